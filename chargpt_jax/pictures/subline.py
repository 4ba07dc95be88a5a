"""Text with its metrics plotted under it, as one SVG: wrapped monospace lines, each with the curves of its tokens.

Glyphs and curve points get their x from the same cell index, so they line up in any font.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chargpt_jax.pictures.svg import N_COLOURS, Entry, clip_path, escaped, figure, legend, number
from chargpt_jax.pictures.text_layout import Piece, characters, curve, layout, marks, with_neighbours

MARGIN = 16.0
TITLE = 26.0  # height of a title
RISE = 18.0  # pixels from a baseline to the value 1
FALL = 9.0  # pixels for values below 0
TEXT = 17.0  # from the top of a line to the top of its curves
GAP = 12.0  # between a line's curves and the next line
PITCH = TEXT + RISE + FALL + GAP
LEGEND = 14.0  # from the last line to the legend


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
    text = layout(tokens, chars_per_line)
    width = text.width
    numbers = [(s.label, s.dashed, s.filled, np.asarray(s.values).tolist()) for s in series]
    content = (list(tokens), numbers, chars_per_line, n_prompt, title)
    clip, clipped = clip_path(content, 0, -RISE - 1, width, FALL)
    top = MARGIN + (TITLE if title else 0.0)
    body = [f'<text class="cg-title" x="{MARGIN:g}" y="{MARGIN + 11:g}">{escaped(title)}</text>'] if title else []
    body.append(clip)
    for i, pieces in enumerate(text.pieces):
        at = f"translate({MARGIN:g} {number(top + i * PITCH + TEXT + RISE)})"
        curves = "".join(_curve(s, n, with_neighbours(text, i)) for n, s in enumerate(series))
        line = characters(text, i, -RISE - 5, n_prompt)
        body.append(f'<g transform="{at}">{line}<g clip-path="{clipped}">{curves}</g>{marks(pieces)}</g>')
    key, bottom = legend(_entries(series, n_prompt), MARGIN, top + len(text.lines) * PITCH + LEGEND, width)
    return figure(
        width + 2 * MARGIN,
        bottom + MARGIN,
        "".join(body) + key,
        name=title or "Text with its metrics",
        description=", ".join(s.label for s in series) + " under each character of: " + "".join(tokens),
    )


def _curve(series: Series, index: int, pieces: Sequence[Piece]) -> str:
    path = curve(series.values, pieces, RISE, series.filled)
    return f'<path class="{_kind(series, index)}" d="{path}"/>' if path else ""


def _kind(series: Series, index: int) -> str:
    shape = "cg-area" if series.filled else "cg-line cg-dashed" if series.dashed else "cg-line"
    return f"{shape} cg-s{index % N_COLOURS + 1}"


def _entries(series: Sequence[Series], n_prompt: int) -> list[Entry]:
    shapes = ["M0 4V-3H16V4Z" if s.filled else "M0 0H16" for s in series]
    curves = [
        Entry(f'<path class="{_kind(s, i)}" d="{shape}"/>', 16, s.label)
        for i, (s, shape) in enumerate(zip(series, shapes, strict=True))
    ]
    return curves + ([Entry("", 0, "Prompt", "cg-prompt")] if n_prompt > 0 else [])
