"""The texts of a corpus, one after another: each without its licence and its encoding errors, and described.

A text is processed in pieces, in a temporary file. It is in memory as a whole only if `start_at` is set, if all fixes
run on a text that may have mojibake, or if its encoding needs that.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from chargpt_jax.config import DataConfig
from chargpt_jax.data import gutenberg
from chargpt_jax.data.download import Page
from chargpt_jax.data.encoding import decode, decode_in_pieces
from chargpt_jax.data.repair import ALL, DEFAULT, Repaired, Repairs, fixes_of, kinds, repair
from chargpt_jax.data.sources import stdlib_text
from chargpt_jax.data.streams.journal import Journal
from chargpt_jax.data.streams.licences import Watch, removal
from chargpt_jax.data.streams.text_file import NeedsWhole, TextFile, by_lines, joined
from chargpt_jax.errors import UserError

STDLIB_TITLE = "Python help topics"

LICENCE_NAME = 200
"""Maximum length of a name of a licence, characters."""

MIN_REMAINING = 1_000
"""Minimum number of characters that remain after a part was removed; at least 10 % of the text must remain too."""


@dataclass(frozen=True)
class Source:
    """The source of a part of the corpus, and the state of that part when it was used."""

    title: str
    kind: str
    """'gutenberg', 'url', 'file' or 'stdlib'."""
    url: str
    """The address, the file's path as it was given, or 'python:pydoc_data.topics'."""
    sha256: str
    """Of the UTF-8 of this source's final text, or of its bytes if these are the tokens, in hexadecimal."""
    characters: int
    """Number of characters, or of bytes."""
    fixes: tuple[tuple[str, str], ...]
    """Encoding errors that ftfy repaired: pairs of action and parameter, in order."""
    stand_in_for: str | None = None
    """The source that could not be downloaded, if this one is its stand-in."""
    repairs: tuple[str, ...] = ()
    """The fixes that ran: names of `repair.FIXES`."""
    notes: tuple[str, ...] = ()
    """What was removed, changed or found in the text, for people."""
    file_sha256: str | None = None
    """Of the bytes of a local file, in hexadecimal."""

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Source":
        """Return a source from what JSON made of it."""
        fixes = tuple((str(action), str(parameter)) for action, parameter in saved["fixes"])
        return cls(**{**saved, "fixes": fixes, "repairs": tuple(saved["repairs"]), "notes": tuple(saved["notes"])})


