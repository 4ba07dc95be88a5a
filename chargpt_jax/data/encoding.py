"""Decode the bytes of a text: the encoding is given, or found in the text; it is never guessed silently."""

import codecs
import contextlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from chargpt_jax.data.streams.text_file import NeedsWhole
from chargpt_jax.errors import UserError

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins with the mark of utf-16-le
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

FILE_TYPES = ((b"%PDF-", "PDF"), (b"PK\x03\x04", "ZIP, EPUB or DOCX"), (b"\x1f\x8b", "gzip"), (b"{\\rtf", "RTF"))
"""How files begin that hold a text in another form."""

WIDE = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
"""Encodings with NUL bytes in most texts."""

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

IN_PIECES = re.compile(r"utf-8|utf-16.*|utf-32.*|ascii|iso8859.*|cp\d+|koi8.*|mac.*|gb.*|big5|euc.*|shift_jis")
"""The encodings, by Python's names, of which large texts are decoded piece by piece."""

FEW, SPARSE = 6, 0.3
"""A text with fewer different bytes above 127, and a smaller part of its bytes, tells too little about its encoding."""

PUNCTUATION = "‘’“”–—…€£§°«»¡¿"
"""What a Western European text may hold above ASCII beside letters."""

_DECLARED = re.compile(b"|".join(DECLARATIONS), re.IGNORECASE | re.MULTILINE)


class UndecodableText(UserError):
    """A text cannot be decoded; `likely` is the encoding that it probably has."""

    def __init__(self, name: str, reason: str, likely: str | None, marked: bool = False) -> None:
        """`marked`: the text has a byte order mark, so that no other encoding can be chosen."""
        guess = f", probably {likely}" if likely else ""
        remedy = "save it in UTF-8" if marked else _remedy("it", [likely])
        super().__init__(f"{name} cannot be read as {reason}{guess}: {remedy}.")
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
    if not marked and not encoding:
        if kind := kind_of_binary(data):
            raise _binary(name, kind)
        if wide := _wide(data):
            raise UndecodableText(name, f"utf-8 (NUL at byte {data.find(0)})", wide)
    used = marked or encoding or declared or _declared_in(body) or "utf-8"
    try:
        text = body.decode(used)
    except UnicodeError as error:
        where = f"at byte {error.start + len(mark)}" if isinstance(error, UnicodeDecodeError) else f"({error})"
        raise UndecodableText(
            name, f"{used} {where}", None if marked else likely_encoding(data), bool(marked)
        ) from None
    except LookupError:
        raise UndecodableText(name, f"{used} (unknown to Python)", likely_encoding(data)) from None
    if "\0" in text:
        raise _binary(name, f"is binary (NUL at byte {data.find(0)})")
    return _line_ends(text, used)


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
            raise _binary(name, f"is binary (NUL at byte {done + block.find(0)})")
        done += len(block)
        held = "\r" if text.endswith("\r") and block else ""
        if text := text.removesuffix(held):
            yield _line_ends(text, used)


def decode_in_pieces(
    blocks: Callable[[], Iterable[bytes]], encoding: str = "", declared: str | None = None
) -> Iterator[str]:
    r"""Decode a text of any length piece by piece; together the pieces are what `decode` returns.

    Args:
        blocks: returns the bytes in order; the first block has at least `DECLARED_WITHIN` bytes, or all.
        encoding: as for `decode`.
        declared: as for `decode`.

    Raises:
        NeedsWhole: if `decode` must decode it, or say why that is impossible.
    """
    start = next(iter(blocks()), b"")
    mark, marked = _mark(start)
    if encoding and not is_encoding(encoding):
        raise NeedsWhole
    if not marked and not encoding and (kind_of_binary(start) or _wide(start)):
        raise NeedsWhole
    used = marked or encoding or declared
    if not used:
        used = _declaration(start) or "utf-8"
        if not _is_utf8(used) and _valid_utf8_above_ascii(blocks()):
            used = "utf-8"
    if not is_encoding(used) or not IN_PIECES.fullmatch(codecs.lookup(used).name):
        raise NeedsWhole
    decoder, held = codecs.getincrementaldecoder(used)(), ""
    for number, block in enumerate(itertools.chain(blocks(), [b""])):
        block = block[len(mark) :] if number == 0 else block
        try:
            text = held + decoder.decode(block, final=not block)
        except UnicodeError:
            raise NeedsWhole from None
        if "\0" in text:
            raise NeedsWhole
        held = "\r" if text.endswith("\r") and block else ""
        if text := text.removesuffix(held):
            yield _line_ends(text, used)


