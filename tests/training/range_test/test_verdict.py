"""A range test without a clear answer proposes no learning rate, and says what to do."""

import dataclasses
import math

import numpy as np
import pytest

from chargpt_jax.config import LRFinderConfig
from chargpt_jax.errors import NoClearAnswer
from chargpt_jax.events import LRFinderResult
from chargpt_jax.training.range_test.search import search
from chargpt_jax.training.range_test.verdict import check_descent, unclear

METHODS = ("steepest", "lowest", "balanced", "valley", "slide")
SWEEP = {"num_zooms": 1, "steps_per_zoom": 100, "start_lr": 1e-6, "smoothing": 0.8, "stop_factor": 4.0}
"""One sweep like fastai's, which 'valley' and 'slide' are made for."""


def losses(kind, seed=0):
    """Return losses of a kind; those at a learning rate of 0 are those of the untrained model."""

    def losses_of(zoom, rates):
        learned = diverged = 0.0
        for step, rate in enumerate(rates):
            noise = np.random.default_rng([seed, zoom, step]).normal()
            yield {
                "flat": 4.0,
                "pure noise": 4.0 + 0.3 * noise,
                "rising": 4.0 + 0.1 * step,
                "nan at once": math.nan,
                "infinite at once": math.inf,
                "falling": 4.0 - 2.5 * math.tanh(learned) + diverged + 0.01 * noise,
                "falling in one seed, rising in the other": 4.0 + (2.0 if seed % 2 else -2.2) * math.tanh(learned),
            }[kind]
            learned, diverged = learned + min(0.2, 5 * rate), diverged + 3 * max(0.0, rate - 0.3)

    return losses_of


def answer(config, *kinds):
    """Run the search and the checks of a training; return the result."""
    each = [losses(kind, seed) for seed, kind in enumerate(kinds)]
    *_, result = search(each[0], config, each[1:])
    assert isinstance(result, LRFinderResult)
    if (zoom := unclear(result)) is not None:
        untrained = [list(of_seed(zoom.number - 1, [0.0] * config.steps_per_zoom)) for of_seed in each]
        check_descent(zoom, np.mean(untrained, axis=0), config)
    return result


NONE = {
    "flat": "no fall",
    "pure noise": "batches",
    "rising": "no fall",
    "nan at once": "not finite",
    "infinite at once": "not finite",
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", NONE)
def test_losses_without_an_answer_get_none(kind, method):
    for seeds in (1, 3):
        with pytest.raises(NoClearAnswer, match=r"^No clear answer: .* set optimizer.learning_rate.$") as raised:
            answer(LRFinderConfig(method=method, seeds=seeds), *[kind] * seeds)
        assert raised.value.reason == NONE[kind]
        assert raised.value.exit_code == 2


@pytest.mark.parametrize("method", METHODS)
def test_losses_with_an_answer_get_it(method):
    choices = ({}, {"smoothing": 0.3}, {"stop_factor": 4.0}, {"seeds": 3}) if method in METHODS[:3] else ()
    for settings in (*choices, SWEEP, SWEEP | {"seeds": 3}):
        config = LRFinderConfig(method=method, **settings)
        result = answer(config, *["falling"] * config.seeds)
        assert 1e-5 < result.learning_rate < 3
        assert result.seeds == config.seeds


def test_seeds_that_differ_more_than_they_fall_give_no_answer():
    kind = "falling in one seed, rising in the other"
    with pytest.raises(
        NoClearAnswer, match=r"in the mean of 2 seeds, and by .* more or less in one of them: raise"
    ) as raised:
        answer(LRFinderConfig(seeds=2), kind, kind)
    assert raised.value.reason == "seeds"
    answer(LRFinderConfig(), kind)


def test_seeds_at_different_levels_that_fall_alike_are_clear():
    """What counts is how far each seed falls, not where it begins."""

    def shifted(by):
        return lambda zoom, rates: (loss + by for loss in losses("falling")(zoom, rates))

    *_, result = search(shifted(0.0), LRFinderConfig(seeds=2), [shifted(3.0)])
    *_, alone = search(shifted(1.5), LRFinderConfig())
    assert result.learning_rate == pytest.approx(alone.learning_rate, rel=1e-6)


def test_reason_and_message_of_a_verdict_can_be_read():
    error = NoClearAnswer("No clear answer: x.", "seeds")
    assert (str(error), error.reason) == ("No clear answer: x.", "seeds")
    assert dataclasses.fields(LRFinderResult)[-1].name == "seeds"