class Parts:
    """The texts of a corpus, as they are added one by one."""

    def __init__(self, journal: Journal, start: re.Pattern[str], config: DataConfig, folder: Path | None) -> None:
        """Begin an empty corpus in a file; `journal` has the texts that an interrupted preparation has finished."""
        self.out, self.characters, self.sources = journal.text, set[str](), list[Source]()
        self._journal, self._last_size = journal, 0
        self._start, self._config, self._folder = start, config, folder

    def add_stdlib(self, stand_in_for: str | None = None) -> None:
        """Add the complete stdlib text: `start_at` is for books, and no encoding error needs repair."""
        written = self._write([stdlib_text()])
        about = {"stand_in_for": stand_in_for, "repairs": DEFAULT}
        self._describe(written, STDLIB_TITLE, "stdlib", "python:pydoc_data.topics", (), **about)

    def add_page(self, kind: str, page: Page, notes: Sequence[str]) -> None:
        """Add a text without what is not the author's, and without its encoding errors.

        Args:
            kind: of its source.
            page: the text.
            notes: on its source.
        """
        if self._config.unit == "byte":
            self._add_bytes(kind, page, notes)
            return
        key = self._journal.key_of(kind, page)
        if (record := self._journal.kept(key)) and self._taken_from(record):
            return
        self._make(kind, page, notes)
        self._journal.add(key, self._last_size, self.sources[-1])

    def _taken_from(self, record: dict[str, Any]) -> bool:
        """Add the text that an interrupted preparation has finished; return whether it is intact."""
        length, known = len(self.out), len(self.sources)
        try:
            source = Source.from_json(record["source"])
            written = self._write(adopted=record["bytes"])
            if written.sha256.hexdigest() != source.sha256:
                raise ValueError("the text has changed")
        except (ValueError, TypeError, LookupError):
            self.out.truncate(length)
            self._journal.forget()
            return False
        self.characters |= written.distinct | ({"\n"} if known else set())
        self.sources.append(source)
        self._journal.use()
        return True

    def _make(self, kind: str, page: Page, notes: Sequence[str]) -> None:
        """Add a text, as `add_page` describes."""
        length = len(self.out)
        try:
            if self._start.pattern:
                raise NeedsWhole
            raw, watch = TextFile(self._folder), Watch()
            for piece in watch.watch(decode_in_pieces(page.blocks, self._config.encoding, page.charset)):
                raw.append(piece)
            self._finish(kind, page, _trimmed_file(raw, watch, page.url, kind), notes)
        except NeedsWhole:
            self.out.truncate(length)
            text = decode(page.content(), page.url, self._config.encoding, page.charset)
            self._finish(kind, page, self._begun(kind, page, text), notes)

    def _add_bytes(self, kind: str, page: Page, notes: Sequence[str]) -> None:
        """Add the bytes of a text as they are."""
        written = self._write(block.decode("latin-1") for block in page.blocks())
        if not written.characters:
            raise UserError(f"{page.url} is empty, but must be a text: give another.")
        title = Path(page.url).stem if kind == "file" else unquote(urlsplit(page.url).path).rpartition("/")[2]
        url, digest = _without_password(page.url), _sha256(page.blocks())
        file_sha256 = digest if kind == "file" else None
        self._describe(written, title or url, kind, url, (), sha256=digest, notes=tuple(notes), file_sha256=file_sha256)

    def _begun(self, kind: str, page: Page, text: str) -> "Trimmed":
        """Return a text in memory from the match of `start_at` on, without what belongs to Project Gutenberg."""
        body, title, notes = trimmed(text, page.url, kind)
        from_gutenberg = kind == "gutenberg" or bool(notes)
        begun = _start_at(body, self._start, page.url)
        if len(begun) < len(body):
            notes.append(f"data.start_at removed {len(body) - len(begun):,} characters")
        begun = begun.strip() if from_gutenberg else begun
        return Trimmed(lambda: iter([begun]), title, notes, from_gutenberg, not text, whole=begun)

    def _finish(self, kind: str, page: Page, body: "Trimmed", of_source: Sequence[str]) -> None:
        """Repair the encoding errors of a text, write it, and describe its source."""
        names = fixes_of(self._config.repair, body.from_gutenberg)
        if body.whole is None:
            has_tags = set(names) == set(ALL) and any("<" in piece for piece in body.pieces())
            repairs: Repairs | Repaired = (done := Repairs(names, has_tags))
            pieces = done.repaired(by_lines(body.pieces()) if names else body.pieces())
            written = self._write(pieces)
        else:
            repairs = fixed = repair(body.whole, names)
            written = self._write([fixed.text])
        if written.blank:
            state = "is empty" if body.empty else "has only white space"
            raise UserError(f"{page.url} {state}, but must be a text: give another.")
        notes = [*of_source, *body.notes]
        if written.licence_line:
            notes.append(f"line {written.licence_line:,} may be part of Project Gutenberg's licence, and was kept")
        if repairs.lines:
            lines = "1 line" if repairs.lines == 1 else f"{repairs.lines:,} lines"
            notes.append(f"repaired {lines} ({', '.join(kinds(repairs.fixes))})")
        if page.cached_on:
            notes.append(f"downloaded on {page.cached_on}")
        title = body.title
        if not title:
            title = Path(page.url).stem if kind == "file" else unquote(urlsplit(page.url).path).rpartition("/")[2]
        file_sha256 = _sha256(page.blocks()) if kind == "file" else None
        url = _without_password(page.url)
        described = {"repairs": names, "notes": tuple(notes), "file_sha256": file_sha256}
        self._describe(written, title or url, kind, url, repairs.fixes, **described)

    def _write(self, pieces: Iterable[str] = (), adopted: int = 0) -> "_Written":
        """Write a text behind the others, or adopt that many bytes; a line break ends the text before it."""
        if len(self.out) and not self.out.ends_with_line():
            self.out.append("\n")
        written = _Written()
        for piece, data in self.out.adopt(adopted):
            written.add(piece, data)
        for piece in pieces:
            written.add(piece, self.out.append(piece))
        self._last_size = written.bytes
        return written

    def _describe(self, written: "_Written", *about: Any, **further: Any) -> None:
        title, kind, url, fixes = about
        self.characters |= written.distinct | ({"\n"} if self.sources else set())
        facts: dict[str, Any] = {"sha256": written.sha256.hexdigest(), "characters": written.characters} | further
        self.sources.append(Source(title, kind, url, fixes=fixes, **facts))


