"""How many steps fit into given minutes: simulated runs with a clock that the test sets."""

import dataclasses
import math

import numpy as np
import pytest

from chargpt_jax.training.dispatch import run_length
from chargpt_jax.training.dispatch.run_length import Clock, Fit, RunLength, as_json, fits_from, total_of

FIT = Fit(0, 100, 10.0, 5.0, 0.1, 1.0)


class Time:
    """A clock that stands still until it is advanced."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def time(monkeypatch):
    clock = Time()
    monkeypatch.setattr(run_length, "time", clock)
    return clock


def simulated(time, minutes, speed, *, validate_every=200, validation=1.0, samples=0.0, after=0.0, startup=10.0):
    """Return the seconds of a run whose steps take speed(seconds so far), and the fits that were made."""
    length = RunLength(minutes, [], 0, Clock(time.now, samples, after), validate_every)
    began, time.now = time.now, time.now + startup
    length.validation, length.compile_seconds, length.trace_seconds = validation, 1.0, 1.0
    length.record_steps(10 * speed(0.0), 10)
    step, total = 0, None
    while True:
        if step and (step % validate_every == 0 or step == total):
            took = validation + (samples if not length._validations else 0.0)
            time.now += took
            length.record_validation(took)
        if step == total:
            return time.now + after - began, length.fits
        if (new := length.new_total(step)) is not None:
            total = length.decide(step, new).total_steps
        count = min(20, validate_every - step % validate_every, total - step)
        took = sum(speed(time.now - began) for _ in range(count))
        time.now += took
        length.record_steps(took, count)
        step += count


def noisy(size, seed=0):
    rng = np.random.default_rng(seed)
    return lambda seconds: 0.05 * math.exp(size * rng.normal())


SPEEDS = {
    "constant": lambda seconds: 0.05,
    "slower after a third": lambda seconds: 0.05 if seconds < 200 else 0.08,
    "faster after two thirds": lambda seconds: 0.05 if seconds < 400 else 0.03,
    "slower and slower": lambda seconds: 0.05 * (1 + seconds / 600),
    "in waves of two minutes": lambda seconds: 0.05 * (1 + 0.4 * math.sin(seconds * 2 * math.pi / 120)),
    "noisy": noisy(0.5),
}


@pytest.mark.parametrize("name", SPEEDS)
def test_a_run_ends_within_three_percent(time, name):
    seconds, fits = simulated(time, 10.0, SPEEDS[name], samples=10.0, after=4.0)
    assert seconds == pytest.approx(600, rel=0.03)
    assert len(fits) < 20


def test_at_a_constant_speed_there_is_one_fit(time):
    seconds, fits = simulated(time, 10.0, SPEEDS["constant"], validation=3.0, samples=10.0, after=4.0)
    assert [fit.step for fit in fits] == [0]
    assert seconds == pytest.approx(600, abs=0.06)


def test_a_run_of_one_minute_with_slow_validations_ends_in_time(time):
    seconds, _ = simulated(time, 1.0, lambda seconds: 0.02, validate_every=50, validation=4.0)
    assert seconds == pytest.approx(60, rel=0.03)


def test_no_time_left_gives_one_step(time):
    length = RunLength(1.0, [], 7, Clock(time.now), 100)
    length.record_steps(1.0, 10)
    time.now += 61
    assert length.new_total(7) == 8
    assert length.decide(7, 8).total_steps == length.total_steps(7) == 8


def test_fits_are_written_before_they_hold(time):
    written = []
    length = RunLength(1.0, [FIT], 20, Clock(time.now), 100, save=written.append)
    length.decide(20, 300)
    assert fits_from(written[-1]) == length.fits
    assert [fit.total_steps for fit in length.fits] == [100, 300]


def test_a_repeated_run_keeps_its_fits_and_waits_for_the_last(time):
    fits = [FIT, dataclasses.replace(FIT, step=40, total_steps=90), dataclasses.replace(FIT, step=60, total_steps=95)]
    length = RunLength(10.0, fits, 20, Clock(time.now - 500), 1000)
    assert [length.total_steps(step) for step in (20, 39, 40, 59, 60)] == [100, 100, 90, 90, 95]
    assert [length.next_fit(step) for step in (20, 40, 60)] == [40, 60, math.inf]
    assert length.new_total(20) is length.new_total(59) is None
    assert length.new_total(60) > 95


def test_no_new_fit_before_the_last_step_that_was_made(time):
    length = RunLength(10.0, [FIT], 20, Clock(time.now), 10**6, repeated=50)
    assert [length.new_total(step) for step in (20, 49)] == [None, None]
    assert length.new_total(50) > 100


def test_compilation_of_samples_and_scores_is_expected(time):
    length = RunLength(10.0, [FIT], 20, Clock(time.now, first_samples=1.2, after=0.4), 10**6)
    length.compile_seconds, length.trace_seconds = 10.0, 5.0
    assert length.seconds_to(120, 20) == pytest.approx(100 * 0.1 + 1.0 + 12.0 + 2.0)
    length.record_validation(1.0)
    assert length.seconds_to(120, 20) == pytest.approx(100 * 0.1 + 1.0 + 2.0)
    length.clock = dataclasses.replace(length.clock, samples_along=False)
    assert length.seconds_to(120, 20) == pytest.approx(100 * 0.1 + 1.0 + 12.0 + 2.0)


def test_fits_for_other_minutes_do_not_hold(time):
    fits = [FIT, dataclasses.replace(FIT, step=40, total_steps=90)]
    length = RunLength(20.0, fits, 20, Clock(time.now), 1000)
    assert length.total_steps(20) is None
    assert not length.needs_trial
    assert length.new_total(20) == 11_900  # 1,188 s of steps and 12 validations
    assert total_of(fits, 10.0) == 90
    assert total_of(fits, 20.0) is total_of([], 10.0) is None


def test_time_of_earlier_commands_counts(time):
    length = RunLength(10.0, [FIT], 50, Clock(time.now), 10**6, before=300.0)
    time.now += 20
    assert length.elapsed() == 320
    assert length.new_total(50) == 50 + 2790


BROKEN = [
    *([], {}, {"fits": {}}, {"fits": [3]}, {"fits": [{}]}, {"fits": [dataclasses.asdict(FIT) | {"more": 1}]}),
    *({"fits": [dataclasses.asdict(FIT) | {"step": step}]} for step in (-1, 0.5, "0", 2**31, 100, None, True)),
    *({"fits": [dataclasses.asdict(FIT) | {"seconds": value}]} for value in (-1.0, math.nan, 1e40, "1", [])),
    {"fits": [dataclasses.asdict(FIT) | {"minutes": 0.0}]},
    {"fits": [dataclasses.asdict(FIT)] * 2},
]


@pytest.mark.parametrize("content", BROKEN)
def test_fits_from_a_damaged_file_are_refused(content):
    with pytest.raises(ValueError, match="fit"):
        fits_from(content)


def test_fits_survive_being_written():
    fits = [FIT, dataclasses.replace(FIT, step=40)]
    assert fits_from(as_json(fits)) == fits
