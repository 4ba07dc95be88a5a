"""Operations for a GPU against those of plain.py, on any device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chargpt_jax.ops import plain
from chargpt_jax.ops.dropout import Dropout, dropout
from chargpt_jax.ops.gpu import operations
from tests.ops.test_blockwise_attention import SEEDS


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def value_and_gradients(f, *arrays):
    """Return f's result, and the gradients of its arguments from an arbitrary gradient of the result."""
    out, pull_back = jax.vjp(f, *arrays)
    return out, *pull_back(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape).astype(out.dtype))


def assert_equal(found, expected, tolerance=1e-6):
    """Compare arrays, relative to the largest value of each."""
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert np.abs(np.float64(one) - np.float64(other)).max() <= tolerance * np.abs(np.float64(other)).max()


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_layer_norm_has_the_values_and_gradients_of_the_plain_one(mean):
    arrays = mean + 2 * draw(2, 5, 24), draw(24, seed=1), draw(24, seed=2)
    found, expected = (
        value_and_gradients(lambda *x, f=f: f(*x, jnp.float32), *arrays)
        for f in (operations.layer_norm, plain.layer_norm)
    )
    assert_equal(found, expected, 2e-6 if not mean else 1e-5)


def test_layer_norm_without_parameters_normalises():
    x, none = draw(3, 16), jnp.zeros(0)
    expected = plain.layer_norm(x, jnp.ones(16), jnp.zeros(16), jnp.float32)
    assert_equal([operations.layer_norm(x, none, none, jnp.float32)], [expected])


def test_layer_norm_in_bfloat16_is_closer_to_float32_than_the_plain_one():
    """It does not round the residual stream before it subtracts the mean."""
    x, ones, zeros = 30 + draw(4, 64), jnp.ones(64), jnp.zeros(64)
    exact = plain.layer_norm(x, ones, zeros, jnp.float32)
    ours, other = (
        np.abs(f(x, ones, zeros, jnp.bfloat16).astype(jnp.float32) - exact).max()
        for f in (operations.layer_norm, plain.layer_norm)
    )
    assert ours <= 2**-8 * np.abs(exact).max() < other


def test_gradient_of_layer_norm_is_orthogonal_to_ones_and_to_the_result():
    x = draw(3, 16)
    n, gradient = value_and_gradients(partial(operations.normalise, dtype=jnp.float32), x)
    np.testing.assert_allclose(jnp.sum(gradient, -1), 0, atol=1e-5)
    np.testing.assert_allclose(jnp.sum(gradient * n, -1), 0, atol=1e-4)  # not exactly, because of epsilon


def test_linear_equals_the_plain_one():
    arrays = draw(2, 5, 6), draw(6, 7, seed=1), draw(7, seed=2)
    assert_equal(*(value_and_gradients(f, *arrays) for f in (operations.linear, plain.linear)))


def test_bias_of_each_sequence_has_that_sequences_gradient():
    x, kernel, bias = draw(2, 5, 6), draw(6, 7, seed=1), draw(7, seed=2)
    copies = jnp.broadcast_to(bias, (2, 1, 7))
    out, *_, gradient = value_and_gradients(operations.linear, x, kernel, copies)
    known, *_, total = value_and_gradients(plain.linear, x, kernel, bias)
    assert_equal([out, jnp.sum(gradient, axis=(0, 1))], [known, total])
    assert np.abs(gradient[0] - gradient[1]).max() > 0.1


@pytest.mark.parametrize("how", [Dropout(), Dropout(0.3), Dropout(0.9), Dropout(0.3, "jax")])
def test_dropout_has_the_bits_of_the_plain_one(how):
    x = draw(2, 5, 6)
    for seeds in (SEEDS, None):
        np.testing.assert_array_equal(operations.dropout(x, seeds, how), dropout(x, seeds, how))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotation_equals_the_plain_one(dtype):
    x, angles = draw(2, 3, 5, 8, dtype=dtype), plain.rotary(jnp.arange(5), 8)
    pairs = (value_and_gradients(lambda x, f=f: f(x, *angles), x) for f in (operations.rotate, plain.rotate))
    assert_equal(*pairs, 1e-6 if dtype == jnp.float32 else 2**-7)
