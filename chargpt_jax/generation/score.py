"""Score a given text of any length: surprisal, entropy and predictions of every character."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from chargpt_jax.errors import UserError
from chargpt_jax.generation.generate import bucket
from chargpt_jax.generation.metrics import Predictions, token_metrics, token_predictions
from chargpt_jax.model.init import Params


class Scored(NamedTuple):
    """The metrics of n consecutive characters, and what the model predicted in their place."""

    surprisal: np.ndarray
    """float32 [n], nats; NaN where undefined."""
    entropy: np.ndarray
    """float32 [n], nats; NaN where undefined."""
    predictions: Predictions | None = None
    """[n]; None: not asked for."""


def joined(parts: Sequence[Scored]) -> Scored:
    """Join the metrics of consecutive parts of a text."""
    scored: Scored = jax.tree.map(lambda *found: np.concatenate(found), *parts)
    return scored


@partial(jax.jit, static_argnames=("graphdef", "alternatives"))
def _scored(params: Params, windows: jax.Array, *, graphdef: nnx.GraphDef, alternatives: int) -> Scored:
    logits = nnx.merge(graphdef, params)(windows)
    kept = token_predictions(logits, windows, alternatives) if alternatives else None
    return Scored(*token_metrics(logits, windows), kept)  # type: ignore[arg-type]


def score_tokens(
    params: Params,
    tokens: np.ndarray,
    *,
    graphdef: nnx.GraphDef,
    block_size: int,
    stride: int | None = None,
    batch_size: int = 8,
    alternatives: int = 0,
) -> Scored:
    """Compute the metrics of a text's characters; arguments and errors as for `score_pieces`.

    Args:
        params: of the model.
        tokens: int32 [N], without padding.
        graphdef: the model's static description.
        block_size: of the model.
        stride: distance between the starts of windows.
        batch_size: windows per call of the model.
        alternatives: number of the likeliest tokens to keep for every token; 0: no predictions are kept.
    """
    how: dict[str, Any] = {"graphdef": graphdef, "block_size": block_size, "stride": stride, "batch_size": batch_size}
    parts = list(score_pieces(params, [tokens], alternatives=alternatives, **how))
    return joined(parts)


def score_pieces(
    params: Params,
    pieces: Iterable[np.ndarray],
    *,
    graphdef: nnx.GraphDef,
    block_size: int,
    stride: int | None = None,
    batch_size: int = 8,
    alternatives: int = 0,
) -> Iterator[Scored]:
    """Compute the metrics of a text's characters, in order, in memory that does not depend on the text's length.

    Args:
        params: of the model.
        pieces: int32 [N1], int32 [N2], ... : the text, in pieces of any length, without padding.
        graphdef: the model's static description.
        block_size: of the model.
        stride: distance between the starts of windows. Beyond the first window, every character is predicted from
            block_size - stride to block_size characters of context (1: as in generation). None: half of block_size.
        batch_size: windows per call of the model.
        alternatives: number of the likeliest tokens to keep for every token; 0: no predictions are kept.

    Yields:
        The metrics of the next characters; they are undefined for the first character of the text.

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
        scored = jax.tree.map(np.asarray, _scored(params, windows_of, graphdef=graphdef, alternatives=alternatives))
        for i, start in enumerate(starts):
            first = width - stride if emitted else 0
            end = min(width, len(buffer) - start)
            emitted += end - first
            part: Scored = jax.tree.map(lambda x, i=i, first=first, end=end: x[i, first:end], scored)
            yield part


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
