"""The training loop of a run of given minutes: it measures the speed, and decides how many steps there are in total."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from chargpt_jax.devices import processes
from chargpt_jax.errors import UserError
from chargpt_jax.events import Compiled, Event, Fitted
from chargpt_jax.training.dispatch.pacing import MAX_DISPATCH_STEPS
from chargpt_jax.training.dispatch.run_length import TRIAL, Clock, RunLength, fits_from
from chargpt_jax.training.loop import Dispatched, TrainingLoop
from chargpt_jax.training.step import TrainState


class TimedLoop(TrainingLoop):
    """A training loop whose steps take their learning rates as an argument, so that the schedule may change.

    With several processes, all decisions are those of process 0.
    """

    def __init__(self, *given: Any, clock: Clock, restored: Callable[[], TrainState]) -> None:
        """Continue a run.

        Args:
            given: as for TrainingLoop; the learning rate is not used.
            clock: of this command.
            restored: returns the state again, after the trial has used its memory.

        Raises:
            UserError: if the run had taken more minutes when the config was changed, or schedule.json is damaged.
        """
        logged = given[0].workdir.load_metrics()  # the loop removes the lines of steps that it makes again
        super().__init__(*given)
        folder, minutes = self.run.workdir, self.run.config.scheduler.minutes
        assert minutes is not None
        before = self.store.seconds_of(self.step) if self.step else 0.0
        before = self.seconds if before is None else before
        self.length = RunLength(
            minutes,
            folder.load_schedule(fits_from),
            self.step,
            clock,
            self.validate_every,
            before,
            max((line["step"] for line in logged), default=0),
            lambda content: processes.on_first(lambda: folder.save_schedule(content)),
        )
        self.total_steps = self.length.total_steps(self.step)
        self._restored, self._fitted = restored, False
        self._began, self._made, self._validates = time.monotonic(), 0, False
        """When the dispatch or the validation began, the steps of the one, and whether it is the other."""
        self._warm = False
        """Whether a dispatch has been made: the first one is slower."""
        if processes.agreed(self.total_steps is None and before >= 60 * minutes):
            raise UserError(
                f"scheduler.minutes is {minutes:g}, but the run in {folder.path} has already taken "
                f"{before / 60:.3g} minutes: increase it, or use another --workdir."
            )

    def compile(self, lowered: jax.stages.Lowered, tracing: float) -> Compiled:
        """Compile the dispatch, and note how long that took."""
        compiled = super().compile(lowered, tracing)
        self.length.compile_seconds, self.length.trace_seconds = compiled.seconds, tracing
        return compiled

    def measure(self) -> None:
        """Measure validation and training, unless the speed is known; nothing is kept of these steps.

        Their learning rates are 0, so that no loss can become infinite.
        """
        if not processes.agreed(self.length.needs_trial):
            return
        self.length.validation = self._seconds_of_validation()
        rates, seconds, dispatches = np.zeros(MAX_DISPATCH_STEPS, np.float32), 0.0, 0
        while processes.agreed(dispatches < 3 or seconds < TRIAL * 60 * self.length.minutes):
            self.lock.alive()
            if self.condition.reached(self.size.seconds_for(1)):
                break
            count = processes.agreed(min(self.size.steps, self.feed.max_steps))
            text, began = self.feed.text_for(self.step, count), time.monotonic()
            self.state, history = self._dispatch(self.state, text, rates, np.int32(count))
            np.asarray(history["loss"])  # wait for it
            last, dispatches = time.monotonic() - began, dispatches + 1
            seconds += last
            self.size.record(last, count)
            if dispatches > 1:  # the first one is slower
                self.length.record_steps(last, count)
        self.state, self._warm = self._restored(), True

    def _seconds_of_validation(self) -> float:
        """Return the expected seconds of a validation, from its second batch: the first one compiles."""
        times = self._batch_times()
        if len(times) == 2:  # there is only one batch
            times = self._batch_times()
        return self.setup.validation_batches * (times[-1] - times[-2])

    def _batch_times(self) -> list[float]:
        """Validate on up to two batches; return when each of them began, and when the last one ended."""
        times: list[float] = []

        def stop() -> bool:
            times.append(time.monotonic())
            return len(times) > 2 or self.condition.reached()

        self._validator(self.state.params, self.step, stop)
        self.validation_compile_seconds = 0.0
        return times if len(times) > 2 else [*times, time.monotonic()]

    def validation_is_due(self) -> bool:
        """Return whether this step is to be validated; record the duration of the dispatch before."""
        now, made = time.monotonic(), self._made
        if made and self._warm:
            self.length.record_steps(now - self._began, made)
        self._warm, self._made, self._began = self._warm or made > 0, 0, now
        self._validates = super().validation_is_due()
        return self._validates

    def fit(self) -> Iterator[Event]:
        """Decide how many steps there are in total, or repeat the decision that was made before the run stopped."""
        if self._validates:
            self.length.record_validation(time.monotonic() - self._began)
        yield from self._decided()
        self._began = time.monotonic()

    def _decided(self) -> Iterator[Event]:
        total, new = self.length.total_steps(self.step), processes.agreed(self.length.new_total(self.step))
        if new is not None:
            if total is None and new == self.step + 1:
                self.warn(
                    f"scheduler.minutes is {self.length.minutes:g}, but {self.length.elapsed():.0f} s passed before "
                    f"training, and samples and report need about {self.length.seconds_of_results():.0f} s, so that "
                    "only one step is made: increase it."
                )
            self.length.decide(self.step, new)
            total = new
        assert total is not None
        if total == self.total_steps and self._fitted:
            return
        self._fitted, self.total_steps, self.learning_rate_at = True, total, jax.jit(self.run.schedule(total))
        yield Fitted(
            self.step,
            total,
            total / self.epoch_steps,
            self.length.minutes,
            self.length.elapsed(),
            self.run.warmup_steps,
        )

    def next_steps(self) -> int:
        """Return how many training steps fit into a dispatch, and before the next decision that is repeated."""
        return int(min(super().next_steps(), processes.agreed(self.length.next_fit(self.step) - self.step)))

    def rates(self, count: int) -> tuple[np.ndarray, ...]:
        """Return the learning rates of the next steps, float32 [MAX_DISPATCH_STEPS]; the first `count` are used."""
        rates = np.zeros(MAX_DISPATCH_STEPS, np.float32)
        rates[:count] = [self.learning_rate_at(self.step + i) for i in range(count)]
        return (rates,)

    def dispatch(self) -> Dispatched:
        """Make the training steps of one dispatch."""
        dispatched = super().dispatch()
        self._made = len(dispatched.losses)
        return dispatched

    def record(self) -> dict[str, Any]:
        """Return the description of the run that a checkpoint holds, with the time of the run."""
        return {**super().record(), "seconds": self.length.elapsed()}
