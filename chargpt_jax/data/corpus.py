"""Load the texts of a corpus, remove licences, repair encoding errors, and record the source of each text.

A text is read from a file, from the download cache or from the web; if no text can be downloaded, a text that ships
with Python is used instead, with a warning. `sources.py` finds the texts, `download.py` downloads and caches,
`encoding.py` decodes, `gutenberg.py` removes licences, `repair.py` repairs encoding errors.
`streams/` processes a text in pieces, so that a text of any length needs little memory.
"""

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chargpt_jax.config import DataConfig
from chargpt_jax.data.download import DownloadError, default_cache, keep
from chargpt_jax.data.encoding import UndecodableText, decode, decode_pieces, several
from chargpt_jax.data.repair import fixes_of
from chargpt_jax.data.sources import entries_of, exists, pages_of, read_file, too_large
from chargpt_jax.data.streams.journal import Journal
from chargpt_jax.data.streams.parts import STDLIB_TITLE, Parts, Source, trimmed
from chargpt_jax.data.streams.text_file import TextFile
from chargpt_jax.data.tokenizer import CharTokenizer
from chargpt_jax.errors import UserError

MAX_SCORED = 64_000_000
"""Size up to which a text to be scored is read at once, bytes; only such a text loses its licence text."""

SCORED_AT_ONCE = 1 << 20
"""Bytes of a larger text that are read at once."""


@dataclass(frozen=True)
class Corpus:
    """The text of a corpus, in a temporary file, and where it comes from."""

    text: TextFile
    characters: frozenset[str]
    """The distinct characters of the text."""
    sources: tuple[Source, ...]

    def ids(self, tokenizer: CharTokenizer) -> Iterator[np.ndarray]:
        """Yield the token ids of the text, int32 [n] per piece."""
        return map(tokenizer.encode_text, self.text.pieces())


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def load_corpus(
    config: DataConfig, *, cache: Path | None = None, warn: Callable[[str], None] = _to_stderr
) -> tuple[str, tuple[Source, ...]]:
    """Return the texts of `config.source`, joined by line breaks, and the source of each, in memory.

    Raises:
        UserError: as for `read_corpus`.
    """
    found = read_corpus(config, cache=cache, warn=warn)
    return found.text.text(), found.sources


def read_corpus(
    config: DataConfig,
    *,
    cache: Path | None = None,
    warn: Callable[[str], None] = _to_stderr,
    folder: Path | None = None,
    journal: Journal | None = None,
) -> Corpus:
    """Read the texts of `config.source` into one, joined by line breaks.

    Args:
        config: of the corpus.
        cache: the folder of downloads; None: the user's.
        warn: called with one line per warning.
        folder: for temporary files, which vanish with this process; None: the system's folder for them.
        journal: has the texts that an interrupted preparation has finished, and records those of this one.

    Raises:
        UserError: if a source is missing or invalid, or `start_at` is not a regular expression or has no match.
    """
    start = _start_pattern(config)
    fixes_of(config.repair, from_gutenberg=False)  # rejects an unknown name before anything is downloaded
    cache = cache or default_cache()
    parts = Parts(journal or Journal(None, config), start, config, folder)
    missing: dict[str, str] = {}
    undecodable: list[UndecodableText] = []
    left = config.max_megabytes * 1e6
    for entry in entries_of(config.source):
        if entry == "stdlib":
            parts.add_stdlib()
            continue
        try:
            kind, pages, left_out = pages_of(entry, config, cache, left)
        except DownloadError as error:
            missing[entry] = str(error)
            continue
        for page in pages:
            left -= page.size()
            try:
                parts.add_page(kind, page, left_out)
            except UndecodableText as error:
                undecodable.append(error)
                continue
            left_out = ()
            if page.key:  # cached only now, so that an invalid page is downloaded again
                keep(page, cache, warn)
    if undecodable:
        raise several(undecodable)
    if left < 0:
        raise too_large(config)
    if missing:
        names = _stand_in(missing, [source for source in parts.sources if source.kind != "stdlib"], config, warn)
        parts = Parts(Journal(None, config), start, config, folder)
        parts.add_stdlib(names)
    return Corpus(parts.out, frozenset(parts.characters), tuple(parts.sources))


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
    text, _, notes = trimmed(text, str(path), "file")
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
    if config.unit == "byte":
        read_file(path, 0, "") if not os.path.isfile(path) else None
        with open(path, "rb") as file:
            yield from (
                block.decode("utf-8", "surrogateescape") for block in iter(lambda: file.read(SCORED_AT_ONCE), b"")
            )
        return
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
            with contextlib.suppress(OSError), open(path, "rb") as file:
                small = os.fstat(file.fileno()).st_size <= config.max_megabytes * 1e6
                if small and hashlib.file_digest(file, "sha256").hexdigest() != recorded:
                    changed.append(str(source["url"]))
    return changed


def _stand_in(missing: dict[str, str], found: Sequence[Source], config: DataConfig, warn: Callable[[str], None]) -> str:
    """Return the names of the texts that the stand-in replaces: a part of the corpus cannot be replaced."""
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
    warn(
        f"WARNING: {names} could not be downloaded ({reasons}). Using a STAND-IN text instead: {STDLIB_TITLE!r}, which "
        "ships with Python."
    )
    return names


def _start_pattern(config: DataConfig) -> re.Pattern[str]:
    try:
        return re.compile(config.start_at, re.MULTILINE)
    except re.error as error:
        raise UserError(
            f"data.start_at is {config.start_at!r}, but it must be a regular expression ({error}): correct or empty it."
        ) from None
