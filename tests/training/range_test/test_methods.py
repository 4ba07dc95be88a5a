"""The methods of the range test on curves whose answer is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt_jax.config import LRFinderConfig
from chargpt_jax.training.range_test.methods import falling, log_spaced, propose, slide_rate, smoothed, valley_rate
from chargpt_jax.training.range_test.search import search

few = settings(max_examples=80, deadline=None)
curves = st.lists(st.floats(0, 10) | st.sampled_from([math.nan, math.inf]), min_size=2, max_size=40).filter(
    lambda losses: sum(map(math.isfinite, losses)) > 1
)


def brute_force_valley(losses):
    """Return the length and the end of the longest falling subsequence, the first one, by trying all."""
    best = [1] * len(losses)
    for i in range(len(losses)):
        for j in range(i):
            if losses[j] > losses[i]:
                best[i] = max(best[i], best[j] + 1)
    return max(best), best.index(max(best))


@few
@given(curves)
def test_valley_is_in_the_middle_of_the_longest_fall(losses):
    rates = log_spaced((1e-6, 1.0), len(losses))
    kept = [(rate, loss) for rate, loss in zip(rates, losses, strict=True) if math.isfinite(loss)]
    length, end = brute_force_valley([loss for _, loss in kept])
    assert valley_rate(rates, losses) == kept[max(0, end - length + int(length / 3) + int(length / 3 / 2))][0]


def test_valley_ignores_a_bump_and_what_follows_the_lowest_loss():
    rates = list(log_spaced((1e-6, 1.0), 13))
    losses = [4.0, 3.9, 3.8, 3.7, 4.5, 3.6, 3.5, 3.4, 3.3, 5.0, 6.0, 7.0, 8.0]
    # Eight points fall up to index 8; the third and the half of a third are 2 and 1.
    assert valley_rate(rates, losses) == rates[8 - 8 + 2 + 1]


def test_slide_is_before_the_loss_shoots_up():
    """The slope is even up to index 70; there the loss begins to rise."""
    steps = np.arange(100)
    losses = 4 - 0.01 * steps + np.where(steps > 70, 0.002 * (steps - 70.0) ** 2, 0)
    rates = log_spaced((1e-6, 10.0), 100)
    found = int(np.argmin(np.abs(rates - slide_rate(rates, losses))))
    assert 55 <= found <= 72
    assert losses[found] < losses[0]


@few
@given(curves)
def test_slide_stops_where_the_slopes_agree(losses):
    rates = log_spaced((1e-6, 1.0), len(losses))
    kept = [(rate, loss) for rate, loss in zip(rates, losses, strict=True) if math.isfinite(loss)]
    slopes = np.gradient([loss for _, loss in kept])
    interval = min(len(kept) - 1, max(1, round(0.15 * len(kept))))
    top = len(kept) - 1 - interval
    agree = [i for i in range(top + 1) if abs(slopes[i + interval] - slopes[i]) <= 0.005]
    assert slide_rate(rates, losses) == kept[min(max(agree, default=-1) + 1, top)][0]


@few
@given(curves)
def test_every_method_proposes_a_rate_of_the_curve(losses):
    rates = log_spaced((1e-6, 1.0), len(losses))
    for rate in (valley_rate(rates, losses), slide_rate(rates, losses)):
        assert rate in rates
    assert propose("valley", 1.0, 1.0, rates, losses) == (valley_rate(rates, losses),) * 2
    assert propose("slide", 1.0, 1.0, rates, losses) == (slide_rate(rates, losses),) * 2


@few
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.floats(0.01, 0.99))
def test_smoothed_losses_are_weighted_means(losses, beta):
    weights = [(1 - beta) * beta**k for k in range(len(losses))]
    found = smoothed(losses, beta)
    for n in range(1, len(losses) + 1):
        expected = np.average(losses[:n], weights=weights[:n][::-1])
        assert found[n - 1] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_smoothing_leaves_out_what_is_not_finite():
    found = smoothed([4.0, math.nan, 2.0, math.inf, 2.0], 0.5)
    assert found[0] == 4.0
    assert math.isnan(found[1])
    assert found[2] == pytest.approx((4 * 0.25 + 2 * 0.5) / 0.75)
    assert found[3] == math.inf
    assert 2.0 < found[4] < found[2]


@few
@given(curves)
def test_without_smoothing_losses_are_unchanged(losses):
    assert np.array_equal(smoothed(losses, 0.0), losses, equal_nan=True)


@few
@given(curves)
def test_falling_points_are_below_all_before(losses):
    for i, loss in enumerate(losses):
        assert (i in falling(losses)) == (loss < min([x for x in losses[:i] if x == x], default=math.inf))


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_a_zoom_stops_when_the_loss_has_diverged(smoothing):
    made: list[int] = []

    def losses_of(zoom, rates):
        for step, _ in enumerate(rates):
            made.append(step)
            yield 4.0 - 0.5 * step if step < 5 else 100.0 * step

    config = LRFinderConfig(num_zooms=2, steps_per_zoom=20, stop_factor=4.0, smoothing=smoothing)
    *_, result = search(losses_of, config)
    assert made == [*range(6)] * 2
    assert len(result.zooms[0].lrs) == 5
    made.clear()
    list(search(losses_of, LRFinderConfig(num_zooms=2, steps_per_zoom=20)))
    assert len(made) == 40


def test_a_loss_that_is_nan_at_once_stops_the_zoom():
    made: list[int] = []

    def losses_of(zoom, rates):
        for step, _ in enumerate(rates):
            made.append(step)
            yield math.nan

    with pytest.raises(ValueError, match="all losses are NaN"):
        list(search(losses_of, LRFinderConfig(num_zooms=3, stop_factor=2.0)))
    assert made == [0, 0, 0]


def test_several_seeds_give_a_band_and_the_rate_of_each():
    def of_seed(k):
        return lambda zoom, rates: (4.0 - 0.1 * step * (1 + k) + 0.01 * k for step, _ in enumerate(rates))

    *events, result = search(of_seed(0), LRFinderConfig(seeds=3, num_zooms=2), [of_seed(1), of_seed(2)])
    last = result.zooms[-1]
    assert result.seeds == len(last.seed_rates) == 3
    assert last.losses == pytest.approx([4.01 - 0.2 * step for step in range(10)])
    assert last.lowest_losses[1:] == pytest.approx([4.02 - 0.3 * step for step in range(1, 10)])
    assert last.highest_losses[1:] == pytest.approx([4.0 - 0.1 * step for step in range(1, 10)])
    assert last.seed_falls == pytest.approx([0.9, 1.8, 2.7])
    steps = [event for event in events if hasattr(event, "seed")]
    assert [event.step for event in steps] == list(range(1, 61))
    assert [event.seed for event in steps] == [*[0] * 10, *[1] * 10, *[2] * 10] * 2
    assert {event.total_steps for event in steps} == {60}


def test_equal_seeds_give_the_answer_of_one():
    def of_seed(zoom, rates):
        return (4.0 - 0.03 * step**1.5 for step, _ in enumerate(rates))

    *_, one = search(of_seed, LRFinderConfig())
    *_, three = search(of_seed, LRFinderConfig(seeds=3), [of_seed, of_seed])
    assert three.learning_rate == pytest.approx(one.learning_rate, rel=1e-9)
    assert three.zooms[-1].seed_rates == pytest.approx([one.learning_rate] * 3, rel=1e-9)
