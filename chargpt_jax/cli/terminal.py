"""What may reach a terminal: texts of others without what steers it, and streams that take any text.

A terminal obeys some of the characters it is sent: they move its cursor, set its title and its colours, reach the
clipboard, or turn the direction of a line around. What a model writes, what a corpus is called and what a file holds
is shown with a stand-in for each of them.
"""

import io
import logging
import sys
import unicodedata
import warnings
from typing import Any

STAND_IN = "\N{REPLACEMENT CHARACTER}"

MOST_MARKS = 8
"""Combining marks that one character may carry; hundreds would be drawn over the lines above and below."""

MOST_MESSAGE = 2_000
"""The longest message, in characters, that one line tells."""


def printable(text: str, keep: str = "\n\t") -> str:
    """Return text with a stand-in for what could steer a terminal or hide: controls, format characters, surrogates.

    Spaces of every width stay, and of a character's combining marks the first `MOST_MARKS`.

    Args:
        text: anything.
        keep: characters that stay nevertheless.
    """
    if text.isascii() and text.isprintable():
        return text
    shown, marks = [], 0
    for char in text:
        kind = unicodedata.category(char)
        marks = marks + 1 if kind in ("Mn", "Mc", "Me") else 0
        harmless = (char.isprintable() or kind == "Zs") and marks <= MOST_MARKS
        shown.append(char if harmless or char in keep else STAND_IN)
    return "".join(shown)


def one_line(text: object, most: int = MOST_MESSAGE) -> str:
    """Return a message as one printable line, cut where it is longer than `most` characters."""
    line = printable(" ".join(str(text)[: 4 * most].splitlines()), keep="")
    return line if len(line) <= most else line[: most - 1] + "…"


def guard() -> None:
    """Prepare this process for texts of others: for a command, not for a library.

    Its streams write what they cannot encode as an escape (`LANG=C`), and log records and warnings are printable lines.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.setLogRecordFactory(_harmless_record)
    warnings.formatwarning = _warning_line


def _harmless_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = logging.LogRecord(*args, **kwargs)
    record.msg, record.args = one_line(record.getMessage()), ()
    return record


def _warning_line(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> str:
    return f"{category.__name__}: {one_line(message)}\n"
