"""The stages end to end on a small text of known entropy: resuming, stopping, the range test, errors."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from chargpt_jax import api, atomic
from chargpt_jax.config import Config
from chargpt_jax.config.files import load_config
from chargpt_jax.devices.platform import BFLOAT16_ON_CPU
from chargpt_jax.errors import NonFiniteLoss, UserError
from chargpt_jax.events import (
    Compiled,
    Ended,
    LRFinderResult,
    LRFinderStep,
    Prepared,
    Saved,
    Steps,
    TrainStarted,
    Validated,
    Zoom,
)
from chargpt_jax.results.curves import range_test_plot
from chargpt_jax.selftest.bench import shrunk
from chargpt_jax.storage.arrays.state_arrays import on_host
from chargpt_jax.storage.checkpoint import Checkpoints
from chargpt_jax.storage.metrics_log import Log
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training import loop, optimizer, setup, stages
from chargpt_jax.training.dispatch import kept, pacing, steps
from chargpt_jax.training.range_test.saved import result_from
from chargpt_jax.training.run import Run
from chargpt_jax.training.setup import Setup
from tests.corpus_text import FLOOR, small_config, write_words


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(autouse=True, scope="module")
def several_validation_batches():
    """Validate in batches of the training size, so that a validation has several and can be interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "VALIDATED_AT_ONCE", 1)
        yield


def quiet(_: str) -> None:
    pass


def final(workdir):
    """Return the arrays of the newest checkpoint of a run, by path."""
    setup = Setup.of(Run.load(workdir))
    tx = optimizer.empty(setup.config)
    store = Checkpoints(Workdir(workdir).checkpoints)
    fresh = setup.initial_state(tx)
    _, _, state = store.load("latest", lambda record: fresh)
    store.close()
    return on_host(state)