class _Written:
    """What is known of a text that was written."""

    def __init__(self) -> None:
        self.characters, self.distinct, self.sha256, self.blank = 0, set[str](), hashlib.sha256(), True
        self.bytes = 0
        self.licence_line: int | None = None
        self._lines, self._end = 0, ""

    def add(self, piece: str, data: bytes) -> None:
        """Consider a piece and its UTF-8."""
        self.sha256.update(data)
        self.bytes += len(data)
        self.characters += len(piece)
        self.distinct |= set(piece)
        self.blank = self.blank and not piece.strip()
        text = self._end + piece
        if self.licence_line is None and (line := gutenberg.licence_line(text)):
            self.licence_line = self._lines + line
        self._end = text[-LICENCE_NAME:]
        self._lines += text.count("\n") - self._end.count("\n")


class Trimmed(NamedTuple):
    """A text without what belongs to Project Gutenberg."""

    pieces: Callable[[], Iterator[str]]
    title: str | None
    notes: list[str]
    """What was removed."""
    from_gutenberg: bool
    empty: bool
    """Whether the text was empty before anything was removed."""
    whole: str | None = None
    """The text in memory; None: it is in a file."""


def _trimmed_file(text: TextFile, watch: Watch, where: str, kind: str) -> Trimmed:
    """Remove Project Gutenberg's own text from a text in a file."""
    found = removal(text, watch)
    if found is None:
        if kind == "gutenberg":
            raise _without_marker(where)
        return Trimmed(text.pieces, None, [], False, not len(text))
    kept = sum(map(len, joined(text, found.kept)))
    if not (found.certain and kept):
        _check_plausible(kept, len(text), where, "removing the licence text")
    notes = _notes_on(found.lines, found.notes, kept, len(text))
    return Trimmed(lambda: joined(text, found.kept), found.title, notes, True, False)


def _notes_on(lines: Sequence[tuple[int, int]], notes: Sequence[int], kept: int, length: int) -> list[str]:
    """Return what was removed, in words."""
    ranges = ", ".join(f"{first:,}-{last:,}" for first, last in lines)
    removed = [f"kept {kept:,} of {length:,} characters, licence removed at lines {ranges}"]
    if notes:
        removed.append(f"kept a transcriber's note at line {', '.join(f'{line:,}' for line in notes)}")
    return removed


def _without_marker(where: str) -> UserError:
    return UserError(
        f"{where} has no Gutenberg start or end marker, but one is needed to remove the licence text: remove it by "
        "hand and give the file."
    )


def _sha256(blocks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def trimmed(text: str, where: str, kind: str) -> tuple[str, str | None, list[str]]:
    """Remove Project Gutenberg's own text.

    Returns:
        The rest, its title, and what was removed; the text unchanged if it is not from Project Gutenberg.
    """
    cut = gutenberg.cut(text)
    if cut is None:
        if kind == "gutenberg":
            raise _without_marker(where)
        return text, None, []
    if not (cut.certain and cut.text):
        _check_plausible(len(cut.text), len(text), where, "removing the licence text")
    return cut.text, cut.title, _notes_on(cut.lines, cut.notes, len(cut.text), len(text))


def _without_password(url: str) -> str:
    """Return a URL without the name and password in front of its host; anything else as it is."""
    scheme, mark, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return scheme + mark + host.rpartition("@")[2] + slash + path if mark else url


def _start_at(text: str, start: re.Pattern[str], where: str) -> str:
    match = start.search(text)
    if not match:
        raise UserError(f"data.start_at is {start.pattern!r}, but {where} has no match: correct or empty it.")
    rest = text[match.start() :]
    if match.start():
        _check_plausible(len(rest.strip()), len(text), where, "data.start_at")
    return rest


def _check_plausible(rest: int, length: int, where: str, step: str) -> None:
    minimum = max(MIN_REMAINING, length / 10)
    if rest < minimum:
        raise UserError(
            f"Only {rest:,} of {length:,} characters of {where} remain after {step} (at least {minimum:,.0f} "
            "expected): check the text, or shorten it by hand and give the file."
        )
