"""Text with the predictions after each layer of a model below it, as one SVG: a row of curves per layer."""

import math
from collections.abc import Sequence

import numpy as np

from chargpt_jax.pictures.svg import Entry, clip_path, figure, label, legend, number
from chargpt_jax.pictures.text_layout import CELL, Piece, characters, curve, layout, with_neighbours

MARGIN = 16.0
GUTTER = 20.0  # left of the text, for the numbers of the layers
RISE = 13.0  # pixels from the baseline of a row to the value 1
ROW = 16.0  # from one baseline to the next
TEXT = 23.0  # from the top of a line to the top of its first row
GAP = 12.0  # between the last row and the next line
LEGEND = 14.0
TOP = 1.05  # larger values are plotted here
RADIUS = 2.0  # of the dot where a prediction settles


def layers(
    tokens: Sequence[str],
    entropy: np.ndarray,
    surprisal: np.ndarray,
    settled: np.ndarray,
    vocab_size: int,
    chars_per_line: int = 80,
) -> str:
    """Plot a text with one row per layer, as a self-contained SVG; row 0 is the embedding alone.

    Args:
        tokens: [T] strings.
        entropy: float [L + 1, T], nats; plotted as a fraction of log(vocab_size), like the surprisal.
        surprisal: float [L + 1, T], nats.
        settled: int [T]: the row from which on the most likely character stays the same; it gets a dot.
        vocab_size: number of characters in the vocabulary.
        chars_per_line: columns per line.
    """
    rows = len(entropy)
    h, i = (np.minimum(np.asarray(values, float) / math.log(vocab_size), TOP) for values in (entropy, surprisal))
    text = layout(tokens, chars_per_line)
    pitch = TEXT + RISE + (rows - 1) * ROW + GAP
    clip, clipped = clip_path((list(tokens), entropy.tolist(), surprisal.tolist()), 0, -RISE * TOP - 1, text.width, 1)
    body = [clip]
    for n, pieces in enumerate(text.pieces):
        left, y = MARGIN + GUTTER, MARGIN + n * pitch + TEXT + RISE
        body.append(f'<g transform="translate({left:g} {number(y)})">{characters(text, n, -RISE - 9)}</g>')
        known = _known(pieces, entropy[-1])
        around, end = with_neighbours(text, n), max(piece.last for piece in pieces) + CELL / 2
        for k in range(rows):
            at = f"translate({left:g} {number(y + k * ROW)})"
            curves = f'<path class="cg-area cg-s1" d="{curve(h[k], around, RISE, True)}"/>'
            curves += f'<path class="cg-line cg-s2" d="{curve(i[k], around, RISE, False)}"/>'
            dots = _dots([p for p in known if settled[p.token] == k])
            body.append(
                f'<g transform="{at}">{label(-8, -2, str(k), "cg-end cg-small")}'
                f'<g clip-path="{clipped}">{curves}</g><path class="cg-grid" d="M0 0H{number(end)}"/>{dots}</g>'
            )
    entries = [
        Entry("", 0, f"row k: after k of {rows - 1} layers"),
        Entry('<path class="cg-area cg-s1" d="M0 4V-3H16V4Z"/>', 16, "Entropy"),
        Entry('<path class="cg-line cg-s2" d="M0 0H16"/>', 16, "Surprisal"),
        Entry(f'<circle class="cg-settled" cx="3" cy="0" r="{RADIUS:g}"/>', 6, "from here on, the first choice stays"),
    ]
    key, bottom = legend(entries, MARGIN + GUTTER, MARGIN + len(text.lines) * pitch + LEGEND, text.width)
    said = f"Entropy and surprisal after each of {rows - 1} layers, under each character of: " + "".join(tokens)
    size = text.width + 2 * MARGIN + GUTTER
    return figure(
        size, bottom + MARGIN, "".join(body) + key, name="Text with the predictions of each layer", description=said
    )


def _known(pieces: Sequence[Piece], entropy: np.ndarray) -> list[Piece]:
    """Return the pieces whose characters were predicted."""
    return [piece for piece in pieces if math.isfinite(entropy[piece.token])]


def _dots(pieces: Sequence[Piece]) -> str:
    return "".join(
        f'<circle class="cg-settled" cx="{number((p.first + p.last) / 2)}" cy="0" r="{RADIUS:g}"/>' for p in pieces
    )
