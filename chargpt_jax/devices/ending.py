"""How several processes end: together at a signal or an error, and with one sentence if one of them is lost.

During training a signal is agreed on like any other decision, and a checkpoint is saved. At other times (preparation
of the text, range test, compilation, samples) a process may be waiting for another one in compiled code, which no
signal can interrupt. The process that got the signal then announces it through JAX's coordination service, a thread of
each process hears that, and all of them leave.
"""

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from chargpt_jax.devices import processes
from chargpt_jax.errors import ExpectedError, ProcessLost

LEAVING_SECONDS = 5.0
"""Time that a process with an error, and process 0 in any case, waits for the others to end."""

EXITING_SECONDS = 0.5
"""Time that process 0 leaves the others between their last message and their exit.

JAX aborts a process that still runs when process 0 has ended.
"""

HEARING_SECONDS = 60
"""Time of one request that waits for an announcement; another one follows."""

STOPPED, LEFT = "chargpt/stopped", "chargpt/left/"
"""Keys of the coordination service: the announced signal; the processes that have left."""

LOST = re.compile(
    r"Gloo|NCCL|[Cc]oordination|heartbeat|Connection (closed|reset)|Socket closed|DEADLINE_EXCEEDED|UNAVAILABLE"
)
"""Parts of JAX's errors if another process has ended or cannot be reached."""


def _client() -> Any:
    """Return the client of JAX's coordination service; None while this process is not connected with others."""
    return _state().client if processes.started() else None


def _state() -> Any:
    """Return JAX's record of the connection; jax.process_index() may wait for other processes, and this does not."""
    from jax._src import distributed

    return distributed.global_state


def announce(number: int) -> None:
    """Tell all processes that the signal of this number ends them, 0 for the time limit; the first one counts."""
    if (client := _client()) is not None:
        with contextlib.suppress(Exception):  # one was announced before, or process 0 has ended
            client.key_value_set(STOPPED, str(number))


def announced() -> int | None:
    """Return the number of the signal that was announced, or None."""
    if (client := _client()) is not None:
        with contextlib.suppress(Exception):  # none was announced, or process 0 has ended
            return int(client.key_value_try_get(STOPPED))
    return None


def listen(hear: Callable[[int], None]) -> None:
    """Call a function, in a thread, with the number of the signal that any process announces."""
    if (client := _client()) is not None:
        threading.Thread(target=_listen, args=(client, hear), daemon=True).start()


def _listen(client: Any, hear: Callable[[int], None]) -> None:
    while True:
        try:
            number = int(client.blocking_key_value_get(STOPPED, 1000 * HEARING_SECONDS))
        except Exception as error:
            if "DEADLINE_EXCEEDED" in str(error):
                continue
            return None  # this process has disconnected, or process 0 has ended
        return hear(number)


def leave_together(code: int) -> None:
    """Exit after a signal; process 0 does so last, because JAX ends the others when it ends."""
    _flush()
    if (client := _client()) is not None:
        with contextlib.suppress(Exception):  # process 0 has ended
            if index := _state().process_id:
                client.key_value_set(f"{LEFT}{index}", "")
            else:
                _wait_for_others(client, _state().num_processes - 1)
    os._exit(code)


def _wait_for_others(client: Any, count: int) -> None:
    """Wait until the other processes have left, but not longer than LEAVING_SECONDS."""
    end = time.monotonic() + LEAVING_SECONDS
    for index in range(1, count + 1):
        client.blocking_key_value_get(f"{LEFT}{index}", max(1, int(1000 * (end - time.monotonic()))))
    time.sleep(EXITING_SECONDS)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


@contextlib.contextmanager
def loss_named() -> Iterator[None]:
    """Turn JAX's error that another process has ended into one sentence.

    Raises:
        ProcessLost: instead of that error.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        of_jax = processes.started() and not isinstance(error, ExpectedError) and LOST.search(str(error))
        if not of_jax or processes.count() == 1:
            raise
        raise ProcessLost(
            f"Process {processes.index()} of {processes.count()} has stopped, because another process has ended or "
            "cannot be reached: see the messages of the others, then run the same commands again; training continues "
            "from the newest checkpoint."
        ) from error


def leave(code: int) -> None:
    """Exit, after an error, without Python's clean-up, in which JAX would wait for processes that have ended.

    Processes with the same error disconnect first. With one process, or with exit code 0, this does nothing.
    """
    jax = sys.modules.get("jax")
    if not code or jax is None or not jax.distributed.is_initialized():
        return
    if sys.exc_info()[0] is not None:
        sys.excepthook(*sys.exc_info())
    if code != ProcessLost.exit_code:
        thread = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        thread.start()
        thread.join(LEAVING_SECONDS)
    _flush()
    os._exit(code)
