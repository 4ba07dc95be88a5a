"""Several processes, imitated by threads: what each sends, all receive, as with JAX's collectives."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from chargpt_jax.devices import processes

SECONDS = 20.0
"""A thread that waits longer for the others has called one function too many."""


class Group:
    """A number of imitated processes."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replace what the package asks JAX about processes."""
        self.count, self._own = count, threading.local()
        self._barrier, self._sent = threading.Barrier(count), [b""] * count
        monkeypatch.setattr(processes, "count", lambda: count)
        monkeypatch.setattr(processes, "index", lambda: self._own.index)
        monkeypatch.setattr(processes, "_exchanged", self._exchanged)

    def results(self, f: Callable[[int], Any]) -> list[Any]:
        """Call a function with its index in each process; return the results, or the exceptions that it raised."""

        def call(index: int) -> Any:
            self._own.index = index
            try:
                return f(index)
            except Exception as error:
                return error

        with ThreadPoolExecutor(self.count) as threads:
            return list(threads.map(call, range(self.count)))

    def _exchanged(self, message: bytes) -> list[bytes]:
        self._sent[self._own.index] = message
        self._barrier.wait(SECONDS)
        received = list(self._sent)
        self._barrier.wait(SECONDS)
        assert len({len(one) for one in received}) == 1  # JAX gathers arrays of one shape
        return received
