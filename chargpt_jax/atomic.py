"""Atomic writes of files and folders: they are written next to their final path, and then renamed.

A rename protects against a process that ends in the middle. `sync_folder` and `sync_tree` are for what must also
survive a power failure.
"""

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[BinaryIO]:
    """Yield an open file that becomes `path` at the end of the block. If the block fails, the old file stays.

    Args:
        path: the file to create or replace; its folder must exist.
        shared: several processes may write the same path at the same time, so each gets a neighbour of its own.
            Otherwise the neighbour is always `path` + '.partial', and a later write reuses what a killed process left.
    """
    if shared:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        partial, file = Path(name), os.fdopen(descriptor, "wb")
    else:
        partial = path.with_name(path.name + ".partial")
        file = partial.open("wb")
    try:
        with file:
            yield file
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_file(path: Path, content: bytes, *, shared: bool = False) -> None:
    """Create or replace a file; `shared` as for `replacing`."""
    with replacing(path, shared=shared) as file:
        file.write(content)


def create_file(path: Path, content: bytes) -> None:
    """Write a file that must not exist yet.

    Raises:
        FileExistsError: if it exists.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def creating_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` at the end of the block. If the block fails, it is removed.

    `path` must not exist, or be an empty folder; missing parents are created at the end.
    """
    parent = next((p for p in (path.parent, *path.parent.parents) if p.exists()), path.parent)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}.", suffix=".partial", dir=parent))
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.rmdir()
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(new: Path, path: Path, aside: Path | None) -> None:
    """Rename `new` to `path`, and wait until that is on the disk. What was at `path` is renamed to `aside` first.

    Args:
        new: a complete folder, on the same file system.
        path: its new path.
        aside: where to move what is at `path`; None: `path` does not exist.

    Raises:
        OSError: if a rename fails; what was at `path` is there again.
    """
    if aside:
        os.rename(path, aside)
    try:
        os.rename(new, path)
    except OSError:
        if aside:
            with contextlib.suppress(OSError):
                os.rename(aside, path)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until every file and folder below a folder is on the disk, the outermost folder last."""
    folders, ahead = [], [folder]
    while ahead:
        folders.append(below := ahead.pop())
        with os.scandir(below) as entries:
            for entry in entries:
                if stat.S_ISDIR(entry.stat(follow_symlinks=False).st_mode):
                    ahead.append(below / entry.name)
                else:
                    _sync_file(below / entry.name)
    for below in reversed(folders):
        sync_folder(below)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)  # some systems sync only a file that is open for writing
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """Return the permissions that new files do not get. mkdtemp gives permissions only to the owner."""
    now = os.umask(0)
    os.umask(now)
    return now
