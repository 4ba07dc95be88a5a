"""The training loop of a sweep: validate, save, dispatch, log, report, for K runs at once.

It does what `training/loop.py` does for one run. A run that diverges is reported and goes on with NaN; it does not
touch the others.
"""

import dataclasses
import math
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from chargpt_jax.devices import sharding
from chargpt_jax.errors import NonFiniteLoss, excused
from chargpt_jax.events import (
    Compiled,
    Event,
    RunDiverged,
    Saved,
    SweepStarted,
    SweepSteps,
    SweepValidated,
)
from chargpt_jax.lab import summary
from chargpt_jax.lab.folder import SweepFolder, finite_or_none
from chargpt_jax.lab.many import ManyState
from chargpt_jax.lab.setup import SweepSetup
from chargpt_jax.model.flops import training_flops
from chargpt_jax.model.init import count_parameters
from chargpt_jax.pictures.plots.bands import bands_plot
from chargpt_jax.storage.checkpoint import UNVALIDATED, Checkpoints
from chargpt_jax.storage.lock import Lock
from chargpt_jax.storage.metrics_log import Log, read_metrics
from chargpt_jax.training.base_loop import BaseLoop
from chargpt_jax.training.dispatch.pacing import StopCondition
from chargpt_jax.training.run import Warn


