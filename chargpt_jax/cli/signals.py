"""Signals that stop a command, and output streams whose reader may close them."""

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TextIO, cast

from chargpt_jax.devices import ending

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
"""Signals that stop a command; Windows has no SIGHUP."""


MAX_ALARM = 1e6
"""Seconds that a timer of the system can certainly hold; it is set again for the rest."""

AGAIN_SECONDS = 1.0
"""A further signal within this time of a KeyboardInterrupt raises no second one, which could end a clean-up."""

WAITED_FOR = ("<frozen importlib", f"{os.sep}asyncio{os.sep}")
"""Parts of file names of code that a signal waits for: imports, because compiled modules may abort if they are
interrupted, and event loops, in which checkpoints are read, because other threads report to them."""

LEAVING_SECONDS = 2.0
"""Time in which one of several processes stops by itself; then a thread ends it, since it waits for another one."""

RETRY_SECONDS, MAX_RETRIES = 0.05, 200
"""How often, and how many times, to check whether such code has ended before a signal raises KeyboardInterrupt."""


class Signals:
    """Handler of SIGINT, SIGTERM, SIGHUP and a time limit for the duration of a command.

    A signal raises KeyboardInterrupt at once, or after code of `WAITED_FOR` that is running. While `deferred` is set
    it is only recorded, and the command stops at the next point where it has saved its state. A second SIGINT always
    exits immediately: a thread watches for it, because Python's own handlers do not run before compiled code returns.
    """

    def __init__(self, last: bool = False) -> None:
        """Create a handler; `last`: the process ends after the command, so further signals are then ignored."""
        self.deferred = False
        self.finished = False
        """Whether the command's exit code is known, and a signal must not change it."""
        self.interrupted = False
        """Whether a signal or the time limit has raised KeyboardInterrupt."""
        self.advice = ""
        """Added to the message "Stopped by SIGNAL"."""
        self.shared = False
        """Whether this is one of several processes, which a signal to one of them stops."""
        self.last, self._number = last, cast("int | None", None)
        self._deadline, self._raised, self._retries = math.inf, -math.inf, 0
        self._stopping, self._reporting, self._reported = threading.Lock(), threading.Lock(), False
        self._outermost: FrameType | None = None
        """The frame of the command."""
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> "Signals":
        """Install the handlers; in other threads than the main one Python does not allow that, and nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            return self
        self._outermost = sys._getframe(1)
        inner, outer = socket.socketpair()
        outer.setblocking(False)
        self._sockets, self._fd_before = (inner, outer), signal.set_wakeup_fd(outer.fileno(), warn_on_full_buffer=False)
        for name, handler in (*dict.fromkeys(NAMES, self._on_signal).items(), ("SIGALRM", self._on_alarm)):
            if hasattr(signal, name):
                self._before[getattr(signal, name)] = signal.signal(getattr(signal, name), handler)
        self._hook_before, sys.unraisablehook = sys.unraisablehook, self._on_unraisable
        threading.Thread(target=self._watch, args=(inner,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the handlers of before, or ignore further signals if the process ends now.

        An interrupted process leaves without Python's own clean-up, which crashes while a thread compiles a program.
        """
        self.finished, self._outermost = True, None
        if self.last and self.interrupted:
            self._leave()
        if self._before:
            _set_alarm(0.0)
            sys.unraisablehook = self._hook_before
            signal.set_wakeup_fd(self._fd_before)
            for number, handler in self._before.items():
                signal.signal(number, signal.SIG_IGN if self.last else handler)
            self._sockets[1].close()  # the thread ends with it

    @property
    def name(self) -> str:
        """The name of the signal that arrived; SIGINT if only a KeyboardInterrupt was seen."""
        return signal.Signals(self._number or signal.SIGINT).name

    @property
    def out_of_time(self) -> bool:
        """Whether the time limit, and no signal, has ended the command."""
        return self._number is None and time.monotonic() >= self._deadline

    @property
    def code(self) -> int:
        """The exit code: 0 for the time limit, 130 for SIGINT, 143 for the others."""
        return 0 if self.out_of_time else code_of(self._number or signal.SIGINT)

    @property
    def message(self) -> str:
        """The message that reports the signal or the time limit."""
        return f"{'Time limit reached' if self.out_of_time else f'Stopped by {self.name}'}{self.advice}."

    def report(self, write: Callable[[str], object]) -> None:
        """Write the message, once: two threads may end a process at the same time."""
        with self._reporting:
            if not self._reported:
                self._reported = True
                write(self.message)

    def stopped_with(self, number: int) -> None:
        """Stop because of a signal to another process, 0 for its time limit, as if it had arrived here."""
        self._number = self._number or number or None
        if self._number is None:
            self._deadline = -math.inf
        self.interrupted = True

    def hear(self) -> None:
        """Stop when another of several processes, which are connected now, does so."""

        def stop(number: int) -> None:
            self.stopped_with(number)
            self._stop_soon()

        ending.listen(stop)

    def received(self) -> int | None:
        """Return the number of the first signal that arrived, or None."""
        return self._number

    def end_after(self, seconds: float) -> None:
        """Raise KeyboardInterrupt after a time; while `deferred` is set, training watches the time itself.

        Windows has no SIGALRM: there the limit holds from the first training step on.
        """
        if self._before:
            self._deadline = time.monotonic() + seconds
            _set_alarm(seconds)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._number = self._number or number
        self._stop(frame)

    def _on_alarm(self, _: int, frame: FrameType | None) -> None:
        """Stop at the time limit, or for a signal that had to wait for an import."""
        if self._number is not None or time.monotonic() >= self._deadline:
            self._stop(frame)
        else:
            _set_alarm(self._deadline - time.monotonic())

    def _stop(self, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt, unless the command is about to end, or must not or cannot be interrupted now."""
        if self.deferred and self._number is None:  # the limit holds again after training
            _set_alarm(AGAIN_SECONDS)
        if self.deferred or self.finished or time.monotonic() - self._raised < AGAIN_SECONDS:
            return
        if hasattr(signal, "SIGALRM") and self._retries < MAX_RETRIES and self._must_wait(frame):
            self._retries += 1
            _set_alarm(RETRY_SECONDS)
            return
        self.interrupted, self._raised = True, time.monotonic()
        raise KeyboardInterrupt

    def _on_unraisable(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """Stop again if a callback, as of a weak reference, has swallowed the KeyboardInterrupt."""
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            self._hook_before(unraisable)
            return
        self._raised = -math.inf
        _set_alarm(RETRY_SECONDS)

    def _must_wait(self, frame: FrameType | None) -> bool:
        """Return whether code of `WAITED_FOR`, called by this command, is running in a frame."""
        while frame is not None and frame is not self._outermost:
            if any(part in frame.f_code.co_filename for part in WAITED_FOR):
                return True
            frame = frame.f_back
        return False

    def _watch(self, arrived: socket.socket) -> None:
        """Exit at the second SIGINT; the socket receives a byte, its number, for every signal."""
        count, stopping = 0, {getattr(signal, name) for name in NAMES if hasattr(signal, name)}
        while number := arrived.recv(1):
            if count and number[0] == signal.SIGINT:
                os.write(2, b"\nchargpt: Exited immediately; files saved earlier are intact.\n")
                os._exit(130)
            if not count and number[0] in stopping and self.shared and not (self.deferred or self.finished):
                self.stopped_with(number[0])
                threading.Thread(target=self._stop_soon, daemon=True).start()
            count += number[0] in stopping
        arrived.close()

    def _stop_soon(self) -> None:
        """End this process and the others within a few seconds, even if it waits for one of them in compiled code."""
        if not self._stopping.acquire(blocking=False):
            return  # another thread does so: a process hears its own announcement
        ending.announce(self._number or 0)
        _set_alarm(RETRY_SECONDS)  # raises KeyboardInterrupt in the main thread, when it runs Python's code
        time.sleep(LEAVING_SECONDS)
        if not self.finished:
            self.report(lambda message: print(f"chargpt: {message}", file=sys.stderr, flush=True))
            self._leave()

    def _leave(self) -> None:
        """Exit at once, without Python's own clean-up."""
        if self.shared:
            ending.announce(self._number or 0)
            ending.leave_together(self.code)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(self.code)


def code_of(number: int) -> int:
    """Return the exit code for a signal: 130 for SIGINT, 143 for the others."""
    return 130 if number == signal.SIGINT else 143


def _set_alarm(seconds: float) -> None:
    """Send SIGALRM to this process after a time; 0: do not."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, min(seconds, MAX_ALARM))


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
