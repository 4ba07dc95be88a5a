"""How many updates go into a dispatch, and when training has to end: asked by a signal, or because time is up."""

import math
import time
from collections.abc import Callable

from chargpt_jax.config import Config

MOST_STEPS = 256
"""Updates in one dispatch at most."""

DISPATCH_SECONDS = 2.0
"""How long a dispatch should take where the config leaves it open: the pace of the progress bar and of signals."""

Stop = Callable[[], int | None]
"""Asked after every dispatch and between the parts of other work; the number of a signal ends training, which saves."""


class Pace:
    """How many updates to put into a dispatch, so that one takes about DISPATCH_SECONDS."""

    def __init__(self, config: Config):
        self.fixed = min(config.train.steps_per_dispatch, MOST_STEPS)
        self.steps = self.fixed or 1
        self.seconds_per_step = math.inf
        self._last = 0.0

    def took(self, seconds: float, count: int) -> None:
        """Learn from a dispatch; one may be held up by others, so the best so far, slowly forgotten, is believed."""
        self._last = seconds / count
        self.seconds_per_step = min(self._last, 1.2 * self.seconds_per_step)
        if not self.fixed:
            wanted = int(DISPATCH_SECONDS / self.seconds_per_step)
            self.steps = max(1, min(MOST_STEPS, 4 * self.steps, wanted))

    def seconds(self, steps: int) -> float:
        """Return the time that so many updates take at most, as far as is known; 0 before the first."""
        return 1.25 * steps * max(self._last, self.seconds_per_step) if self._last else 0.0

    def fitting(self, seconds: float) -> int:
        """Return how many updates fit into a time, at least one; one where no update has been timed."""
        if seconds == math.inf:
            return MOST_STEPS
        return max(1, int(min(MOST_STEPS, seconds / self.seconds(1)))) if self._last else 1


class Ending:
    """Whether training is to end now; once it is, it stays so."""

    def __init__(self, stop: Stop, max_minutes: float | None = None):
        """Begin to count the minutes, if there is a limit to them."""
        self.signal: int | None = None
        self.out_of_time = False
        self._stop = stop
        self._by = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._save_seconds = 2.0

    def near(self, seconds: float = 0.0) -> bool:
        """Say whether to end: a signal came, or `seconds` more of work would leave no time for a checkpoint."""
        if self.signal is None and not self.out_of_time:
            self.signal = self._stop()
            self.out_of_time = self.signal is None and self.spare() <= seconds
        return self.signal is not None or self.out_of_time

    def spare(self) -> float:
        """Return the seconds until a checkpoint, which may take twice as long as any before, has to be begun."""
        return self._by - time.monotonic() - 2 * self._save_seconds - 1

    def saved(self, seconds: float) -> None:
        """Learn how long a checkpoint takes."""
        self._save_seconds = max(self._save_seconds, seconds)
