"""Write a manifest with the sha256 of each file in a folder, and later verify the folder against it.

A manifest detects what a file system does not: a flipped bit, a truncated, missing, added or swapped file. It detects
damage, not forgery: a process that can change a file can also write a new manifest.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, TypedDict

from chargpt_jax import atomic

NAME = "manifest.json"
"""Name of the manifest, which is in the folder that it describes."""

MAX_FILES = 10_000
"""Maximum number of files and folders in a sealed folder; more are rejected before any file is read."""

MAX_BYTES = 4_000_000
"""Maximum size of a manifest, bytes: it needs about 150 bytes per file."""

MAX_TOTAL = 2**36
"""Maximum size of a sealed folder, bytes: verifying more than 64 GiB would look like a hang."""


class FileFacts(TypedDict):
    """What a manifest states of one file."""

    sha256: str
    bytes: int


class Damaged(Exception):
    """A sealed folder differs from its manifest: the file, and what is wrong with it."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(file, reason)
        self.file, self.reason = file, reason

    def __str__(self) -> str:
        file = self.file if self.file.isprintable() else ascii(self.file)
        return f"{file[:200]} {self.reason}"


def seal(folder: Path, known: Mapping[str, FileFacts] | None = None) -> None:
    """Write the manifest of a complete folder, and wait until the folder is on the disk.

    Args:
        folder: the folder.
        known: the facts of files that the caller has written; these are not read.
    """
    files = {name: (known or {}).get(name) or _described(folder / name) for name in _files(folder)}
    atomic.create_file(folder / NAME, json.dumps(files, indent=1).encode() + b"\n")
    atomic.sync_tree(folder)


class Facts:
    """A file to write to, and its facts: what a manifest would state of it."""

    def __init__(self, file: BinaryIO | None = None) -> None:
        """Begin with an empty file; None: only the facts are kept."""
        self._file, self._sha256, self._bytes = file, hashlib.sha256(), 0

    def write(self, content: bytes | memoryview) -> int:
        """Add bytes."""
        if self._file is not None:
            self._file.write(content)
        self._sha256.update(content)
        size = memoryview(content).nbytes
        self._bytes += size
        return size

    def result(self) -> FileFacts:
        """Return the facts of all that was written."""
        return {"sha256": self._sha256.hexdigest(), "bytes": self._bytes}


def verify(folder: Path, *, extra_files: bool = False, known: Mapping[str, FileFacts] | None = None) -> None:
    """Compare a folder with its manifest: sizes first, then content. No file outside the folder is opened.

    Args:
        folder: a sealed folder.
        extra_files: whether files that the manifest does not list are ignored.
        known: the facts of files that the caller has read; these are not opened again.

    Raises:
        Damaged: if a file differs, naming the first one.
    """
    try:
        listed = _listed(folder)
        found = _files(folder)
        if extra_files:
            found = {name: size for name, size in found.items() if name in listed}
        for name in sorted(listed.keys() - found.keys()):
            raise Damaged(name, "is missing")
        for name, size in found.items():
            if name not in listed:
                raise Damaged(name, "is not in the manifest")
            if size != listed[name]["bytes"]:
                raise Damaged(name, f"has {size:,} bytes, but {listed[name]['bytes']:,} were saved")
        if sum(found.values()) > MAX_TOTAL:
            raise Damaged(NAME, f"lists more than {MAX_TOTAL:,} bytes")
        for name in found:
            if ((known or {}).get(name) or _described(folder / name)) != listed[name]:
                raise Damaged(name, "sha256 differs from the saved value")
    except OSError as error:
        raise Damaged(_within(folder, error), f"cannot be read ({error.strerror or error})") from error


def same(folder: Path, other: Path) -> bool:
    """Return whether two folders have the same manifest, and the same files of the same sizes; none of them is read."""
    try:
        return read(folder / NAME, MAX_BYTES) == read(other / NAME, MAX_BYTES) and _files(folder) == _files(other)
    except (OSError, Damaged):
        return False


def read(path: Path, max_bytes: int) -> bytes:
    """Read a regular file of a sealed folder.

    Raises:
        Damaged: if it is missing, unreadable, not a regular file, or larger than `max_bytes`.
    """
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise Damaged(path.name, "is not a regular file")
        with path.open("rb") as file:
            content = file.read(min(os.fstat(file.fileno()).st_size, max_bytes) + 1)
    except FileNotFoundError:
        raise Damaged(path.name, "is missing") from None
    except OSError as error:
        raise Damaged(path.name, f"cannot be read ({error.strerror or error})") from error
    if len(content) > max_bytes:
        raise Damaged(path.name, f"has more than {max_bytes:,} bytes")
    return content


def read_json(path: Path, max_bytes: int) -> dict[str, object]:
    """Read a JSON object of a sealed folder.

    Raises:
        Damaged: if the file is something else, or `read` rejects it.
    """
    try:
        value = json.loads(read(path, max_bytes))
    except (ValueError, RecursionError):
        raise Damaged(path.name, "is not JSON") from None
    if not isinstance(value, dict):
        raise Damaged(path.name, "is not a JSON object")
    return value


def _listed(folder: Path) -> dict[str, FileFacts]:
    """Read the manifest, and check that each entry is {sha256, bytes} of a path inside the folder."""
    listed: dict[str, FileFacts] = {}
    for name, entry in read_json(folder / NAME, MAX_BYTES).items():
        parts = name.split("/")
        if not parts[0] or {"..", "."} & set(parts) or "\\" in name or os.path.isabs(name) or ":" in parts[0]:
            raise Damaged(NAME, f"names a file outside its folder ({name[:80]!a})")
        if not isinstance(entry, dict) or set(entry) != {"sha256", "bytes"} or not isinstance(entry["bytes"], int):
            raise Damaged(NAME, f"does not give sha256 and bytes of {name[:80]!a}")
        listed[name] = FileFacts(sha256=entry["sha256"], bytes=entry["bytes"])
    return listed


def _files(folder: Path) -> dict[str, int]:
    """Return {relative path with '/': size in bytes} of all files but the manifest."""
    found = {}
    for seen, (name, entry) in enumerate(_entries(folder)):
        if seen >= MAX_FILES:
            raise Damaged(name, f"is one of more than {MAX_FILES:,} files")
        facts = entry.stat(follow_symlinks=False)
        if stat.S_ISLNK(facts.st_mode):
            raise Damaged(name, "is a symbolic link")
        if stat.S_ISREG(facts.st_mode):
            found[name] = facts.st_size
        elif not stat.S_ISDIR(facts.st_mode):
            raise Damaged(name, "is neither a file nor a folder")
    found.pop(NAME, None)
    return dict(sorted(found.items()))


def _entries(folder: Path) -> Iterator[tuple[str, "os.DirEntry[str]"]]:
    """Yield (relative path, entry) for everything below a folder; symbolic links are not followed."""
    if stat.S_ISLNK(os.lstat(folder).st_mode):
        raise Damaged(".", "is a symbolic link")
    ahead = [""]
    while ahead:
        below = ahead.pop()
        with os.scandir(folder / below) as entries:
            for entry in entries:
                yield below + entry.name, entry
                if entry.is_dir(follow_symlinks=False):
                    ahead.append(f"{below}{entry.name}/")


def _described(path: Path) -> FileFacts:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": os.fstat(file.fileno()).st_size}


def _within(folder: Path, error: OSError) -> str:
    """Return the path, relative to the folder, of the file that an error is about."""
    try:
        return Path(str(error.filename)).relative_to(folder).as_posix()
    except ValueError:
        return str(error.filename or ".")
