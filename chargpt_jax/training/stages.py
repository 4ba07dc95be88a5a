"""The stages of a run, where the pieces meet: prepare, find_lr, train.

Each is a generator of typed events and leaves its results in the workdir; a later stage makes up for an earlier one
that was left out.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from chargpt_jax.config import Config, validate
from chargpt_jax.config_io import differences, from_dict
from chargpt_jax.data import batches
from chargpt_jax.data.corpus import load_corpus
from chargpt_jax.data.tokenizer import CharTokenizer
from chargpt_jax.devices import sharding
from chargpt_jax.errors import NonFiniteLoss, UserError
from chargpt_jax.events import (
    Compiled,
    Ended,
    Event,
    LRFinderResult,
    Prepared,
    Saved,
    Steps,
    TrainStarted,
    Validated,
    bits_per_character,
)
from chargpt_jax.model.flops import peak_flops, training_flops
from chargpt_jax.model.gpt import count_parameters
from chargpt_jax.pictures import plots
from chargpt_jax.storage.checkpoint import UNVALIDATED, Checkpoints
from chargpt_jax.storage.lock import Lock, writer
from chargpt_jax.storage.workdir import Log, Workdir, excused
from chargpt_jax.training import optimizer
from chargpt_jax.training.lr_finder import search, trainer_losses
from chargpt_jax.training.pacing import MAX_DISPATCH_STEPS, DispatchSize, Stop, StopCondition
from chargpt_jax.training.setup import Setup
from chargpt_jax.training.step import TrainState


def prepare(config: Config, workdir: str | Path, warn: Callable[[str], None] = print) -> Iterator[Event]:
    """Find, mend and encode the text; write it and the config, with the vocabulary's size filled in.

    Raises:
        UserError: where the config, the workdir or the text will not do, or another process writes into the workdir;
            nothing has been written then.
    """
    folder = _place(config, workdir)
    with writer(folder.path):
        yield from _prepare(config, folder, warn)


def _place(config: Config, workdir: str | Path) -> Workdir:
    """Return the workdir, where a run with this config can be."""
    validate(config)
    folder = Workdir(workdir)
    folder.check_writable()
    return folder


def _prepare(config: Config, folder: Workdir, warn: Callable[[str], None]) -> Iterator[Event]:
    folder.check_config(config)
    known = folder.has_corpus() and folder.config.exists()
    if known:
        tokenizer, tokens, sources = folder.load_tokenizer(), folder.load_tokens(), folder.load_sources()
        config = _carried_over(folder.load_config(), config)
    else:
        text, found = load_corpus(config.data, warn=warn)
        tokenizer, sources = CharTokenizer.from_text(text), [dataclasses.asdict(source) for source in found]
        if tokenizer.n_ids < 3:
            raise UserError(f"The text holds one distinct character, {text[0]!r}: a model needs at least two.")
        tokens = tokenizer.encode_text(text)
    train, validation = batches.split(tokens, config.data.train_split, config.model.block_size)
    config = _fitted(config, tokenizer)
    _check_length(config, folder, len(train))
    if not known:
        folder.save_corpus(tokenizer, tokens, sources)
    folder.save_config(config)
    yield Prepared(
        titles=tuple(source["title"] for source in sources),
        characters=len(tokens),
        n_train=len(train),
        n_validation=len(validation),
        n_ids=tokenizer.n_ids,
        vocab_size=config.model.vocab_size,
        stand_in_for=next((source["stand_in_for"] for source in sources if source["stand_in_for"]), None),
    )


def _fitted(config: Config, tokenizer: CharTokenizer) -> Config:
    """Fill in what follows from the corpus."""
    given = config.model.vocab_size
    if given and given < tokenizer.n_ids:
        raise UserError(
            f"model.vocab_size is {given}, but the corpus has {tokenizer.n_ids} ids with the padding: leave it at 0."
        )
    if config.model.used_ids not in (0, tokenizer.n_ids):
        raise UserError(
            f"model.used_ids is {config.model.used_ids}, but the corpus has {tokenizer.n_ids} ids with the padding: "
            "leave it at 0."
        )
    model = dataclasses.replace(config.model, vocab_size=given or tokenizer.vocab_size, used_ids=tokenizer.n_ids)
    return dataclasses.replace(config, model=model)


def _check_length(config: Config, folder: Workdir, n_train: int) -> None:
    """Refuse a schedule that ends before updates that were made already: it may grow, but not shrink below them."""
    with contextlib.closing(Checkpoints(folder.checkpoints)) as store:
        made = max(store.steps(), default=0)
    epoch_steps = batches.steps_per_epoch(n_train, config.model.block_size, config.data, config.ancestor.short_epochs)
    total = optimizer.total_steps(config.scheduler, epoch_steps)
    if made > total:
        name = "epochs" if config.scheduler.max_steps is None else "max_steps"
        raise UserError(
            f"scheduler.{name} is {getattr(config.scheduler, name):g}, which makes {total:,} updates, but the run in "
            f"{folder.path} has made {made:,}: give more, or another --workdir."
        )


def _carried_over(saved: Config, given: Config) -> Config:
    """Take a given config over a saved one that it does not contradict, keeping what the run had filled in."""
    rate = given.optimizer.learning_rate or saved.optimizer.learning_rate
    model = dataclasses.replace(given.model, vocab_size=saved.model.vocab_size, used_ids=saved.model.used_ids)
    return dataclasses.replace(given, model=model, optimizer=dataclasses.replace(given.optimizer, learning_rate=rate))


def find_lr(config: Config, workdir: str | Path, warn: Callable[[str], None] = print) -> Iterator[Event]:
    """Run the range test, save its result and picture, and write the rate into the run's config."""
    folder = _place(config, workdir)
    with writer(folder.path) as lock:
        yield from _prepare(config, folder, warn)
        yield from _find_lr(folder, warn, lock, StopCondition(lambda: None))


