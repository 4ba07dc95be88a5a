"""Surprisal, entropy and S2 compared with the float64 reference, and for distributions with known values."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt_jax.generation.metrics import (
    surprisal_and_entropy,
    surprise_surprise,
    token_metrics,
)
from tests import reference

V = 7
MASKED = -1e9


def log_of(p: list[float]) -> np.ndarray:
    return np.log(np.maximum(p, 1e-300)).astype(np.float32)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_token_metrics_equal_the_reference(scale):
    rng = np.random.default_rng(0)
    logits = (scale * rng.normal(size=(3, 12, V))).astype(np.float32)
    logits[:, :, 0] = logits[:, :, V - 1] = MASKED
    tokens = rng.integers(1, V - 1, size=(3, 12)).astype(np.int32)
    tokens[1, :5] = tokens[2, 3] = 0
    surprisal, entropy = token_metrics(jnp.asarray(logits), jnp.asarray(tokens))
    s2 = surprise_surprise(np.asarray(surprisal), np.asarray(entropy), V)
    for row in range(3):
        expected = reference.token_metrics(logits[row].astype(np.float64), tokens[row], V)
        for got, want in zip((surprisal[row], entropy[row], s2[row]), expected, strict=True):
            np.testing.assert_allclose(np.asarray(got), want, rtol=2e-5, atol=2e-5, equal_nan=True)


def test_only_first_token_and_padding_are_nan():
    tokens = jnp.array([[3, 1, 2, 1], [0, 0, 2, 1], [0, 1, 0, 2]])
    for values in token_metrics(jnp.zeros((3, 4, V)), tokens):
        assert np.isnan(values).tolist() == [
            [True, False, False, False],
            [True, True, False, False],
            [True, False, True, False],
        ]


@pytest.mark.parametrize("n", [2, 3, 64])
def test_uniform_distribution_has_s2_of_zero(n):
    surprisal, entropy = surprisal_and_entropy(jnp.full((n, n), 0.5), jnp.arange(n))
    np.testing.assert_allclose(surprisal, math.log(n), rtol=1e-6)
    np.testing.assert_allclose(entropy, math.log(n), rtol=1e-6)
    np.testing.assert_allclose(surprise_surprise(np.asarray(surprisal), np.asarray(entropy), n), 0, atol=1e-6)


def test_certain_prediction_has_zero_entropy_and_surprisal():
    logits = jnp.full((2, V), MASKED).at[:, 3].set(0.0)
    surprisal, entropy = surprisal_and_entropy(logits, jnp.array([3, 4]))
    assert entropy.tolist() == [0.0, 0.0]
    assert surprisal.tolist() == [0.0, -MASKED]


def test_impossible_ids_do_not_count_in_the_entropy():
    ids = jnp.arange(64)
    logits = jnp.where((ids > 0) & (ids < 5), 0.0, MASKED)
    assert float(surprisal_and_entropy(logits, jnp.int32(2))[1]) == pytest.approx(math.log(4), rel=1e-6)


def test_three_letters_by_hand():
    """With p = 1/2, 1/4, 1/4 the entropy is 1.5 bits; the surprisals are 1, 2 and 2 bits; log 3 is 1.585 bits."""
    surprisal, entropy = surprisal_and_entropy(jnp.tile(log_of([0.5, 0.25, 0.25]), (3, 1)), jnp.arange(3))
    bits = np.asarray(surprisal) / math.log(2)
    np.testing.assert_allclose(bits, [1, 2, 2], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(entropy) / math.log(2), 1.5, rtol=1e-6)
    s2 = surprise_surprise(np.asarray(surprisal), np.asarray(entropy), 3)
    np.testing.assert_allclose(s2, [-0.5 / math.log2(3), 0.5 / math.log2(3), 0.5 / math.log2(3)], rtol=1e-5)
    assert np.sign(s2).tolist() == [-1, 1, 1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-50, 50, width=32), min_size=V, max_size=V))
def test_entropy_is_the_expected_surprisal(row):
    logits = np.array(row, dtype=np.float32)
    surprisal, entropy = surprisal_and_entropy(jnp.tile(logits, (V, 1)), jnp.arange(V))
    p = np.exp(-np.asarray(surprisal, dtype=np.float64))
    assert p.sum() == pytest.approx(1, abs=1e-4)
    assert 0 <= float(entropy[0]) <= math.log(V) * (1 + 1e-6)
    assert (p * np.asarray(surprisal)).sum() == pytest.approx(float(entropy[0]), abs=1e-4)


def test_metrics_do_not_depend_on_a_constant_added_to_the_logits():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(4, V)), jnp.float32)
    for one, two in zip(
        surprisal_and_entropy(logits, jnp.arange(4)), surprisal_and_entropy(logits + 8, jnp.arange(4)), strict=True
    ):
        np.testing.assert_allclose(one, two, atol=1e-5)
