"""Weights that give unused token ids a constant, very negative logit in models without a mask.

The final LayerNorm returns h = scale * n + bias, in which the C elements of n always sum to 0. A row w of the head
with w * scale = c in every element therefore has the logit c * sum(n) + w @ bias = w @ bias, which is a constant.
"""

import numpy as np

from chargpt_jax.data.tokenizer import PADDING

UNTIED_LOGIT = -1e4
"""The logit of unused ids in a separate head: the probability is 0 in float32, and float16 can hold it."""

TIED_LOGIT = -100.0
"""The same in a tied table, whose rows are also embeddings: closer to 0, so that they have fewer digits to lose."""


def with_unused_rows(table: np.ndarray, used_ids: int, row: np.ndarray) -> np.ndarray:
    """Return a table [V, C] in which a row [C] replaces those of padding and of the ids from used_ids on."""
    found = table.copy()
    found[PADDING] = found[used_ids:] = row
    return found


def untied(
    scale: np.ndarray, bias: np.ndarray, table: np.ndarray, used_ids: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return another final LayerNorm and a separate head, which give the same logits, and unused ids UNTIED_LOGIT.

    The scale and the bias move into the head. With a LayerNorm n + 1, a row of mean c has the logit
    (row - c) @ n + C * c: its mean is a bias. This is possible for any scale and bias.

    Args:
        scale: of the final LayerNorm, float32 [C].
        bias: of the final LayerNorm, float32 [C].
        table: the embedding table, float32 [V, C], which is also the head.
        used_ids: token ids in use, padding included.

    Returns:
        The new scale and bias, float32 [C] each, and the head, float32 [V, C].
    """
    rows, width = table.astype(np.float64), len(scale)
    scaled = rows * scale.astype(np.float64)
    head = scaled - scaled.mean(axis=1, keepdims=True) + (rows @ bias.astype(np.float64))[:, None] / width
    head = with_unused_rows(head, used_ids, np.full(width, UNTIED_LOGIT / width))
    return np.ones_like(scale), np.ones_like(bias), head.astype(np.float32)


def tied_row(scale: np.ndarray, bias: np.ndarray) -> np.ndarray | None:
    """Return a row of a tied table that has the logit TIED_LOGIT, float32 [C].

    Returns None if there is none that float32 can hold: if an element of the scale is 0, or sum(bias / scale) is
    almost 0. A model before its first training step has the bias 0.
    """
    exact = scale.astype(np.float64)
    if not exact.all():
        return None
    ratios = bias / exact
    total = ratios.sum()
    # Rounding errors of the logit, in units of TIED_LOGIT: those of c * n, whose length is sqrt(C), and of w @ bias.
    error = np.finfo(np.float32).eps * (len(scale) + np.abs(ratios).sum())
    if not abs(total) > 100 * error:
        return None
    row = (TIED_LOGIT / total / exact).astype(np.float32)
    return row if np.isfinite(row).all() else None