def _find_lr(folder: Workdir, warn: Callable[[str], None], lock: Lock, condition: StopCondition) -> Iterator[Event]:
    setup = Setup.of(folder)
    finder = setup.config.lr_finder
    tx = optimizer.make_optimizer(setup.config.optimizer, 0.0)
    compiled, pace = setup.prober(tx), DispatchSize(setup.config)

    def start(zoom: int) -> TrainState:
        state = setup.fresh_state(tx)
        return dataclasses.replace(state, step=state.step + zoom * finder.steps_per_zoom)

    def probe(state: TrainState, rates: Sequence[float]) -> tuple[TrainState, np.ndarray]:
        count = min(pace.steps, len(rates), pace.steps_within(condition.seconds_left()))
        began, padded = time.perf_counter(), np.zeros(MAX_DISPATCH_STEPS, np.float32)
        padded[:count] = rates[:count]
        state, losses = compiled(state, setup.on_device, padded, np.int32(count))
        losses = np.asarray(losses)[:count]
        pace.record(time.perf_counter() - began, count)
        return state, losses

    for event in search(trainer_losses(start, probe), finder):
        lock.alive()
        if condition.reached():
            return
        if isinstance(event, LRFinderResult):
            zooms = [(zoom.lrs, zoom.losses) for zoom in event.zooms]
            steepest = [zoom.steepest for zoom in event.zooms]
            with excused(f"{folder.lr_finder} or its plot", warn):
                folder.save_lr_finder(event, plots.lr_finder_plot(zooms, steepest, event.learning_rate, event.method))
            found = dataclasses.replace(setup.config.optimizer, learning_rate=event.learning_rate)
            folder.save_config(dataclasses.replace(setup.config, optimizer=found))
        yield event


def train(
    config: Config,
    workdir: str | Path,
    warn: Callable[[str], None] = print,
    stop: Stop = lambda: None,
    max_minutes: float | None = None,
) -> Iterator[Event]:
    """Train to the end of the schedule, from the newest checkpoint where there is one.

    Args:
        config: of the run.
        workdir: of the run, which nobody else may write into meanwhile.
        warn: told what the user should know.
        stop: asked between dispatches, and within the range test and validations; a signal's number ends training
            after a checkpoint.
        max_minutes: from now, in which a last checkpoint is made; training with the same arguments goes on from it.

    Raises:
        UserError: where the config, the workdir or the text will not do, or another process writes into the workdir.
        NonFiniteLoss: with the step and the last good checkpoint, which is kept.
    """
    condition, folder, warn = StopCondition(stop, max_minutes), _place(config, workdir), _once(warn)
    with writer(folder.path) as lock:
        yield from _prepare(config, folder, warn)
        if folder.load_config().optimizer.learning_rate is None:
            yield from _find_lr(folder, warn, lock, condition)
            if condition.reached():
                yield Ended(0, 0.0, math.inf, condition.signal, condition.out_of_time)
                return
        setup = Setup.of(folder)
        store = Checkpoints(folder.checkpoints, keep_last=setup.config.train.keep_last, warn=warn)
        store.sweep()
        try:
            yield from _train(setup, folder, store, warn, lock, condition)
        finally:
            store.close()


