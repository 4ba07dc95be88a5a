"""One writer for a run: a lock file that names the process which holds it.

The kernel holds the lock where it can (flock, or its like on Windows) and lets go of it when the process ends, however
it ends: a lock that is left over stops nobody, nor does one from before a reboot, nor a pid that is another's now.
What the file says is for people, and for the two cases in which the kernel cannot be asked: disks without such locks,
and holders on other machines that share a disk. Of those a holder counts until it has been silent for `SILENCE`
seconds; every sign of life is a new time of the file.
"""

import contextlib
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chargpt_jax.errors import UserError

NAME = "lock.json"

SILENCE = 900.0
"""Seconds without a sign of life after which a holder that cannot be asked is taken to be gone."""

SIGN = 10.0
"""Seconds between two signs of life, at least."""


class Lock:
    """The right to write into a run, held by this process; `writer` gives it."""

    def __init__(self, path: Path, file: int):
        """Take over the lock's file, which is open and locked."""
        self.path, self.file, self.lost = path, file, False
        self._pid, self._seen = os.getpid(), time.monotonic()

    def alive(self) -> None:
        """Give a sign of life, where the last is some seconds old.

        Raises:
            UserError: where a later training in this process has taken the run over.
        """
        if self.lost:
            raise UserError(f"A later training in this process writes into {self.path.parent} now: go on with that.")
        if time.monotonic() - self._seen >= SIGN:
            self._seen = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """Let go; a second time, or in a forked child, does nothing."""
        if self.lost or self._pid != os.getpid():
            return
        self.lost = True
        _held.pop(self.path, None)
        # Removed while it is still locked, so that nobody's later file is; Windows removes closed files only.
        if os.name == "posix":
            self.path.unlink(missing_ok=True)
        os.close(self.file)
        if os.name != "posix":
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)


_held: dict[Path, Lock] = {}
"""The locks of this process: a run that was broken off in a notebook may still hold one, and the next takes it over."""


@contextlib.contextmanager
def writer(folder: Path) -> Iterator[Lock]:
    """Hold the right to write into a run's folder; folders that had to be made and stay empty are removed again.

    Raises:
        UserError: where another process holds it, naming its pid and host; nothing has been touched then.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = None
    try:
        lock = _take(folder / NAME)
        yield lock
    finally:
        if lock is not None:
            lock.release()
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


def refuse_if_held(folder: Path) -> None:
    """Refuse a folder that another process writes into, naming its pid and host, as `writer` does."""
    if (folder / NAME).exists():
        with writer(folder):
            pass


def _take(path: Path) -> Lock:
    if path in _held:
        _held[path].release()
    while True:
        file = _opened(path)
        try:
            if refusal := _refusal(file, path):
                raise UserError(refusal)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(path)):  # else its holder has just removed it
                    _sign(file)
                    _held[path] = Lock(path, file)
                    return _held[path]
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _opened(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT
    # A link must not lead to a file of others, and a pipe must not keep us waiting.
    for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):
        flags |= getattr(os, name, 0)
    for _ in range(100):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, flags, 0o644)
        except FileNotFoundError:  # a folder that another process, refused for its text, has just removed
            continue
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): choose another --workdir.") from None
        if stat.S_ISREG(os.fstat(file).st_mode):
            return file
        os.close(file)
        raise UserError(f"{path} is no file that can be written: remove it.")
    raise UserError(f"{path} cannot be written (no folder can be made there): choose another --workdir.")


def _refusal(file: int, path: Path) -> str | None:
    """Lock an open file; where that cannot be, say why."""
    found, silent = _read(file), time.time() - os.fstat(file).st_mtime
    here, locked = found.get("host") == socket.gethostname(), _lock(file)
    run = f"The run in {path.parent}"
    holder = f"process {found.get('pid', 'unknown')} on {found.get('host', 'an unknown host')}"
    if locked is False or (locked is None and here and _runs(found)):
        return f"{run} is being written by {holder}: wait for it, stop it, or give another --workdir."
    # Containers on one machine have names of their own, but one kernel.
    known_gone = here or (locked and found.get("boot") == _boot())
    if not found or known_gone or silent >= SILENCE:
        return None
    return (
        f"{run} was written by {holder} {max(0, silent):.0f} s ago, and whether that still runs cannot be seen from "
        f"here: if it does not, remove {path}; after {SILENCE / 60:.0f} minutes of silence it no longer counts."
    )


def _lock(file: int) -> bool | None:
    """Ask the kernel for a lock that ends with this process: True if it is ours, None where the disk has no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(file, 1 << 30, os.SEEK_SET)  # far from what the file says, which others may read
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (OSError, ImportError):
        return None
    return True


def _read(file: int) -> dict[str, Any]:
    """Return what a lock file says; nothing where that makes no sense."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        os.lseek(file, 0, os.SEEK_SET)
        said = json.loads(os.read(file, 2000))
        if isinstance(said["pid"], int) and isinstance(said["host"], str) and said["host"].isprintable():
            return said
    return {}


def _sign(file: int) -> None:
    """Write who holds the lock; on a full disk it is held without a name."""
    pid = os.getpid()
    said = {"pid": pid, "host": socket.gethostname(), "process_started": _started(pid), "boot": _boot()}
    with contextlib.suppress(OSError):
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        os.write(file, json.dumps(said).encode())


def _runs(found: dict[str, Any]) -> bool:
    """Say whether a process of this machine still runs: the same one, not another with its pid."""
    if found.get("boot") != _boot() or os.name != "posix":
        return False
    try:
        os.kill(found["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return found.get("process_started") == _started(found["pid"])


def _boot() -> str | None:
    """Return what tells this start of the machine from others, where the system says it."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def _started(pid: int) -> str | None:
    """Return when a process started, in ticks since the machine did, where the system says it."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    return None
