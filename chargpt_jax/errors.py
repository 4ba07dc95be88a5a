"""Exceptions of the package, each with the exit code that `main` returns for it. Imports no file of the package."""

import contextlib
import errno
from collections.abc import Callable, Iterator


class ExpectedError(Exception):
    """An error that the command reports in one line, without a traceback."""

    exit_code = 2

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class UserError(ExpectedError, ValueError):
    """Invalid arguments or input: the message gives the value, the rule and the fix."""


class NoClearAnswer(UserError):
    """The range test proposes no learning rate."""

    def __init__(self, message: str, reason: str) -> None:
        """Give the message, and the reason: 'not finite', 'no fall', 'batches' or 'seeds'."""
        super().__init__(message)
        self.reason = reason


class NoCheckpoint(ExpectedError):
    """No usable checkpoint was found."""

    exit_code = 3


class NonFiniteLoss(ExpectedError):
    """Training stopped because a loss or a gradient is NaN or infinite."""

    exit_code = 4


class SaveFailed(ExpectedError):
    """A checkpoint could not be written."""

    exit_code = 5


class ProcessLost(ExpectedError):
    """Another process of a training with several processes has ended, or cannot be reached."""

    exit_code = 6


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether Python, NumPy or JAX raised an exception because no memory was left, on the host or a device."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)[:1000]


def reason(error: Exception) -> str:
    """Return the words of an error; of an OSError without its number and its path."""
    return getattr(error, "strerror", None) or str(error)


def remedy(error: object, otherwise: str) -> str:
    """Return what a user can do about an error of a file that is to be read: as for permissions, or `otherwise`."""
    number = getattr(error, "errno", None)
    if number in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n)"
    return "make it readable" if number in (errno.EACCES, errno.EPERM) else otherwise


@contextlib.contextmanager
def excused(what: str, warn: Callable[[str], None]) -> Iterator[None]:
    """Turn an OSError of the block, which writes something optional, into a warning."""
    try:
        yield
    except OSError as error:
        warn(f"Cannot write {what} ({error.strerror}): the run continues without it.")