def _train(
    setup: Setup, folder: Workdir, store: Checkpoints, warn: Callable[[str], None], lock: Lock, condition: StopCondition
) -> Iterator[Event]:
    config, epoch_steps = setup.config, setup.epoch_steps
    assert config.optimizer.learning_rate is not None
    schedule = optimizer.warmup_cosine(
        config.scheduler, config.optimizer.learning_rate, epoch_steps, config.ancestor.decay
    )
    tx, rate_at = optimizer.make_optimizer(config.optimizer, schedule, setup.mesh), jax.jit(schedule)
    total = optimizer.total_steps(config.scheduler, epoch_steps)
    every = max(1, round(config.train.validate_every * epoch_steps))
    began = time.perf_counter()
    state, lowered = setup.begin(tx)
    tracing = time.perf_counter() - began
    state = _resumed(setup, store, state)
    step = int(state.step)
    log = Log(folder, step, warn)
    validations = [line for line in log.lines if line["event"] == "validation"]
    seconds = max((line.get("seconds", 0.0) for line in log.lines), default=0.0)
    best = min((line["loss"] for line in validations), default=math.inf)
    yield TrainStarted(
        parameters=count_parameters(setup.shapes),
        first_step=step,
        total_steps=total,
        epoch_steps=epoch_steps,
        epochs=total / epoch_steps,
        learning_rate=config.optimizer.learning_rate,
        device=sharding.describe(setup.mesh),
        dtype=jnp.dtype(setup.dtype).name,
        training=tuple((line["step"], line["loss"]) for line in log.lines if line["event"] == "step"),
        validation=tuple((line["step"], line["loss"]) for line in validations),
    )
    if condition.reached():
        yield Ended(step, seconds, best, condition.signal, condition.out_of_time)
        return
    began = time.perf_counter()
    dispatch = lowered.compile()
    compiled = Compiled(tracing + time.perf_counter() - began, training_flops(config.model, config.data.batch_size))
    yield compiled
    validate_now, pace = setup.validator(), DispatchSize(config)
    # Nothing cuts the compilation of the first validation short; it takes no longer than that of the updates.
    compiling, validated, saved = compiled.seconds, max((line["step"] for line in validations), default=0), step

    while True:
        lock.alive()
        loss = None
        if step > validated and (step % every == 0 or step == total) and not condition.reached(compiling):
            began = time.perf_counter()
            loss = validate_now(state.params, step, condition.reached)
            seconds, compiling = seconds + time.perf_counter() - began, 0.0
        if loss is not None:
            _check_finite(np.array([loss]), np.zeros(1), step - 1, store)
            found = Validated(step, step / epoch_steps, loss, bits_per_character(loss), loss < best, seconds)
            best, validated = min(best, loss), step
            with excused(str(folder.speed), warn):
                if math.isfinite(pace.seconds_per_step):
                    folder.save_speed(_speed(compiled, pace, setup))
            # The line goes first: after a crash between the two, training goes on from before it and drops it.
            log.add([{"event": "validation", **dataclasses.asdict(found)}], durably=True)
            saving, saved = _saved(store, state, setup, loss, condition), step
            yield found
            yield saving
        ended = condition.reached(pace.seconds_for(1)) or step == total
        if ended and step > saved:  # asked to end between validations, or within one, which is made up for on resuming
            yield _saved(store, state, setup, UNVALIDATED, condition)
        if ended:
            break
        count = min(pace.steps, every - step % every, total - step, pace.steps_within(condition.seconds_left()))
        began = time.perf_counter()
        state, history = dispatch(state, setup.on_device, np.int32(count))
        # Awaited at once: with several CPU devices two dispatches in flight can deadlock.
        losses, norms = (np.asarray(history[name])[:count] for name in ("loss", "grad_norm"))
        pace.record(time.perf_counter() - began, count)
        times = np.linspace(seconds, seconds + time.perf_counter() - began, count + 1)[1:]
        seconds = float(times[-1])
        _check_finite(losses, norms, step, store, scaled=state.loss_scale is not None)
        log.add(_lines(losses, norms, times, rate_at, step, config.train.log_every))
        step += count
        yield Steps(
            step=step,
            epoch=step / epoch_steps,
            loss=float(losses[-1]),
            learning_rate=float(rate_at(step - 1)),
            grad_norm=float(norms[-1]),
            tokens_per_second=config.data.batch_size * config.model.block_size / pace.seconds_per_step,
            seconds=seconds,
            seconds_left=(total - step) * pace.seconds_per_step,
        )
    yield Ended(step, seconds, best, condition.signal, condition.out_of_time)


