"""The range test on NumPy losses: compared with the reference, and its properties."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chargpt_jax.config import LRFinderConfig
from chargpt_jax.errors import UserError
from chargpt_jax.events import LRFinderResult, LRFinderStep, Zoom
from chargpt_jax.training.range_test.methods import log_spaced, steepest_rate, zoom_in
from chargpt_jax.training.range_test.search import LossesOf, search, trainer_losses
from chargpt_jax.training.range_test.verdict import check_descent, lowest_at_the_end, unclear
from tests import reference

LossOf = Callable[[int, int, float], float]
"""(zoom, step, rate) -> the loss before the step with this learning rate, as the reference expects it."""

METHODS = ("steepest", "lowest", "balanced")
few = settings(max_examples=80, deadline=None)


def one_by_one(loss_of: LossOf) -> LossesOf:
    """Return the losses at the learning rates of a zoom, computed one by one."""
    return lambda zoom, rates: (loss_of(zoom, step, rate) for step, rate in enumerate(rates))


def bowl(seed: int, broken: float = 0.0, blank: tuple[int, ...] = ()) -> LossOf:
    """Return a noisy loss with a minimum near the learning rate 1e-3; some losses, or all of some zooms, are NaN."""

    def loss_of(zoom: int, step: int, rate: float) -> float:
        rng = np.random.default_rng([seed, zoom, step])
        loss = 2 + 0.05 * abs(math.log(rate / 1e-3)) + 0.1 * rng.normal()
        return math.nan if zoom in blank or rng.random() < broken else loss

    return loss_of


CASES: dict[str, Callable[[], LossOf]] = {
    "smooth": lambda: bowl(0),
    "noisy": lambda: bowl(1, broken=0.2),
    "mostly nan": lambda: bowl(2, broken=0.6),
    "the first zoom is nan": lambda: bowl(3, blank=(0,)),
    "inner zooms are nan": lambda: bowl(4, blank=(1, 3)),
    "the last zoom is nan": lambda: bowl(5, blank=(4,)),
    "falling evenly": lambda: lambda zoom, step, rate: 5.0 - step,
    "infinite from the middle": lambda: lambda zoom, step, rate: 5.0 - step**0.5 if step < 5 else math.inf,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_search_equals_the_reference(case, method):
    config = LRFinderConfig(method=method)
    *events, result = search(one_by_one(CASES[case]()), config)
    best, zooms = reference.range_test(CASES[case](), method=method)
    assert result.learning_rate == pytest.approx(best, rel=1e-12)
    assert len(result.zooms) == len(zooms)
    assert [event for event in events if isinstance(event, Zoom)] == list(result.zooms)
    for zoom, expected in zip(result.zooms, zooms, strict=True):
        assert zoom.number == expected["zoom"] + 1
        assert zoom.lrs == pytest.approx(expected["lrs"], rel=1e-12)
        assert zoom.losses == pytest.approx(expected["losses"], rel=1e-12)
        for name, value in (("low", expected["range"][0]), ("high", expected["range"][1])):
            assert getattr(zoom, name) == pytest.approx(value, rel=1e-12)
        for name in ("steepest", "lowest", "best"):
            assert getattr(zoom, name) == pytest.approx(expected[name], rel=1e-12)


def test_search_of_other_sizes_equals_the_reference():
    settings = {"start_lr": 1e-6, "end_lr": 1.0, "num_zooms": 3, "steps_per_zoom": 25, "zoom_factor": 0.3}
    *_, result = search(one_by_one(bowl(6)), LRFinderConfig(method="balanced", **settings))
    best, _ = reference.range_test(bowl(6), method="balanced", **settings)
    assert result.learning_rate == pytest.approx(best, rel=1e-12)


def test_events_come_in_order_and_the_last_one_is_the_result():
    config = LRFinderConfig(num_zooms=3, steps_per_zoom=4)
    events = list(search(one_by_one(bowl(0, blank=(1,))), config))
    kinds = [type(event) for event in events]
    assert kinds == [*[LRFinderStep] * 4, Zoom, *[LRFinderStep] * 4, *[LRFinderStep] * 4, Zoom, LRFinderResult]
    steps = [event for event in events if isinstance(event, LRFinderStep)]
    assert [event.step for event in steps] == list(range(1, 13))
    assert {event.total_steps for event in steps} == {12}
    assert [event.zoom for event in steps] == [1] * 4 + [2] * 4 + [3] * 4
    result = events[-1]
    assert (result.method, result.start_lr, result.end_lr) == ("steepest", config.start_lr, config.end_lr)
    assert result.learning_rate == result.zooms[-1].best


def test_a_skipped_zoom_leaves_the_range_as_it_was():
    events = search(one_by_one(bowl(0, blank=(1,))), LRFinderConfig())
    steps = [event for event in events if isinstance(event, LRFinderStep)]
    rates = [[event.learning_rate for event in steps if event.zoom == zoom] for zoom in (1, 2, 3)]
    assert rates[1] == rates[2]
    assert rates[0] != rates[1]


@pytest.mark.parametrize("loss", [math.nan, math.inf, 3.0])
def test_search_without_falling_losses_is_an_error(loss):
    config = LRFinderConfig(num_zooms=2, steps_per_zoom=3)
    events = search(one_by_one(lambda zoom, step, rate: loss), config)
    for _ in range(6):
        assert isinstance(next(events), LRFinderStep)
    with pytest.raises(UserError, match=r"between 1e-10 and 10 lowers the loss: widen .* or set optimizer"):
        next(events)


@few
@given(st.lists(st.floats(0, 10) | st.just(math.nan), min_size=20, max_size=20), st.sampled_from(METHODS))
def test_any_losses_give_the_result_of_the_reference(losses, method):
    def loss_of(zoom: int, step: int, rate: float) -> float:
        return losses[zoom * 5 + step]

    sizes = {"num_zooms": 4, "steps_per_zoom": 5}
    try:
        best, zooms = reference.range_test(loss_of, method=method, **sizes)
    except ValueError:
        with pytest.raises(UserError):
            list(search(one_by_one(loss_of), LRFinderConfig(method=method, **sizes)))
        return
    *_, result = search(one_by_one(loss_of), LRFinderConfig(method=method, **sizes))
    assert result.learning_rate == pytest.approx(best, rel=1e-9)
    assert [zoom.number - 1 for zoom in result.zooms] == [zoom["zoom"] for zoom in zooms]
    for zoom in result.zooms:
        assert min(zoom.lrs) * (1 - 1e-9) <= zoom.steepest <= max(zoom.lrs) * (1 + 1e-9)
        assert zoom.lowest <= zoom.lrs[-1]


@few
@given(st.lists(st.tuples(st.floats(-20, 2), st.floats(0, 10)), min_size=2, max_size=10))
def test_the_steepest_rate_lies_within_the_rates(points):
    lrs, losses = np.exp(sorted(x for x, _ in points)), [y for _, y in points]
    assert lrs[0] * (1 - 1e-9) <= steepest_rate(lrs, losses) <= lrs[-1] * (1 + 1e-9)


def test_steepest_rate_is_at_the_only_fall():
    lrs = [1e-4, 1e-3, 1e-2, 1e-1]
    assert steepest_rate(lrs, [4.0, 4.0, 3.0, 3.0]) == pytest.approx(10**-2.5)
    assert steepest_rate(lrs, [4.0, 3.0, 2.0, 1.0]) == pytest.approx(10**-2.5)
    assert steepest_rate(lrs[:2], [4.0, 3.0]) == pytest.approx(10**-3.5)


@few
@given(st.lists(st.floats(-20, 3), min_size=4, max_size=4, unique=True), st.floats(0.05, 0.95))
def test_zoom_in_keeps_the_range_inside_and_ordered(logs, zoom_factor):
    low, first, second, high = (math.exp(x) for x in sorted(logs))
    assume(low < first < second < high)
    for proposed in ((first, second), (first, first), (second, second)):
        ends = zoom_in(proposed, (low, high), zoom_factor)
        assert low * (1 - 1e-9) <= ends[0] <= proposed[0] * (1 + 1e-9)
        assert proposed[1] * (1 - 1e-9) <= ends[1] <= high * (1 + 1e-9)
        assert all(
            end == pytest.approx(want) for end, want in zip(ends, halved(proposed, low, high, zoom_factor), strict=True)
        )


def halved(proposed: tuple[float, float], low: float, high: float, zoom_factor: float) -> tuple[float, float]:
    """Return the next range, computed with powers instead of logarithms."""
    rest = zoom_factor
    return low**rest * proposed[0] ** (1 - rest), high**rest * proposed[1] ** (1 - rest)


def test_rates_are_evenly_spaced_in_the_logarithm_with_both_ends():
    assert log_spaced((1e-10, 10.0), 12) == pytest.approx([10.0**n for n in range(-10, 2)])


# Whether the test shows a descent


def result_of(
    *falls: float, firsts: Sequence[float] = (4.0,) * 9, rates: Sequence[float] = (1e-3, 1e-2)
) -> LRFinderResult:
    """Return a result with one zoom per fall of the loss."""
    ends = [(first, first - x) for first, x in zip(firsts, falls, strict=False)]
    zooms = [Zoom(i + 1, 1e-5, 1.0, tuple(rates), losses, 1e-3, 1e-2, 1e-3) for i, losses in enumerate(ends)]
    return LRFinderResult(1e-3, "steepest", 1e-5, 1.0, tuple(zooms))


def test_only_a_large_fall_of_the_last_zoom_is_clear():
    assert unclear(result_of(0.1, 0.2, 0.41)) is None
    for falls in ((0.1, 0.41, 0.39), (0.41, 0.41), (1.0,)):
        result = result_of(*falls)
        assert unclear(result) is result.zooms[-1]


def test_fall_is_unclear_if_the_untrained_losses_vary_as_much():
    falls, firsts = (0.1, 0.2, 0.8), (4.0, 3.9, 4.11)
    assert unclear(result_of(*falls, firsts=firsts)) is not None
    assert unclear(result_of(0.1, 0.2, 0.85, firsts=firsts)) is None


RATES = tuple(log_spaced((1e-5, 1.0), 10)[[0, 4, 6]])


@pytest.mark.parametrize("untrained", [3.61, 3.7, 3.8])
def test_fall_that_batches_explain_is_rejected(untrained):
    (zoom,) = result_of(0.39, rates=RATES).zooms
    losses = [4.0, *[9.0] * 5, untrained, 0.0, 9.0, 9.0]
    says = r"from 1e-10 to 10 shows no descent \(in zoom 1 .* by 0.390 nats, .*: choose other lr_finder.start"
    with pytest.raises(UserError, match=says):
        check_descent(zoom, losses, LRFinderConfig())


@pytest.mark.parametrize("untrained", [3.81, 4.0, 4.3])
def test_fall_that_training_explains_is_accepted(untrained):
    (zoom,) = result_of(0.39, rates=RATES).zooms
    check_descent(zoom, [4.0, *[0.0] * 5, untrained, 9.0, 0.0, 0.0], LRFinderConfig())


def test_lowest_loss_at_the_highest_rate_is_recognised():
    assert not lowest_at_the_end(result_of(0.5, 0.5))
    assert lowest_at_the_end(result_of(0.5, rates=(1e-3, float(log_spaced((1e-5, 1.0), 7)[-1]))))


# The loss function of a training run


@pytest.mark.parametrize("at_once", [1, 3, 4, 256])
def test_each_zoom_starts_from_a_new_state(at_once):
    starts: list[int] = []
    seen: list[tuple[int, int, float]] = []

    def start(zoom: int) -> tuple[int, int]:
        starts.append(zoom)
        return zoom, 0

    def train(state: tuple[int, int], rates: Sequence[float]) -> tuple[tuple[int, int], np.ndarray]:
        zoom, updates = state
        rates = rates[:at_once]
        seen.extend((zoom, updates + i, rate) for i, rate in enumerate(rates))
        return (zoom, updates + len(rates)), np.float32(5 - updates - np.arange(len(rates)))

    config = LRFinderConfig(num_zooms=3, steps_per_zoom=4)
    events = [e for e in search(trainer_losses(start, train), config) if isinstance(e, LRFinderStep)]
    assert starts == [0, 1, 2]
    assert [(zoom, updates) for zoom, updates, _ in seen] == [(z, n) for z in range(3) for n in range(4)]
    assert [rate for *_, rate in seen] == [event.learning_rate for event in events]
    assert [event.loss for event in events] == [5, 4, 3, 2] * 3
    assert all(type(event.loss) is float for event in events)
