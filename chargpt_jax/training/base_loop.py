"""What the training loops of a run and of a sweep share: when to validate, how many steps to make, when to end."""

import math
import time

from chargpt_jax.config import Config
from chargpt_jax.events import Ended, Saved
from chargpt_jax.storage.checkpoint import Checkpoints
from chargpt_jax.storage.lock import Lock
from chargpt_jax.training.dispatch.pacing import DispatchSize, StopCondition


class BaseLoop:
    """The progress of a training. A loop sets `step` and the following fields, and keeps them up to date."""

    step: int
    """Training steps made so far."""
    saved_step: int
    """Step of the last checkpoint."""
    validated_step: int
    """Step of the last validation; 0: none."""
    total_steps: int | None
    """None in a run of given minutes, until the first steps have been measured."""
    seconds: float
    """Of training and validation, without interruptions of the run."""
    best_loss: float
    """Lowest validation loss of the checkpoints, nats per character; a log may have been edited, or be missing."""

    def __init__(
        self, config: Config, epoch_steps: int, store: Checkpoints, lock: Lock, condition: StopCondition
    ) -> None:
        """Prepare a training with these checkpoints, this lock and this condition to stop."""
        self.config, self.epoch_steps = config, epoch_steps
        self.store, self.lock, self.condition = store, lock, condition
        self.size = DispatchSize(config)
        self.validate_every = max(1, round(config.train.validate_every * epoch_steps))
        self.best_loss = best[1] if (best := store.best()) else math.inf
        self.validation_compile_seconds = 0.0
        """Expected seconds that the next validation takes to be compiled; 0 after the first one."""

    def validation_is_due(self) -> bool:
        """Return whether this step is to be validated, and there is time for it."""
        due = self.step % self.validate_every == 0 or self.step == self.total_steps
        return due and self.step > self.validated_step and not self.condition.reached(self.validation_compile_seconds)

    def is_finished(self) -> bool:
        """Return whether the schedule has ended, or no time is left for another step."""
        return self.condition.reached(self.size.seconds_for(1)) or self.step == self.total_steps

    def steps_that_fit(self) -> int:
        """Return how many training steps fit into a dispatch, before the next validation and the end."""
        assert self.total_steps is not None
        return min(
            self.size.steps,
            self.validate_every - self.step % self.validate_every,
            self.total_steps - self.step,
            self.size.steps_within(self.condition.seconds_left()),
        )

    def saved(self, began: float) -> Saved:
        """Note that a checkpoint of this step has been saved since `began`, of `time.perf_counter`."""
        self.condition.record_save(time.perf_counter() - began)
        self.saved_step = self.step
        return Saved(self.step, str(self.store.folder / str(self.step)))

    def ended(self) -> Ended:
        """Return the event that describes the end."""
        complete = self.step == self.total_steps == self.validated_step
        out_of_time = self.condition.out_of_time and not complete
        signal, unit = self.condition.signal, self.config.data.unit
        return Ended(self.step, self.seconds, self.best_loss, signal, out_of_time, unit)
