"""The vectors of llama.cpp's tests/test-sampling.cpp (commit 07e4038), and the NumPy forms at the same settings.

The vectors are printed with 5 or 6 digits: they are compared to 1e-6, or to half a unit of their last digit if that is
larger. The NumPy forms are compared to 1e-6. Those vectors that are not normalised are normalised here.
"""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from chargpt_jax.generation.samplers.feedback import AdaptiveP
from chargpt_jax.generation.samplers.filters import MinP, TopNSigma, TopP, Typical
from chargpt_jax.generation.samplers.penalties import DRY
from tests.generation.samplers import in_numpy
from tests.generation.samplers.calls import probabilities

RISING = (0.1, 0.2, 0.3, 0.4)
FALLING = (0.4, 0.3, 0.2, 0.1)
FIFTHS = (0.2,) * 5
QUARTERS = (0.25,) * 4
IDS = "abcde"

FILTERS: list[tuple[Any, Any, tuple[float, ...], tuple[str, ...]]] = [
    ("temperature=1.0", lambda p: in_numpy.temperature(p, 1), RISING, ("0.1", "0.2", "0.3", "0.4")),
    ("dynatemp=1.0:high=1.0:exponent=1.0", lambda p: p, RISING, ("0.1", "0.2", "0.3", "0.4")),
    ("dynatemp=0.0:high=0.0", lambda p: in_numpy.dynatemp(p, 0, 0, 1), RISING, ("0", "0", "0", "1")),
    ("top_k=1", lambda p: in_numpy.top_k(p, 1), RISING, ("0", "0", "0", "1.0")),
    ("top_k=3", lambda p: in_numpy.top_k(p, 3), RISING, ("0", "0.22222", "0.33333", "0.44444")),
    ("top_k=4", lambda p: in_numpy.top_k(p, 4), RISING, ("0.1", "0.2", "0.3", "0.4")),
    ("top_p=0.7", lambda p: in_numpy.top_p(p, 0.7), RISING, ("0", "0", "0.428571", "0.571429")),
    ("top_p=0.8", lambda p: in_numpy.top_p(p, 0.8), RISING, ("0", "0.22222", "0.33333", "0.44444")),
    ("top_p=1.0", lambda p: in_numpy.top_p(p, 1.0), RISING, ("0.1", "0.2", "0.3", "0.4")),
    (TopP(1e-30), lambda p: in_numpy.top_p(p, 1e-9), RISING, ("0", "0", "0", "1.0")),
    *[
        (MinP(f), lambda p, f=f: in_numpy.min_p(p, f), RISING, kept)
        for f, kept in (
            *[(f, ("0.1", "0.2", "0.3", "0.4")) for f in (0.0, 0.24)],
            *[(f, ("0", "2/9", "3/9", "4/9")) for f in (0.26, 0.49)],
            *[(f, ("0", "0", "3/7", "4/7")) for f in (0.51, 0.74)],
            *[(f, ("0", "0", "0", "1")) for f in (0.76, 1.0)],
        )
    ],
    ("xtc=1.0:threshold=0.09", lambda p: in_numpy.xtc(p, 0.09), FALLING, ("0", "0", "0", "0.1")),
    ("xtc=1.0:threshold=0.19", lambda p: in_numpy.xtc(p, 0.19), FALLING, ("0", "0", "0.2", "0.1")),
    ("xtc=1.0:threshold=0.29", lambda p: in_numpy.xtc(p, 0.29), FALLING, ("0", "0.3", "0.2", "0.1")),
    ("xtc=1.0:threshold=0.39", lambda p: in_numpy.xtc(p, 0.39), FALLING, ("0.4", "0.3", "0.2", "0.1")),
    (Typical(0.5), lambda p: in_numpy.typical(p, 0.5), (0.97, 0.01, 0.01, 0.01), ("0.97", "0", "0", "0")),
    (Typical(0.5), lambda p: in_numpy.typical(p, 0.5), (0.4, 0.2, 0.2, 0.2), ("0", "0.2", "0.2", "0.2")),
    (TopNSigma(1.0), lambda p: in_numpy.top_n_sigma(p, 1), RISING, ("0", "0", "0.428571", "0.571429")),
    (TopNSigma(3.0), lambda p: in_numpy.top_n_sigma(p, 3), RISING, ("0.1", "0.2", "0.3", "0.4")),
    ("p_less", in_numpy.p_less, (0.1, 0.15, 0.2, 0.25, 0.3), ("0", "0", "0", "0.45454545", "0.54545455")),
    ("p_less", in_numpy.p_less, FIFTHS, ("0.2",) * 5),
]
"""Sampler, NumPy form, given and expected probabilities."""

