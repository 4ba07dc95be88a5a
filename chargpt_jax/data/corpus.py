"""Load the texts of a corpus, remove licences, repair encoding errors, and record the source of each text.

A text is read from a file, from the download cache or from the web; if no text can be downloaded, a text that ships
with Python is used instead, with a warning. `sources.py` finds the texts, `download.py` downloads and caches,
`encoding.py` decodes, `gutenberg.py` removes licences, `repair.py` repairs encoding errors.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from chargpt_jax.config import DataConfig
from chargpt_jax.data import gutenberg
from chargpt_jax.data.download import DownloadError, Page, default_cache, keep
from chargpt_jax.data.encoding import UndecodableText, decode, decode_pieces, several
from chargpt_jax.data.repair import DEFAULT, fixes_of, kinds, repair
from chargpt_jax.data.sources import entries_of, exists, pages_of, read_file, stdlib_text, too_large
from chargpt_jax.errors import UserError

MAX_SCORED = 64_000_000
"""Size up to which a text to be scored is read at once, bytes; only such a text loses its licence text."""

SCORED_AT_ONCE = 1 << 20
"""Bytes of a larger text that are read at once."""

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
    """Of the UTF-8 of this source's final text, in hexadecimal."""
    characters: int
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


Part = tuple[str, Source]


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def load_corpus(
    config: DataConfig, *, cache: Path | None = None, warn: Callable[[str], None] = _to_stderr
) -> tuple[str, tuple[Source, ...]]:
    """Return the texts of `config.source`, joined by line breaks, and the source of each.

    Raises:
        UserError: if a source is missing or invalid, or `start_at` is not a regular expression or has no match.
    """
    start = _start_pattern(config)
    fixes_of(config.repair, from_gutenberg=False)  # rejects an unknown name before anything is downloaded
    cache = cache or default_cache()
    parts: list[Part] = []
    missing: dict[str, str] = {}
    undecodable: list[UndecodableText] = []
    left = config.max_megabytes * 1e6
    for entry in entries_of(config.source):
        if entry == "stdlib":
            parts.append(_stdlib_part())
            continue
        try:
            kind, pages, left_out = pages_of(entry, config, cache, left)
        except DownloadError as error:
            missing[entry] = str(error)
            continue
        for page in pages:
            left -= len(page.data)
            try:
                text = decode(page.data, page.url, config.encoding, page.charset)
            except UndecodableText as error:
                undecodable.append(error)
                continue
            part, source = _finish(kind, page, text, start, config.repair)
            parts.append((part, dataclasses.replace(source, notes=left_out + source.notes)))
            left_out = ()
            if page.key:  # cached only now, so that an invalid page is downloaded again
                keep(page, cache, warn)
    if undecodable:
        raise several(undecodable)
    if left < 0:
        raise too_large(config)
    if missing:
        parts = [_stand_in(missing, [part for part in parts if part[1].kind != "stdlib"], config, warn)]
    return _joined([text for text, _ in parts]), tuple(source for _, source in parts)


def _joined(texts: Sequence[str]) -> str:
    """Join texts by line breaks; one that ends with a line break needs no other."""
    return "".join(text if text.endswith("\n") else text + "\n" for text in texts[:-1]) + "".join(texts[-1:])


def read_text(path: str | Path, config: DataConfig | None = None, warn: Callable[[str], None] = _to_stderr) -> str:
    """Return a local text file, decoded like a source.

    At most `MAX_SCORED` bytes are read. The text may be empty.

    Args:
        path: of the file.
        config: of the run that the text is scored with. The licence text of Project Gutenberg, and what comes before a
            match of `start_at`, are removed like from the corpus, and `warn` is told; None: nothing is removed.
        warn: called with one line per removal.

    Raises:
        UserError: if the file is unreadable, too large, binary or in an unknown encoding.
    """
    data = read_file(str(path), MAX_SCORED, "score its parts one by one")
    text = decode(data, str(path), config.encoding if config else "")
    if config is None:
        return text
    text, _, notes = _trimmed(text, str(path), "file")
    match = _start_pattern(config).search(text)
    if match and match.start():
        text = text[match.start() :]
        notes.append("data.start_at was applied")
    if notes:
        warn(f"{path}: {'; '.join(notes)}, as in the corpus")
    return text


def check_exists(path: str) -> None:
    """Check that a text file is there, before anything that takes long.

    Raises:
        UserError: if it is not.
    """
    if not exists(path):
        read_file(path, 0, "")


def text_pieces(path: str, config: DataConfig, warn: Callable[[str], None]) -> Iterator[str]:
    """Yield a local text file to be scored, as `read_text` returns it, or, if it is large, in pieces.

    Raises:
        UserError: as for `read_text`.
    """
    path = os.path.expanduser(path)
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    if size <= MAX_SCORED:
        yield read_text(path, config, warn)
        return
    with open(path, "rb") as file:
        for i, piece in enumerate(decode_pieces(iter(lambda: file.read(SCORED_AT_ONCE), b""), path, config.encoding)):
            if i == 0:
                warn(f"{path} is larger than {MAX_SCORED // 10**6} MB: it is read in pieces, and no licence is removed")
            yield piece


