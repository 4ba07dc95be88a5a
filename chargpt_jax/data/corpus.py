"""Load a text, remove the licence, repair encoding errors, and record its source.

A text is read from a file, from the download cache or from the web. If a download fails, a text that ships with Python
is used instead, with a warning. `download.py` downloads and caches; `tokenizer.py` encodes characters.
"""

import hashlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from chargpt_jax.config import MAX_TEXT, DataConfig
from chargpt_jax.data.download import DownloadError, Page, default_cache, fetch, keep, split_url
from chargpt_jax.errors import UserError

MAX_SCORED = 4 * MAX_TEXT
"""Maximum size of a text to be scored, bytes: UTF-8 needs up to 4 bytes per character."""

MIN_REMAINING = 1_000
"""Minimum number of characters that remain after a part was removed; at least 10 % of the text must remain too."""

_BOOK = r"PROJECT\s+GUTENBERG(?:['’]S)?\s+E-?(?:BOOK|TEXT)\b"
_START = re.compile(
    # The title can span several lines, but no empty line; the closing stars of a marker can be missing.
    rf"^[ \t]*\*{{3}}\s*START\s+OF\s+(?:THE|THIS)\s+{_BOOK}(?:(?:(?!\n[ \t]*\n)[\s\S]){{0,500}}?\*{{3}}|[^\n]*)",
    re.IGNORECASE | re.MULTILINE,
)
_OLD_START = re.compile(r"^[ \t]*\*+\s*END\s*\**\s*THE\s+SMALL\s+PRINT[^\n]*", re.IGNORECASE | re.MULTILINE)
_END = re.compile(
    rf"^[ \t]*(?:\*{{3}}\s*END\s+OF\s+(?:THE|THIS)\s+{_BOOK}"
    rf"|END\s+OF\s+(?:(?:THE|THIS)\s+)?(?:{_BOOK}|PROJECT\s+GUTENBERG['’]S\b))",
    re.IGNORECASE | re.MULTILINE,
)
_TITLE = re.compile(r"^Title:[ \t]*(\S.*(?:\n[ \t]+\S.*)*)", re.MULTILINE)
_PRODUCER = re.compile(r"\s*(?:Produced|E-?text\s+prepared)\s+by\b(?:(?!\n[ \t]*\n)[\s\S])*", re.IGNORECASE)


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


Part = tuple[str, Source]


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def load_corpus(
    config: DataConfig, *, cache: Path | None = None, warn: Callable[[str], None] = _to_stderr
) -> tuple[str, tuple[Source, ...]]:
    """Return the concatenated texts of `config.source`, and the source of each.

    Raises:
        UserError: if a source is missing or invalid, or `start_at` is not a regular expression or has no match.
    """
    try:
        start = re.compile(config.start_at, re.MULTILINE)
    except re.error as error:
        raise UserError(
            f"data.start_at is {config.start_at!r}, but it must be a regular expression ({error}): correct or empty it."
        ) from None
    cache = cache or default_cache()
    parts: list[Part] = []
    missing: dict[str, str] = {}
    for entry in _entries(config.source):
        if entry == "stdlib":
            parts.append(_stdlib_part())
            continue
        try:
            kind, pages = _pages(entry, config, cache)
        except DownloadError as error:
            missing[entry] = str(error)
            continue
        for page in pages:
            body, title = _remove_licence(_decode(page), kind, page.url)
            if page.key:  # cached only now, so that an invalid page is downloaded again
                keep(page, cache, warn)
            parts.append(_finish(kind, page.url, title, _start_at(body, start, page.url)))
    if missing:  # one stand-in for all: a repeated text would put training text into the validation set
        parts = [part for part in parts if part[1].kind != "stdlib"] + [_stand_in(missing, config, warn)]
    return "".join(text for text, _ in parts), tuple(source for _, source in parts)


def read_text(path: str | Path) -> str:
    """Return a local text file by the rules for sources: strict UTF-8, no byte order mark, plain line ends.

    No part is removed or repaired, and the text may be empty. At most `MAX_SCORED` bytes are read.

    Raises:
        UserError: if the file is unreadable, too large or not UTF-8.
    """
    return _decode(Page(str(path), _read_file(str(path), MAX_SCORED, "score its parts one by one")))