REPEAT, OPENAI = "repetition=50.0", "frequency=5.0,presence=5.0"
HEAVY, LIGHT = ("0.000011", "0.000023"), ("0.249997", "0.499966", "0.499977")
PENALTIES = [
    (REPEAT, (0,), ("0", "0.25", "0.25", "0.25", "0.25")),
    (REPEAT, (0, 1, 2), ("0", "0", "0", "0.5", "0.5")),
    (REPEAT, (0, 1, 2, 0, 0), ("0", "0", "0", "0.5", "0.5")),
    (OPENAI, (0,), (HEAVY[0], *(LIGHT[0],) * 4)),
    (OPENAI, (0, 1, 2), (*(HEAVY[1],) * 3, *(LIGHT[1],) * 2)),
    (OPENAI, (0, 1, 2, 0, 0), ("0.000000", *(HEAVY[1],) * 2, *(LIGHT[2],) * 2)),
]
"""Chain, text, and expected probabilities of five equally likely tokens."""

REPETITIONS = [
    (QUARTERS, (0, 1), ("0.25",) * 4, (1.0, 1.1, 2, 4), ()),
    (QUARTERS, (0, 1, 2, 0, 1), ("0.296923", "0.296923", "0.109232", "0.296923"), (1.0, 1.1, 2, 5), ()),
    (FIFTHS, (0, 1, 3, 4, 0, 1), ("0.2",) * 5, (1.0, 1.1, 2, 6), (3,)),
    (FIFTHS, (0, 1, 2, 0, 1), ("0.241818",) * 2 + ("0.032727",) + ("0.241818",) * 2, (2.0, 1.1, 2, 5), ()),
    (FIFTHS, (0, 1, 2, 3, 4, 0, 1), ("0.2",) * 5, (1.0, 1.1, 4, 7), ()),
]
"""Given probabilities, text, expected ones, settings of DRY, breakers."""


def assert_golden(ours: np.ndarray, printed: tuple[str, ...]) -> None:
    """Compare with numbers as they are printed: to 1e-6, or half a unit of the last digit."""
    expected = np.array([float(Fraction(number)) for number in printed])
    digits = [len(number.partition(".")[2]) for number in printed]
    unit = [0 if n < 4 else 0.5 * 10.0**-n for n in digits]
    assert np.all(abs(ours - expected / expected.sum()) <= np.maximum(1e-6, 2 * np.array(unit))), (ours, printed)


@pytest.mark.parametrize(("sampler", "form", "given", "printed"), FILTERS)
def test_filters_and_temperatures_have_the_vectors_of_llama_cpp(sampler, form, given, printed):
    ours = probabilities(sampler, given)
    assert_golden(ours, printed)
    np.testing.assert_allclose(ours, form(np.array(given)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("chain", "text", "printed"), PENALTIES)
def test_penalties_have_the_vectors_of_llama_cpp(chain, text, printed):
    ours = probabilities(chain, FIFTHS, list(text))
    assert_golden(ours, printed)
    p = np.array(FIFTHS)
    if chain == REPEAT:
        expected = in_numpy.repetition(p, text, 50)
    else:
        expected = in_numpy.presence(in_numpy.frequency(p, text, 5), text, 5)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("given", "text", "printed", "settings", "breakers"), REPETITIONS)
def test_dry_has_the_vectors_of_llama_cpp(given, text, printed, settings, breakers):
    sampler = DRY(*settings, breakers="".join(IDS[i] for i in breakers))
    ours = probabilities(sampler, given, list(text), IDS[: len(given)])
    assert_golden(ours, printed)
    np.testing.assert_allclose(ours, in_numpy.dry(np.array(given), text, *settings, breakers), rtol=0, atol=1e-6)


@pytest.mark.parametrize("target", [0.0, 0.3, 0.9])
def test_adaptive_p_has_its_formula_before_the_first_token(target):
    """llama.cpp's tests have no vector for it."""
    ours = probabilities(AdaptiveP(target), RISING)
    expected = in_numpy.AdaptiveP(target, 0.9)(np.array(RISING), lambda p: 0)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)
