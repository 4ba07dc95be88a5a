"""Safe terminal output: replaces control characters in untrusted text, and makes the streams accept any text.

Control characters and bidirectional controls can move the cursor, set the title and colours, write to the clipboard,
or reverse the direction of a line. On a terminal, generated text is printed with a replacement character in their
place, and so are titles of texts and contents of files everywhere. Text in files and pipes is not changed.
"""

import contextlib
import io
import json
import logging
import math
import sys
import unicodedata
import warnings
from typing import TextIO

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

MAX_MARKS = 8
"""Maximum number of combining marks per character; hundreds would cover the lines above and below."""

MAX_MESSAGE = 2_000
"""Maximum length of a message, in characters."""


JOINERS = "\u200c\u200d"
"""ZERO WIDTH NON-JOINER and JOINER: Persian and Indic spelling needs them, and emoji sequences."""


def shown(text: str, out: TextIO) -> str:
    """Return text for a stream: as it is for a file or a pipe, and `printable` for a terminal."""
    return printable(text) if out.isatty() else text


def printable(text: str, keep: str = "\n\t") -> str:
    """Return text with a replacement character for controls, format characters and surrogates.

    Spaces of every width stay, the first `MAX_MARKS` combining marks of a character, `JOINERS` between letters, marks
    or emoji, and code points that are newer than Python's tables.

    Args:
        text: any text.
        keep: characters that are never replaced.
    """
    if text.isascii() and text.isprintable():
        return text
    kinds = [unicodedata.category(char) for char in text]
    clean, marks = [], 0
    for i, (char, kind) in enumerate(zip(text, kinds, strict=True)):
        marks = marks + 1 if kind[0] == "M" else 0
        if char in JOINERS:
            harmless = 0 < i < len(text) - 1 and _joins(kinds[i - 1]) and _joins(kinds[i + 1])
        else:
            harmless = (char.isprintable() or kind == "Zs" or _is_new(char, kind)) and marks <= MAX_MARKS
        clean.append(char if harmless or char in keep else REPLACEMENT)
    return "".join(clean)


def _joins(kind: str) -> bool:
    """Return whether a joiner may stand beside a character of this category: a letter, a mark or an emoji."""
    return kind[0] in "LM" or kind in ("So", "Sk")


def _is_new(char: str, kind: str) -> bool:
    """Return whether a code point may have been assigned after Python's tables were made.

    Noncharacters never are, and the reserved format characters would be invisible.
    """
    code = ord(char)
    never = 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE
    invisible = code == 0x2065 or 0xFFF0 <= code <= 0xFFF8 or 0xE0000 <= code <= 0xE0FFF
    return kind == "Cn" and not never and not invisible


def one_line(text: object, limit: int = MAX_MESSAGE) -> str:
    """Return a message as one printable line of at most `limit` characters."""
    line = printable(" ".join(str(text)[: 4 * limit].splitlines()), keep="")
    return line if len(line) <= limit else line[: limit - 1] + "…"


def warn(text: str) -> None:
    """Print a warning to stderr."""
    with contextlib.suppress(OSError):
        print(f"\n*** {one_line(text)}\n", file=sys.stderr, flush=True)


def as_json(value: object) -> str:
    """Return a value as one line of JSON in printable ASCII; NaN and infinity become null."""
    return json.dumps(_finite(value), allow_nan=False).replace("\x7f", "\\u007f")


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def guard() -> None:
    """Prepare this process to print untrusted text. Only a command may do this, a library must not.

    The standard streams escape characters that they cannot encode (`LANG=C`). Log records and Python warnings become
    printable lines.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.setLogRecordFactory(_printable_record)
    warnings.formatwarning = _warning_line
    # A compiled program that cannot be cached, or read from the cache, is compiled again.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def _printable_record(*args: object, **kwargs: object) -> logging.LogRecord:
    record = logging.LogRecord(*args, **kwargs)  # type: ignore[arg-type]
    record.msg, record.args = one_line(record.getMessage()), ()
    return record


def _warning_line(message: Warning | str, category: type[Warning], *_: object, **__: object) -> str:
    return f"{category.__name__}: {one_line(message)}\n"