def _is_utf8(name: str) -> bool:
    return codecs.lookup(name).name == "utf-8"


def _valid_utf8_above_ascii(blocks: Iterable[bytes]) -> bool:
    """Return whether a text is valid UTF-8, but not ASCII."""
    decoder, above = codecs.getincrementaldecoder("utf-8")(), False
    try:
        for block in itertools.chain(blocks, [b""]):
            above |= not decoder.decode(block, final=not block).isascii()
    except UnicodeError:
        return False
    return above


def _mark(data: bytes) -> tuple[bytes, str]:
    """Return the byte order mark of a text and its encoding; both are empty without one."""
    return next(((mark, encoding) for mark, encoding in BYTE_ORDER_MARKS if data.startswith(mark)), (b"", ""))


def kind_of_binary(data: bytes) -> str | None:
    """Say what the bytes at the start of a file are, such as 'is in PDF format'; None if they can be a text."""
    for start, kind in FILE_TYPES:
        if data.startswith(start):
            return f"is in {kind} format"
    if 0 in data and not _mark(data)[1] and not _wide(data):
        return f"is binary (NUL at byte {data.find(0)})"
    return None


def _wide(data: bytes) -> str | None:
    """Return the encoding of WIDE that a text without a byte order mark has; None if it has none of them."""
    start = data[:DECLARED_WITHIN]
    if 0 not in start:
        return None
    for name in WIDE:
        try:
            text = codecs.getincrementaldecoder(name)().decode(start)
        except UnicodeError:
            continue
        if "\0" not in text and 200 * (text.count(" ") + text.count("\n")) > len(text):
            return name
    return None


def _line_ends(text: str, encoding: str) -> str:
    r"""Write \n for all line ends; EBCDIC has NEL, which elsewhere is often a misread ellipsis."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.replace("\x85", "\n") if b"\x15".decode(encoding, "ignore") == "\x85" else text


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

    with contextlib.suppress(UnicodeError):
        data.decode("utf-8", "surrogatepass")
        return None  # UTF-8, but for surrogates, which no encoding has
    high = data.translate(None, delete=bytes(range(128)))
    western = high.decode("cp1252", "replace")
    if (
        len(set(high)) < FEW
        and len(high) < SPARSE * len(data)
        and all(c.isalpha() or c in PUNCTUATION for c in western)
    ):
        return "cp1252"
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
    remedy = _remedy("them", [error.likely for error in errors])
    return UserError(f"{len(named)} texts cannot be read: {', '.join(named[:10])}{more}: {remedy}.")


def _remedy(what: str, likely: Sequence[str | None]) -> str:
    """Return what to do about texts ('it' or 'them') with these likely encodings."""
    if len(set(likely)) == 1 and likely[0]:
        return f"save {what} in UTF-8, or pass --config.data.encoding={likely[0]} and check the result"
    return f"save {what} in UTF-8, or pass --config.data.encoding=NAME with the encoding's name"


def _binary(name: str, kind: str) -> UserError:
    return UserError(f"{name} {kind}, but must be a text: give plain text in UTF-8.")


def _declaration(data: bytes) -> str | None:
    """Return the encoding that the start of a text declares, if Python knows it."""
    match = _DECLARED.search(data[:DECLARED_WITHIN])
    name = next((group.decode("ascii", "replace") for group in match.groups() if group), "") if match else ""
    return name if name and is_encoding(name) else None


def _declared_in(data: bytes) -> str | None:
    """Return the encoding that a text declares, if Python knows it, and the text is not simply UTF-8."""
    if (name := _declaration(data)) is None:
        return None
    try:
        return name if data.decode("utf-8").isascii() else None
    except UnicodeError:
        return name
