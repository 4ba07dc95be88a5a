"""Find the texts that a source names, and read or download their bytes.

A source is a list of files, folders, URLs, numbers of Project Gutenberg, or 'stdlib', separated by commas.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from chargpt_jax.config import DataConfig
from chargpt_jax.data.download import BLOCK, Page, fetch, split_url
from chargpt_jax.data.encoding import kind_of_binary
from chargpt_jax.errors import UserError, reason, remedy

PLACES = {name: f"https://mattmahoney.net/dc/{name}.zip" for name in ("enwik8", "enwik9", "text8")}
"""Where to get the files of well-known benchmarks."""


def stdlib_text() -> str:
    """Return the help texts that ship with Python, in printable ASCII: every version needs equally many embeddings."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    return "".join(c for c in text if c == "\n" or " " <= c <= "~")


def folders(config: DataConfig) -> list[Path]:
    """Return the folders that `config.source` names."""
    paths = [Path(os.path.expanduser(entry)) for entry in entries_of(config.source)]
    return [path for path in paths if path.is_dir()]


def entries_of(source: str) -> list[str]:
    """Split at commas, but not inside the name of an existing path.

    Raises:
        UserError: if nothing is named, or a comma may belong to a URL.
    """
    pieces, entries = source.split(","), []
    while pieces:
        for taken in range(len(pieces), 0, -1):
            entry = ",".join(pieces[:taken])
            entry = entry if exists(entry) else entry.strip()
            if exists(entry):
                break
        following = pieces[taken] if taken < len(pieces) else " "
        if "://" in entry and not exists(entry) and "://" not in following and not following[:1].isspace():
            raise UserError(
                f"data.source has a comma directly after {entry}, which may be a part of that URL: write it as %2C, or "
                "write a space after it if another text follows."
            )
        entries.append(entry)
        pieces = pieces[taken:]
    entries = [entry for entry in entries if entry]
    if not entries:
        raise UserError(
            f"data.source is {source!r}, but it must name a text: give a Gutenberg number, a URL, a path or 'stdlib'."
        )
    return entries


def exists(entry: str) -> bool:
    """Return whether a source is an existing path."""
    return os.path.exists(os.path.expanduser(entry))


def pages_of(entry: str, config: DataConfig, cache: Path, left: float) -> tuple[str, list[Page], tuple[str, ...]]:
    """Return the kind of a source, its pages, unchanged, and a note on what was left out of a folder.

    An existing path goes before a Gutenberg number.

    Args:
        entry: the source.
        config: of the corpus.
        cache: the folder of downloads.
        left: bytes that the corpus may still grow by.
    """
    if not exists(entry) and entry.isascii() and entry.isdigit():
        number = entry.lstrip("0")
        if not number:
            raise UserError(
                f"data.source is {entry!r}, but books of Project Gutenberg are numbered from 1: correct it."
            )
        urls = [mirror.replace("{number}", number) for mirror in config.mirrors]
        return "gutenberg", [fetch(f"pg{number}", urls, config, cache)], ()
    if not exists(entry) and "://" in entry:
        host = f".{split_url(entry).hostname}"
        kind = "gutenberg" if host.endswith(".gutenberg.org") else "url"
        key = "url-" + hashlib.sha256(os.fsencode(entry)).hexdigest()[:24]
        return kind, [fetch(key, [entry], config, cache)], ()
    pages = []
    names, left_out = _files(entry)
    for name in names:
        limit, fix = round(config.max_megabytes * 1e6), "increase data.max_megabytes, or give less text"
        if (size := large_file(name)) and size <= limit:
            page = Page(name, b"", path=Path(os.path.expanduser(name)))
        else:
            page = Page(name, read_file(name, limit, fix))
        left -= size or len(page.data)
        if left < 0:
            raise too_large(config)
        pages.append(page)
    return "file", pages, left_out


def _files(entry: str) -> tuple[list[str], tuple[str, ...]]:
    """Return the path of a file, or the paths of the texts in a folder, by name, and a note on the other items."""
    path = Path(os.path.expanduser(entry))
    if not exists(entry):
        if place := PLACES.get(path.name):
            raise UserError(
                f"data.source names the file {entry!r}, but it does not exist: download {place}, unpack it, and set "
                "--config.data.source to its path."
            )
        raise UserError(
            f"data.source names the path {entry!r}, but it does not exist: correct it, or give a Gutenberg number, a "
            "URL or 'stdlib'."
        )
    if not path.is_dir():
        return [entry], ()
    try:
        items = sorted(path.iterdir())
    except OSError as error:
        fix = remedy(error, "give a readable folder")
        raise UserError(f"The folder {entry!r} cannot be read ({error.strerror}): {fix}.") from None
    found = {item.name: item for item in items if not item.name.startswith(".") and _is_text(item)}
    read: dict[Path, str] = {}
    for name, item in sorted(found.items(), key=lambda pair: (pair[1].is_symlink(), pair[0])):
        read.setdefault(item.resolve(), name)  # a file that is linked in the same folder is read once
    texts = sorted(read.values())
    others = [item.name for item in items if item.name not in read.values()]
    if not texts:
        raise UserError(f"The folder {entry!r} has no text file, but must have at least one: put a text there.")
    note = (
        (f"left out {_listed(others)} of {entry} (hidden, empty, binary, a duplicate, or not a file)",)
        if others
        else ()
    )
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
    return bool(start.strip()) and kind_of_binary(start) is None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def large_file(name: str) -> int:
    """Return the size of a readable file of more than one block, bytes; 0 for any other."""
    path = os.path.expanduser(name)
    try:
        size = os.path.getsize(path) if os.path.isfile(path) and os.access(path, os.R_OK) else 0
    except (OSError, ValueError):
        return 0
    return size if size > BLOCK else 0


def read_file(name: str, max_bytes: int, fix: str) -> bytes:
    """Return the bytes of a file.

    Raises:
        UserError: if it is unreadable, or larger than `max_bytes`; `fix` says what to do about that.
    """
    if not name:
        raise UserError("The name of the text file is empty: give one.")
    try:
        with Path(os.path.expanduser(name)).open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError, RuntimeError) as error:
        cure = remedy(error, "give a readable text file")
        raise UserError(f"The file {name!r} cannot be read ({reason(error)}): {cure}.") from None
    if len(data) > max_bytes:
        raise UserError(f"The file {name!r} is larger than {max_bytes / 1e6:,g} MB: {fix}.")
    return data


def too_large(config: DataConfig) -> UserError:
    """Return the error for a corpus above `max_megabytes`."""
    return UserError(
        f"The texts of data.source together are larger than data.max_megabytes ({config.max_megabytes:g}): increase "
        "it, or give less text."
    )
