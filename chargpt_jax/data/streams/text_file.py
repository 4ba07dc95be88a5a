"""A text in a file: it is written and read in pieces, so that a text of any length needs little memory."""

import bisect
import codecs
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from chargpt_jax import atomic

PIECE = 1 << 20
"""Characters of a text that are in memory together, if its lines are shorter."""

END = 4_096
"""Characters at the ends of a part that are read together, to find its white space."""

Span = tuple[int, int]
"""The positions of the first character of a part, and of the first one after it."""


class NeedsWhole(Exception):
    """A text cannot be processed in pieces: it must be processed in memory as a whole."""


class Extent(NamedTuple):
    """A length of text."""

    characters: int
    bytes: int
    """In UTF-8."""
    line_ends: int


class TextFile:
    """A text in an unnamed file, which vanishes with its process, as UTF-8; lone surrogates are kept."""

    def __init__(self, folder: Path | None = None, path: Path | None = None) -> None:
        """Begin an empty text, in a folder; None: in the system's folder for temporary files.

        With a path, the file has this name and stays. Its old content is written over, unless `adopt` uses it.
        """
        self._file: IO[bytes]
        if path is None:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        else:
            descriptor = atomic.regular_only(str(path), os.O_RDWR | os.O_CREAT)
            self._file = os.fdopen(descriptor, "r+b")
        self._name = str(path or f"a temporary file in {folder or tempfile.gettempdir()}")
        self._ends = [Extent(0, 0, 0)]
        self._kept: tuple[Extent, Extent, str] = (self._ends[0], self._ends[0], "")

    def append(self, text: str) -> bytes:
        """Write a piece of the text, and return its UTF-8."""
        data, end = text.encode("utf-8", "surrogatepass"), self._ends[-1]
        if text:
            try:
                self._file.seek(end.bytes)
                self._file.write(data)
            except OSError as error:  # of a file without a name
                error.filename = self._name
                raise
            self._extended(text, data)
        return data

    def _extended(self, text: str, data: bytes) -> bytes:
        """Count a piece that the file has behind the last one, and return its UTF-8."""
        counts = len(text), len(data), text.count("\n")
        self._ends.append(Extent(*(one + more for one, more in zip(self._ends[-1], counts, strict=True))))
        return data

    def adopt(self, size: int) -> Iterator[tuple[str, bytes]]:
        """Append the next bytes of the file to the text, as they are; yield the pieces and their UTF-8.

        Raises:
            UnicodeDecodeError: if they are no text.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
        position = self._ends[-1].bytes
        while size:
            self._file.seek(position)
            data = self._file.read(min(size, PIECE))
            position, size = position + len(data), size - len(data) if data else 0
            piece = decoder.decode(data, final=not size)
            if piece:
                yield piece, self._extended(piece, piece.encode("utf-8", "surrogatepass"))

    def flush(self) -> None:
        """Hand all that was written to the operating system, so that it outlives this process."""
        self._file.flush()

    def truncate(self, length: int) -> None:
        """Remove the pieces from a character on, at which one of them starts."""
        while self._ends[-1].characters > length:
            self._ends.pop()
            self._kept = (self._ends[0], self._ends[0], "")

    def __len__(self) -> int:
        """Return the number of characters."""
        return self._ends[-1].characters

    def ends_with_line(self) -> bool:
        """Return whether the last character is a line break."""
        return self.text(len(self) - 1) == "\n" if len(self) else False

    def pieces(self, start: int = 0, stop: int | None = None) -> Iterator[str]:
        """Yield the text from one character to another, in pieces as they were written; None: to the end."""
        stop = len(self) if stop is None else min(stop, len(self))
        first = max(0, bisect.bisect_right(self._ends, start, key=lambda end: end.characters) - 1)
        for begin, end in itertools.pairwise(self._ends[first:]):
            if begin.characters >= stop:
                return
            text = self._read(begin, end)
            if part := text[max(0, start - begin.characters) : stop - begin.characters]:
                yield part

    def text(self, start: int = 0, stop: int | None = None) -> str:
        """Return the text from one character to another, in memory; None: to the end."""
        return "".join(self.pieces(start, stop))

    def line_ends_before(self, position: int) -> int:
        """Return the number of line breaks before a character."""
        before = self._ends[bisect.bisect_right(self._ends, position, key=lambda end: end.characters) - 1]
        return before.line_ends + self.text(before.characters, position).count("\n")

    def stripped(self, span: Span) -> Span:
        """Return a part without the white space at its ends."""
        start, stop = span
        while start < stop:
            head = self.text(start, min(start + END, stop))
            start += len(head) - len(rest := head.lstrip())
            if rest:
                break
        while start < stop:
            tail = self.text(max(start, stop - END), stop)
            stop -= len(tail) - len(rest := tail.rstrip())
            if rest:
                break
        return start, stop

    def _read(self, begin: Extent, end: Extent) -> str:
        """Return a piece; the last one is kept, because small parts of a piece are often read one after another."""
        if self._kept[:2] != (begin, end):
            self._file.seek(begin.bytes)
            data = self._file.read(end.bytes - begin.bytes)
            self._kept = begin, end, data.decode("utf-8", "surrogatepass")
        return self._kept[2]


def joined(text: TextFile, spans: Sequence[Span]) -> Iterator[str]:
    """Yield the parts of a text, without white space at their ends, separated by an empty line."""
    kept = [span for span in map(text.stripped, spans) if span[0] < span[1]]
    for i, span in enumerate(kept):
        if i:
            yield "\n\n"
        yield from text.pieces(*span)


def by_lines(pieces: Iterable[str], size: int | None = None) -> Iterator[str]:
    r"""Yield a text in pieces of complete lines.

    A piece ends with \n, and the next one does not start with white space. A line is never divided.

    Args:
        pieces: the text, in pieces of any length.
        size: characters of a piece, at least, if the text is long enough; None: PIECE.
    """
    size, length = size or PIECE, 0
    held: list[str] = []
    for piece in pieces:
        held.append(piece)
        length += len(piece)
        if length < size or "\n" not in piece:
            continue
        text = "".join(held)
        end = _last_line_start(text)
        if end:
            yield text[:end]
        held, length = [text[end:]], len(text) - end
    if rest := "".join(held):
        yield rest


def _last_line_start(text: str) -> int:
    """Return the position of the last line that does not start with white space; 0 if there is no other line."""
    end = text.rfind("\n", 0, len(text) - 1) + 1
    while end and text[end].isspace():
        end = text.rfind("\n", 0, end - 1) + 1
    return end