def same_bits(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def logged(workdir):
    """Return metrics.jsonl without wall-clock times."""
    lines = Workdir(workdir).load_metrics()
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def traces_of(module, name, monkeypatch):
    """Return a list that gets an element whenever a function of a module is traced; earlier traces are forgotten."""
    kept.forget()
    traces, original = [], getattr(module, name)

    def counted(*args, **kwargs):
        traces.append(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return traces


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """Train without interruption."""
    workdir = tmp_path_factory.mktemp("whole")
    events = list(stages.train(small_config(text), workdir, quiet))
    return workdir, events


def test_events_come_in_order(whole):
    _, events = whole
    kinds = [type(event) for event in events]
    assert kinds[:3] == [Prepared, TrainStarted, Compiled]
    assert kinds[-3:] == [Validated, Saved, Ended]
    steps = [event.step for event in events if isinstance(event, Steps)]
    assert steps == sorted(set(steps))
    assert steps[-1] == events[1].total_steps == 30
    assert all(event.tokens_per_second > 0 for event in events if isinstance(event, Steps))
    best = [event.loss for event in events if isinstance(event, Validated) and event.best]
    assert best == sorted(best, reverse=True)
    assert events[-1].best_loss == best[-1]


def test_every_step_and_validation_is_logged_once(whole):
    workdir, events = whole
    lines = Workdir(workdir).load_metrics()
    assert [line["step"] for line in lines if line["event"] == "step"] == list(range(1, 31))
    validations = [dataclasses.asdict(event) for event in events if isinstance(event, Validated)]
    assert {event.pop("unit") for event in validations} == {"character"}  # the config says so too
    assert [{k: v for k, v in line.items() if k != "event"} for line in lines if line["event"] == "validation"] == (
        validations
    )


def test_training_speed_is_saved(whole):
    workdir, events = whole
    (compiled,) = [event for event in events if isinstance(event, Compiled)]
    speed = Workdir(workdir).load_speed(pytest.fail)
    assert speed["compile_seconds"] == compiled.seconds > 0
    assert speed["flops_per_step"] == compiled.flops_per_step
    assert speed["flops_per_second"] == pytest.approx(compiled.flops_per_step / speed["seconds_per_step"])
    assert speed["mfu"] is None  # the peak of a CPU is not known
    last = [event for event in events if isinstance(event, Steps)][-1]
    assert speed["seconds_per_step"] == pytest.approx(8 * 32 / last.tokens_per_second)


def test_mfu_is_saved_if_the_peak_is_known(whole, monkeypatch):
    setup, timed = Setup.of(Run.load(whole[0])), pacing.DispatchSize(small_config("x"))
    timed.record(0.5, 10)
    monkeypatch.setattr(loop, "peak_flops", lambda device, dtype: 1e9 if dtype == "float32" else None)
    assert loop.speed(Compiled(1.0, 1e7), timed, setup)["mfu"] == pytest.approx(1e7 / 0.05 / 1e9)


@pytest.mark.parametrize("when", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_resumed_run_is_bit_identical(whole, text, tmp_path, when):
    """Close the generator after some checkpoint and again later, like a crash, with dropout and padding."""
    config = small_config(text)
    for stop_after in (when, 1):
        saved = 0
        for event in stages.train(config, tmp_path, quiet):
            saved += isinstance(event, Saved)
            if saved == stop_after:
                break
    events = list(stages.train(config, tmp_path, quiet))
    started = next(event for event in events if isinstance(event, TrainStarted))
    assert 0 < started.first_step < 30
    assert same_bits(final(tmp_path), final(whole[0]))
    assert logged(tmp_path) == logged(whole[0])


@pytest.mark.parametrize("steps", [1, pytest.param(7, marks=pytest.mark.slow)])
def test_dispatch_size_changes_no_bit(whole, text, tmp_path, steps):
    config = small_config(text)
    config.train.steps_per_dispatch = steps
    list(stages.train(config, tmp_path, quiet))
    assert same_bits(final(tmp_path), final(whole[0]))


def test_signal_saves_and_the_run_resumes_there(whole, text, tmp_path):
    config = small_config(text)
    config.train.steps_per_dispatch = 1
    events: list[object] = []
    stop = lambda: signal.SIGTERM if isinstance(events[-1], Steps) and events[-1].step == 5 else None  # noqa: E731
    for event in stages.train(config, tmp_path, quiet, stop):
        events.append(event)
    assert isinstance(events[-1], Ended)
    assert events[-1].signal == signal.SIGTERM
    assert events[-1].step == 5
    list(stages.train(config, tmp_path, quiet))
    assert same_bits(final(tmp_path), final(whole[0]))
    assert logged(tmp_path) == logged(whole[0])


@pytest.mark.slow
def test_seconds_continue_after_resuming(text, tmp_path):
    config = small_config(text)
    config.train.steps_per_dispatch, config.train.log_every = 1, 1
    stop = lambda: signal.SIGTERM if isinstance(events[-1], Steps) and events[-1].step == 5 else None  # noqa: E731
    events: list[object] = []
    for event in stages.train(config, tmp_path, quiet, stop):
        events.append(event)
    before = Workdir(tmp_path).load_metrics()
    assert before[-1]["event"] == "step"  # interrupted after the last validation
    list(stages.train(config, tmp_path, quiet))
    seconds = [line["seconds"] for line in Workdir(tmp_path).load_metrics()]
    assert all(later > earlier for earlier, later in itertools.pairwise(seconds))
    assert events[-1].seconds == before[-1]["seconds"] == seconds[len(before) - 1]


@pytest.mark.parametrize("at", [3, *(pytest.param(at, marks=pytest.mark.slow) for at in (15, 30))])
def test_signal_interrupts_a_validation_which_is_repeated(whole, text, tmp_path, monkeypatch, at):
    """Step 3 is the first one with a validation, and step 30 the last of the run."""
    config = small_config(text)
    batches_seen, original = 0, setup.Setup.validator

    def counting(self, whole=False):
        inner = original(self, whole)

        def loss(params, step, ended=lambda: False):
            def counted():
                nonlocal batches_seen
                batches_seen += step >= at
                return ended()

            return inner(params, step, counted)

        return loss

    monkeypatch.setattr(setup.Setup, "validator", counting)
    events = list(stages.train(config, tmp_path, quiet, lambda: signal.SIGTERM if batches_seen == 2 else None))
    monkeypatch.undo()
    cut = events[-1].step
    assert batches_seen == 2
    assert [type(event) for event in events[-2:]] == [Saved, Ended]
    assert events[-1].signal == signal.SIGTERM
    assert cut not in [line["step"] for line in logged(tmp_path) if line["event"] == "validation"]
    again = [event for event in stages.train(config, tmp_path, quiet) if isinstance(event, Validated)]
    assert again[0].step == cut
    assert same_bits(final(tmp_path), final(whole[0]))
    assert logged(tmp_path) == logged(whole[0])


def test_signal_ends_the_range_test_without_a_result(text, tmp_path):
    config = small_config(text)
    config.optimizer.learning_rate = None
    events: list[object] = []
    stop = lambda: signal.SIGINT if len(events) == 4 else None  # noqa: E731
    for event in stages.train(config, tmp_path, quiet, stop):
        events.append(event)
    assert [type(event) for event in events] == [Prepared, LRFinderStep, LRFinderStep, LRFinderStep, Ended]
    assert (events[-1].signal, events[-1].complete) == (signal.SIGINT, False)
    assert Workdir(tmp_path).load_config().optimizer.learning_rate is None
    assert not (tmp_path / "lr_finder.json").exists()


def test_signal_ends_the_check_for_a_descent_without_a_result(text, tmp_path, monkeypatch):
    checked: list[object] = []
    monkeypatch.setattr(stages, "unclear", lambda result: checked.append(result) or result.zooms[0])
    stop = lambda: signal.SIGINT if checked else None  # noqa: E731
    (*_, last) = stages.train(range_test_config(text, 0), tmp_path, quiet, stop)
    assert last == Ended(0, 0.0, math.inf, signal.SIGINT)
    assert len(checked) == 1
    assert not (tmp_path / "lr_finder.json").exists()


def test_unwritable_log_does_not_end_training(whole, text, tmp_path, monkeypatch):
    warnings, original, full = [], atomic.regular_only, True

    def opened(path, flags):
        if full and flags & os.O_APPEND:
            raise OSError(28, "No space left on device")
        return original(path, flags)

    monkeypatch.setattr(atomic, "regular_only", opened)
    monkeypatch.setattr(Workdir, "save_speed", lambda *_: opened("speed.json", os.O_APPEND))
    for event in stages.train(small_config(text), tmp_path, warnings.append):
        if isinstance(event, Saved) and event.step >= 15:
            full = False
            monkeypatch.setattr(Workdir, "save_speed", lambda *_: None)
    log, speed = sorted(warnings, key=lambda line: "speed.json" in line)
    assert "metrics.jsonl (No space left on device): training continues" in log
    assert "speed.json (No space left on device): the run continues" in speed
    assert same_bits(final(tmp_path), final(whole[0]))
    assert logged(tmp_path) == logged(whole[0])


class Crash(BaseException):
    """Simulates the death of the process: the package does not catch it."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parts"), [("tiny", 1), ("small", 2), ("nanogpt_cpu", 1), ("nanogpt_baby", 2)])
def test_shipped_configs_resume_bit_for_bit_after_crashes(text, tmp_path, monkeypatch, name, parts):
    """With the settings of each config (dropout, padding, clipping, ...), within an epoch, on a small model."""
    config = load_config(name)
    config.optimizer.accumulation_steps = parts
    config = shrunk(config, text)
    config.scheduler.max_steps = 16
    list(stages.train(config, tmp_path / "whole", quiet))
    rng, left = np.random.default_rng([parts, *name.encode()]), 0

    def crashing(method):
        def call(*args, **options):
            nonlocal left
            left -= 1
            if left == 0:
                raise Crash
            result = method(*args, **options)
            left -= 1
            if left == 0:
                raise Crash
            return result

        return call

    for owner, method in ((Log, "add"), (Checkpoints, "save"), (Workdir, "write")):
        monkeypatch.setattr(owner, method, crashing(getattr(owner, method)))
    for most in (10, 20, 30, 0):
        left = int(rng.integers(1, most)) if most else 0
        with contextlib.suppress(Crash):
            list(stages.train(config, tmp_path / "cut", quiet))
    monkeypatch.undo()
    assert same_bits(final(tmp_path / "cut"), final(tmp_path / "whole"))
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    assert [line["step"] for line in logged(tmp_path / "cut") if line["event"] == "step"] == list(range(1, 17))


def test_time_is_up_when_a_dispatch_and_two_saves_no_longer_fit(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(pacing.time, "monotonic", lambda: now)
    condition = pacing.StopCondition(lambda: None, max_minutes=1.0)
    assert not condition.reached(40.0)
    condition.record_save(10.0)
    assert condition.seconds_left() == 39.0
    now += 30
    assert not condition.reached(8.9)
    assert condition.reached(9.1)
    now -= 30
    assert condition.reached()  # it stays true
    assert (condition.signal, condition.out_of_time) == (None, True)
    assert not pacing.StopCondition(lambda: None).reached(1e9)


@pytest.mark.parametrize("minutes", [math.nan, math.inf, -1, 0, 10**400, "1", True])
def test_time_limit_is_a_number_above_0(minutes):
    with pytest.raises(UserError, match="max_minutes is .*, but it must be a number"):
        pacing.StopCondition(lambda: None, minutes)


def test_stop_must_be_a_function():
    with pytest.raises(UserError, match="stop is 5, but it must be a function"):
        pacing.StopCondition(5)


def test_last_dispatch_fits_into_the_time_left(text):
    timed = pacing.DispatchSize(small_config(text))
    assert (timed.steps_within(math.inf), timed.steps_within(3.0)) == (pacing.MAX_DISPATCH_STEPS, 1)
    timed.record(1.0, 10)
    assert timed.steps_within(1.3) == 10
    assert timed.steps_within(0.001) == 1
    assert timed.steps_within(1e9) == pacing.MAX_DISPATCH_STEPS


def test_finished_run_makes_no_further_step(whole, text):
    workdir, _ = whole
    before = final(workdir)
    events = list(stages.train(small_config(text), workdir, quiet))
    assert not [event for event in events if isinstance(event, Steps)]
    assert same_bits(final(workdir), before)


def test_training_compiles_once_for_dispatches_of_any_length(text, tmp_path, monkeypatch):
    traces = traces_of(steps, "train_steps", monkeypatch)
    events = list(stages.train(small_config(text), tmp_path, quiet))
    lengths = np.diff([0] + [event.step for event in events if isinstance(event, Steps)])
    assert len(set(lengths)) > 1
    assert len(traces) == 1


@pytest.mark.slow
def test_validation_compiles_once_for_all_of_a_run(text, tmp_path, monkeypatch):
    traces = traces_of(setup, "validation_step", monkeypatch)
    events = list(stages.train(small_config(text), tmp_path, quiet))
    assert len([event for event in events if isinstance(event, Validated)]) > 1
    assert len(traces) == 1


def test_merged_validation_batches_give_the_same_loss(text, tmp_path, monkeypatch):
    list(stages.prepare(small_config(text), tmp_path, quiet))
    run, asked, losses = Setup.of(Run.load(tmp_path)), [], []
    params = jax.tree.map(np.asarray, run.initial_params())
    for most in (1, 600, 10**6):  # a batch of training is 8 x 32 characters
        monkeypatch.setattr(setup, "VALIDATED_AT_ONCE", most)
        asked.append(0)

        def ended():
            asked[-1] += 1
            return False

        losses.append(run.validator()(params, 0, ended))
    n_validation = len(run.tokens) - run.n_train
    assert asked == [
        -(-n_validation // 256),
        -(-n_validation // 512),
        2,
    ]  # the last: all that fill batches, and the rest
    assert n_validation % 256
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


@pytest.mark.slow
def test_the_model_learns_the_text_down_to_its_entropy(text, tmp_path):
    """No model can have a loss below FLOOR; the final loss must be only a little higher."""
    config = small_config(text, dropout=0.0, n_embd=32)
    config.scheduler.max_steps = 400
    config.train.validate_every = 100.0
    (ended,) = [event for event in stages.train(config, tmp_path, quiet) if isinstance(event, Ended)]
    assert FLOOR * 0.97 < ended.best_loss < FLOOR * 1.12


@pytest.mark.slow
def test_settings_of_the_original_can_be_enabled(text, tmp_path):
    """Short epochs, warm-up without cosine decay, unmasked unused ids, and validation on random crops."""
    config = small_config(text)
    config.model.mask_unused_ids = False
    config.ancestor.short_epochs, config.ancestor.random_validation = True, True
    config.ancestor.decay, config.scheduler.max_steps, config.scheduler.epochs = "none", None, 3.0
    config.scheduler.warmup_epochs, config.train.validate_every = 1.0, 1.0
    config.data.batch_size = 4
    events = list(stages.train(config, tmp_path, quiet))
    prepared, started = events[:2]
    steps = math.ceil(math.ceil((prepared.n_train - 33) / 4 / 32) / 4)
    assert (started.epoch_steps, started.total_steps) == (steps, 3 * steps)
    rates = [line["learning_rate"] for line in logged(tmp_path) if line["event"] == "step"]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[steps:] == pytest.approx([1e-2] * 2 * steps)

    setup = Setup.of(Run.load(tmp_path))
    params = jax.tree.map(np.asarray, setup.initial_params())
    crops, windows = setup.validator(), setup.validator(whole=True)
    assert crops(params, 1) == crops(params, 1) != crops(params, 2)
    assert windows(params, 1) == windows(params, 2)
    # The text is homogeneous: the loss of a few crops is close to that of the full validation set.
    assert crops(params, 1) == pytest.approx(windows(params, 1), rel=0.05)


def test_range_test_runs_if_no_learning_rate_is_set(text, tmp_path):
    config = small_config(text)
    config.optimizer.learning_rate = None
    config.scheduler.max_steps = 3
    events = list(api.train(config, tmp_path, quiet))
    steps = [event for event in events if isinstance(event, LRFinderStep)]
    (result,) = [event for event in events if isinstance(event, LRFinderResult)]
    started = next(event for event in events if isinstance(event, TrainStarted))
    assert len(steps) == steps[-1].total_steps == 50
    assert [event for event in events if isinstance(event, Zoom)] == list(result.zooms)
    assert started.learning_rate == result.learning_rate == Workdir(tmp_path).load_config().optimizer.learning_rate
    assert json.loads((tmp_path / "lr_finder.json").read_text())["learning_rate"] == result.learning_rate
    assert (tmp_path / "lr_finder.svg").read_text().startswith("<svg")
    assert 1e-5 < result.learning_rate < 1
    # Every zoom starts from the same parameters: at tiny learning rates the first losses differ only by their batches.
    firsts = [step.loss for step in steps if (step.step - 1) % 10 == 0]
    assert max(firsts) - min(firsts) < 0.2
    again = list(stages.train(config, tmp_path, quiet))
    assert not [event for event in again if isinstance(event, LRFinderStep)]


def range_test_config(source: Path, seed: int, **settings: float | str) -> Config:
    """Return a config without a learning rate, with changed settings of the range test."""
    config = small_config(source)
    config.optimizer.learning_rate, config.seed = None, seed
    config.lr_finder = dataclasses.replace(config.lr_finder, **settings)
    return config


NO_DESCENT = [
    (0, {"num_zooms": 1, "steps_per_zoom": 2, "method": "balanced"}),
    (0, {"end_lr": 1e-8}),
    *(
        pytest.param(seed, {"num_zooms": 1, "steps_per_zoom": 2, "method": "balanced"}, marks=pytest.mark.slow)
        for seed in (1, 2)
    ),
    pytest.param(0, {"start_lr": 1.0, "num_zooms": 2}, marks=pytest.mark.slow),
]


@pytest.mark.slow
def test_range_test_of_small_batches_takes_no_noise_for_a_descent(text, tmp_path):
    config = range_test_config(text, 0, start_lr=1e-30, end_lr=1e-25)
    config.model.block_size, config.data.batch_size = 8, 2
    with pytest.raises(UserError, match=r"shows no descent .* training accounts for -?0.000"):
        list(stages.find_lr(config, tmp_path, quiet))


@pytest.mark.parametrize(("seed", "settings"), NO_DESCENT)
def test_range_test_without_a_descent_proposes_no_learning_rate(text, tmp_path, seed, settings):
    events = []
    with pytest.raises(UserError, match=r"shows no descent|lowers the loss"):
        events.extend(stages.train(range_test_config(text, seed, **settings), tmp_path, quiet))
    assert Workdir(tmp_path).load_config().optimizer.learning_rate is None
    assert not (tmp_path / "lr_finder.json").exists()
    assert not (tmp_path / "checkpoints").exists()


def test_range_test_of_several_seeds_is_that_of_each_seed(text, tmp_path):
    """In the first zoom, whose rates are the same, the losses of the k-th seed are those of a run with seed + k."""

    def losses(seed, seeds, folder):
        config = range_test_config(text, seed, seeds=seeds, num_zooms=3, start_lr=1e-5)
        *events, result = stages.find_lr(config, tmp_path / folder, quiet)
        steps = [event for event in events if isinstance(event, LRFinderStep) and event.zoom == 1]
        return [[step.loss for step in steps if step.seed == i] for i in range(seeds)], result

    (first, second), both = losses(3, 2, "both")
    assert first == losses(3, 1, "first")[0][0]
    assert second == losses(4, 1, "second")[0][0]
    assert first != second
    saved = result_from(Workdir(tmp_path / "both").load_json(tmp_path / "both" / "lr_finder.json"))
    assert saved == both
    assert min(both.zooms[-1].seed_rates) <= max(both.zooms[-1].seed_rates)
    assert len(both.zooms[-1].seed_rates) == 2
    assert 'class="cg-band"' in range_test_plot(both)


@pytest.mark.slow
def test_lowest_loss_at_the_end_of_the_range_is_reported(text, tmp_path):
    said: list[str] = []
    (*_, result) = stages.find_lr(range_test_config(text, 0, end_lr=0.1, method="balanced"), tmp_path, said.append)
    assert isinstance(result, LRFinderResult)
    assert [line for line in said if "lowest at the highest learning rate of the range test, 0.1: raise" in line]
    said.clear()
    list(stages.find_lr(range_test_config(text, 0), tmp_path / "wide", said.append))
    assert not [line for line in said if "highest learning rate" in line]


def test_error_of_initialisation_in_the_thread_is_raised(text, tmp_path):
    list(stages.prepare(small_config(text), tmp_path, quiet))

    def draw():
        raise MemoryError

    setup = dataclasses.replace(Setup.of(Run.load(tmp_path)), initial_params=draw)
    state = setup.initial_state_in_background(optimizer.make_optimizer(setup.config, 1e-3))
    with pytest.raises(MemoryError):
        state.result()


def test_the_range_test_compiles_once_and_keeps_a_set_rate(text, tmp_path, monkeypatch):
    traces, said = traces_of(steps, "range_test_steps", monkeypatch), []
    (*_, result) = stages.find_lr(small_config(text), tmp_path, said.append)
    assert len(traces) == 1
    assert Workdir(tmp_path).load_config().optimizer.learning_rate == small_config(text).optimizer.learning_rate
    (line,) = [line for line in said if "learning_rate" in line]
    assert "is set to 0.01, so the run keeps it" in line
    assert f"set it to {result.learning_rate:.3g} to train" in line


def test_non_finite_loss_stops_training(text, tmp_path):
    config = small_config(text)
    config.optimizer.learning_rate = 1e30
    config.scheduler.warmup_epochs = 100.0  # the learning rate starts near 0, so the first checkpoint is good
    config.scheduler.min_lr_factor = 0.0
    config.train.validate_every = 1 / 40
    config.scheduler.max_steps = 200
    with pytest.raises(
        NonFiniteLoss, match=r"diverged at step \d+: loss (nan|inf).* last checkpoint is step \d+: .*a new --workdir"
    ):
        list(stages.train(config, tmp_path, quiet))
    assert all(np.isfinite(x).all() for x in final(tmp_path).values())


@pytest.mark.slow
def test_advice_after_a_non_finite_loss_can_be_followed(text, tmp_path):
    config = small_config(text)
    config.optimizer.learning_rate, config.scheduler.warmup_epochs = 1e30, 0.0
    advice = r"no checkpoint yet: start again with --config.optimizer.learning_rate=1.0e\+29 or --config.optimizer."
    with pytest.raises(NonFiniteLoss, match=advice + "clip_norm=1.0 and the same --workdir"):
        list(stages.train(config, tmp_path, quiet))
    config.optimizer.learning_rate, config.optimizer.clip_norm = 1e29, 1.0
    with pytest.raises(NonFiniteLoss, match=r"again with --config.optimizer.learning_rate=1.0e\+28 and the same --"):
        list(stages.train(config, tmp_path, quiet))
    config.optimizer.learning_rate = 1e-3
    list(stages.train(config, tmp_path, quiet))
    config.optimizer.learning_rate = 1e-4
    with pytest.raises(UserError, match="optimizer.learning_rate: saved 0.001, given 0.0001"):
        next(stages.train(config, tmp_path, quiet))


def test_several_processes_are_rejected_until_asked_for(text, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    config = small_config(text)
    for stage in (stages.prepare, stages.find_lr, stages.train):
        with pytest.raises(UserError, match=r"process_count\(\) is 2, but it must be 1 without --distributed"):
            next(stage(config, tmp_path / "run", quiet))
    with pytest.raises(UserError, match=r"process_count\(\) is 2"):
        api.load(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_changed_config_is_rejected_by_field(whole, text):
    workdir, _ = whole
    config = small_config(text)
    config.model.dropout, config.seed = 0.3, 5
    with pytest.raises(UserError, match=r"model.dropout: saved 0.1, given 0.3; seed: saved 0, given 5"):
        next(stages.train(config, workdir, quiet))
    config = small_config(text)
    config.train.log_every, config.sample.temperature = 3, 0.1
    list(stages.train(config, workdir, quiet))


def test_checkpoint_of_another_vocabulary_is_rejected(whole, text, tmp_path):
    workdir, _ = whole
    config = small_config(text)
    list(stages.prepare(config, tmp_path, quiet))
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    folder = Workdir(tmp_path)
    tokens = folder.load_tokens()
    folder.save_corpus(folder.load_tokenizer(), tokens[::-1].copy(), folder.load_sources())
    with pytest.raises(UserError, match="belongs to a different run .*corpus_sha256 differs"):
        list(stages.train(config, tmp_path, quiet))


def test_preparing_writes_nothing_when_the_text_is_too_short(tmp_path):
    source = tmp_path / "short.txt"
    source.write_text("abc " * 20)
    with pytest.raises(UserError, match="validation part has 16 characters, but model.block_size 32"):
        list(stages.prepare(small_config(source), tmp_path / "run", quiet))
    assert not (tmp_path / "run").exists()


def test_one_distinct_character_is_refused(tmp_path):
    source = tmp_path / "aaa.txt"
    source.write_text("a" * 2000)
    with pytest.raises(UserError, match="one distinct character, 'a'"):
        list(stages.prepare(small_config(source), tmp_path / "run", quiet))


def test_dispatch_size_targets_two_seconds(text):
    timed = pacing.DispatchSize(small_config(text))
    assert timed.steps == 1
    for seconds in (9.0, 0.01, 0.04, 0.16, 0.64):
        timed.record(seconds, timed.steps)
    assert math.isclose(timed.seconds_per_step, 0.01, rel_tol=0.5)
    assert 100 <= timed.steps <= 200


def resumed(config, folder):
    """Train without a stop, and with a stop at the first checkpoint; check equality, and return the arrays."""
    list(stages.train(config, folder / "whole", quiet))
    for event in stages.train(config, folder / "cut", quiet):
        if isinstance(event, Saved):
            break
    list(stages.train(config, folder / "cut", quiet))
    whole, cut = final(folder / "whole"), final(folder / "cut")
    assert same_bits(whole, cut)
    return cut


@pytest.mark.slow
def test_muon_finds_a_rate_trains_and_resumes_bit_for_bit(text, tmp_path):
    config = small_config(text)
    config.optimizer.kind, config.optimizer.learning_rate, config.scheduler.max_steps = "muon", None, 12
    arrays = resumed(config, tmp_path)
    assert ".mean.blocks.attn.qkv.kernel" in " ".join(arrays)
    losses = [line["loss"] for line in logged(tmp_path / "cut") if line["event"] == "step"]
    assert losses[-1] < losses[0] - 0.5
    config.optimizer.kind = "adamw"
    with pytest.raises(UserError, match=r"optimizer.kind: saved 'muon', given 'adamw'"):
        list(stages.train(config, tmp_path / "cut", quiet))


@pytest.mark.slow
def test_float16_resumes_bit_for_bit_with_its_loss_scale(text, tmp_path):
    """The loss scale is part of the training state."""
    config = small_config(text)
    config.amp.dtype, config.scheduler.max_steps = "float16", 12
    assert "loss_scale" in " ".join(resumed(config, tmp_path))


@pytest.mark.skipif(jax.__version_info__ < BFLOAT16_ON_CPU, reason="this JAX cannot multiply bfloat16 on a CPU")
@pytest.mark.slow
def test_bfloat16_trains_and_resumes_bit_for_bit(text, tmp_path):
    config = small_config(text)
    config.amp.dtype, config.scheduler.max_steps = "bfloat16", 12
    resumed(config, tmp_path)
    losses = [line["loss"] for line in logged(tmp_path / "cut") if line["event"] == "step"]
    assert losses[-1] < losses[0] - 0.3
