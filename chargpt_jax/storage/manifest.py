"""Seal a folder with the sha256 of each of its files, and tell later whether it is still what was sealed.

A manifest finds what a file system does not: a flipped bit, a file cut short, missing, added or swapped with another.
It proves that nothing was damaged, not who wrote it: whoever can change a file can seal the folder anew.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "manifest.json"
"""The file that lists the others, in the folder that it seals."""

MOST_FILES = 10_000
"""Files and folders of a sealed folder; one that claims more is refused before any is read."""

MOST_BYTES = 4_000_000
"""The longest manifest: a file takes about 150 bytes of it."""

MOST_TOTAL = 2**36
"""Bytes of a sealed folder: reading more than 64 GiB would look like hanging."""


class Damaged(Exception):
    """A folder is not what was sealed: which file of it, and what is wrong with that."""

    def __init__(self, file: str, reason: str):
        super().__init__(file, reason)
        self.file, self.reason = file, reason

    def __str__(self) -> str:
        file = self.file if self.file.isprintable() else ascii(self.file)
        return f"{file[:200]} {self.reason}"


def seal(folder: Path) -> None:
    """Write the manifest of a folder that is complete, and wait until all of it is on the disk."""
    files = {name: _described(folder / name) for name in _files(folder)}
    write(folder / NAME, json.dumps(files, indent=1).encode() + b"\n")
    _sync(folder)


def write(path: Path, content: bytes) -> None:
    """Write a new file, whole or with an error."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    finally:
        os.close(descriptor)


def verify(folder: Path) -> None:
    """Compare a folder with its manifest: sizes first, then content. Nothing outside the folder is ever opened.

    Raises:
        Damaged: naming the first file that is not as it was sealed.
    """
    try:
        listed = _listed(folder)
        found = _files(folder)
        for name in sorted(listed.keys() - found.keys()):
            raise Damaged(name, "is missing")
        for name, size in found.items():
            if name not in listed:
                raise Damaged(name, "is not in the manifest")
            if size != listed[name]["bytes"]:
                raise Damaged(name, f"has {size:,} bytes, but {listed[name]['bytes']:,} were saved")
        if sum(found.values()) > MOST_TOTAL:
            raise Damaged(NAME, f"lists more than {MOST_TOTAL:,} bytes")
        for name in found:
            if _described(folder / name) != listed[name]:
                raise Damaged(name, "has another sha256 than when it was saved")
    except OSError as error:
        raise Damaged(_within(folder, error), f"cannot be read ({error.strerror or error})") from error


def read(path: Path, most: int) -> bytes:
    """Read a regular file of a sealed folder, of at most so many bytes.

    Raises:
        Damaged: where it is not one.
    """
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise Damaged(path.name, "is not a regular file")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except FileNotFoundError:
        raise Damaged(path.name, "is missing") from None
    except OSError as error:
        raise Damaged(path.name, f"cannot be read ({error.strerror or error})") from error
    if len(content) > most:
        raise Damaged(path.name, f"has more than {most:,} bytes")
    return content


def read_json(path: Path, most: int) -> dict[str, Any]:
    """Read a JSON object of at most so many bytes.

    Raises:
        Damaged: where the file is something else.
    """
    try:
        value = json.loads(read(path, most))
    except (ValueError, RecursionError):
        raise Damaged(path.name, "is not JSON") from None
    if not isinstance(value, dict):
        raise Damaged(path.name, "is not a JSON object")
    return value


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if os.name == "nt":  # there a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the manifest, whose every entry is then known to be {sha256, bytes} of a file inside the folder."""
    listed = read_json(folder / NAME, MOST_BYTES)
    for name, entry in listed.items():
        parts = name.split("/")
        if not parts[0] or {"..", "."} & set(parts) or "\\" in name or os.path.isabs(name) or ":" in parts[0]:
            raise Damaged(NAME, f"names a file outside its folder ({name[:80]!a})")
        if not isinstance(entry, dict) or set(entry) != {"sha256", "bytes"} or not isinstance(entry["bytes"], int):
            raise Damaged(NAME, f"does not give sha256 and bytes of {name[:80]!a}")
    return listed


def _files(folder: Path) -> dict[str, int]:
    """Return {name: bytes} of all files but the manifest, by their paths from the folder with '/' between."""
    found = {}
    for seen, (name, entry) in enumerate(_entries(folder)):
        if seen >= MOST_FILES:
            raise Damaged(name, f"is one of more than {MOST_FILES:,} files")
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
    """Yield everything below a folder with its path from there; links are not followed."""
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


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": os.fstat(file.fileno()).st_size}


def _sync(folder: Path) -> None:
    """Wait until every file and folder is on the disk, the outermost folder last."""
    folders = [folder]
    for name, entry in _entries(folder):
        if entry.is_dir(follow_symlinks=False):
            folders.append(folder / name)
            continue
        descriptor = os.open(folder / name, os.O_RDWR)  # some systems sync only what may be written
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    for below in reversed(folders):
        sync_folder(below)


def _within(folder: Path, error: OSError) -> str:
    """Name the file that an error is about by its path from the folder."""
    try:
        return Path(str(error.filename)).relative_to(folder).as_posix()
    except ValueError:
        return str(error.filename or ".")