def changed_files(config: DataConfig, sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the paths of local files that have changed since a corpus was made from them."""
    changed = []
    for source in sources:
        path, recorded = os.path.expanduser(source.get("url") or ""), source.get("file_sha256")
        if recorded and os.path.isfile(path):
            with contextlib.suppress(UserError):
                data = read_file(path, round(config.max_megabytes * 1e6), "")
                if hashlib.sha256(data).hexdigest() != recorded:
                    changed.append(str(source["url"]))
    return changed


def _stdlib_part(stand_in_for: str | None = None) -> Part:
    """Return the complete stdlib text: `start_at` is for books, and no encoding error needs repair."""
    return _part(
        "Python help topics",
        "stdlib",
        "python:pydoc_data.topics",
        stdlib_text(),
        (),
        stand_in_for=stand_in_for,
        repairs=DEFAULT,
    )


def _stand_in(missing: dict[str, str], found: Sequence[Part], config: DataConfig, warn: Callable[[str], None]) -> Part:
    """Return the stand-in for all texts of the corpus: a part of it cannot be replaced by another text."""
    names = ", ".join(missing)
    reasons = "; ".join(dict.fromkeys(missing.values()))
    if found:
        raise UserError(
            f"data.source names {names}, which could not be downloaded ({reasons}), beside texts that were found: "
            "connect, or remove it from data.source."
        )
    if not config.allow_stand_in:
        raise UserError(
            f"data.source names {names}, which could not be downloaded ({reasons}), and data.allow_stand_in is off: "
            "connect, give the path of a text file, or allow the stand-in."
        )
    text, source = _stdlib_part(names)
    warn(
        f"WARNING: {names} could not be downloaded ({reasons}). Using a STAND-IN text instead: {source.title!r}, which "
        "ships with Python."
    )
    return text, source


def _start_pattern(config: DataConfig) -> re.Pattern[str]:
    try:
        return re.compile(config.start_at, re.MULTILINE)
    except re.error as error:
        raise UserError(
            f"data.start_at is {config.start_at!r}, but it must be a regular expression ({error}): correct or empty it."
        ) from None


def _finish(kind: str, page: Page, text: str, start: re.Pattern[str], setting: str) -> Part:
    """Remove from a text what is not the author's, repair its encoding errors, and describe its source."""
    body, title, notes = _trimmed(text, page.url, kind)
    from_gutenberg = kind == "gutenberg" or bool(notes)
    begun = _start_at(body, start, page.url)
    if len(begun) < len(body):
        notes.append(f"data.start_at removed {len(body) - len(begun):,} characters")
    begun = begun.strip() if from_gutenberg else begun
    repaired = repair(begun, names := fixes_of(setting, from_gutenberg))
    if not repaired.text.strip():
        state = "has only white space" if text else "is empty"
        raise UserError(f"{page.url} {state}, but must be a text: give another.")
    if line := gutenberg.licence_line(repaired.text):
        notes.append(f"line {line:,} may be part of Project Gutenberg's licence, and was kept")
    if repaired.lines:
        lines = "1 line" if repaired.lines == 1 else f"{repaired.lines:,} lines"
        notes.append(f"repaired {lines} ({', '.join(kinds(repaired.fixes))})")
    if page.cached_on:
        notes.append(f"downloaded on {page.cached_on}")
    if not title:
        title = Path(page.url).stem if kind == "file" else unquote(urlsplit(page.url).path).rpartition("/")[2]
    file_sha256 = hashlib.sha256(page.data).hexdigest() if kind == "file" else None
    described = {"repairs": names, "notes": tuple(notes), "file_sha256": file_sha256}
    url = _without_password(page.url)
    return _part(title or url, kind, url, repaired.text, repaired.fixes, **described)


def _trimmed(text: str, where: str, kind: str) -> tuple[str, str | None, list[str]]:
    """Remove Project Gutenberg's own text.

    Returns:
        The rest, its title, and what was removed; the text unchanged if it is not from Project Gutenberg.
    """
    cut = gutenberg.cut(text)
    if cut is None:
        if kind == "gutenberg":
            raise UserError(
                f"{where} has no Gutenberg start or end marker, but one is needed to remove the licence text: remove "
                "it by hand and give the file."
            )
        return text, None, []
    lines = ", ".join(f"{first:,}-{last:,}" for first, last in cut.lines)
    rest = cut.text if cut.certain and cut.text else _plausible(cut.text, text, where, "removing the licence text")
    notes = [f"kept {len(rest):,} of {len(text):,} characters, licence removed at lines {lines}"]
    if cut.notes:
        notes.append(f"kept a transcriber's note at line {', '.join(f'{line:,}' for line in cut.notes)}")
    return rest, cut.title, notes


def _without_password(url: str) -> str:
    """Return a URL without the name and password in front of its host; anything else as it is."""
    scheme, mark, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return scheme + mark + host.rpartition("@")[2] + slash + path if mark else url


def _start_at(text: str, start: re.Pattern[str], where: str) -> str:
    match = start.search(text)
    if not match:
        raise UserError(f"data.start_at is {start.pattern!r}, but {where} has no match: correct or empty it.")
    return _plausible(text[match.start() :], text, where, "data.start_at") if match.start() else text


def _plausible(rest: str, text: str, where: str, step: str) -> str:
    minimum = max(MIN_REMAINING, len(text) / 10)
    if len(rest.strip()) < minimum:
        raise UserError(
            f"Only {len(rest.strip()):,} of {len(text):,} characters of {where} remain after {step} (at least "
            f"{minimum:,.0f} expected): check the text, or shorten it by hand and give the file."
        )
    return rest


def _part(title: str, kind: str, url: str, text: str, fixes: tuple[tuple[str, str], ...], **described: Any) -> Part:
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return text, Source(title, kind, url, sha256, len(text), fixes, **described)
