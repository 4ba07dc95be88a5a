"""Text with its metrics plotted under it, as one SVG: wrapped monospace lines, each with the curves of its tokens.

Glyphs and curve points get their x from the same cell index, so they line up in any font.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from chargpt_jax.pictures import bidi
from chargpt_jax.pictures.svg import N_COLOURS, Entry, clip_path, columns, escaped, figure, glyph, joins, legend, number

CELL = 8.4
"""Width of one column, in pixels: 0.6 of the font size, as in most monospace fonts."""

MARGIN = 16.0
TITLE = 26.0  # height of a title
RISE = 18.0  # pixels from a baseline to the value 1
FALL = 9.0  # pixels for values below 0
TEXT = 17.0  # from the top of a line to the top of its curves
GAP = 12.0  # between a line's curves and the next line
PITCH = TEXT + RISE + FALL + GAP
LEGEND = 14.0  # from the last line to the legend
MAX_MARKS = 8  # combining marks per cell; hundreds would cover the lines above and below
MIN_COLUMNS = 44  # a narrower picture has no room for its legend


@dataclass(frozen=True)
class Series:
    """One curve under the text.

    Attributes:
        label: its name in the legend.
        values: float [N], one per token: 0 at the baseline, 1 at full height, clipped beyond; NaN breaks the curve.
        dashed: plot a dashed line.
        filled: fill the area down to the baseline instead of a line.
    """

    label: str
    values: np.ndarray
    dashed: bool = False
    filled: bool = False


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


def metric_series(
    surprisal: np.ndarray, entropy: np.ndarray, surprise_surprise: np.ndarray, vocab_size: int
) -> list[Series]:
    """Return the metrics of a text as curves: entropy as an area, surprisal and S₂ as lines.

    Args:
        surprisal: float [N], nats; plotted as a fraction of log(vocab_size).
        entropy: float [N], nats; plotted in the same way.
        surprise_surprise: float [N], S₂ = (surprisal - entropy) / log(vocab_size).
        vocab_size: number of characters in the vocabulary.
    """
    if vocab_size < 2:
        raise ValueError(f"vocab_size is {vocab_size}, but it must be at least 2.")
    top = math.log(vocab_size)
    return [
        Series("Entropy", np.asarray(entropy, float) / top, filled=True),
        Series("Surprisal", np.asarray(surprisal, float) / top),
        Series("S₂ (surprise-surprise)", np.asarray(surprise_surprise, float)),
    ]


def subline(
    tokens: Sequence[str],
    series: Sequence[Series],
    *,
    chars_per_line: int = 80,
    n_prompt: int = 0,
    title: str = "",
) -> str:
    """Return text with curves under each line, as a self-contained SVG.

    A newline is shown as ↵ and a tab as →. Wide characters take two columns. Combining marks and other characters
    without width share the cell before them. If there is none, or it has `MAX_MARKS`, they get a dotted circle. Tokens
    without a cell, such as padding (''), take no space, and their values are not plotted.

    Args:
        tokens: [N] strings, of one character or more.
        series: curves of N values each.
        chars_per_line: columns per line.
        n_prompt: number of tokens of the prompt, at the start; they are bold.
        title: a line above the text; also the accessible name.

    Raises:
        ValueError: if a series does not have one value per token, or chars_per_line is below 1.
    """
    for s in series:
        if np.shape(s.values) != (len(tokens),):
            raise ValueError(f"Series {s.label!r} has shape {np.shape(s.values)}, but there are {len(tokens)} tokens.")
    if chars_per_line < 1:
        raise ValueError(f"chars_per_line is {chars_per_line}, but it must be at least 1.")
    lines = [list(line) for _, line in groupby(_cells(tokens, chars_per_line), key=lambda cell: cell.line)]
    base = bidi.base_level("".join(tokens))
    lines = _in_visual_columns(lines, base)
    width = CELL * max([MIN_COLUMNS, *(cell.column + cell.width for line in lines for cell in line)])
    numbers = [(s.label, s.dashed, s.filled, np.asarray(s.values).tolist()) for s in series]
    content = (list(tokens), numbers, chars_per_line, n_prompt, title)
    clip, clipped = clip_path(content, 0, -RISE - 1, width, FALL)
    top = MARGIN + (TITLE if title else 0.0)
    body = [f'<text class="cg-title" x="{MARGIN:g}" y="{MARGIN + 11:g}">{escaped(title)}</text>'] if title else []
    body.append(clip)
    pieces = [_pieces(line) for line in lines]
    for i, line in enumerate(lines):
        at = f"translate({MARGIN:g} {number(top + i * PITCH + TEXT + RISE)})"
        curves = "".join(_curve(s, n, _with_neighbours(pieces, i, base)) for n, s in enumerate(series))
        body.append(f'<g transform="{at}">{_text(line, n_prompt, base)}<g clip-path="{clipped}">{curves}</g>')
        body.append(f"{_marks(pieces[i])}</g>")
    key, bottom = legend(_entries(series, n_prompt), MARGIN, top + len(lines) * PITCH + LEGEND, width)
    return figure(
        width + 2 * MARGIN,
        bottom + MARGIN,
        "".join(body) + key,
        name=title or "Text with its metrics",
        description=", ".join(s.label for s in series) + " under each character of: " + "".join(tokens),
    )


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


def _pieces(line: Sequence[Cell]) -> list[Piece]:
    runs = [list(run) for _, run in groupby(line, key=lambda cell: cell.token)]
    return [Piece(run[0].token, min(map(_centre, run)), max(map(_centre, run))) for run in runs]


def _with_neighbours(pieces: Sequence[Sequence[Piece]], i: int, base: int) -> list[Piece]:
    """Return the pieces of line i from left to right, with the neighbouring tokens one cell beyond either end.

    With them, curves continue to the ends of a line. Where a line runs from right to left, the next token is at its
    left.
    """
    found = sorted(pieces[i], key=lambda piece: piece.first)
    left, right = found[0].first - CELL, found[-1].last + CELL
    before, after = (right, left) if base else (left, right)
    if i > 0:
        found.append(Piece(pieces[i - 1][-1].token, before, before))
    if i + 1 < len(pieces):
        found.append(Piece(pieces[i + 1][0].token, after, after))
    return sorted(found, key=lambda piece: piece.first)


def _text(line: Sequence[Cell], n_prompt: int, base: int) -> str:
    """Return the characters of a line in their logical order: the browser joins Arabic letters and mirrors brackets.

    Runs share a tspan; x counts code units, so longer characters have their own.
    """

    def style(cell: Cell) -> tuple[str, int]:
        kind = "cg-stand-in" if cell.stand_in else "cg-prompt" if cell.token < n_prompt else ""
        return kind, cell.column if len(cell.text.encode("utf-16-le")) > 2 else -1

    spans = []
    for (kind, _), run in groupby(line, key=style):
        cells = list(run)
        xs = " ".join(number(_centre(cell)) for cell in cells)
        classed = f' class="{kind}"' if kind else ""
        spans.append(f'<tspan{classed} x="{xs}">{escaped("".join(cell.text for cell in cells))}</tspan>')
    direction = ' direction="rtl"' if base else ""
    return f'<text class="cg-text"{direction} xml:space="preserve" y="{-RISE - 5:g}">{"".join(spans)}</text>'


def _marks(pieces: Sequence[Piece]) -> str:
    """Return the baseline: a dot per token, or a dash from its first to its last character."""
    path = "".join(f"M{number(p.first)} 0h{number(p.last - p.first)}" for p in pieces)
    return f'<path class="cg-mark" d="{path}"/>'


def _curve(series: Series, index: int, pieces: Sequence[Piece]) -> str:
    knots: list[tuple[float, float]] = []
    for p in pieces:
        y = -RISE * float(np.clip(series.values[p.token], -2.0, 2.0))
        knots += [(p.first, y)] if p.first == p.last else [(p.first, y), (p.last, y)]
    runs = [list(run) for broken, run in groupby(knots, key=lambda knot: math.isnan(knot[1])) if not broken]
    path = "".join(_smooth(np.array(run), series.filled) for run in runs)
    return f'<path class="{_kind(series, index)}" d="{path}"/>' if path else ""


def _kind(series: Series, index: int) -> str:
    shape = "cg-area" if series.filled else "cg-line cg-dashed" if series.dashed else "cg-line"
    return f"{shape} cg-s{index % N_COLOURS + 1}"


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


def _entries(series: Sequence[Series], n_prompt: int) -> list[Entry]:
    shapes = ["M0 4V-3H16V4Z" if s.filled else "M0 0H16" for s in series]
    curves = [
        Entry(f'<path class="{_kind(s, i)}" d="{shape}"/>', 16, s.label)
        for i, (s, shape) in enumerate(zip(series, shapes, strict=True))
    ]
    return curves + ([Entry("", 0, "Prompt", "cg-prompt")] if n_prompt > 0 else [])
