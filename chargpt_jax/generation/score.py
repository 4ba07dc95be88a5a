"""Score a given text of any length: surprisal and entropy of every character."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

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
    """Compute the metrics of a text's characters; arguments and errors as for `score_pieces`.

    Args:
        params: of the model.
        tokens: int32 [N], without padding.
        graphdef: the model's static description.
        block_size: of the model.
        stride: distance between the starts of windows.
        batch_size: windows per call of the model.

    Returns:
        Surprisal and entropy, float32 [N] each, nats; NaN for the first character.
    """
    how: dict[str, Any] = {"graphdef": graphdef, "block_size": block_size, "stride": stride, "batch_size": batch_size}
    parts = list(score_pieces(params, [tokens], **how))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def score_pieces(
    params: Params,
    pieces: Iterable[np.ndarray],
    *,
    graphdef: nnx.GraphDef,
    block_size: int,
    stride: int | None = None,
    batch_size: int = 8,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Compute the metrics of a text's characters, in order, in memory that does not depend on the text's length.

    Args:
        params: of the model.
        pieces: int32 [N1], int32 [N2], ... : the text, in pieces of any length, without padding.
        graphdef: the model's static description.
        block_size: of the model.
        stride: distance between the starts of windows. Beyond the first window, every character is predicted from
            block_size - stride to block_size characters of context (1: as in generation). None: half of block_size.
        batch_size: windows per call of the model.

    Yields:
        Surprisal and entropy of the next characters, float32 [n] each, nats; NaN for the first character of the text.

    Raises:
        UserError: if the stride is out of range.
    """
    stride = max(1, block_size // 2) if stride is None else stride
    if not 1 <= stride <= block_size:
        raise UserError(f"stride is {stride}, but it must be between 1 and the block size {block_size}.")
    # A window has one token more than a context: token T is predicted from tokens 0 to T - 1.
    width, emitted = block_size + 1, 0
    batch = (batch_size - 1) * stride + width
    for buffer, last in _buffers(pieces, batch, batch_size * stride):
        if last and not emitted:  # a short text
            width = min(width, bucket(len(buffer)))
            windows = 1 + max(0, -(-(len(buffer) - width) // stride))
            batch_size = min(batch_size, 1 << (windows - 1).bit_length())
        starts = range(0, max(1, len(buffer) - width + stride), stride)[:batch_size]
        padded = np.zeros((batch_size - 1) * stride + width, np.int32)
        padded[: len(buffer)] = buffer
        windows_of = np.stack([padded[i * stride :][:width] for i in range(batch_size)])
        surprisal, entropy = map(np.asarray, _window_metrics(params, windows_of, graphdef=graphdef))
        for i, start in enumerate(starts):
            first = width - stride if emitted else 0
            end = min(width, len(buffer) - start)
            emitted += end - first
            yield surprisal[i, first:end], entropy[i, first:end]


def _buffers(pieces: Iterable[np.ndarray], size: int, step: int) -> Iterator[tuple[np.ndarray, bool]]:
    """Yield consecutive, overlapping parts of a text: `size` tokens, every `step` tokens; True with the last one."""
    buffer, source = np.zeros(0, np.int32), iter(pieces)
    while True:
        while len(buffer) <= size:
            piece = next(source, None)
            if piece is None:
                yield buffer, True
                return
            buffer = np.concatenate([buffer, piece])
        while len(buffer) > size:
            yield buffer[:size], False
            buffer = buffer[step:]
