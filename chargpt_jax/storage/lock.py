"""Only one process trains in a workdir: a lock file that names the process which holds it.

The kernel holds the lock (flock, or its equivalent on Windows) and releases it when the process ends, however it ends.
A stale lock file is therefore ignored. The content of the file is for error messages, and for two cases in which the
kernel cannot tell: disks without such locks, and processes on other machines that share a disk. A lock of another
machine expires EXPIRY seconds after its last heartbeat, which is the modification time of the file.
"""

import contextlib
import datetime
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from chargpt_jax.errors import SaveFailed, UserError

NAME = "lock.json"

EXPIRY = 900.0
"""Seconds without a heartbeat after which the lock of a process that cannot be checked expires."""

HEARTBEAT = 10.0
"""Minimum time between two heartbeats, seconds."""

MAX_DATE = 253_000_000_000.0
"""The latest date that is printed, in the year 9987; file systems hold later ones."""

BOOT_TOLERANCE = 2.0
"""Maximum difference of two readings of one boot time, seconds: the clock is adjusted now and then."""

START_TOLERANCE = 0.05
"""Maximum difference of two readings of the time from the boot to the start of one process, seconds."""


NO_FILE = "{} is not a regular file with one name: remove it."
"""The message for a lock that is a folder, a link or a pipe, or has a second name."""


class Lock:
    """The right to write into a workdir, held by this process; `writer` creates it."""

    def __init__(self, path: Path, file: int) -> None:
        """Take an open, locked lock file."""
        self.path, self.file, self.lost = path, file, False
        self._pid, self._last_heartbeat = os.getpid(), time.monotonic()
        self._folder = os.stat(path.parent)

    def alive(self) -> None:
        """Update the modification time of the file, at most once every HEARTBEAT seconds.

        Raises:
            UserError: if a newer training in this process has taken over the workdir.
            SaveFailed: if the workdir was moved or removed, so that no checkpoint can be saved in it.
        """
        folder = self.path.parent
        try:
            there = os.path.samestat(os.stat(folder), self._folder)
            # While a folder is being removed, a save may keep it from vanishing.
            there = there and (self.path.exists() or any(path.suffix == ".json" for path in folder.iterdir()))
        except (FileNotFoundError, NotADirectoryError):
            there = False
        except OSError:  # the disk fails: the next save reports it
            there = True
        if not there:
            raise SaveFailed(
                f"{folder} was moved or removed during training, so training has stopped: run the same command again "
                "with the --workdir where the run is; it continues from the newest checkpoint, if one was saved."
            )
        if self.lost:
            raise UserError(f"A newer training in this process has taken over {folder}: continue with that one.")
        if time.monotonic() - self._last_heartbeat >= HEARTBEAT:
            self._last_heartbeat = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """Release the lock. A second call, or a call in a forked child, has no effect."""
        if self.lost or self._pid != os.getpid():
            return
        self.lost = True
        _held.pop(self.path, None)
        if os.name == "posix":  # while the file is locked, so that the file of the next holder is not removed
            with contextlib.suppress(OSError):  # a disk that became read-only
                self.path.unlink()
        os.close(self.file)
        if os.name != "posix":  # Windows removes only closed files
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)


class NoLock(Lock):
    """What a process has while another one holds the lock of a workdir for both."""

    def __init__(self) -> None:
        """Hold nothing."""

    def alive(self) -> None:
        """Do nothing: the other process updates and checks the file."""

    def release(self) -> None:
        """Do nothing."""


_held: dict[Path, Lock] = {}
"""The locks of this process. A training interrupted in a notebook may hold one; the next training takes it over."""


@contextlib.contextmanager
def writer(folder: Path) -> Iterator[Lock]:
    """Hold the lock of a workdir. Folders that are created for it and stay empty are removed at the end.

    Raises:
        UserError: if another process holds it, naming its pid and host; no file has been changed then.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = None
    try:
        lock = _acquire(folder / NAME)
        yield lock
    finally:
        if lock is not None:
            lock.release()
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


def holder(path: Path) -> str:
    """Return the content of a lock file, which names the process that holds the lock; '' if there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")[:2000]
    except OSError:
        return ""


