"""Signals that stop a command, and output streams whose reader may close them."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TextIO

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
"""Signals that stop a command; Windows has no SIGHUP."""


class Signals:
    """Handler of SIGINT, SIGTERM and SIGHUP for the duration of a command.

    A signal raises KeyboardInterrupt at once. While `deferred` is set it is only recorded, and the command stops at the
    next point where it has saved its state. A second SIGINT always exits immediately: a thread watches for it, because
    Python's own handlers do not run before compiled code returns.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.interrupted = False
        """Whether a signal has raised KeyboardInterrupt."""
        self.advice = ""
        """Added to the message "Stopped by SIGNAL"."""
        self._number: int | None = None
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> "Signals":
        """Install the handlers; in other threads than the main one Python does not allow that, and nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            return self
        for name in NAMES:
            if hasattr(signal, name):
                self._before[getattr(signal, name)] = signal.signal(getattr(signal, name), self._on_signal)
        inner, outer = socket.socketpair()
        outer.setblocking(False)
        self._sockets, self._fd_before = (inner, outer), signal.set_wakeup_fd(outer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(inner,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the handlers of before."""
        if self._before:
            signal.set_wakeup_fd(self._fd_before)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._sockets[1].close()  # the thread ends with it

    @property
    def name(self) -> str:
        """The name of the signal that arrived; SIGINT if only a KeyboardInterrupt was seen."""
        return signal.Signals(self._number or signal.SIGINT).name

    @property
    def code(self) -> int:
        """The exit code: 130 for SIGINT, 143 for the others."""
        return 130 if self._number in (None, signal.SIGINT) else 143

    @property
    def message(self) -> str:
        """The message that reports the signal."""
        return f"Stopped by {self.name}{self.advice}."

    def received(self) -> int | None:
        """Return the number of the first signal that arrived, or None."""
        return self._number

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._number = self._number or number
        if not self.deferred:
            self.interrupted = True
            raise KeyboardInterrupt

    def _watch(self, arrived: socket.socket) -> None:
        """Exit at the second SIGINT; the socket receives a byte, its number, for every signal."""
        count = 0
        while number := arrived.recv(1):
            if count and number[0] == signal.SIGINT:
                os.write(2, b"\nchargpt: Exited immediately; files saved earlier are intact.\n")
                os._exit(130)
            count += number[0] in self._before
        arrived.close()


def ignore_signals() -> None:
    """Ignore all signals that stop a command: the work is done, and its exit code must not change any more."""
    for name in NAMES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def open_standard_streams() -> None:
    """Open closed standard streams on os.devnull; otherwise a file opened later could get their descriptor."""
    for stream in (0, 1, 2):
        try:
            os.fstat(stream)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


class ResilientStream:
    """A text stream whose reader may close it (`| head`, a closed terminal): output is then discarded."""

    def __init__(self, stream: TextIO):
        """Wrap a stream."""
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, unless the reader has closed the stream."""
        with self._closing_ignored():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, unless the reader has closed the stream."""
        with self._closing_ignored():
            self._stream.flush()

    def mute(self) -> None:
        """Discard all further output."""
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _closing_ignored(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.mute()
