"""Runs of given minutes, with a clock that the test sets: fits, resuming, and the bits of runs of so many steps."""

import json
import os

import jax
import numpy as np
import pytest

from chargpt_jax import api
from chargpt_jax.config import validate
from chargpt_jax.errors import UserError
from chargpt_jax.events import Ended, Fitted, Saved, Steps, TrainStarted, Validated
from chargpt_jax.results.facts import facts_in_words
from chargpt_jax.results.info import all_facts
from chargpt_jax.storage.checkpoint import Checkpoints
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training import setup, stages, timed_loop
from chargpt_jax.training.dispatch import run_length
from chargpt_jax.training.dispatch.run_length import Clock, fits_from
from tests.corpus_text import small_config, write_words
from tests.training.test_stages import final, logged, quiet, same_bits

MINUTES = 0.15

STARTUP, PER_STEP, PER_BATCH = 1.0, 0.1, 0.01
"""Seconds of the simulated clock until training begins, per step and per validation batch."""


class Time:
    """A clock that stands still until it is advanced; `slow` multiplies the time of a step from some time on."""

    def __init__(self):
        self.now, self.startup, self.slow = 0.0, STARTUP, (float("inf"), 1.0)

    def monotonic(self):
        return self.now

    def step(self):
        self.now += PER_STEP * (self.slow[1] if self.now > self.slow[0] else 1.0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture
def time(monkeypatch):
    """Replace the clock of runs of given minutes: it advances with every step and every batch of a validation."""
    time = Time()
    monkeypatch.setattr(run_length, "time", time)
    monkeypatch.setattr(timed_loop, "time", time)
    monkeypatch.setattr(setup, "VALIDATED_AT_ONCE", 1)
    compiled = timed_loop.TimedLoop.compile

    def compile(self, *args):
        event = compiled(self, *args)
        time.now += time.startup
        dispatch, validator = self._dispatch, self._validator

        def dispatched(state, text, rates, count):
            for _ in range(int(count)):
                time.step()
            return dispatch(state, text, rates, count)

        def validated(params, step, stop):
            def stopped():
                time.now += PER_BATCH
                return stop()

            return validator(params, step, stopped)

        self._dispatch, self._validator = dispatched, validated
        return event

    monkeypatch.setattr(timed_loop.TimedLoop, "compile", compile)
    return time


def config_of(text, minutes, **model):
    config = small_config(text, **model)
    config.scheduler.max_steps, config.scheduler.minutes = None, minutes
    config.train.steps_per_dispatch, config.train.validate_every = 4, 0.1
    return config


def trained(config, workdir, until=lambda event: False):
    """Train until an event, as a kill would; return the events."""
    events = []
    generator = stages.train(config, workdir, quiet, clock=Clock())
    for event in generator:
        events.append(event)
        if until(event):
            generator.close()
            break
    return events


def schedule(workdir):
    return fits_from(json.loads((workdir / "schedule.json").read_text()))


OPTIMIZED = os.environ.get("CHARGPT_TESTS_OPTIMIZED") == "1"
"""Whether programs are compiled as users compile them: .ci/run does so here."""


def same(one, other):
    """Return whether arrays have the same bits; nearly so without LLVM's optimisations, which change the cosine."""
    if OPTIMIZED:
        return same_bits(one, other)
    return one.keys() == other.keys() and all(
        one[name].dtype.kind != "f" or np.allclose(one[name], other[name], rtol=1e-3, atol=1e-4) for name in one
    )


def fitted(events):
    return [(event.step, event.total_steps) for event in events if isinstance(event, Fitted)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    ["adamw", pytest.param("muon", marks=pytest.mark.skipif(not OPTIMIZED, reason="Muon amplifies the rounding"))],
)
def test_a_run_has_the_bits_of_a_run_of_so_many_steps(time, text, tmp_path, case):
    config = config_of(text, MINUTES)
    config.optimizer.kind = case
    events = trained(config, tmp_path / "timed")
    ((step, total),) = fitted(events)
    assert (step, 40 < total < 90) == (0, True)
    assert time.now == pytest.approx(60 * MINUTES, rel=0.03)
    assert events[-1].complete
    assert events[-1].step == total
    config.scheduler.max_steps, config.scheduler.minutes = total, None
    list(stages.train(config, tmp_path / "steps", quiet))
    assert same(final(tmp_path / "timed"), final(tmp_path / "steps"))
    timed, steps = (logged(tmp_path / name) for name in ("timed", "steps"))
    assert [line["step"] for line in timed] == [line["step"] for line in steps]
    assert [line["loss"] for line in timed] == pytest.approx([line["loss"] for line in steps], rel=1e-4)


@pytest.mark.slow
def test_a_slower_machine_gets_a_new_fit_which_is_that_of_a_resumed_run(time, text, tmp_path):
    time.slow = 5.0, 2.0
    config = config_of(text, MINUTES)
    fits = fitted(trained(config, tmp_path / "timed"))
    assert len(fits) > 1
    assert fits[-1][1] < fits[0][1]
    assert time.now == pytest.approx(60 * MINUTES, rel=0.03)
    config.scheduler.minutes = None
    for (_, total), (stop, _) in zip(fits, [*fits[1:], (10**9, None)], strict=True):
        config.scheduler.max_steps = total
        made: list[int] = []
        events = stages.train(
            config, tmp_path / "steps", quiet, lambda stop=stop, made=made: 15 if stop in made else None
        )
        for event in events:
            made.append(event.step if isinstance(event, Steps) else -1)
    assert same(final(tmp_path / "timed"), final(tmp_path / "steps"))


def test_a_killed_run_makes_its_steps_and_fits_again(time, text, tmp_path):
    """Kill it directly after its second fit, which the last checkpoint does not know, and resume it."""
    time.slow = 5.0, 2.0
    config, seen = config_of(text, MINUTES), list[object]()

    def after_the_second_fit(event):
        seen.append(event)
        return isinstance(event, Steps) and len(fitted(seen)) == 2

    before = trained(config, tmp_path, after_the_second_fit)
    killed, lines = schedule(tmp_path), logged(tmp_path)
    assert len(killed) == 2
    time.slow = 1e9, 1.0  # the machine is fast again
    began = time.now
    events = trained(config, tmp_path)
    started = next(event for event in events if isinstance(event, TrainStarted))
    assert started.first_step <= killed[1].step < before[-1].step == lines[-1]["step"]
    assert schedule(tmp_path)[:2] == killed
    assert logged(tmp_path)[: len(lines)] == lines
    # The time up to the checkpoint, and that of the second command.
    assert Checkpoints(Workdir(tmp_path).checkpoints).seconds_of(events[-1].step) == pytest.approx(
        60 * MINUTES, rel=0.03
    )
    assert time.now - began < 60 * MINUTES


@pytest.mark.slow
def test_a_kill_at_an_even_speed_changes_no_bit(time, text, tmp_path):
    config = config_of(text, MINUTES)
    trained(config, tmp_path / "whole")
    time.now = 0.0
    trained(config, tmp_path / "killed", lambda event: isinstance(event, Saved))
    time.startup = 0.0  # otherwise less time is left to the second command, and there is a new fit
    trained(config, tmp_path / "killed")
    assert same_bits(final(tmp_path / "whole"), final(tmp_path / "killed"))


@pytest.mark.slow
def test_minutes_may_be_raised_after_the_end_but_not_lowered(time, text, tmp_path):
    first = trained(config_of(text, MINUTES), tmp_path)
    assert fitted(trained(config_of(text, MINUTES), tmp_path))[:1] == []
    time.now = 0.0
    with pytest.raises(
        UserError, match=r"scheduler.minutes is 0.05, but the run in .* has already taken 0.1.* minutes"
    ):
        trained(config_of(text, 0.05), tmp_path)
    assert schedule(tmp_path)[-1].minutes == MINUTES
    time.now = 0.0
    events = trained(config_of(text, 2 * MINUTES), tmp_path)
    assert fitted(events)[0][0] == first[-1].step
    assert isinstance(events[-1], Ended)
    assert events[-1].complete
    assert events[-1].step > 1.5 * first[-1].step


def test_a_run_without_time_makes_one_step_and_says_so(time, text, tmp_path):
    said: list[str] = []
    events = list(stages.train(config_of(text, 0.01), tmp_path, said.append, clock=Clock()))
    assert events[-1].step == 1
    assert [event.step for event in events if isinstance(event, Validated)] == [1]
    assert any(
        "scheduler.minutes is 0.01, but" in line and "only one step is made: increase it" in line for line in said
    )


def test_a_damaged_schedule_is_refused_in_one_sentence(time, text, tmp_path):
    config = config_of(text, MINUTES)
    trained(config, tmp_path, lambda event: isinstance(event, Saved))
    (tmp_path / "schedule.json").write_text('{"fits": [1]}')
    with pytest.raises(UserError, match=r"schedule.json cannot be used \(it is not a list of fits\): .* remove it"):
        trained(config, tmp_path)
    (tmp_path / "schedule.json").unlink()
    assert trained(config, tmp_path)[-1].complete


def test_the_number_of_steps_is_shown_only_if_it_is_known(time, text, tmp_path):
    list(api.prepare(config_of(text, MINUTES), tmp_path))
    assert api.info(tmp_path)["total_steps"] is None
    assert dict(facts_in_words(all_facts(tmp_path))[2][1])["progress"] == "not started: a run of 0.15 min"
    events = trained(config_of(text, MINUTES), tmp_path)
    started = next(event for event in events if isinstance(event, TrainStarted))
    assert (started.total_steps, started.epochs, started.minutes) == (None, None, MINUTES)
    assert api.info(tmp_path)["total_steps"] == events[-1].step
    assert f"complete: {events[-1].step} steps" in dict(facts_in_words(all_facts(tmp_path))[2][1])["progress"]


def test_minutes_and_max_steps_contradict_each_other(text):
    config = config_of(text, MINUTES)
    config.scheduler.max_steps = 30
    with pytest.raises(
        UserError, match=r"scheduler.minutes is 0.15 and scheduler.max_steps is 30, but only one of them"
    ):
        validate(config)


def test_a_time_limit_stops_a_run_of_given_minutes(time, text, tmp_path):
    config = config_of(text, MINUTES)
    events = list(stages.train(config, tmp_path, quiet, max_minutes=1e-6, clock=Clock()))
    assert events[-1].out_of_time
    assert not (tmp_path / "schedule.json").exists()
    assert trained(config, tmp_path)[-1].complete


def test_rates_of_a_schedule_are_those_of_its_compiled_program(time, text, tmp_path):
    """The rate is an argument, and not computed in the program: the numbers are the same."""
    events = trained(config_of(text, MINUTES), tmp_path)
    run = stages.Run.load(tmp_path)
    rate = jax.jit(run.schedule(events[-1].step))
    lines = [line for line in Workdir(tmp_path).load_metrics() if line["event"] == "step"]
    assert [line["learning_rate"] for line in lines] == [float(rate(line["step"] - 1)) for line in lines]
