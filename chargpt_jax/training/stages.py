"""The stages of a run: prepare the text, find a learning rate, train.

Each is a generator of typed events that writes its results to the workdir. A later stage first runs the earlier ones
that have not been run.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from chargpt_jax.config import Config
from chargpt_jax.devices import sharding, startup
from chargpt_jax.devices.platform import compute_dtype
from chargpt_jax.errors import UserError, excused
from chargpt_jax.events import AttentionChosen, AttentionTried, Ended, Event, LRFinderResult
from chargpt_jax.ops import choose
from chargpt_jax.ops.kernels.trial import Shape, fastest
from chargpt_jax.storage.checkpoint import Checkpoints
from chargpt_jax.storage.lock import Lock, writer
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training import optimizer
from chargpt_jax.training.loop import TrainingLoop
from chargpt_jax.training.lr_finder import (
    LossesOf,
    check_descent,
    lowest_at_the_end,
    search,
    trainer_losses,
    unclear,
)
from chargpt_jax.training.pacing import MAX_DISPATCH_STEPS, DispatchSize, Stop, StopCondition
from chargpt_jax.training.run import Run, Warn, check_record, checked_workdir
from chargpt_jax.training.setup import Setup, jit_range_test_steps, jit_train_steps, training_mesh
from chargpt_jax.training.step import TrainState

AUTO = "auto"
"""The value of train.attention that lets the run choose."""


def prepare(config: Config, workdir: str | Path | Workdir, warn: Warn = print) -> Iterator[Event]:
    """Load, repair and encode the text; write it and the config, with the vocabulary size, to the workdir.

    Raises:
        UserError: if the config, the workdir or the text is invalid, or another process trains in the workdir; nothing
            has been written then.
    """
    folder = checked_workdir(config, workdir)
    with writer(folder.path):
        yield Run.prepare(config, folder, warn).prepared()


def find_lr(config: Config, workdir: str | Path | Workdir, warn: Warn = print) -> Iterator[Event]:
    """Run the learning-rate range test; write its result, and the learning rate into the run's config.

    A learning rate that the config sets is kept.
    """
    folder = checked_workdir(config, workdir)
    check_attention(config)
    with writer(folder.path) as lock:
        run = Run.prepare(config, folder, warn)
        yield run.prepared()
        run = yield from _with_attention(run, warn)
        yield from _range_test(run, warn, lock, StopCondition(lambda: None), config.optimizer.learning_rate)


def train(
    config: Config,
    workdir: str | Path | Workdir,
    warn: Warn = print,
    stop: Stop = lambda: None,
    max_minutes: float | None = None,
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

    Raises:
        UserError: if the config, the workdir or the text is invalid, or another process trains in the workdir.
        NonFiniteLoss: if training diverges; the last good checkpoint is kept.
    """
    condition, folder, warn = StopCondition(stop, max_minutes), checked_workdir(config, workdir), without_repeats(warn)
    check_attention(config)
    with writer(folder.path) as lock:
        run = Run.prepare(config, folder, warn)
        yield run.prepared()
        run = yield from _with_attention(run, warn)
        if run.config.optimizer.learning_rate is None:
            run = yield from _range_test(run, warn, lock, condition)
            if condition.reached():
                yield Ended(0, 0.0, math.inf, condition.signal, condition.out_of_time)
                return
        setup, schedule = Setup.of(run), run.schedule()
        tx = optimizer.make_optimizer(run.config.optimizer, schedule, setup.mesh)
        with contextlib.closing(
            Checkpoints(folder.checkpoints, keep_last=run.config.train.keep_last, warn=warn)
        ) as store:
            store.sweep()
            began = time.perf_counter()
            with startup.gc_paused():
                initial_state, shapes = setup.initial_state_in_background(tx), setup.state_shapes(tx)
                dispatch = jit_train_steps(run.config, setup.graphdef, tx, setup.mesh, shapes)
                lowered = dispatch.lower(shapes, setup.on_device, np.int32(1))
                state = initial_state.result()
            tracing = time.perf_counter() - began
            state = _restore(setup, store, state)
            loop = TrainingLoop(run, setup, state, jax.jit(schedule), store, lock, condition, warn)
            yield from loop.events(lowered, tracing)


