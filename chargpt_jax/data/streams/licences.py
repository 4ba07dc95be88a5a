"""Remove Project Gutenberg's own text from a text of any length: only what surrounds its markers is in memory.

The result is the same as that of `gutenberg.cut` for the whole text.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from chargpt_jax.data import gutenberg
from chargpt_jax.data.streams.text_file import Span, TextFile

AROUND = 1 << 16
"""Characters in front of a marker and behind it that are searched at first for the start and the end of a licence."""


class Removal(NamedTuple):
    """What belongs to Project Gutenberg in a text, as `gutenberg.Cut` has it."""

    kept: list[Span]
    title: str | None
    lines: tuple[tuple[int, int], ...]
    notes: tuple[int, ...]
    certain: bool


class Watch:
    """Finds the markers of Project Gutenberg in a text that passes by."""

    def __init__(self) -> None:
        """Begin at the start of a text."""
        self.markers: list[int] = []
        """The positions at which there may be a marker, each perhaps twice."""
        self.notes: dict[int, int] = {}
        """The transcriber's notes: the position of each heading, and of the first empty line in front of it."""
        self._before, self._position = "", 0

    def watch(self, pieces: Iterable[str]) -> Iterator[str]:
        """Yield the pieces of a text, and remember where its markers are."""
        for piece in pieces:
            offset, text = self._position - len(self._before), self._before + piece
            self.markers += [offset + position for position in gutenberg.may_have_marker(text)]
            for start, end in gutenberg.notes(text):
                heading = end - len(text[start:end].lstrip())
                self.notes.setdefault(offset + heading, offset + start)
            self._before = text[max(text.rfind("\n", 0, -AROUND) + 1, len(text) - 2 * AROUND, 0) :]
            self._position += len(piece)
            yield piece


def removal(text: TextFile, watch: Watch) -> Removal | None:
    """Return what is to be removed from a text that was watched; None if it has no marker of Project Gutenberg."""
    around = AROUND
    while True:
        islands = _islands(text, watch.markers, around)
        found = [(start, gutenberg.find(text.text(start, end), start == 0, end == len(text))) for start, end in islands]
        if all(part.complete for _, part in found):
            break
        around *= 8
    removed = [(offset + start, offset + end) for offset, part in found for start, end in part.removed]
    if not removed:
        return None
    parts = [part for _, part in found]
    return Removal(
        kept=gutenberg.kept(removed, len(text)),
        title=gutenberg.title_of([title for part in parts for title in part.titles]),
        lines=tuple(_lines(text, span) for span in removed),
        notes=tuple(
            text.line_ends_before(heading) + 1
            for heading, start in sorted(watch.notes.items())
            if not gutenberg.inside(start, removed)
        ),
        certain=any(part.heads for part in parts) and any(part.tails for part in parts),
    )


def _islands(text: TextFile, markers: Iterable[int], around: int) -> list[Span]:
    """Return the parts around markers: at least `around` characters on both sides, from one empty line to another."""
    islands: list[Span] = []
    for marker in sorted(set(markers)):
        start = 0 if marker <= gutenberg.MAX_HEAD else _paragraph_start(text, marker - around, around)
        end = _paragraph_end(text, marker + around, around)
        if islands and start <= islands[-1][1]:
            start, end = islands[-1][0], max(end, islands.pop()[1])
        islands.append((start, end))
    return islands


def _paragraph_start(text: TextFile, position: int, step: int) -> int:
    """Return the start of the last paragraph that starts before a position, or 0."""
    while position > 0:
        start = max(0, position - step)
        found = text.text(start, position + 1).rfind("\n\n")
        if found >= 0:
            return start + found + 2
        position = start
    return 0


def _paragraph_end(text: TextFile, position: int, step: int) -> int:
    """Return the end of the paragraph at a position."""
    while position < len(text):
        found = text.text(position, position + step + 1).find("\n\n")
        if found >= 0:
            return position + found + 1
        position += step
    return len(text)


def _lines(text: TextFile, span: Span) -> tuple[int, int]:
    """Return the first and the last line of a part, counted from 1, without the empty lines around it."""
    start, stop = text.stripped(span)
    first = text.line_ends_before(start) + 1
    return first, first + text.line_ends_before(stop) - text.line_ends_before(start)
