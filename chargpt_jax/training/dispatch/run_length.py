"""How many training steps fit into a run of given minutes (scheduler.minutes), from the speed measured.

A fit is a decision: from one training step on, the learning rate follows the schedule of a run of so many steps. The
first fit comes from a trial before the first step, and a later one replaces it if the run would end at another time.
Each is written to the run's folder before a step uses it, so a resumed run makes the same steps again. A fit has
the effect of a stop and a resume with another scheduler.max_steps.

The time of a run is that of its commands from their start: start-up, range test, compilation, training, validations,
checkpoints and samples. A resumed run counts the time up to the checkpoint that it resumes from.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from chargpt_jax.config.sections import MAX_STEPS

TRIAL = 0.01
"""The trial takes this fraction of the run's time, or two dispatches if they take longer."""

MEMORY = 0.2
"""The speed is a mean that forgets dispatches further back than this fraction of the run's time."""

TOLERANCE, TOLERANCE_LEFT = 0.01, 0.1
"""A new fit is made if the expected end is wrong by more than these fractions of the run's time and of the time left.

The second one keeps the schedule as it is at the beginning, when the noise of the measurement says little.
"""


@dataclasses.dataclass(frozen=True)
class Clock:
    """When a command began, and what it does besides training."""

    began: float = dataclasses.field(default_factory=lambda: time.monotonic())
    """By `time.monotonic`."""
    first_samples: float = 0.0
    """Expected time of the first samples, which compile the programs of generation, in addition to later ones.

    In units of the time that tracing and compiling the training takes, which is short with a filled compilation cache.
    """
    after: float = 0.0
    """Expected time from the last checkpoint to the end of the command, without the first samples.

    In units of the time that tracing the training takes: like this work, it is mostly Python.
    """
    samples_along: bool = True
    """Whether the first samples follow the first validation, and not the training."""

    def seconds(self) -> float:
        """Return the seconds since the command began."""
        return time.monotonic() - self.began


@dataclasses.dataclass(frozen=True)
class Fit:
    """From which training step on a run has how many steps in total, and the measurements behind that."""

    step: int
    total_steps: int
    minutes: float
    """scheduler.minutes at that time."""
    seconds: float
    """Time of the run before the step."""
    seconds_per_step: float
    seconds_per_validation: float


def fits_from(saved: Any) -> list[Fit]:
    """Return the fits from the content of schedule.json.

    Raises:
        ValueError: if the content is invalid: the file is untrusted input.
    """
    rows = saved.get("fits") if isinstance(saved, dict) else None
    names = [item.name for item in dataclasses.fields(Fit)]
    if not isinstance(rows, list) or not all(isinstance(row, dict) and sorted(row) == sorted(names) for row in rows):
        raise ValueError("it is not a list of fits")
    for row in rows:
        whole = all(type(row[name]) is int and 0 <= row[name] < MAX_STEPS for name in ("step", "total_steps"))
        if not whole or not all(type(x) in (int, float) and 0 <= x < 1e30 for x in row.values()):
            raise ValueError("a number of a fit is invalid")
    fits = [Fit(**row) for row in rows]
    ordered = all(a.step < b.step for a, b in itertools.pairwise(fits))
    if not ordered or not all(fit.step < fit.total_steps and fit.minutes > 0 for fit in fits):
        raise ValueError("its fits contradict each other")
    return fits


def as_json(fits: Sequence[Fit]) -> dict[str, Any]:
    """Return the content of schedule.json."""
    return {"fits": [dataclasses.asdict(fit) for fit in fits]}


def total_of(fits: Sequence[Fit], minutes: float, step: int | None = None) -> int | None:
    """Return the steps of a run that is at a step (None: at its end); None if they were not fitted to these minutes."""
    past = [fit for fit in fits if step is None or fit.step <= step]
    return past[-1].total_steps if past and past[-1].minutes == minutes else None


