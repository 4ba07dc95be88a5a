"""Attention weights as maps, as SVG: which earlier characters each character of a text reads.

A row of a map is a character that reads, a column is a character that is read. Darker squares are larger weights.
"""

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from chargpt_jax.pictures.svg import Entry, escaped, figure, glyph, joins, label, legend, number

MAX_CHARACTERS = 120
"""Length of the longest text that is plotted."""

WIDTH = 720.0
MARGIN = 16.0
GUTTER = 46.0  # left of the maps, for the names of the layers
HEAD = 18.0  # above the maps, for the names of the heads
GAP = 8.0  # between two maps
MAX_COLUMNS = 12  # maps side by side; more heads continue on the next row
MIN_MAP, MIN_NAMED = 26.0, 44.0  # pixels of a small map at least, and of one that has room for "head 12" above it
MAX_CELL, MAX_LARGE_CELL = 5.0, 14.0  # pixels of a square, in a small and in the large map
LEGEND = 22.0

LEVELS = ((0.05, 0.15), (0.1, 0.3), (0.2, 0.5), (0.4, 0.75), (0.7, 1.0))
"""The lowest weight of each level, and the opacity of its squares; smaller weights are not plotted."""


def attention_maps(tokens: Sequence[str], attention: np.ndarray) -> str:
    """Plot the weights of all heads, a row of maps per layer, as a self-contained SVG.

    Args:
        tokens: [T] strings, at most `MAX_CHARACTERS`.
        attention: float [L, H, T, T].
    """
    L, H, T, _ = attention.shape
    columns = min(H, MAX_COLUMNS)
    rows = -(-H // columns)  # of one layer
    room = (WIDTH - GUTTER - 2 * MARGIN - (columns - 1) * GAP) / columns
    size = min(room, max(MAX_CELL * T, MIN_MAP))
    cell, step = size / T, size + GAP
    left, top = MARGIN + GUTTER, MARGIN + HEAD
    named = "head {}" if size > MIN_NAMED else "{}"
    body = [label(left + j * step + size / 2, MARGIN + 8, named.format(j + 1), "cg-middle") for j in range(columns)]
    for i in range(L):
        y = top + i * rows * step
        body.append(label(left - 8, y + size / 2 + 4, f"layer {i + 1}", "cg-end"))
        for j in range(H):
            x, own = left + j % columns * step, y + j // columns * step
            body.append(_map(attention[i, j], x, own, cell, f"layer {i + 1}, head {j + 1}"))
    width = max(left + columns * step - GAP + MARGIN, WIDTH / 2)
    key, bottom = legend(_entries(), MARGIN, top + L * rows * step + LEGEND - GAP, width - 2 * MARGIN)
    said = f"Attention weights of {L} layers with {H} heads each, for the text: " + "".join(tokens)
    return figure(width, bottom + MARGIN, "".join(body) + key, name="Attention maps", description=said)


def attention_map(tokens: Sequence[str], weights: np.ndarray, name: str) -> str:
    """Plot the weights of one head, with the text along both sides, as a self-contained SVG.

    Args:
        tokens: [T] strings, at most `MAX_CHARACTERS`.
        weights: float [T, T].
        name: of the picture.
    """
    T = len(tokens)
    cell = min(MAX_LARGE_CELL, (WIDTH - 3 * MARGIN) / T)
    left = top = 2 * MARGIN
    shown = [escaped(_visible(token)) for token in tokens]
    size = f'style="font-size:{number(min(11.0, cell))}px"'
    at = [number((i + 0.5) * cell) for i in range(T)]
    body = [
        f'<g class="cg-middle" transform="translate({left:g} {top - 5:g})">',
        *(f'<text class="cg-text" {size} x="{x}">{text}</text>' for x, text in zip(at, shown, strict=True)),
        f'</g><g class="cg-middle" transform="translate({left - 9:g} {number(top + 0.3 * cell)})">',
        *(f'<text class="cg-text" {size} y="{y}">{text}</text>' for y, text in zip(at, shown, strict=True)),
        f"</g>{_map(weights, left, top, cell, name)}",
    ]
    width = max(left + T * cell + MARGIN, WIDTH / 2)
    key, bottom = legend(_entries(), MARGIN, top + T * cell + LEGEND, width - 2 * MARGIN)
    said = f"{name}: which earlier characters (columns) each character (rows) reads, for the text: " + "".join(tokens)
    return figure(width, bottom + MARGIN, "".join(body) + key, name=name, description=said)


def _map(weights: np.ndarray, left: float, top: float, cell: float, name: str) -> str:
    """Return a map [T, T] with its left upper corner at a position; equal neighbours in a row are one line."""
    levels = np.searchsorted([lowest for lowest, _ in LEVELS], weights, side="right")
    paths = [""] * (len(LEVELS) + 1)
    for y, row in enumerate(levels):
        x = 0
        for level, run in groupby(row):
            length = len(list(run))
            paths[level] += f"M{x} {y}h{length}" if level else ""
            x += length
    lines = "".join(
        f'<path class="cg-weight" stroke-opacity="{opacity:g}" d="{path}"/>'
        for path, (_, opacity) in zip(paths[1:], LEVELS, strict=True)
        if path
    )
    T, at = len(weights), f"translate({number(left)} {number(top)})"
    scaled = f"scale({cell:.4g}) translate(0 .5)"
    edge = f'<path class="cg-frame" d="M0 0H{number(T * cell)}V{number(T * cell)}Z"/>'
    return f'<g transform="{at}"><title>{escaped(name)}</title><g transform="{scaled}">{lines}</g>{edge}</g>'


def _visible(token: str) -> str:
    """Return a character that can be seen on its own: ␣ for a space, a dotted circle below a combining mark."""
    shown = "".join(map(glyph, token))
    return "␣" if shown == " " else f"◌{shown}" if shown and joins(shown[0]) else shown


def _entries() -> list[Entry]:
    square = '<path class="cg-weight" stroke-opacity="{:g}" style="stroke-width:10" d="M0 0h10"/>'
    note = Entry("", 0, "row: the character that reads; column: the one that it reads")
    return [note, *(Entry(square.format(opacity), 10, f"≥ {100 * lowest:g} %") for lowest, opacity in LEVELS)]
