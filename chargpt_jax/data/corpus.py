"""Load the texts of a corpus, remove licences, repair encoding errors, and record the source of each text.

A text is read from a file, from the download cache or from the web; if no text can be downloaded, a text that ships
with Python is used instead, with a warning. `download.py` downloads and caches, `encoding.py` decodes, `gutenberg.py`
removes licences, `repair.py` repairs encoding errors.
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
from chargpt_jax.data.download import DownloadError, Page, default_cache, fetch, keep, split_url
from chargpt_jax.data.encoding import BYTE_ORDER_MARKS, UndecodableText, decode, decode_pieces, several
from chargpt_jax.data.repair import DEFAULT, fixes_of, kinds, repair
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
    for entry in _entries(config.source):
        if entry == "stdlib":
            parts.append(_stdlib_part())
            continue
        try:
            kind, pages, left_out = _pages(entry, config, cache, left)
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
        raise _too_large(config)
    if missing:
        parts = [_stand_in(missing, [part for part in parts if part[1].kind != "stdlib"], config, warn)]
    return joined([text for text, _ in parts]), tuple(source for _, source in parts)


def joined(texts: Sequence[str]) -> str:
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
    data = _read_file(str(path), MAX_SCORED, "score its parts one by one")
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
    if not _exists(path):
        _read_file(path, 0, "")


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


def folders(config: DataConfig) -> list[Path]:
    """Return the folders that `config.source` names."""
    paths = [Path(os.path.expanduser(entry)) for entry in _entries(config.source)]
    return [path for path in paths if path.is_dir()]


def changed_files(config: DataConfig, sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the paths of local files that have changed since a corpus was made from them."""
    changed = []
    for source in sources:
        path, recorded = os.path.expanduser(source.get("url") or ""), source.get("file_sha256")
        if recorded and os.path.isfile(path):
            with contextlib.suppress(UserError):
                data = _read_file(path, round(config.max_megabytes * 1e6), "")
                if hashlib.sha256(data).hexdigest() != recorded:
                    changed.append(str(source["url"]))
    return changed


def stdlib_text() -> str:
    """Return the help texts that ship with Python, in printable ASCII: every version needs equally many embeddings."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    return "".join(c for c in text if c == "\n" or " " <= c <= "~")


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


# From a source to bytes


def _entries(source: str) -> list[str]:
    """Split at commas, but not inside the name of an existing path."""
    pieces, entries = source.split(","), []
    while pieces:
        for taken in range(len(pieces), 0, -1):
            entry = ",".join(pieces[:taken])
            entry = entry if _exists(entry) else entry.strip()
            if _exists(entry):
                break
        entries.append(entry)
        pieces = pieces[taken:]
    entries = [entry for entry in entries if entry]
    if not entries:
        raise UserError(
            f"data.source is {source!r}, but it must name a text: give a Gutenberg number, a URL, a path or 'stdlib'."
        )
    return entries


def _exists(entry: str) -> bool:
    return os.path.exists(os.path.expanduser(entry))


def _pages(entry: str, config: DataConfig, cache: Path, left: float) -> tuple[str, list[Page], tuple[str, ...]]:
    """Return the kind of a source, its pages, unchanged, and a note on what was left out of a folder.

    An existing path goes before a Gutenberg number.

    Args:
        entry: the source.
        config: of the corpus.
        cache: the folder of downloads.
        left: bytes that the corpus may still grow by.
    """
    if not _exists(entry) and entry.isascii() and entry.isdigit():
        number = entry.lstrip("0") or "0"
        urls = [mirror.replace("{number}", number) for mirror in config.mirrors]
        return "gutenberg", [fetch(f"pg{number}", urls, config, cache)], ()
    if not _exists(entry) and "://" in entry:
        host = f".{split_url(entry).hostname}"
        kind = "gutenberg" if host.endswith(".gutenberg.org") else "url"
        key = "url-" + hashlib.sha256(os.fsencode(entry)).hexdigest()[:24]
        return kind, [fetch(key, [entry], config, cache)], ()
    pages = []
    names, left_out = _files(entry)
    for name in names:
        data = _read_file(name, round(config.max_megabytes * 1e6), "increase data.max_megabytes, or give less text")
        left -= len(data)
        if left < 0:
            raise _too_large(config)
        pages.append(Page(name, data))
    return "file", pages, left_out


def _files(entry: str) -> tuple[list[str], tuple[str, ...]]:
    """Return the path of a file, or the paths of the texts in a folder, by name, and a note on the other items."""
    path = Path(os.path.expanduser(entry))
    if not _exists(entry):
        raise UserError(
            f"data.source names the path {entry!r}, but it does not exist: correct it, or give a Gutenberg number, a "
            "URL or 'stdlib'."
        )
    if not path.is_dir():
        return [entry], ()
    try:
        items = sorted(path.iterdir())
    except OSError as error:
        raise UserError(f"The folder {entry!r} cannot be read ({error.strerror}): give a readable folder.") from None
    texts = [item.name for item in items if not item.name.startswith(".") and _is_text(item)]
    others = [item.name for item in items if item.name not in texts]
    if not texts:
        raise UserError(f"The folder {entry!r} has no text file, but must have at least one: put a text there.")
    note = (f"left out {_listed(others)} of {entry} (hidden, empty, binary, or a folder)",) if others else ()
    return [os.path.join(entry, name) for name in texts], note


def _is_text(path: Path) -> bool:
    """Return whether the start of a file looks like text; an unreadable file is not left out silently."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            start = file.read(8_192)
    except OSError:
        return True
    marked = start.startswith(tuple(mark for mark, _ in BYTE_ORDER_MARKS))
    return bool(start.strip()) and (marked or b"\0" not in start)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _read_file(name: str, max_bytes: int, fix: str) -> bytes:
    try:
        with Path(os.path.expanduser(name)).open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"The file {name!r} cannot be read ({reason}): give a readable text file.") from None
    if len(data) > max_bytes:
        raise UserError(f"The file {name!r} is larger than {max_bytes / 1e6:,g} MB: {fix}.")
    return data


def _too_large(config: DataConfig) -> UserError:
    return UserError(
        f"The texts of data.source together are larger than data.max_megabytes ({config.max_megabytes:g}): increase "
        "it, or give less text."
    )


# From a text to a part of the corpus


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
        raise UserError(f"{page.url} is empty, but must be a text: give another.")
    if repaired.lines:
        lines = "1 line" if repaired.lines == 1 else f"{repaired.lines:,} lines"
        notes.append(f"repaired {lines} ({', '.join(kinds(repaired.fixes))})")
    if page.cached_on:
        notes.append(f"downloaded on {page.cached_on}")
    if not title:
        title = Path(page.url).stem if kind == "file" else unquote(urlsplit(page.url).path).rpartition("/")[2]
    file_sha256 = hashlib.sha256(page.data).hexdigest() if kind == "file" else None
    described = {"repairs": names, "notes": tuple(notes), "file_sha256": file_sha256}
    return _part(title or page.url, kind, page.url, repaired.text, repaired.fixes, **described)


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
    rest = _plausible(cut.text, text, where, "removing the licence text")
    notes = [f"kept {len(rest):,} of {len(text):,} characters, licence removed at lines {lines}"]
    if cut.notes:
        notes.append(f"kept a transcriber's note at line {', '.join(f'{line:,}' for line in cut.notes)}")
    return rest, cut.title, notes


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
