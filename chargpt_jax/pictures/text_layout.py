"""Text on a grid of monospace columns: which line and column a character takes, and what is drawn at its place.

Wide characters take two columns. Combining marks share the cell of their base character. A line may run from right to
left.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from chargpt_jax.pictures import bidi
from chargpt_jax.pictures.svg import columns, escaped, glyph, joins, number

CELL = 8.4
"""Width of one column, in pixels: 0.6 of the font size, as in most monospace fonts."""

MAX_MARKS = 8  # combining marks per cell; hundreds would cover the lines above and below
MIN_COLUMNS = 44  # a narrower picture has no room for its legend


class Cell(NamedTuple):
    """One character with its combining characters, and its position in the grid."""

    text: str
    token: int
    stand_in: bool  # whether a symbol replaces the character
    line: int
    column: int
    width: int


class Piece(NamedTuple):
    """The part of a token on one line: the centres of its first and last cell, in pixels from the line's start."""

    token: int
    first: float
    last: float


@dataclass(frozen=True)
class Layout:
    """A text, laid out in lines of at least one cell each."""

    lines: tuple[tuple[Cell, ...], ...]
    pieces: tuple[tuple[Piece, ...], ...]
    """Of each line: the parts of its tokens, in the order of the text."""
    base: int
    """The writing direction: 0 from left to right, 1 from right to left."""

    @property
    def width(self) -> float:
        """Of the longest line, in pixels, and at least that of a legend."""
        return CELL * max([MIN_COLUMNS, *(cell.column + cell.width for line in self.lines for cell in line)])


def layout(tokens: Sequence[str], chars_per_line: int) -> Layout:
    """Lay out a text, given as tokens of one character or more, in lines of at most so many columns.

    Raises:
        ValueError: if chars_per_line is below 1.
    """
    if chars_per_line < 1:
        raise ValueError(f"chars_per_line is {chars_per_line}, but it must be at least 1.")
    lines = [list(line) for _, line in groupby(_cells(tokens, chars_per_line), key=lambda cell: cell.line)]
    base = bidi.base_level("".join(tokens))
    lines = _in_visual_columns(lines, base)
    return Layout(tuple(map(tuple, lines)), tuple(map(_pieces, lines)), base)


def _cells(tokens: Sequence[str], chars_per_line: int) -> list[Cell]:
    """Place tokens on a grid: join marks to their base characters, then wrap lines."""
    clusters: list[tuple[str, int, bool]] = []
    for token, text in enumerate(tokens):
        for char in text:
            shown = glyph(char)
            if not joins(shown):
                clusters.append((shown, token, shown != char))
            elif clusters and len(clusters[-1][0]) <= MAX_MARKS:
                clusters[-1] = (clusters[-1][0] + shown, *clusters[-1][1:])
            else:
                clusters.append(("◌" + shown, token, False))  # no base character, or too many marks on it
    cells: list[Cell] = []
    line = column = 0
    for text, token, stand_in in clusters:
        width = columns(text)
        if column and column + width > chars_per_line:
            line, column = line + 1, 0
        cells.append(Cell(text, token, stand_in, line, column, width))
        column += width
    return cells


def _in_visual_columns(lines: list[list[Cell]], base: int) -> list[list[Cell]]:
    """Move the cells of each line to their visual columns; lines that run from right to left end at the right edge."""
    characters = [cell.text for line in lines for cell in line]
    found = bidi.levels(characters, base)
    if not any(found):
        return lines
    edge = max([MIN_COLUMNS, *(sum(cell.width for cell in line) for line in lines)])
    moved, start = [], 0
    for line in lines:
        own, start = found[start : start + len(line)], start + len(line)
        column = edge - sum(cell.width for cell in line) if base else 0
        places = [0] * len(line)
        for i in bidi.visual_order(own, [cell.text.isspace() for cell in line], base):
            places[i], column = column, column + line[i].width
        moved.append([cell._replace(column=place) for cell, place in zip(line, places, strict=True)])
    return moved


def _centre(cell: Cell) -> float:
    return (cell.column + cell.width / 2) * CELL


def _pieces(line: Sequence[Cell]) -> tuple[Piece, ...]:
    runs = [list(run) for _, run in groupby(line, key=lambda cell: cell.token)]
    return tuple(Piece(run[0].token, min(map(_centre, run)), max(map(_centre, run))) for run in runs)


