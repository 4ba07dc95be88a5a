"""Score a given text of any length: surprisal and entropy of every character."""

from functools import partial

import jax
import numpy as np
from flax import nnx

from chargpt_jax.errors import UserError
from chargpt_jax.generation.generate import bucket
from chargpt_jax.generation.metrics import token_metrics
from chargpt_jax.model.init import Params


@partial(jax.jit, static_argnames=("graphdef",))
def _window_metrics(params: Params, windows: jax.Array, *, graphdef: nnx.GraphDef) -> tuple[jax.Array, jax.Array]:
    return token_metrics(nnx.merge(graphdef, params)(windows), windows)


def score_tokens(
    params: Params,
    tokens: np.ndarray,
    *,
    graphdef: nnx.GraphDef,
    block_size: int,
    stride: int | None = None,
    batch_size: int = 8,
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the metrics of a text's characters.

    Args:
        params: of the model.
        tokens: int32 [N], without padding.
        graphdef: the model's static description.
        block_size: of the model.
        stride: distance between the starts of windows. Beyond the first window, every character is predicted from
            block_size - stride to block_size characters of context (1: as in generation). None: half of block_size.
        batch_size: windows per call of the model.

    Returns:
        Surprisal and entropy, float32 [N] each, nats; NaN for the first character.

    Raises:
        UserError: if the stride is out of range.
    """
    stride = max(1, block_size // 2) if stride is None else stride
    if not 1 <= stride <= block_size:
        raise UserError(f"stride is {stride}, but it must be between 1 and the block size {block_size}.")
    # A window has one token more than a context: token T is predicted from tokens 0 to T - 1.
    width = min(block_size + 1, bucket(len(tokens)))
    starts = [0, *range(stride, len(tokens) - width + stride, stride)] if len(tokens) > width else [0]
    padded = np.zeros(starts[-1] + width, np.int32)
    padded[: len(tokens)] = tokens
    results = np.full((2, len(padded)), np.nan, np.float32)
    batch_size = min(batch_size, 1 << (len(starts) - 1).bit_length())
    for at in range(0, len(starts), batch_size):
        group = starts[at : at + batch_size]
        windows = np.stack([padded[s : s + width] for s in group] + [padded[:width]] * (batch_size - len(group)))
        surprisal, entropy = map(np.asarray, _window_metrics(params, windows, graphdef=graphdef))
        for i, start in enumerate(group):
            first = 0 if start == 0 else width - stride
            results[:, start + first : start + width] = surprisal[i, first:], entropy[i, first:]
    return results[0, : len(tokens)], results[1, : len(tokens)]
