"""Atomic writes of files and folders: they are written next to their final path, and then renamed.

A rename protects against a process that ends in the middle. `sync_folder` and `sync_tree` are for what must also
survive a power failure.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PARTIAL = re.compile(r"\..*\.[0-9a-z_]{8}\.partial", re.DOTALL)
"""The name of a temporary file or folder: that of its target with 8 random characters."""

OLD_SECONDS = 86_400.0
"""Age at which a temporary file outside of a run's folder is of a killed process."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield an open file that becomes `path` at the end of the block. If the block fails, the old file stays.

    The file is created under a name that did not exist, next to `path`, whose folder must exist. No link is followed,
    and several processes may write the same path at the same time.
    """
    partial = _fresh(path)
    file = open(partial, "xb")  # noqa: SIM115
    try:
        with file:
            yield file
        os.replace(partial, path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_file(path: Path, content: bytes) -> None:
    """Create or replace a file, as `replacing` does."""
    with replacing(path) as file:
        file.write(content)


def sweep(folder: Path, seconds: float = 0.0, start: str = "") -> None:
    """Remove the temporary files that killed processes have left in a folder.

    Args:
        folder: may be missing.
        seconds: minimum age of a file; a younger one may belong to a process that still writes it.
        start: only files whose name starts so, after the dot.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                facts = entry.stat(follow_symlinks=False)
                ours = PARTIAL.fullmatch(entry.name) and entry.name.startswith(f".{start}")
                if ours and time.time() - facts.st_mtime >= seconds:
                    shutil.rmtree(entry.path) if stat.S_ISDIR(facts.st_mode) else os.unlink(entry.path)


def regular_only(path: str, flags: int) -> int:
    """Open a regular file, and no other: an `opener` for `open`.

    Raises:
        OSError: if the path is a link, a folder or a pipe.
    """
    # Do not follow a link to another file, and do not block on a pipe.
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"):
        flags |= getattr(os, name, 0)
    descriptor = os.open(path, flags, 0o666)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file", path)


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
def creating_folder(path: Path, last: str = "") -> Iterator[Path]:
    """Yield an empty folder that becomes `path` at the end of the block. If the block fails, it is removed.

    If `path` is an empty folder, or a link to one, the items of the yielded folder are moved into it instead: it may be
    a mount point or the current folder, and keeps its permissions.

    Args:
        path: must not exist, or be an empty folder; missing parents are created at the end.
        last: the name of the file without which the folder is not accepted by any reader: it is moved last.
    """
    exists = path.is_dir()
    parent = path if exists else next((p for p in (path.parent, *path.parent.parents) if p.exists()), path.parent)
    sweep(parent, OLD_SECONDS, f"{path.name[:40]}.")
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}.", suffix=".partial", dir=parent))
    try:
        yield partial
        if exists:
            for name in sorted(os.listdir(partial), key=lambda name: name == last):
                os.rename(partial / name, path / name)
        else:
            with contextlib.suppress(OSError):  # a network disk without permissions
                partial.chmod(0o777 & ~_umask())
            path.parent.mkdir(parents=True, exist_ok=True)
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


def remove(path: Path) -> None:
    """Remove a folder, or a link or file in its place; give up after a second if the system refuses."""
    for _ in range(20):
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        if not os.path.lexists(path):
            return
        time.sleep(0.05)


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


def _fresh(path: Path) -> Path:
    """Return a new name next to a path. A part of its name is enough: the longest names have 255 bytes."""
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.partial")


def _umask() -> int:
    """Return the permissions that new files do not get. mkdtemp gives permissions only to the owner."""
    now = os.umask(0)
    os.umask(now)
    return now
