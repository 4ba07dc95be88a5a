"""How the modes generate and score show a text: plain, with colours, or with rows of metrics under its lines."""

import dataclasses
import os
import shutil
from typing import TYPE_CHECKING, TextIO

from chargpt_jax.cli.terminal import JOINERS, MAX_MARKS, printable, shown
from chargpt_jax.data.tokenizer import part_reader
from chargpt_jax.errors import UserError
from chargpt_jax.pictures import terminal_text

if TYPE_CHECKING:
    from chargpt_jax.generation.sample import Sample

COLOURS = {"standard": 16, "256": 256, "truecolor": 256}
"""The number of colours by rich's name of a colour system."""


def check(out: TextIO, as_json: bool) -> None:
    """Check that a stream can show rows of metrics.

    Raises:
        UserError: if it cannot.
    """
    if as_json:
        raise UserError("--subline draws rows for people, but --json prints JSON: give one of them.")
    encoding = out.encoding or "utf-8"
    try:
        terminal_text.BLOCKS.encode(encoding)
    except UnicodeError:
        raise UserError(
            f"--subline draws with block characters, but the encoding of the output is {encoding}: set "
            "PYTHONIOENCODING=utf-8, or leave the flag out."
        ) from None


def colours_of(out: TextIO) -> int:
    """Return the number of colours to use: 256 or 16 on a terminal that has them, otherwise 0."""
    if not out.isatty() or os.environ.get("NO_COLOR"):
        return 0
    from rich.console import Console

    return COLOURS.get(Console(file=out).color_system or "", 0)


class TextDisplay:
    """Shows samples on a stream, each in one piece or part by part."""

    def __init__(self, out: TextIO, vocab_size: int, rows: bool):
        """Look at the stream; `rows`: draw rows of metrics under each line."""
        self._out, self._rows = out, rows
        self._look = terminal_text.Look(vocab_size, colours_of(out), shutil.get_terminal_size().columns)
        self._waiting: Sample | None = None
        self._before = ""  # the last characters that were printed: `printable` looks at them
        self._prompt = False  # whether one was added
        self._others: dict[str, float] = {}  # labels of other series than the metrics, with their tops
        self._joiner: Sample | None = None  # waits for the character after it
        self._read = part_reader()

    @property
    def plain(self) -> bool:
        """Whether texts are shown as they are, without colours and rows."""
        return not self._rows and not self._look.colours

    def show(self, sample: "Sample") -> None:
        """Print a sample, and a line break."""
        if self.plain:
            print(shown(sample.text, self._out), file=self._out)
            return
        scored = len(sample.prompt) == len(sample)  # a scored text is its own prompt, but not to be shown as one
        self.add(dataclasses.replace(sample, prompt="") if scored else sample)
        self.end()

    def add(self, part: "Sample") -> None:
        """Print the next part of a sample; rows of metrics wait until their line is complete."""
        self._prompt |= bool(part.prompt)
        if part.unit == "byte":
            if self.plain:
                print(self._shown_bytes("".join(part.tokens), last=False), end="", file=self._out, flush=True)
                return
            part = part.spelled_out()
        self._add(part if self._joiner is None else self._joiner + part, complete=False)

    def end(self) -> None:
        """Print the rest of a sample whose parts were added, and a line break, if it is not plain."""
        print(self._shown_bytes("", last=True), end="", file=self._out, flush=True)
        if self._joiner is not None:
            self._add(self._joiner, complete=True)
        self._before = ""
        if self._rows:
            self._print_lines(complete=True)
            self._waiting = None
        elif not self.plain:
            print(file=self._out)

    def print_legend(self) -> None:
        """Print what colours and rows mean, below a blank line."""
        if not self.plain:
            print(
                f"\n{terminal_text.legend(self._look, self._rows, self._prompt, list(self._others.items()))}",
                file=self._out,
            )

    def _add(self, part: "Sample", complete: bool) -> None:
        part = self._printable(part, complete)
        if self._rows:
            self._waiting = part if self._waiting is None else self._waiting + part
            self._print_lines(complete=False)
        elif self.plain:
            print(part.text, end="", file=self._out, flush=True)
        else:
            text = terminal_text.coloured(part.tokens, part.surprisal, self._look, len(part.prompt))
            print(text, end="", file=self._out, flush=True)

    def _shown_bytes(self, characters: str, last: bool) -> str:
        """Return the next bytes, given as characters, as text; a character that is not complete waits."""
        text = self._read(characters, last)
        if last:
            self._read = part_reader()
        return printable(text) if self._out.isatty() else text

    def _printable(self, part: "Sample", complete: bool) -> "Sample":
        """Return the next part as `printable` shows it after the text before; on a stream for files, as it is.

        A joiner at its end waits for the next part, unless the text is complete.
        """
        self._joiner = None
        if not self._out.isatty():
            return part
        text = printable(self._before + part.text)[len(self._before) :]
        if part.text.endswith(tuple(JOINERS)) and not complete:
            part, self._joiner = part[:-1], part[-1:]
        self._before = (self._before + part.text)[-MAX_MARKS - 1 :]
        return dataclasses.replace(part, tokens=tuple(text[: len(part)]))

    def _print_lines(self, complete: bool) -> None:
        """Print the lines that wait; the last one only if the text is complete."""
        text = self._waiting
        if text is None:
            return
        self._others |= {own.label: own.top for own in text.series.values()}
        found = terminal_text.lines(text.tokens, self._look.width)
        for line in found if complete else found[:-1]:
            heights = [own.height for own in text.series.values()]
            rows = terminal_text.sublined(line, text.surprisal, text.entropy, self._look, len(text.prompt), heights)
            print(rows, end="", file=self._out, flush=True)
        self._waiting = text[found[-1][0].position :] if found else text