class SweepLoop(BaseLoop):
    """The state of a sweep in training, and what is done with it."""

    def __init__(
        self,
        setup: SweepSetup,
        folder: SweepFolder,
        state: ManyState,
        store: Checkpoints,
        lock: Lock,
        condition: StopCondition,
        warn: Warn,
    ) -> None:
        """Continue the log of the sweep after the step of `state`, which has K runs."""
        super().__init__(setup.run.config, setup.run.epoch_steps, store, lock, condition)
        self.setup, self.folder, self.run, self.members = setup, folder, setup.run, setup.members
        assert self.run.total_steps is not None  # grid.check refuses a length in minutes
        self.total_steps: int = self.run.total_steps
        self.warn = warn
        self.step = self.saved_step = int(state.step)
        self.validated_step = self.step if self.step and store.loss_of(self.step) < UNVALIDATED else 0
        self.diverged = np.asarray(state.diverged)
        self.state = setup.on_devices(state)
        self.log = Log(folder.metrics, self.step, warn)
        self.seconds = max((line.get("seconds", 0.0) for line in self.log.lines), default=0.0)

    def events(self) -> Iterator[Event]:
        """Train until the schedule ends or the stop condition is reached."""
        yield self.started()
        if not self.condition.reached():
            yield self.compile()
            while True:
                self.lock.alive()
                losses = self.validate() if self.validation_is_due() else None
                if losses is not None:
                    # The log line is written before the checkpoint. After a crash between the two, training resumes
                    # from an earlier step and drops the line.
                    validated = self.log_validation(losses)
                    saved = self.save(self.mean_of(validated))
                    self.write_results(losses, validated)
                    yield validated
                    yield saved
                if self.is_finished():
                    break
                steps, newly = self.dispatch()
                yield from newly
                yield steps
                self.check_any_is_left()
            if self.step > self.saved_step:
                yield self.save(UNVALIDATED)
        yield self.ended()

    def started(self) -> SweepStarted:
        """Return the event that describes the runs, the model and the schedule."""
        return SweepStarted(
            runs=tuple((member.seed, member.learning_rate) for member in self.members),
            parameters=count_parameters(self.setup.shapes),
            first_step=self.step,
            total_steps=self.total_steps,
            epoch_steps=self.run.epoch_steps,
            device=sharding.describe(self.setup.mesh, jax.device_count()),
            dtype=jnp.dtype(self.setup.dtype).name,
        )

    def compile(self) -> Compiled:
        """Trace and compile the dispatch."""
        began = time.perf_counter()
        self._dispatch = self.setup.lower(self.state).compile()
        self._validator = self.setup.validator()
        config, seconds = self.run.config, time.perf_counter() - began
        # The first validation is compiled without a check of the time limit; it takes no longer than the dispatch.
        self.validation_compile_seconds = seconds
        return Compiled(seconds, len(self.members) * training_flops(config.model, config.data.batch_size))

    def validate(self) -> np.ndarray | None:
        """Return each run's validation loss, float64 [K], nats, or None if the stop condition was reached meanwhile."""
        began = time.perf_counter()
        losses = self._validator(self.state.runs.params, self.condition.reached)
        self.seconds, self.validation_compile_seconds = self.seconds + time.perf_counter() - began, 0.0
        return losses

    def log_validation(self, losses: np.ndarray) -> SweepValidated:
        """Log the validation losses."""
        rows = summary.rows(self.members, losses, self.diverged)
        found = SweepValidated(
            self.step,
            self.step / self.run.epoch_steps,
            tuple(map(float, losses)),
            rows,
            self.seconds,
            self.step == self.total_steps,
            self.run.config.data.unit,
        )
        self.validated_step = self.step
        line = {"event": "sweep_validation", "step": self.step, "losses": list(map(finite_or_none, found.losses))}
        self.log.add([{**line, "seconds": self.seconds}], durably=True)
        return found

    def mean_of(self, validated: SweepValidated) -> float:
        """Return the lowest mean loss of a learning rate: the loss of a checkpoint."""
        mean = min((row.mean for row in validated.rows if math.isfinite(row.mean)), default=UNVALIDATED)
        self.best_loss = min(self.best_loss, mean)
        return mean

    def write_results(self, losses: np.ndarray, validated: SweepValidated) -> None:
        """Write the table and the picture of the sweep so far."""
        with excused(str(self.folder.results), self.warn):
            self.folder.save_results(self.members, self.step, losses, self.diverged, validated.rows)
        with excused(str(self.folder.picture), self.warn):
            bands = summary.bands(self.members, read_metrics(self.folder.metrics), self.diverged)
            seeds = self.run.config.sweep.seeds
            note = f"mean and its 95 % interval over {seeds} seeds" if seeds > 1 else "one seed"
            self.folder.write(self.folder.picture, bands_plot(bands, note, unit=self.run.config.data.unit))

    def save(self, loss: float) -> Saved:
        """Save a checkpoint with a validation loss, or UNVALIDATED; record how long that takes."""
        self.lock.alive()
        began = time.perf_counter()
        self.store.save(self.setup.without_padding(self.state), self.setup.record(), loss)
        return self.saved(began)

    def dispatch(self) -> tuple[SweepSteps, list[RunDiverged]]:
        """Make as many training steps as fit into a dispatch, and before the next validation; log them."""
        count = self.steps_that_fit()
        began = time.perf_counter()
        self.state, history = self._dispatch(self.state, self.setup.which, self.setup.text, np.int32(count))
        # Wait for the result: with several CPU devices, two dispatches in flight can deadlock.
        losses = np.asarray(history["loss"])[: len(self.members), :count]
        elapsed = time.perf_counter() - began
        self.size.record(elapsed, count)
        first, self.step, self.seconds = self.step + 1, self.step + count, self.seconds + elapsed
        self._log_steps(first, losses, elapsed)
        return self._progress(losses[:, -1]), self._newly_diverged()

    def _log_steps(self, first: int, losses: np.ndarray, elapsed: float) -> None:
        """Log the losses, [K, count], of the steps from `first` on whose number is a multiple of log_every."""
        count = losses.shape[1]
        times = np.linspace(self.seconds - elapsed, self.seconds, count + 1)[1:]
        self.log.add(
            [
                {
                    "event": "sweep_step",
                    "step": first + i,
                    "losses": [finite_or_none(float(loss)) for loss in losses[:, i]],
                    "seconds": float(times[i]),
                }
                for i in range(count)
                if (first + i) % self.run.config.train.log_every == 0
            ]
        )

    def _progress(self, losses: np.ndarray) -> SweepSteps:
        config, seconds_per_step = self.run.config, self.size.seconds_per_step
        tokens = len(self.members) * config.data.batch_size * config.model.block_size
        return SweepSteps(
            step=self.step,
            losses=tuple(map(float, losses)),
            tokens_per_second=tokens / seconds_per_step,
            seconds=self.seconds,
            seconds_left=(self.total_steps - self.step) * seconds_per_step,
            unit=config.data.unit,
        )

    def _newly_diverged(self) -> list[RunDiverged]:
        """Return an event for each run that has diverged in the last dispatch."""
        before, self.diverged = self.diverged, np.asarray(self.state.diverged)[: len(self.members)]
        new = np.flatnonzero((self.diverged > 0) & (before == 0))
        return [RunDiverged(**dataclasses.asdict(self.members[i]), step=int(self.diverged[i])) for i in new]

    def check_any_is_left(self) -> None:
        """Raise NonFiniteLoss if every run has diverged."""
        if not self.diverged.all():
            return
        lowest = min(member.learning_rate for member in self.members)
        raise NonFiniteLoss(
            f"All {len(self.members)} runs of the sweep have diverged, the last one at step {self.diverged.max():,}: "
            f"start again with lower rates, --config.sweep.learning_rates={lowest / 10:.1e} for example, and a new "
            "--workdir."
        )