def stdlib_text() -> str:
    """Return the help texts that ship with Python, in printable ASCII: every version needs equally many embeddings."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    return "".join(c for c in text if c == "\n" or " " <= c <= "~")


def _stdlib_part(stand_in_for: str | None = None) -> Part:
    """Return the complete stdlib text: `start_at` is for books, and no encoding error needs repair."""
    return _part("Python help topics", "stdlib", "python:pydoc_data.topics", stdlib_text(), (), stand_in_for)


def _stand_in(missing: dict[str, str], config: DataConfig, warn: Callable[[str], None]) -> Part:
    names = ", ".join(missing)
    reasons = "; ".join(dict.fromkeys(missing.values()))
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


def _pages(entry: str, config: DataConfig, cache: Path) -> tuple[str, list[Page]]:
    """Return the kind of a source, and its pages, unchanged."""
    if entry.isascii() and entry.isdigit():
        number = entry.lstrip("0") or "0"
        urls = [mirror.replace("{number}", number) for mirror in config.mirrors]
        return "gutenberg", [fetch(f"pg{number}", urls, config, cache)]
    if "://" in entry:
        host = f".{split_url(entry).hostname}"
        kind = "gutenberg" if host.endswith(".gutenberg.org") else "url"
        key = "url-" + hashlib.sha256(os.fsencode(entry)).hexdigest()[:24]
        return kind, [fetch(key, [entry], config, cache)]
    max_bytes, fix = round(config.max_megabytes * 1e6), "increase data.max_megabytes, or give a smaller text"
    return "file", [Page(name, _read_file(name, max_bytes, fix)) for name in _files(entry)]


def _files(entry: str) -> list[str]:
    path = Path(os.path.expanduser(entry))
    if not _exists(entry):
        raise UserError(
            f"data.source names the path {entry!r}, but it does not exist: correct it, or give a Gutenberg number, a "
            "URL or 'stdlib'."
        )
    if not path.is_dir():
        return [entry]
    names = sorted(item.name for item in path.glob("*.txt") if item.is_file())
    if not names:
        raise UserError(f"The folder {entry!r} has no .txt file, but must have at least one: put a text there.")
    return [os.path.join(entry, name) for name in names]


def _read_file(name: str, max_bytes: int, fix: str) -> bytes:
    try:
        with Path(os.path.expanduser(name)).open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"The file {name!r} cannot be read ({reason}): give a readable text file.") from None
    if len(data) > max_bytes:
        raise UserError(f"The file {name!r} is larger than {max_bytes / 1e6:,g} MB: {fix}.")
    return data


# From bytes to a clean text


def _decode(page: Page) -> str:
    if (offset := page.data.find(b"\0")) >= 0:
        raise UserError(f"{page.url} is binary (NUL at byte {offset}), but must be a text: give plain text in UTF-8.")
    charset = page.charset or "utf-8"
    try:
        text = page.data.decode(charset)
    except (LookupError, UnicodeError) as error:
        wrong = f"at byte {error.start}" if isinstance(error, UnicodeDecodeError) else f"({error})"
        raise UserError(
            f"{page.url} cannot be read as {charset} {wrong}: save it in UTF-8 and give the file."
        ) from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _remove_licence(text: str, kind: str, url: str) -> tuple[str, str | None]:
    """Return the text between Gutenberg's markers, and the title in its header; other texts are returned unchanged."""
    start = _START.search(text) or _OLD_START.search(text)
    end = _END.search(text, start.end() if start else 0)
    if not start or not end:
        if kind == "gutenberg":
            raise UserError(
                f"{url} has no Gutenberg {'end' if start else 'start'} marker, but both are needed to remove "
                "the licence text: remove it by hand and give the file."
            )
        return text, None
    body = text[start.end() : end.start()]
    if producer := _PRODUCER.match(body):
        body = body[producer.end() :]
    title = _TITLE.search(text, 0, start.start())
    return _plausible(body, text, url, "removing the licence text"), title and " ".join(title[1].split())


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


def _finish(kind: str, url: str, title: str | None, body: str) -> Part:
    """Strip a text, repair its encoding errors, and describe its source."""
    import ftfy

    repaired = ftfy.fix_and_explain(body.strip())
    fixes = tuple((str(action), str(parameter)) for action, parameter in repaired.explanation or ())
    if not repaired.text:
        raise UserError(f"{url} is empty, but must be a text: give another.")
    if not title:
        title = Path(url).stem if kind == "file" else unquote(urlsplit(url).path).rpartition("/")[2]
    return _part(title or url, kind, url, repaired.text, fixes)


def _part(
    title: str, kind: str, url: str, text: str, fixes: tuple[tuple[str, str], ...], stand_in_for: str | None = None
) -> Part:
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return text, Source(title, kind, url, sha256, len(text), fixes, stand_in_for)
