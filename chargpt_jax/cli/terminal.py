"""Safe terminal output: replaces control characters in untrusted text, and makes the streams accept any text.

Control characters and bidirectional controls can move the cursor, set the title and colours, write to the clipboard,
or reverse the direction of a line. Generated text, titles of texts and contents of files are printed with a
replacement character in their place.
"""

import contextlib
import io
import json
import logging
import math
import sys
import unicodedata
import warnings

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

MAX_MARKS = 8
"""Maximum number of combining marks per character; hundreds would cover the lines above and below."""

MAX_MESSAGE = 2_000
"""Maximum length of a message, in characters."""


def printable(text: str, keep: str = "\n\t") -> str:
    """Return text with a replacement character for controls, format characters and surrogates.

    Spaces of every width stay, and the first `MAX_MARKS` combining marks of a character.

    Args:
        text: any text.
        keep: characters that are never replaced.
    """
    if text.isascii() and text.isprintable():
        return text
    shown, marks = [], 0
    for char in text:
        kind = unicodedata.category(char)
        marks = marks + 1 if kind in ("Mn", "Mc", "Me") else 0
        harmless = (char.isprintable() or kind == "Zs") and marks <= MAX_MARKS
        shown.append(char if harmless or char in keep else REPLACEMENT)
    return "".join(shown)


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


def _printable_record(*args: object, **kwargs: object) -> logging.LogRecord:
    record = logging.LogRecord(*args, **kwargs)  # type: ignore[arg-type]
    record.msg, record.args = one_line(record.getMessage()), ()
    return record


def _warning_line(message: Warning | str, category: type[Warning], *_: object, **__: object) -> str:
    return f"{category.__name__}: {one_line(message)}\n"
