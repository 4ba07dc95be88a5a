"""The training loop: validate, save, dispatch, log, report."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chargpt_jax.config import OptimizerConfig
from chargpt_jax.devices import processes, sharding
from chargpt_jax.errors import NonFiniteLoss, excused
from chargpt_jax.events import (
    Compiled,
    Event,
    Saved,
    Steps,
    TrainStarted,
    Validated,
    bits_per_character,
)
from chargpt_jax.model.flops import peak_flops, training_flops
from chargpt_jax.model.init import count_parameters
from chargpt_jax.storage.checkpoint import UNVALIDATED, Checkpoints
from chargpt_jax.storage.lock import Lock
from chargpt_jax.storage.metrics_log import Expected, Log
from chargpt_jax.training.base_loop import BaseLoop
from chargpt_jax.training.dispatch.feed import Feed
from chargpt_jax.training.dispatch.pacing import DispatchSize, StopCondition
from chargpt_jax.training.run import Run, Warn
from chargpt_jax.training.setup import Setup
from chargpt_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """The results of one dispatch: an element per training step."""

    losses: np.ndarray
    """float32, nats per character."""
    grad_norms: np.ndarray
    """float32."""
    seconds: np.ndarray
    """Training time of the run at the end of each step; the steps of a dispatch are assumed to take equal times."""


class TrainingLoop(BaseLoop):
    """The state of a run in training, and what is done with it."""

    def __init__(
        self,
        run: Run,
        setup: Setup,
        feed: Feed,
        state: TrainState,
        learning_rate_at: Callable[[int], jax.Array],
        store: Checkpoints,
        lock: Lock,
        condition: StopCondition,
        warn: Warn,
    ) -> None:
        """Continue the log of the run after the step of `state`."""
        super().__init__(run.config, run.epoch_steps, store, lock, condition)
        self.run, self.setup, self.state, self.learning_rate_at = run, setup, state, learning_rate_at
        self.feed, self.warn, self.total_steps = feed, warn, run.total_steps
        self.step = self.saved_step = int(state.step)
        validated = self.step > 0 and processes.agreed(store.loss_of(self.step) < UNVALIDATED)
        self.validated_step = self.step if validated else 0
        expected = Expected(self.step, self.validated_step > 0, run.config.train.log_every)
        self.log = Log(run.workdir.metrics, self.step, warn, expected, writes=processes.is_first())
        self.seconds = max((line.get("seconds", 0.0) for line in self.log.lines), default=0.0)

    def events(self, lowered: jax.stages.Lowered, tracing: float) -> Iterator[Event]:
        """Train until the schedule ends or the stop condition is reached.

        Args:
            lowered: the traced dispatch, `train_steps`, ready to be compiled.
            tracing: the seconds that tracing took.
        """
        yield self.started()
        if not self.condition.reached():
            yield self.compile(lowered, tracing)
            self.measure()
            while True:
                self.lock.alive()
                loss = self.validate() if self.validation_is_due() else None
                if loss is not None:
                    # The log line is written before the checkpoint. After a crash between the two, training resumes
                    # from an earlier step and drops the line.
                    validated, saved = self.log_validation(loss), self.save(loss)
                    yield validated
                    yield saved
                if self.is_finished():
                    break
                yield from self.fit()
                dispatched = self.dispatch()
                self.log_steps(dispatched)
                yield self.progress(dispatched)
            if self.step > self.saved_step:
                yield self.save(UNVALIDATED)
        yield self.ended()

    def started(self) -> TrainStarted:
        """Return the event that describes the model, the schedule and the losses logged so far."""
        config = self.run.config
        assert config.optimizer.learning_rate is not None
        return TrainStarted(
            parameters=count_parameters(self.setup.shapes),
            first_step=self.step,
            total_steps=self.total_steps,
            epoch_steps=self.epoch_steps,
            epochs=self.total_steps and self.total_steps / self.epoch_steps,
            learning_rate=config.optimizer.learning_rate,
            warmup_steps=self.run.warmup_steps,
            device=sharding.describe(self.setup.mesh, jax.device_count()),
            dtype=jnp.dtype(self.setup.dtype).name,
            training=self._logged_losses("step"),
            validation=self._logged_losses("validation"),
            minutes=config.scheduler.minutes,
        )

    def _logged_losses(self, kind: str) -> tuple[tuple[int, float], ...]:
        return tuple((line["step"], line["loss"]) for line in self.log.lines if line["event"] == kind)

    def compile(self, lowered: jax.stages.Lowered, tracing: float) -> Compiled:
        """Compile the dispatch."""
        config, began = self.run.config, time.perf_counter()
        self._dispatch = lowered.compile()
        seconds = tracing + time.perf_counter() - began
        self._validator = self.setup.validator()
        # The first validation is compiled without a check of the time limit; it takes no longer than the dispatch.
        self.validation_compile_seconds = seconds
        self.compiled = Compiled(seconds, training_flops(config.model, config.data.batch_size))
        return self.compiled

    def measure(self) -> None:
        """Measure the speed, in a run of given minutes."""

    def fit(self) -> Iterator[Event]:
        """Decide how many steps there are in total, in a run of given minutes."""
        yield from ()

    def validate(self) -> float | None:
        """Return the validation loss, nats per character, or None if the stop condition was reached meanwhile."""
        began = time.perf_counter()
        loss = self._validator(self.state.params, self.step, self.condition.reached)
        self.seconds, self.validation_compile_seconds = self.seconds + time.perf_counter() - began, 0.0
        if loss is not None:
            self._check_finite(np.array([loss]), np.zeros(1), self.step - 1)
        return loss

    def log_validation(self, loss: float) -> Validated:
        """Log a validation loss, and update the file with the training speed."""
        found = Validated(
            self.step,
            self.step / self.epoch_steps,
            loss,
            bits_per_character(loss),
            loss < self.best_loss,
            self.seconds,
            self.run.config.data.unit,
        )
        self.best_loss, self.validated_step = min(self.best_loss, loss), self.step
        with excused(str(self.run.workdir.speed), self.warn):
            if math.isfinite(self.size.seconds_per_step) and processes.is_first():
                self.run.workdir.save_speed(speed(self.compiled, self.size, self.setup))
        facts = {name: value for name, value in dataclasses.asdict(found).items() if name != "unit"}
        self.log.add([{"event": "validation", **facts}], durably=True)
        return found

    def save(self, loss: float) -> Saved:
        """Save a checkpoint with a validation loss, or UNVALIDATED; record how long that takes."""
        self.lock.alive()
        began = time.perf_counter()
        state, record = processes.on_host(self.state), self.record()
        processes.on_first(lambda: self.store.save(state, record, loss))
        return self.saved(began)

    def record(self) -> dict[str, Any]:
        """Return the description of the run that a checkpoint holds."""
        return self.setup.record()

    def next_steps(self) -> int:
        """Return how many training steps fit into a dispatch, and before the next validation."""
        return processes.agreed(min(self.steps_that_fit(), self.feed.max_steps))

    def rates(self, count: int) -> tuple[np.ndarray, ...]:
        """Return the learning rates of the next steps, if they are an argument of the compiled dispatch."""
        return ()

    def dispatch(self) -> Dispatched:
        """Make the training steps of one dispatch."""
        count = self.next_steps()
        began = time.perf_counter()
        text, rates = self.feed.text_for(self.step, count), self.rates(count)
        self.state, history = self._dispatch(self.state, text, *rates, np.int32(count))
        # Wait for the result: with several CPU devices, two dispatches in flight can deadlock.
        losses, norms = (np.asarray(history[name])[:count] for name in ("loss", "grad_norm"))
        elapsed = time.perf_counter() - began
        self.size.record(elapsed, count)
        times = np.linspace(self.seconds, self.seconds + elapsed, count + 1)[1:]
        self._check_finite(losses, norms, self.step)
        self.step, self.seconds = self.step + count, float(times[-1])
        return Dispatched(losses, norms, times)

    def _check_finite(self, losses: np.ndarray, norms: np.ndarray, step: int) -> None:
        """Raise NonFiniteLoss at the first NaN or infinite loss or gradient norm after `step`.

        With loss scaling (float16) an infinite gradient norm is normal.
        """
        scaled = self.state.loss_scale is not None
        bad = ~np.isfinite(losses) | (~np.isfinite(norms) & (not scaled))
        if not bad.any():
            return
        at, steps = int(np.argmax(bad)), self.store.valid_steps()
        last = f"The last checkpoint is step {steps[-1]}" if steps else "There is no checkpoint yet"
        raise NonFiniteLoss(
            f"Training diverged at step {step + at + 1}: loss {losses[at]}, gradient norm {norms[at]}. {last}: start "
            f"again with {remedies(self.run.config.optimizer)} and {'a new' if steps else 'the same'} --workdir."
        )

    def log_steps(self, dispatched: Dispatched) -> None:
        """Log the steps of a dispatch whose number is a multiple of log_every."""
        first, every = self.step - len(dispatched.losses) + 1, self.run.config.train.log_every
        self.log.add(
            [
                {
                    "event": "step",
                    "step": step,
                    "loss": float(loss),
                    "learning_rate": float(self.learning_rate_at(step - 1)),
                    "grad_norm": float(norm),
                    "seconds": float(seconds),
                }
                for step, loss, norm, seconds in zip(
                    range(first, self.step + 1),
                    dispatched.losses,
                    dispatched.grad_norms,
                    dispatched.seconds,
                    strict=True,
                )
                if step % every == 0
            ]
        )

    def progress(self, dispatched: Dispatched) -> Steps:
        """Return the event that reports the last step of a dispatch."""
        config = self.run.config
        assert self.total_steps is not None
        return Steps(
            step=self.step,
            epoch=self.step / self.epoch_steps,
            loss=float(dispatched.losses[-1]),
            learning_rate=float(self.learning_rate_at(self.step - 1)),
            grad_norm=float(dispatched.grad_norms[-1]),
            tokens_per_second=config.data.batch_size * config.model.block_size / self.size.seconds_per_step,
            seconds=self.seconds,
            seconds_left=(self.total_steps - self.step) * self.size.seconds_per_step,
            unit=config.data.unit,
        )


def remedies(config: OptimizerConfig) -> str:
    """Return the flags that may cure a non-finite loss; a gradient norm that is limited already is not among them."""
    assert config.learning_rate is not None
    lower = f"--config.optimizer.learning_rate={config.learning_rate / 10:.1e}"
    return lower if config.clip_norm is not None else f"{lower} or --config.optimizer.clip_norm=1.0"


def speed(compiled: Compiled, size: DispatchSize, setup: Setup) -> dict[str, Any]:
    """Return the content of speed.json: the training speed, and the fraction of peak FLOP/s (mfu) if that is known."""
    device, dtype = setup.mesh.devices.flat[0], jnp.dtype(setup.dtype).name
    achieved, peak = compiled.flops_per_step / size.seconds_per_step, peak_flops(device, dtype)
    return {
        "device": sharding.describe(setup.mesh, jax.device_count()),
        "compile_seconds": compiled.seconds,
        "seconds_per_step": size.seconds_per_step,
        "flops_per_step": compiled.flops_per_step,
        "flops_per_second": achieved,
        "mfu": achieved / (peak * setup.mesh.size) if peak else None,
    }