class RunLength:
    """The fits of a run in training, and what its parts take. With several processes, only those of process 0 count."""

    def __init__(
        self,
        minutes: float,
        fits: Sequence[Fit],
        step: int,
        clock: Clock,
        validate_every: int,
        before: float = 0.0,
        repeated: int = 0,
        save: Callable[[Mapping[str, Any]], None] = lambda content: None,
    ) -> None:
        """Continue a run.

        Args:
            minutes: scheduler.minutes.
            fits: those that were made so far.
            step: training steps made.
            clock: of this command.
            validate_every: training steps between validations.
            before: seconds of the run in earlier commands.
            repeated: the last training step that was made before the run stopped; no new fit is made before it.
            save: writes schedule.json.
        """
        self.minutes, self.clock, self.validate_every = minutes, clock, validate_every
        self.before, self.repeated, self._save = before, repeated, save
        self.compile_seconds = self.trace_seconds = 0.0
        """Of the training: the units of the clock."""
        self.fits = [fit for fit in fits if fit.step <= step or fit.minutes == minutes]
        self._steps = self._seconds = 0.0
        self.validation = fits[-1].seconds_per_validation if fits else 0.0
        """Expected seconds of a validation with its checkpoint and samples."""
        self._validations = 0
        if fits:
            self.record_steps(fits[-1].seconds_per_step, 1)

    def elapsed(self) -> float:
        """Return the seconds of the run so far."""
        return self.before + self.clock.seconds()

    def total_steps(self, step: int) -> int | None:
        """Return the steps of the run at a step, by the fits made so far; None if there is none for these minutes."""
        return total_of(self.fits, self.minutes, step)

    def next_fit(self, step: int) -> float:
        """Return the step of the next fit, in a run that makes its steps again; infinity if there is none."""
        return min((fit.step for fit in self.fits if fit.step > step), default=math.inf)

    @property
    def needs_trial(self) -> bool:
        """Whether no speed is known yet."""
        return not self._seconds

    def record_steps(self, seconds: float, steps: int) -> None:
        """Take the duration of some training steps into the mean."""
        kept = math.exp(-seconds / (MEMORY * 60 * self.minutes))
        self._seconds, self._steps = kept * self._seconds + seconds, kept * self._steps + steps

    def record_validation(self, seconds: float) -> None:
        """Record the duration of a validation with its checkpoint and samples; the first one compiles programs."""
        self._validations += 1
        if self._validations > 1 or not self.validation:
            self.validation = seconds

    @property
    def seconds_per_step(self) -> float:
        """The mean of the last dispatches."""
        return self._seconds / self._steps

    def seconds_to(self, total: int, step: int) -> float:
        """Return the expected seconds from a step to the end of the command, if the run has so many steps in total."""
        every = self.validate_every
        validations = total // every - step // every + (total % every > 0)
        return (total - step) * self.seconds_per_step + validations * self.validation + self.seconds_of_results()

    def seconds_of_results(self) -> float:
        """Return the expected seconds of the first samples, if there were none yet, and of the work after training."""
        sampled = self._validations > 0 and self.clock.samples_along
        samples = 0.0 if sampled else self.clock.first_samples * self.compile_seconds
        return samples + self.clock.after * self.trace_seconds

    def fitted(self, step: int, left: float) -> int:
        """Return the most steps in total that end within `left` seconds; at least one more than `step`."""
        low, high = step + 1, MAX_STEPS - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.seconds_to(middle, step) <= left else (low, middle - 1)
        return low

    def new_total(self, step: int) -> int | None:
        """Return another number of steps in total if the expected end is wrong by more than the tolerance; else None.

        A run that makes its steps again keeps the fits of the first time.
        """
        whole, now = 60 * self.minutes, self.total_steps(step)
        if self.next_fit(step) < math.inf or (now is not None and step < self.repeated):
            return None
        left = whole - self.elapsed()
        if now is not None:
            wrong = abs(self.seconds_to(now, step) - left)
            if wrong <= max(TOLERANCE * whole, TOLERANCE_LEFT * left):
                return None
        total = self.fitted(step, left)
        return total if total != now else None

    def decide(self, step: int, total: int) -> Fit:
        """Make a fit from a step on, and write it to the run's folder."""
        fit = Fit(step, total, self.minutes, self.elapsed(), self.seconds_per_step, self.validation)
        self.fits = [*(old for old in self.fits if old.step < step), fit]
        self._save(as_json(self.fits))
        return fit
