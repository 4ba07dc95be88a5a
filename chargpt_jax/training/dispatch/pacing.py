"""How many training steps one dispatch makes, and when training has to stop.

A dispatch is one call of `train_steps` in steps.py, 1 to 256 training steps. Training stops at a signal, or when the
time limit is near.
"""

import math
import time
from collections.abc import Callable

from chargpt_jax.config import Config
from chargpt_jax.config.values import MAX_INT, argument, shown
from chargpt_jax.devices import processes
from chargpt_jax.errors import UserError

MAX_DISPATCH_STEPS = 256
"""Training steps in one dispatch, at most."""

DISPATCH_SECONDS = 2.0
"""Target duration of a dispatch if the config sets no size: how often progress is shown and signals are handled."""

Stop = Callable[[], int | None]
"""Called after every dispatch and during longer work; returns the number of a signal that arrived, or None."""


class DispatchSize:
    """The number of training steps per dispatch, chosen so that one takes about DISPATCH_SECONDS."""

    def __init__(self, config: Config):
        self.fixed = min(config.train.steps_per_dispatch, MAX_DISPATCH_STEPS)
        self.steps = self.fixed or 1
        self.seconds_per_step = math.inf
        self._last = 0.0

    def record(self, seconds: float, steps: int) -> None:
        """Update the estimates with the duration of a dispatch.

        The step time is the minimum so far, allowed to grow by 20 % per dispatch: other processes can delay one.
        """
        self._last = seconds / steps
        self.seconds_per_step = min(self._last, 1.2 * self.seconds_per_step)
        if not self.fixed:
            wanted = int(DISPATCH_SECONDS / self.seconds_per_step)
            self.steps = max(1, min(MAX_DISPATCH_STEPS, 4 * self.steps, wanted))

    def seconds_for(self, steps: int) -> float:
        """Return a cautious estimate of the seconds that some steps take; 0 before the first dispatch."""
        return 1.25 * steps * max(self._last, self.seconds_per_step) if self._last else 0.0

    def steps_within(self, seconds: float) -> int:
        """Return how many steps fit into a time: at least 1, and 1 before the first dispatch was timed."""
        if seconds == math.inf:
            return MAX_DISPATCH_STEPS
        return max(1, int(min(MAX_DISPATCH_STEPS, seconds / self.seconds_for(1)))) if self._last else 1


class StopCondition:
    """Whether training has to stop: a signal arrived, or the time limit is near. Once true, it stays true.

    With several processes, a signal to any of them counts, and the time of process 0.
    """

    def __init__(self, stop: Stop, max_minutes: float | None = None):
        """Start the clock of the time limit, if there is one."""
        self.signal: int | None = None
        self.out_of_time = False
        self._stop = stop
        if not callable(stop):
            raise UserError(f"stop is {shown(stop)}, but it must be a function without arguments: leave it out.")
        if max_minutes is not None:
            fix = "give a number of minutes, or leave it out"
            max_minutes = argument("max_minutes", max_minutes, float, fix)
            if not 0 < max_minutes < MAX_INT:
                raise UserError(f"max_minutes is {shown(max_minutes)}, but it must be a number above 0: {fix}.")
        self._deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._save_seconds = 2.0

    def reached(self, seconds: float = 0.0) -> bool:
        """Return whether to stop: at a signal, or if `seconds` more work would leave no time for a checkpoint."""
        if self.signal is None and not self.out_of_time:
            found = processes.gathered((self._stop(), self.seconds_left() <= seconds))
            self.signal = next((signal for signal, _ in found if signal is not None), None)
            self.out_of_time = self.signal is None and found[0][1]
        return self.signal is not None or self.out_of_time

    def seconds_left(self) -> float:
        """Return the seconds until the last checkpoint must start; it may take twice as long as any before."""
        return self._deadline - time.monotonic() - 2 * self._save_seconds - 1

    def record_save(self, seconds: float) -> None:
        """Record the duration of a checkpoint."""
        self._save_seconds = max(self._save_seconds, seconds)
