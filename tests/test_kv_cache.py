"""One query against a cache: its row of whole attention, whatever is read of the cache and however it is summed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chargpt_jax.attention import causal_attention
from chargpt_jax.dropout import Dropout
from chargpt_jax.kv_cache import cached_attention, read_widths
from tests.pairing import x64
from tests.test_attention import inputs


@pytest.mark.parametrize(
    "position", [(0, 11), (62, 63), (64, 3), (127, 127), (128, 0), (199, 199)], ids=lambda x: f"{x[0]} {x[1]}"
)
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_one_query_against_a_cache_equals_its_row(position, platform):
    """At either side of where more of the cache begins to be read; junk lies ahead of each row's position."""
    q, k, v = inputs(200)
    whole = jax.jit(lambda *x: causal_attention(*x, None, Dropout(), 64))(q, k, v)
    position = jnp.array(position)
    rows = jnp.arange(2)
    junk = jnp.arange(200)[None, None, :, None] > position[:, None, None, None]
    keys, values = (jnp.stack([jnp.where(junk, 99.0, x).swapaxes(2, 3)] * 3) for x in (k, v))
    other = jnp.array([[[[[7.0]]]]])
    keys, values = (x.at[jnp.array([0, 2])].set(other) for x in (keys, values))  # of other layers
    one = jax.jit(partial(cached_attention, platform=platform))(q[rows, :, position], keys, values, 1, position)
    np.testing.assert_allclose(one, whole[rows, :, position], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capacity", [1, 12, 63, 96, 250, 256, 508])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_sums_written_out_are_the_products(capacity, dtype):
    """A CPU's way and that of the others, for caches that can be cut into equal stretches and for others."""
    with x64(dtype == jnp.float64):
        rng = np.random.default_rng(0)
        q, *cache = (jnp.asarray(rng.normal(size=shape), dtype) for shape in [(3, 2, 6), *[(4, 3, 2, 6, capacity)] * 2])
        position = jnp.array([0, capacity // 2, capacity - 1])
        ours, theirs = (cached_attention(q, *cache, 2, position, platform) for platform in ("cpu", "tpu"))
    assert ours.dtype == theirs.dtype == dtype
    exact = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2, jnp.float64: 1e-13}[dtype]
    np.testing.assert_allclose(ours.astype(float), theirs.astype(float), rtol=exact, atol=exact / 10)


@pytest.mark.parametrize("capacity", [100, 1024])
@pytest.mark.parametrize("width", [6, 33])
def test_one_sequence_alone_gets_what_it_gets_among_others(width, capacity):
    rng = np.random.default_rng(0)
    shapes = [(2, 3, width), *[(2, 2, 3, width, capacity)] * 2]
    q, *cache = (jnp.asarray(4 * rng.normal(size=shape), jnp.float32) for shape in shapes)
    position = jnp.array([0, 4 * capacity // 5])
    attend = jax.jit(partial(cached_attention, platform="cpu"))
    both = attend(q, *cache, 1, position)
    for row in range(2):
        own = slice(row, row + 1)
        alone = attend(q[own], *(x[:, own] for x in cache), 1, position[own])
        np.testing.assert_allclose(alone, both[own], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_cache_may_be_read_in_the_width_that_is_asked_for(platform):
    rng = np.random.default_rng(0)
    q, *cache = (jnp.asarray(rng.normal(size=shape)) for shape in [(2, 2, 6), *[(3, 2, 2, 6, 512)] * 2])
    position = jnp.array([3, 100])
    expected = cached_attention(q, *cache, 1, position, platform)
    for width in (101, 256, 512):
        found = cached_attention(q, *cache, 1, position, platform, width)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    narrow = cached_attention(q, *cache, 1, position, platform, 64)
    np.testing.assert_allclose(narrow[0], expected[0], rtol=1e-5, atol=1e-6)
    assert np.abs(narrow[1] - expected[1]).max() > 1e-3  # no more than 64 places were read


def test_a_cpu_copies_neither_keys_nor_values_out_of_the_cache():
    B, H, D, S = 3, 2, 16, 512
    with jax.default_device(jax.devices("cpu")[0]):  # which there is beside any accelerator
        cache = jnp.zeros((4, B, H, D, S))
        args = (jnp.zeros((B, H, D)), cache, cache, 1, jnp.array([0, 300, 511]))
        temporaries = {
            platform: jax.jit(partial(cached_attention, platform=platform)).lower(*args).compile().memory_analysis()
            for platform in ("cpu", "tpu")
        }
    of_a_layer = B * H * D * S * 4
    assert temporaries["cpu"].temp_size_in_bytes < of_a_layer / 2
    assert temporaries["tpu"].temp_size_in_bytes > of_a_layer


@pytest.mark.parametrize("capacity", [1, 63, 64, 65, 100, 512, 513, 2048])
def test_a_cache_is_read_in_at_most_eight_steps_up_to_the_whole(capacity):
    widths = read_widths(capacity)
    assert widths[-1] == capacity
    assert widths == sorted(set(widths))
    assert len(widths) <= 8
    assert all(width == number * widths[0] for number, width in enumerate(widths[:-1], 1))
    assert widths[0] == capacity or widths[0] >= 64
