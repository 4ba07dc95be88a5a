"""Decode the bytes of a text: the encoding is given, or found in the text; it is never guessed silently."""

import codecs
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from chargpt_jax.errors import UserError

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins with the mark of utf-16-le
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

DECLARATIONS = (
    # Project Gutenberg: "Character set encoding: ISO-8859-1"
    rb"^Character set encoding:[ \t]*(?:ISO-646-US \()?([\w.:-]+)",
    rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w.:-]+)""",
    rb"""^\s*<\?xml[^>]{0,200}?encoding\s*=\s*["']([\w.:-]+)""",
)
"""How a text names its own encoding near its start."""

DECLARED_WITHIN = 8_192
"""Bytes at the start of a text in which a declaration is looked for."""

GUESSED_FROM = 200_000
"""Bytes from which the likely encoding of an unreadable text is guessed, for the error message."""

COMMON = ("cp1252", "latin_1")
"""The encodings to name first among those that give the same text."""

_DECLARED = re.compile(b"|".join(DECLARATIONS), re.IGNORECASE | re.MULTILINE)


class UndecodableText(UserError):
    """A text cannot be decoded; `likely` is the encoding that it probably has."""

    def __init__(self, name: str, reason: str, likely: str | None) -> None:
        guess = f", probably {likely}" if likely else ""
        super().__init__(f"{name} cannot be read as {reason}{guess}: {_remedy([likely])}.")
        self.name, self.reason, self.likely = name, reason, likely


def decode(data: bytes, name: str, encoding: str = "", declared: str | None = None) -> str:
    r"""Return a text, without its byte order mark, with \n as line ends.

    Args:
        data: the bytes.
        name: of the text, for error messages.
        encoding: of texts without a byte order mark; '': the declared one; else UTF-8.
        declared: the encoding that the text came with, such as the charset in an HTTP header. A declaration in the
            text itself counts if there is none, unless the text is valid UTF-8.

    Raises:
        UserError: if `encoding` is unknown, or the text is binary.
        UndecodableText: if the text does not have that encoding.
    """
    if encoding and not is_encoding(encoding):
        raise UserError(
            f"data.encoding is {encoding!r}, but must be an encoding that Python knows: give 'latin-1', for example."
        )
    mark, marked = _mark(data)
    body = data[len(mark) :]
    used = marked or encoding or declared or _declared_in(body) or "utf-8"
    try:
        text = body.decode(used)
    except (LookupError, UnicodeError) as error:
        if b"\0" in data and not marked and not encoding:
            raise _binary(name, data.find(b"\0")) from None
        where = f"at byte {error.start + len(mark)}" if isinstance(error, UnicodeDecodeError) else f"({error})"
        raise UndecodableText(name, f"{used} {where}", likely_encoding(data)) from None
    if "\0" in text:
        raise _binary(name, data.find(b"\0"))
    return _line_ends(text)


def decode_pieces(blocks: Iterable[bytes], name: str, encoding: str = "") -> Iterator[str]:
    r"""Decode a large text piece by piece, like `decode`; a declaration in the text counts as well.

    Args:
        blocks: the bytes, in order; none is empty.
        name: of the text, for error messages.
        encoding: as for `decode`.

    Raises:
        UserError: as for `decode`.
    """
    decoder: codecs.IncrementalDecoder | None = None
    held, done = "", 0
    for block in itertools.chain(blocks, [b""]):
        if decoder is None:
            mark, marked = _mark(block)
            used = marked or encoding or _declared_in(block[:-4]) or "utf-8"
            if not is_encoding(used):
                decode(b"", name, encoding)  # raises
            decoder, block = codecs.getincrementaldecoder(used)(), block[len(mark) :]
        try:
            text = held + decoder.decode(block, final=not block)
        except UnicodeError as error:
            raise UndecodableText(name, f"{used} after byte {done} ({error})", likely_encoding(block)) from None
        if "\0" in text:
            raise _binary(name, done + block.find(b"\0"))
        done += len(block)
        held = "\r" if text.endswith("\r") and block else ""
        if text := text.removesuffix(held):
            yield _line_ends(text)


def _mark(data: bytes) -> tuple[bytes, str]:
    """Return the byte order mark of a text and its encoding; both are empty without one."""
    return next(((mark, encoding) for mark, encoding in BYTE_ORDER_MARKS if data.startswith(mark)), (b"", ""))


def _line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_encoding(name: str) -> bool:
    """Return whether Python knows a text encoding of that name."""
    try:
        b"a".decode(name)
    except UnicodeError:  # of another length
        return True
    except (LookupError, ValueError):
        return False
    return True


def likely_encoding(data: bytes) -> str | None:
    """Guess the encoding of a text that is not UTF-8; None without a plausible guess."""
    from charset_normalizer import from_bytes

    best = from_bytes(data[:GUESSED_FROM]).best()
    if best is None:
        return None
    return next((name for name in COMMON if name in best.could_be_from_charset), best.encoding).replace("_", "-")


def several(errors: Sequence[UndecodableText]) -> UserError:
    """Return one error for all texts that cannot be decoded."""
    if len(errors) == 1:
        return errors[0]
    named = [f"{e.name} (not {e.reason}{', probably ' + e.likely if e.likely else ''})" for e in errors]
    more = f" and {len(named) - 10} more" if len(named) > 10 else ""
    remedy = _remedy([error.likely for error in errors])
    return UserError(f"{len(named)} texts cannot be read: {', '.join(named[:10])}{more}: {remedy}.")


def _remedy(likely: Sequence[str | None]) -> str:
    """Return what to do about texts with these likely encodings."""
    if len(set(likely)) == 1 and likely[0]:
        return f"save it in UTF-8, or pass --config.data.encoding={likely[0]}"
    return "save them in UTF-8, or pass --config.data.encoding=NAME with the encoding's name"


def _binary(name: str, offset: int) -> UserError:
    return UserError(f"{name} is binary (NUL at byte {offset}), but must be a text: give plain text in UTF-8.")


def _declared_in(data: bytes) -> str | None:
    """Return the encoding that a text declares, if Python knows it, and the text is not simply UTF-8."""
    match = _DECLARED.search(data[:DECLARED_WITHIN])
    name = next((group.decode("ascii", "replace") for group in match.groups() if group), "") if match else ""
    if not name or not is_encoding(name):
        return None
    try:
        return name if data.decode("utf-8").isascii() else None
    except UnicodeError:
        return name