def _acquire(path: Path) -> Lock:
    if path in _held:
        _held[path].release()
    while True:
        file = _open(path)
        try:
            if refusal := _refusal(file, path):
                raise UserError(refusal)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(path)):  # otherwise its holder has just removed it
                    _sign(file)
                    _held[path] = Lock(path, file)
                    return _held[path]
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT
    # Do not follow a link to another file, and do not block on a pipe.
    for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):
        flags |= getattr(os, name, 0)
    for _ in range(100):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, flags, 0o644)
        except FileNotFoundError:  # another process has just removed the folder that it had created
            continue
        except OSError as error:
            if path.is_symlink() or path.is_dir():
                raise UserError(NO_FILE.format(path)) from None
            raise UserError(f"Cannot write {path} ({error.strerror}): choose another --workdir.") from None
        facts = os.fstat(file)
        if stat.S_ISREG(facts.st_mode) and facts.st_nlink <= 1:  # the lock overwrites it, under every name
            return file
        os.close(file)
        raise UserError(NO_FILE.format(path))
    raise UserError(f"Cannot write {path} (its folder cannot be created): choose another --workdir.")


def _refusal(file: int, path: Path) -> str | None:
    """Lock an open file. Return None if this process holds the lock now, and otherwise an error message."""
    holder, age = _read(file), time.time() - os.fstat(file).st_mtime
    here, locked = holder.get("host") == socket.gethostname(), _lock(file)
    process = f"Process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')}"
    if locked is False or (locked is None and here and _runs(holder)):
        return f"{process} is writing to the run in {path.parent}: wait for it, stop it, or use another --workdir."
    # Containers on one machine have different host names, but the kernel and its start are the same.
    gone = here or (locked and _near(holder.get("boot"), psutil.boot_time(), BOOT_TOLERANCE))
    if not holder or gone or age >= EXPIRY:
        return None
    active = f"was last active {max(0, age):.0f} s ago"
    if age < -EXPIRY:  # a clock was wrong, and this lock would hardly ever expire
        dated = datetime.datetime.fromtimestamp(min(time.time() - age, MAX_DATE)).strftime("%Y-%m-%d %H:%M")
        with contextlib.suppress(OSError):
            os.utime(file)
        active = f"the file is dated {dated}, in the future, so its time counts from now"
    return (
        f"{process} locked the run in {path.parent} and {active}; this machine cannot check whether it still runs. If "
        f"it does not, delete {path}, or wait: the lock expires after {EXPIRY / 60:.0f} minutes without activity."
    )


def _lock(file: int) -> bool | None:
    """Lock a file until this process ends. True: it is locked; False: another has it; None: the disk has no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(file, 1 << 30, os.SEEK_SET)  # beyond the content, which other processes may read
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (OSError, ImportError):
        return None
    return True


def _read(file: int) -> dict[str, object]:
    """Return the content of a lock file; {} if it is malformed."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        os.lseek(file, 0, os.SEEK_SET)
        holder = json.loads(os.read(file, 2000))
        if isinstance(holder["pid"], int) and isinstance(holder["host"], str) and holder["host"].isprintable():
            return holder
    return {}


def _sign(file: int) -> None:
    """Write who holds the lock. On a full disk the file stays empty, and the lock is held all the same."""
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "process_started": _started(os.getpid()),
        "boot": psutil.boot_time(),
    }
    with contextlib.suppress(OSError):
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        os.write(file, json.dumps(holder).encode())


def _runs(holder: dict[str, object]) -> bool:
    """Return whether a process of this machine still runs: the same process, not another one with its pid."""
    started = holder.get("process_started")
    if isinstance(started, str) and started.isdecimal() and len(started) < 20 and os.name == "posix":
        started = int(started) / os.sysconf("SC_CLK_TCK")  # version 0.1.0 wrote clock ticks
    try:
        return _near(started, _started(holder["pid"]), START_TOLERANCE)
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False


def _started(pid: object) -> float:
    """Return the time from the boot of this machine to the start of a process, seconds."""
    boot = psutil.boot_time()  # first: psutil adds the boot time that it read last, and the clock may be adjusted
    return psutil.Process(pid).create_time() - boot


def _near(one: object, other: float, tolerance: float) -> bool:
    return isinstance(one, int | float) and abs(one - other) <= tolerance