def _saved(store: Checkpoints, state: TrainState, setup: Setup, loss: float, condition: StopCondition) -> Saved:
    """Save a checkpoint, and tell `condition` how long that takes."""
    step, began = int(state.step), time.perf_counter()
    path = store.save(state, setup.record(), loss)
    condition.record_save(time.perf_counter() - began)
    return Saved(step, str(path))


def restored(setup: Setup, fresh: TrainState, checkpoints: Path, warn: Callable[[str], None]) -> TrainState:
    """Return the state that training would go on from with the checkpoints of some folder, as it would find it.

    Raises:
        UserError: where the checkpoint is of another model or corpus.
        NoCheckpoint: where there are checkpoints, but none can be used.
    """
    store = Checkpoints(checkpoints, warn=warn)
    try:
        return _resumed(setup, store, fresh)
    finally:
        store.close()


def _resumed(setup: Setup, store: Checkpoints, fresh: TrainState) -> TrainState:
    """Return the newest saved state that can be used, or the fresh one where nothing was saved.

    Raises:
        UserError: where the checkpoint is of another model or corpus than the workdir says.
        NoCheckpoint: where steps were saved, but none can be used.
    """
    own = setup.record()

    def like_of(saved: dict[str, Any]) -> TrainState:
        lines = differences(from_dict(saved["config"]), setup.config)
        lines += [f"{name} differs" for name in ("vocabulary", "corpus_sha256") if saved[name] != own[name]]
        if lines:
            raise UserError(
                f"Checkpoint {saved['step']} of {store.folder} is of another run ({'; '.join(lines[:6])}): go on with "
                "what it was made with, or give another --workdir."
            )
        return fresh

    return store.load("latest", like_of)[2] if store.steps() else fresh


def _speed(compiled: Compiled, pace: DispatchSize, setup: Setup) -> dict[str, Any]:
    """Say how fast training goes, as JSON can hold it."""
    device, dtype = setup.mesh.devices.flat[0], jnp.dtype(setup.dtype).name
    achieved = compiled.flops_per_step / pace.seconds_per_step
    peak = peak_flops(device, dtype)
    return {
        "device": sharding.describe(setup.mesh),
        "compile_seconds": compiled.seconds,
        "seconds_per_step": pace.seconds_per_step,
        "flops_per_step": compiled.flops_per_step,
        "flops_per_second": achieved,
        "mfu": achieved / (peak * setup.mesh.size) if peak else None,
    }


def _check_finite(losses: np.ndarray, norms: np.ndarray, step: int, store: Checkpoints, scaled: bool = False) -> None:
    """Stop at the first loss, or gradient, that is no number; with loss scaling an overflowing gradient is normal."""
    bad = ~np.isfinite(losses) | (~np.isfinite(norms) & (not scaled))
    if not bad.any():
        return
    at = int(np.argmax(bad))
    kept = store.steps()
    last = f"the checkpoint of step {kept[-1]} is kept" if kept else "no checkpoint was made before"
    raise NonFiniteLoss(
        f"At step {step + at + 1} the loss is {losses[at]} and the gradient's norm {norms[at]}: {last}. Lower "
        "optimizer.learning_rate, or set optimizer.clip_norm=1.0."
    )


def _lines(
    losses: np.ndarray, norms: np.ndarray, times: np.ndarray, rate_at: optax.Schedule, step: int, every: int
) -> list[dict[str, Any]]:
    """Make the lines of metrics.jsonl for the updates after `step` whose number is a multiple of `every`.

    `times` are seconds of training at the end of each update, those of one dispatch at equal distances.
    """
    return [
        {
            "event": "step",
            "step": step + i + 1,
            "loss": float(losses[i]),
            "learning_rate": float(rate_at(step + i)),
            "grad_norm": float(norms[i]),
            "seconds": float(times[i]),
        }
        for i in range(len(losses))
        if (step + i + 1) % every == 0
    ]


def _once(warn: Callable[[str], None]) -> Callable[[str], None]:
    """Return a way to warn that says nothing twice."""
    told: set[str] = set()

    def tell(text: str) -> None:
        if text not in told:
            told.add(text)
            warn(text)

    return tell
