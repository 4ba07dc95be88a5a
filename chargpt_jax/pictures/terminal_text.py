"""Text with its metrics for a terminal: coloured characters, and rows of block characters under each line.

The colour of a character is its surprisal, in steps of a fifth of log(vocab_size), the surprisal of a guess without
any knowledge. The rows under a line have the same scale in eighths: surprisal, and below it, in grey, entropy.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np

from chargpt_jax.pictures.svg import columns, glyph, joins

BLOCKS = "▁▂▃▄▅▆▇█"
"""The heights of a row of metrics."""

COLOURS = {
    0: ("", "", "", "", ""),
    16: ("", "36", "35", "31", "91"),  # not 1;31, which is a character of a prompt
    256: ("", "38;5;67", "38;5;98", "38;5;162", "38;5;196"),
}
"""The colours of the steps of surprisal for terminals with so many colours, as parameters of the sequence SGR.

The first step has the terminal's own colour. On white and on black pages, the others have a contrast of 3.8 to 5.6.
"""

GREY = {0: "", 16: "2", 256: "38;5;102"}
"""The colour of the entropy, and of the surprisal of the first step."""

BOLD = "1"
"""The prompt, as in the SVG pictures."""


class Cell(NamedTuple):
    """One character with its combining characters."""

    text: str
    position: int
    """Index of the character in the text."""
    width: int
    """Columns."""


@dataclass(frozen=True)
class Look:
    """How texts of one model are drawn on one terminal."""

    vocab_size: int
    colours: int = 0
    """0, 16 or 256."""
    width: int = 80
    """Columns of the terminal."""

    @property
    def top(self) -> float:
        """The surprisal at full height, nats."""
        return math.log(self.vocab_size)

    def colour(self, surprisal: float) -> str:
        """Return the colour of a surprisal, nats; '' for NaN."""
        if math.isnan(surprisal):
            return ""
        steps = COLOURS[self.colours]
        return steps[min(len(steps) - 1, int(len(steps) * surprisal / self.top))]

    def block(self, value: float) -> str:
        """Return the block of a metric, nats; a space for NaN."""
        if math.isnan(value):
            return " "
        return BLOCKS[max(0, min(len(BLOCKS) - 1, int(len(BLOCKS) * value / self.top)))]


def coloured(characters: Sequence[str], surprisal: np.ndarray, look: Look, n_prompt: int = 0) -> str:
    """Return text in which the colour of each character is its surprisal.

    Line breaks and tabs stay, other control characters become symbols.

    Args:
        characters: [N].
        surprisal: float [N], nats; NaN where undefined.
        look: how to draw.
        n_prompt: number of characters of the prompt, at the start, which are bold.
    """
    shown = (char if char in "\n\t" else glyph(char) for char in characters)
    return _painted((char, _style(look, surprisal, i, n_prompt)) for i, char in enumerate(shown))


def lines(characters: Sequence[str], width: int) -> list[list[Cell]]:
    """Wrap a text at a number of columns, and at its line breaks, which are shown as ↵.

    Wide characters take two columns. Combining marks and other characters without width share the cell before them; at
    the start of a line break's line they get a dotted circle.
    """
    found: list[list[Cell]] = []
    column, broken = 0, True
    for index, char in enumerate(characters):
        shown = glyph(char)
        if joins(shown):
            if not broken:
                last = found[-1][-1]
                found[-1][-1] = last._replace(text=last.text + shown, width=columns(last.text + shown))
                continue
            shown = "◌" + shown
        size = columns(shown)
        if broken or column + size > width:
            found.append([])
            column = 0
        found[-1].append(Cell(shown, index, size))
        column, broken = column + size, char == "\n"
    return found


def sublined(
    line: Sequence[Cell],
    surprisal: np.ndarray,
    entropy: np.ndarray,
    look: Look,
    n_prompt: int = 0,
    heights: Sequence[np.ndarray] = (),
) -> str:
    """Return one line of `lines` with rows of its surprisal, its entropy and other series below it, and line breaks.

    Args:
        line: cells.
        surprisal: float [N], nats, of the whole text; NaN where undefined.
        entropy: float [N], nats.
        look: how to draw.
        n_prompt: number of characters of the prompt, at the start, which are bold.
        heights: float [N] each, the other series, from 0 to 1 at full height; NaN where undefined.
    """
    text = _painted((cell.text, _style(look, surprisal, cell.position, n_prompt)) for cell in line)
    grey = GREY[look.colours]
    values = [(cell.width, surprisal[cell.position], entropy[cell.position]) for cell in line]
    upper = _painted((look.block(value) * width, look.colour(value) or grey) for width, value, _ in values)
    lower = _painted((look.block(value) * width, grey) for width, _, value in values)
    others = [_painted((look.block(x[cell.position] * look.top) * cell.width, grey) for cell in line) for x in heights]
    return "".join(f"{row}\n" for row in (text, upper, lower, *others))


def legend(look: Look, rows: bool, prompt: bool = False, others: Sequence[tuple[str, float]] = ()) -> str:
    """Return what the colours mean, and what a prompt and the rows look like if there are any, as lines.

    `others` are the labels of other series, and their values at full height.
    """
    found = []
    if look.colours:
        steps = len(COLOURS[look.colours])
        bounds = [f"{look.top * i / steps:.1f}" if i else "0" for i in range(steps)]
        labels = [f"{low} to {high}" for low, high in pairwise(bounds)]
        labels.append(f"over {bounds[-1]}")
        named = (_painted([(label, look.colour(look.top * (i + 0.5) / steps))]) for i, label in enumerate(labels))
        bold = f"; {_painted([('bold', BOLD)])}: prompt" if prompt else ""
        found.append(f"colour: surprisal in nats, {', '.join(named)}{bold}")
    if rows:
        found.append(f"rows: surprisal, entropy, from {BLOCKS[0]} 0 to {BLOCKS[-1]} {look.top:.1f} nats")
        found += [f"further row: {label}, from {BLOCKS[0]} 0 to {BLOCKS[-1]} {top:.3g}" for label, top in others]
    return "\n".join(found)


def _style(look: Look, surprisal: np.ndarray, index: int, n_prompt: int) -> str:
    return ";".join(filter(None, (BOLD if look.colours and index < n_prompt else "", look.colour(surprisal[index]))))


def _painted(parts: Iterable[tuple[str, str]]) -> str:
    """Return (text, colour) pairs as one string with SGR sequences."""
    runs = ((style, "".join(text for text, _ in run)) for style, run in groupby(parts, key=lambda part: part[1]))
    return "".join(f"\x1b[{style}m{text}\x1b[0m" if style else text for style, text in runs)