def check_attention(config: Config) -> None:
    """Check that the device can train with the attention that the config sets, before anything is written.

    Raises:
        UserError: if it cannot.
    """
    asked = config.train.attention
    if asked in (AUTO, choose.BLOCKS):
        return
    mesh, model = training_mesh(config, tell=False), config.model
    names = _attentions(config, mesh)
    if asked not in names:
        raise UserError(
            f"train.attention is {asked!r}, but on {sharding.describe(mesh)} with heads of width {model.n_head_dim}, "
            f"{model.block_size} characters and dropout {model.dropout:g} it must be {' or '.join(names)}: set one of "
            "these, or auto."
        )


def _attentions(config: Config, mesh: Mesh) -> tuple[str, ...]:
    """Return the attentions that the devices of a mesh can train with."""
    model = config.model
    device, dtype = mesh.devices.flat[0], compute_dtype(config.amp)
    return choose.attentions_for(device, dtype, model.block_size, model.n_head_dim, model.dropout)


def _with_attention(run: Run, warn: Warn) -> Generator[Event, None, Run]:
    """Return the run with the attention of its training steps: as set, as saved in the run, or found by a trial.

    A run that has made training steps without a choice used blocks, and keeps its bits.
    """
    asked, mesh = run.config.train.attention, training_mesh(run.config, tell=False)
    names = _attentions(run.config, mesh)
    if asked == choose.BLOCKS or (asked == AUTO and len(names) == 1):
        return run
    if asked != AUTO:
        chosen = AttentionChosen(asked, "config")
    else:
        conditions, saved = _conditions(run.config, mesh), run.workdir.load_attention(warn)
        with contextlib.closing(Checkpoints(run.workdir.checkpoints)) as store:
            has_trained = max(store.steps(), default=0) > 0
        kept = saved.get("attention", choose.BLOCKS if has_trained else "")
        if kept in names and saved.get("conditions", conditions) == conditions:
            chosen = AttentionChosen(kept, "run")
        else:
            chosen = _fastest_attention(run, names, conditions, mesh, warn)
    yield chosen
    return dataclasses.replace(run, attention=chosen.name)