def with_neighbours(text: Layout, i: int) -> list[Piece]:
    """Return the pieces of line i from left to right, with the neighbouring tokens one cell beyond either end.

    With them, curves continue to the ends of a line. Where a line runs from right to left, the next token is at its
    left.
    """
    pieces = text.pieces
    found = sorted(pieces[i], key=lambda piece: piece.first)
    left, right = found[0].first - CELL, found[-1].last + CELL
    before, after = (right, left) if text.base else (left, right)
    if i > 0:
        found.append(Piece(pieces[i - 1][-1].token, before, before))
    if i + 1 < len(pieces):
        found.append(Piece(pieces[i + 1][0].token, after, after))
    return sorted(found, key=lambda piece: piece.first)


def characters(text: Layout, i: int, y: float, n_prompt: int = 0) -> str:
    """Return the characters of line i, with their baseline at y; the first `n_prompt` tokens of the text are bold.

    They are in logical order: the browser joins Arabic letters and mirrors brackets. Runs share a tspan; x counts code
    units, so longer characters have their own.
    """

    def style(cell: Cell) -> tuple[str, int]:
        kind = "cg-stand-in" if cell.stand_in else "cg-prompt" if cell.token < n_prompt else ""
        return kind, cell.column if len(cell.text.encode("utf-16-le")) > 2 else -1

    spans = []
    for (kind, _), run in groupby(text.lines[i], key=style):
        cells = list(run)
        xs = " ".join(number(_centre(cell)) for cell in cells)
        classed = f' class="{kind}"' if kind else ""
        spans.append(f'<tspan{classed} x="{xs}">{escaped("".join(cell.text for cell in cells))}</tspan>')
    direction = ' direction="rtl"' if text.base else ""
    return f'<text class="cg-text"{direction} xml:space="preserve" y="{y:g}">{"".join(spans)}</text>'


def marks(pieces: Sequence[Piece]) -> str:
    """Return the baseline: a dot per token, or a dash from its first to its last character."""
    path = "".join(f"M{number(p.first)} 0h{number(p.last - p.first)}" for p in pieces)
    return f'<path class="cg-mark" d="{path}"/>'


def curve(values: np.ndarray, pieces: Sequence[Piece], rise: float, filled: bool) -> str:
    """Return the path of one curve over the pieces of a line, from left to right; '' if no value is defined.

    Args:
        values: float [N], one per token of the text: 0 at the baseline, clipped to -2 .. 2; NaN breaks the curve.
        pieces: of a line, from left to right.
        rise: pixels from the baseline to the value 1.
        filled: close the path at the baseline.
    """
    knots: list[tuple[float, float]] = []
    for p in pieces:
        y = -rise * float(np.clip(values[p.token], -2.0, 2.0))
        knots += [(p.first, y)] if p.first == p.last else [(p.first, y), (p.last, y)]
    runs = [list(run) for broken, run in groupby(knots, key=lambda knot: math.isnan(knot[1])) if not broken]
    return "".join(_smooth(np.array(run), filled) for run in runs)


def _smooth(knots: np.ndarray, filled: bool) -> str:
    """Return a path through knots [N, 2] as monotone cubics, without overshoot; `filled` closes it at the baseline.

    The slopes are those of Fritsch and Butland (1984): the harmonic mean of the neighbouring slopes, 0 at an extremum.
    """
    x, y = knots.T
    path = f"{number(x[0])} {number(y[0])}"
    if len(x) > 1:
        step = np.diff(x)
        slope = np.diff(y) / step
        before, after = slope[:-1], slope[1:]
        turn = before * after <= 0
        mean = 2 * before * after / np.where(turn, 1.0, before + after)
        tangent = np.concatenate([slope[:1], np.where(turn, 0.0, mean), slope[-1:]])
        ahead, behind = y[:-1] + tangent[:-1] * step / 3, y[1:] - tangent[1:] * step / 3
        points = np.stack([x[:-1] + step / 3, ahead, x[1:] - step / 3, behind, x[1:], y[1:]], axis=1)
        path += "".join("C" + " ".join(map(number, point)) for point in points)
    elif not filled:
        path += "h0"  # round caps make it a dot
    return f"M{number(x[0])} 0L{path}L{number(x[-1])} 0Z" if filled else f"M{path}"
