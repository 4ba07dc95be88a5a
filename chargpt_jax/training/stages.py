"""The stages of a run: prepare the text, find a learning rate, train.

Each is a generator of typed events that writes its results to the workdir. A later stage first runs the earlier ones
that have not been run.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from chargpt_jax.config import Config
from chargpt_jax.devices import processes, startup
from chargpt_jax.errors import excused
from chargpt_jax.events import Ended, Event, LRFinderResult
from chargpt_jax.storage.checkpoint import Checkpoints
from chargpt_jax.storage.lock import Lock
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training import attention, optimizer
from chargpt_jax.training.dispatch.feed import Feed, feed_of
from chargpt_jax.training.dispatch.pacing import MAX_DISPATCH_STEPS, DispatchSize, Stop, StopCondition
from chargpt_jax.training.dispatch.run_length import Clock
from chargpt_jax.training.dispatch.steps import jit_range_test_steps, jit_steps_with_rates, jit_train_steps
from chargpt_jax.training.loop import TrainingLoop
from chargpt_jax.training.range_test.methods import smoothed
from chargpt_jax.training.range_test.search import LossesOf, search, trainer_losses
from chargpt_jax.training.range_test.verdict import check_descent, lowest_at_the_end, unclear
from chargpt_jax.training.run import Run, Warn, check_record, checked_workdir, locked
from chargpt_jax.training.setup import Setup
from chargpt_jax.training.step import TrainState
from chargpt_jax.training.timed_loop import TimedLoop


def prepare(config: Config, workdir: str | Path | Workdir, warn: Warn = print) -> Iterator[Event]:
    """Load, repair and encode the text; write it and the config, with the vocabulary size, to the workdir.

    Raises:
        UserError: if the config, the workdir or the text is invalid, or another process trains in the workdir; nothing
            has been written then.
    """
    folder = checked_workdir(config, workdir)
    with locked(folder):
        yield Run.prepare(config, folder, warn).prepared()


def find_lr(config: Config, workdir: str | Path | Workdir, warn: Warn = print) -> Iterator[Event]:
    """Run the learning-rate range test; write its result, and the learning rate into the run's config.

    A learning rate that the config sets is kept.
    """
    folder = checked_workdir(config, workdir)
    attention.check(config)
    with locked(folder) as lock:
        run = Run.prepare(config, folder, warn)
        yield run.prepared()
        run = yield from attention.chosen(run, warn)
        yield from _range_test(run, warn, lock, StopCondition(lambda: None), config.optimizer.learning_rate)


def train(
    config: Config,
    workdir: str | Path | Workdir,
    warn: Warn = print,
    stop: Stop = lambda: None,
    max_minutes: float | None = None,
    clock: Clock | None = None,
) -> Iterator[Event]:
    """Train to the end of the schedule, resuming from the newest checkpoint if there is one.

    Args:
        config: of the run.
        workdir: of the run; no other process may train in it at the same time.
        warn: receives messages for the user.
        stop: called between dispatches, and during the range test and validations; if it returns the number of a
            signal, training saves a checkpoint and ends.
        max_minutes: time limit from now on, within which a last checkpoint is saved. Training with the same arguments
            resumes from it.
        clock: of the command, for scheduler.minutes; None: it begins now, and ends with the last checkpoint.

    Raises:
        UserError: if the config, the workdir or the text is invalid, or another process trains in the workdir.
        NonFiniteLoss: if training diverges; the last good checkpoint is kept.
    """
    clock = clock or Clock()
    condition, folder, warn = StopCondition(stop, max_minutes), checked_workdir(config, workdir), without_repeats(warn)
    attention.check(config)
    with locked(folder) as lock:
        run = Run.prepare(config, folder, warn)
        yield run.prepared()
        run = yield from attention.chosen(run, warn)
        if run.config.optimizer.learning_rate is None:
            run = yield from _range_test(run, warn, lock, condition)
            if condition.reached():
                yield Ended(0, 0.0, math.inf, condition.signal, condition.out_of_time)
                return
        setup, timed = Setup.of(run), run.config.scheduler.minutes is not None
        schedule = optax.constant_schedule(0.0) if timed else run.schedule()
        tx = optimizer.make_optimizer(run.config, schedule, setup.mesh)
        with (
            contextlib.closing(
                Checkpoints(folder.checkpoints, keep_last=run.config.train.keep_last, warn=warn)
            ) as store,
            contextlib.closing(feed_of(setup, warn)) as feed,
        ):
            if processes.is_first():
                store.sweep()
            began = time.perf_counter()
            with startup.gc_paused():
                initial_state, shapes = setup.initial_state_in_background(tx), setup.state_shapes(tx)
                dispatch, arguments = _dispatch(setup, tx, shapes, feed, timed)
                lowered = dispatch.lower(*arguments)
                state = initial_state.result()
            tracing = time.perf_counter() - began
            state = _restore(setup, store, state)
            given = run, setup, feed, state, jax.jit(schedule), store, lock, condition, warn
            again = partial(_restored_anew, setup, store, tx)
            loop = TimedLoop(*given, clock=clock, restored=again) if timed else TrainingLoop(*given)
            yield from loop.events(lowered, tracing)


def _dispatch(
    setup: Setup, tx: optax.GradientTransformation, state: TrainState, feed: Feed, timed: bool
) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
    """Return the dispatch of a run and its arguments, to be traced.

    The learning rates are an argument if the run's length is given in minutes.
    """
    if timed:
        rates = np.zeros(MAX_DISPATCH_STEPS, np.float32)
        make = partial(jit_steps_with_rates, setup.config, setup.graphdef, setup.mesh, state)
        return setup.kept("steps with rates", make), (state, feed.shape, rates, np.int32(1))
    make = partial(jit_train_steps, setup.config, setup.graphdef, tx, setup.mesh, state)
    return setup.kept("steps", make), (state, feed.shape, np.int32(1))


def _range_test(
    run: Run, warn: Warn, lock: Lock, condition: StopCondition, given: float | None = None
) -> Generator[Event, None, Run]:
    """Run the range test; return the run with the learning rate, unchanged if one is given or the test was stopped."""
    seeds = range(run.config.seed, run.config.seed + run.config.lr_finder.seeds)
    setup = Setup.of(run)
    setups = [setup, *map(setup.with_seed, seeds[1:])]
    with contextlib.ExitStack() as feeds:
        each = [(setup, feeds.enter_context(contextlib.closing(feed_of(setup, warn)))) for setup in setups]
        return (yield from _search(run, _range_test_losses(run, each, condition), warn, lock, condition, given))


def _search(
    run: Run, losses_of: list[LossesOf], warn: Warn, lock: Lock, condition: StopCondition, given: float | None
) -> Generator[Event, None, Run]:
    """Search for the learning rate with the losses of a model, for each of the seeds."""
    finder = run.config.lr_finder

    def untrained(zoom: int) -> Iterator[float]:
        for losses in zip(*(of_seed(zoom, [0.0] * finder.steps_per_zoom) for of_seed in losses_of), strict=True):
            lock.alive()
            if condition.reached():
                break
            yield losses[0] if len(losses) == 1 else sum(losses) / len(losses)

    for event in search(losses_of[0], finder, losses_of[1:]):
        lock.alive()
        if condition.reached():
            break
        if isinstance(event, LRFinderResult):
            if (zoom := unclear(event)) is not None:
                losses = list(untrained(zoom.number - 1))
                if condition.reached():
                    break
                check_descent(zoom, smoothed(losses, finder.smoothing), finder)
            if lowest_at_the_end(event):
                warn(
                    f"The loss is lowest at the highest learning rate of the range test, {finder.end_lr:g}: raise "
                    "lr_finder.end_lr, since a higher one may be better."
                )
            if processes.is_first():
                with excused(str(run.workdir.lr_finder), warn):
                    run.workdir.save_lr_finder(dataclasses.asdict(event))
            if given is None:
                run = run.with_learning_rate(event.learning_rate)
            elif given != event.learning_rate:
                warn(
                    f"optimizer.learning_rate is set to {given:g}, so the run keeps it: set it to "
                    f"{event.learning_rate:.3g} to train with the rate of the range test."
                )
        yield event
    return run


def _range_test_losses(run: Run, seeds: list[tuple[Setup, Feed]], condition: StopCondition) -> list[LossesOf]:
    """Return, for each seed, the function that trains the run's model with the learning rates of a zoom.

    A fine-tuned or imported run starts from its checkpoint of step 0, so its range test does too: there the seeds
    differ by their batches alone. All of them run the same compiled program.
    """
    setup, checkpoints = seeds[0][0], run.workdir.checkpoints
    if processes.agreed((checkpoints / "0").is_dir()):
        for one, _ in seeds:
            one.initial_params = partial(one.params_of, checkpoints, 0)
    tx = optimizer.make_optimizer(run.config, 0.0)
    make = partial(jit_range_test_steps, run.config, setup.graphdef, setup.mesh, setup.state_shapes(tx))
    steps = setup.kept("range test", make)
    size = DispatchSize(run.config)

    def start(setup: Setup, zoom: int) -> TrainState:
        state = setup.initial_state(tx)
        return dataclasses.replace(state, step=state.step + zoom * run.config.lr_finder.steps_per_zoom)

    def dispatch(feed: Feed, state: TrainState, rates: Sequence[float]) -> tuple[TrainState, np.ndarray]:
        count = min(size.steps, len(rates), size.steps_within(condition.seconds_left()), feed.max_steps)
        count = processes.agreed(count)
        began, padded = time.perf_counter(), np.zeros(MAX_DISPATCH_STEPS, np.float32)
        padded[:count] = rates[:count]
        state, losses = steps(state, feed.text_for(int(state.step), count), padded, np.int32(count))
        losses = np.asarray(losses)[:count]
        size.record(time.perf_counter() - began, count)
        return state, losses

    return [trainer_losses(partial(start, setup), partial(dispatch, feed)) for setup, feed in seeds]


def restored(setup: Setup, initial: TrainState, checkpoints: Path, warn: Warn) -> TrainState:
    """Return the state that training would resume from with the checkpoints of a folder.

    Raises:
        UserError: if the checkpoint belongs to a different run.
        NoCheckpoint: if there are checkpoints, but none is usable.
    """
    with contextlib.closing(Checkpoints(checkpoints, warn=warn)) as store:
        return _restore(setup, store, initial)


def _restored_anew(setup: Setup, store: Checkpoints, tx: optax.GradientTransformation) -> TrainState:
    """Return the state that training resumes from, in new memory."""
    return _restore(setup, store, setup.initial_state(tx))


def _restore(setup: Setup, store: Checkpoints, initial: TrainState) -> TrainState:
    """Return the state of the newest usable checkpoint, or the initial state if there is no checkpoint.

    With several processes, process 0 chooses the checkpoint, and all of them read it.
    """
    own = setup.record()

    def like_of(saved: dict[str, Any]) -> TrainState:
        check_record(saved, own, store.folder)
        return initial

    def choose() -> tuple[int, TrainState] | None:
        return store.load("latest", like_of)[::2] if store.steps() else None

    chosen = processes.on_first(choose)
    step = processes.agreed(chosen and chosen[0])
    if step is None:
        return initial
    return chosen[1] if chosen else store.load(step, like_of)[2]


def without_repeats(warn: Warn) -> Warn:
    """Return a function that passes each distinct message on once."""
    seen: set[str] = set()

    def warn_once(text: str) -> None:
        if text not in seen:
            seen.add(text)
            warn(text)

    return warn_once