def _conditions(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Return what decides which attention is the fastest; a run whose conditions change tries them again."""
    shape = dataclasses.asdict(attention_shape(config, mesh))
    return {
        **{name: value for name, value in shape.items() if name != "remat"},
        "dtype": jnp.dtype(compute_dtype(config.amp)).name,
        "device": mesh.devices.flat[0].device_kind,
        "jax": jax.__version__,
    }


def _fastest_attention(
    run: Run, names: tuple[str, ...], conditions: dict[str, Any], mesh: Mesh, warn: Warn
) -> AttentionChosen:
    """Try the attentions on a device of the run, and save the fastest in its workdir."""

    def save(name: str, tried: Sequence[dict[str, Any]] = ()) -> None:
        with excused(str(run.workdir.attention), warn):
            run.workdir.save_attention({"attention": name, "conditions": conditions, "tried": tried})

    config = run.config
    shape, dtype = attention_shape(config, mesh), compute_dtype(config.amp)
    # A kernel may end the process, or leave its device unusable. The next start then has a choice that runs.
    save(choose.BLOCKS)
    try:
        results = choose.try_attentions(names, shape, dtype, config.model.attention_block, mesh)
    except KeyboardInterrupt:
        run.workdir.attention.unlink(missing_ok=True)
        raise
    except Exception:
        warn("The trial of attention kernels failed: run the same command again, which will use 'blocks'.")
        raise
    name, tried = fastest(results), [dataclasses.asdict(one) for one in results]
    save(name, tried)
    return AttentionChosen(name, "trial", tuple(AttentionTried(**one) for one in tried))


def attention_shape(config: Config, mesh: Mesh) -> Shape:
    """Return the shape of one layer's attention in a training step, on each device of a mesh."""
    model = config.model
    sequences = config.data.batch_size // config.optimizer.accumulation_steps // mesh.size
    return Shape(sequences, model.n_head, model.block_size, model.n_head_dim, model.dropout, model.remat)


def _range_test(
    run: Run, warn: Warn, lock: Lock, condition: StopCondition, given: float | None = None
) -> Generator[Event, None, Run]:
    """Run the range test; return the run with the learning rate, unchanged if one is given or the test was stopped."""
    finder, losses_of = run.config.lr_finder, _range_test_losses(run, condition)

    def untrained(zoom: int) -> Iterator[float]:
        for loss in losses_of(zoom, [0.0] * finder.steps_per_zoom):
            lock.alive()
            if condition.reached():
                break
            yield loss

    for event in search(losses_of, finder):
        lock.alive()
        if condition.reached():
            break
        if isinstance(event, LRFinderResult):
            if (zoom := unclear(event)) is not None:
                losses = list(untrained(zoom.number - 1))
                if condition.reached():
                    break
                check_descent(zoom, losses, finder)
            if lowest_at_the_end(event):
                warn(
                    f"The loss is lowest at the highest learning rate of the range test, {finder.end_lr:g}: raise "
                    "lr_finder.end_lr, since a higher one may be better."
                )
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


def _range_test_losses(run: Run, condition: StopCondition) -> LossesOf:
    """Return the function that trains the run's model with the learning rates of a zoom.

    A fine-tuned or imported run starts from its checkpoint of step 0, so its range test does too.
    """
    setup, finder, checkpoints = Setup.of(run), run.config.lr_finder, run.workdir.checkpoints
    if (checkpoints / "0").is_dir():
        setup.initial_params = functools.partial(setup.params_of, checkpoints, 0)
    tx = optimizer.make_optimizer(run.config.optimizer, 0.0)
    steps = jit_range_test_steps(run.config, setup.graphdef, setup.mesh, setup.state_shapes(tx))
    size = DispatchSize(run.config)

    def start(zoom: int) -> TrainState:
        state = setup.initial_state(tx)
        return dataclasses.replace(state, step=state.step + zoom * finder.steps_per_zoom)

    def dispatch(state: TrainState, rates: Sequence[float]) -> tuple[TrainState, np.ndarray]:
        count = min(size.steps, len(rates), size.steps_within(condition.seconds_left()))
        began, padded = time.perf_counter(), np.zeros(MAX_DISPATCH_STEPS, np.float32)
        padded[:count] = rates[:count]
        state, losses = steps(state, setup.on_device, padded, np.int32(count))
        losses = np.asarray(losses)[:count]
        size.record(time.perf_counter() - began, count)
        return state, losses

    return trainer_losses(start, dispatch)


def restored(setup: Setup, initial: TrainState, checkpoints: Path, warn: Warn) -> TrainState:
    """Return the state that training would resume from with the checkpoints of a folder.

    Raises:
        UserError: if the checkpoint belongs to a different run.
        NoCheckpoint: if there are checkpoints, but none is usable.
    """
    with contextlib.closing(Checkpoints(checkpoints, warn=warn)) as store:
        return _restore(setup, store, initial)


def _restore(setup: Setup, store: Checkpoints, initial: TrainState) -> TrainState:
    """Return the state of the newest usable checkpoint, or the initial state if there is no checkpoint."""
    own = setup.record()

    def like_of(saved: dict[str, Any]) -> TrainState:
        check_record(saved, own, store.folder)
        return initial

    return store.load("latest", like_of)[2] if store.steps() else initial


def without_repeats(warn: Warn) -> Warn:
    """Return a function that passes each distinct message on once."""
    seen: set[str] = set()

    def warn_once(text: str) -> None:
        if text not in seen:
            seen.add(text)
            warn(text)

    return warn_once
