"""Attention of one query with a KV cache equals its row of full attention, for every way of reading and summing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chargpt_jax.ops import cpu_kv_cache, kv_cache
from chargpt_jax.ops.blockwise_attention import causal_attention
from chargpt_jax.ops.cpu_kv_cache import CpuKVCache
from chargpt_jax.ops.dropout import Dropout
from chargpt_jax.ops.kv_cache import read_widths, write_position
from tests.ops.test_blockwise_attention import inputs
from tests.pairing import x64

ATTENTION = {"cpu": cpu_kv_cache.cached_attention, "tpu": kv_cache.cached_attention}


@pytest.mark.parametrize(
    "position", [(0, 11), (62, 63), (64, 3), (127, 127), (128, 0), (199, 199)], ids=lambda x: f"{x[0]} {x[1]}"
)
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_one_query_against_a_cache_equals_its_row(position, platform):
    """At positions on both sides of a read boundary; the cache has arbitrary values beyond each position."""
    q, k, v = inputs(200)
    whole = jax.jit(lambda *x: causal_attention(*x, None, Dropout(), 64, False))(q, k, v)
    position = jnp.array(position)
    rows = jnp.arange(2)
    junk = jnp.arange(200)[None, None, :, None] > position[:, None, None, None]
    keys, values = (jnp.stack([jnp.where(junk, 99.0, x).swapaxes(2, 3)] * 3) for x in (k, v))
    other = jnp.array([[[[[7.0]]]]])
    keys, values = (x.at[jnp.array([0, 2])].set(other) for x in (keys, values))  # of other layers
    one = jax.jit(ATTENTION[platform])(q[rows, :, position], keys, values, 1, position)
    np.testing.assert_allclose(one, whole[rows, :, position], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [1, 12, 63, 96, 250, 256, 508])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_explicit_sums_equal_the_products(capacity, dtype):
    """The operations for a CPU and for other platforms, with capacities that do or do not divide into equal parts."""
    with x64(dtype == jnp.float64):
        rng = np.random.default_rng(0)
        q, *cache = (jnp.asarray(rng.normal(size=shape), dtype) for shape in [(3, 2, 6), *[(4, 3, 2, 6, capacity)] * 2])
        position = jnp.array([0, capacity // 2, capacity - 1])
        on_cpu, on_tpu = (jax.jit(ATTENTION[platform])(q, *cache, 2, position) for platform in ("cpu", "tpu"))
    assert on_cpu.dtype == on_tpu.dtype == dtype
    exact = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2, jnp.float64: 1e-13}[dtype]
    np.testing.assert_allclose(on_cpu.astype(float), on_tpu.astype(float), rtol=exact, atol=exact / 10)


@pytest.mark.parametrize("capacity", [100, pytest.param(1024, marks=pytest.mark.slow)])
@pytest.mark.parametrize("width", [6, 33])
def test_sequence_result_does_not_depend_on_the_batch_size(width, capacity):
    rng = np.random.default_rng(0)
    shapes = [(2, 3, width), *[(2, 2, 3, width, capacity)] * 2]
    q, *cache = (jnp.asarray(4 * rng.normal(size=shape), jnp.float32) for shape in shapes)
    position = jnp.array([0, 4 * capacity // 5])
    attend = jax.jit(ATTENTION["cpu"])
    both = attend(q, *cache, 1, position)
    for row in range(2):
        own = slice(row, row + 1)
        alone = attend(q[own], *(x[:, own] for x in cache), 1, position[own])
        np.testing.assert_allclose(alone, both[own], rtol=1e-5, atol=1e-6)


def around(middle, rows=2):
    """Return q and a cache of 256 positions with scores close to a given value in each sequence."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(rows, 3, 8))
    k, v = rng.normal(size=(2, 1, rows, 3, 8, 256))
    middle = np.broadcast_to(middle, rows)[:, None, None]
    along = np.einsum("bhd,lbhds->lbhs", q, k) * 8**-0.5 - middle - rng.normal(size=(1, rows, 3, 256))
    k -= np.einsum("bhd,lbhs->lbhds", q * 8**0.5 / np.sum(q**2, axis=-1, keepdims=True), along)
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v))


@pytest.mark.parametrize("middle", [0, 38, -40, 60, -60, 88, -104, 3000, -3000])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_scores_may_be_of_any_size(middle, platform):
    q, k, v = around(middle)
    position = jnp.array([255, 20])
    found = jax.jit(ATTENTION[platform])(q, k, v, 0, position)
    scores = np.einsum("bhd,bhds->bhs", *(np.asarray(x, np.float64) for x in (q, k[0]))) * 8**-0.5
    scores[np.broadcast_to(np.arange(256) > np.asarray(position)[:, None, None], scores.shape)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected = np.einsum("bhs,bhds->bhd", weights / weights.sum(axis=-1, keepdims=True), np.asarray(v[0], np.float64))
    assert np.abs(scores[..., :20] - middle).max() < 6
    exact = 1e-6 * max(10, abs(middle))  # a score is rounded before its weight is made
    np.testing.assert_allclose(found, expected, rtol=exact, atol=exact)


@pytest.mark.parametrize("other", [60, -60, 3000])
def test_result_does_not_depend_on_scores_of_other_sequences(other):
    attend = jax.jit(ATTENTION["cpu"])
    results = []
    for middle in (0, other):
        q, k, v = around([1, middle])
        results.append(np.asarray(attend(q, k, v, 0, jnp.array([200, 200]))))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert np.isfinite(results[1]).all()


def test_cache_is_filled_by_position_and_read_up_to_it():
    rng = np.random.default_rng(0)
    keys, values = (jnp.asarray(rng.normal(size=(2, 3, 2, 4, 20)), jnp.float32) for _ in range(2))
    kept = CpuKVCache.of(keys[..., :7], values[..., :7]).enlarged(20)
    q = jnp.asarray(rng.normal(size=(3, 2, 4)), jnp.float32)
    append, attend = jax.jit(CpuKVCache.append), jax.jit(CpuKVCache.attend)
    for t in range(7, 20):
        at = jnp.full(3, t)
        for layer in range(2):
            kept = append(kept, keys[layer, ..., t], values[layer, ..., t], layer, at)
        expected = jax.jit(ATTENTION["cpu"])(q, keys, values, 1, at)
        np.testing.assert_allclose(attend(kept, q, 1, at), expected, rtol=1e-6)
    np.testing.assert_array_equal(kept.keys, keys)
    np.testing.assert_array_equal(kept.values, values)


def test_append_writes_one_position_only():
    for rows in (1, 3):
        cache = jnp.arange(2.0 * rows * 2 * 4 * 9).reshape(2, rows, 2, 4, 9)
        new, position = -jnp.ones((rows, 2, 4)), jnp.array([4, 0, 8])[:rows]
        expected = np.array(cache)
        for row in range(rows):
            expected[1, row, :, :, position[row]] = -1
        np.testing.assert_array_equal(write_position(cache, new, 1, position), expected)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_cache_is_read_in_the_requested_dtype(platform):
    rng = np.random.default_rng(0)
    q, *cache = (jnp.asarray(rng.normal(size=shape)) for shape in [(2, 2, 6), *[(3, 2, 2, 6, 512)] * 2])
    position = jnp.array([3, 100])
    expected = ATTENTION[platform](q, *cache, 1, position)
    for width in (101, 256, 512):
        found = ATTENTION[platform](q, *cache, 1, position, width)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    narrow = ATTENTION[platform](q, *cache, 1, position, 64)
    np.testing.assert_allclose(narrow[0], expected[0], rtol=1e-5, atol=1e-6)
    assert np.abs(narrow[1] - expected[1]).max() > 1e-3  # no more than 64 places were read


@pytest.mark.slow
def test_cpu_does_not_copy_keys_or_values():
    B, H, D, S = 3, 2, 16, 512
    with jax.default_device(jax.devices("cpu")[0]):  # every machine has one, also with an accelerator
        cache = jnp.zeros((4, B, H, D, S))
        args = (jnp.zeros((B, H, D)), cache, cache, 1, jnp.array([0, 300, 511]))
        temporaries = {
            platform: jax.jit(ATTENTION[platform]).lower(*args).compile().memory_analysis()
            for platform in ("cpu", "tpu")
        }
    of_a_layer = B * H * D * S * 4
    assert temporaries["cpu"].temp_size_in_bytes < of_a_layer / 2
    assert temporaries["tpu"].temp_size_in_bytes > of_a_layer


@pytest.mark.parametrize("capacity", [1, 63, 64, 65, 100, 512, 513, 2048])
def test_cache_is_read_in_at_most_eight_lengths(capacity):
    widths = read_widths(capacity)
    assert widths[-1] == capacity
    assert widths == sorted(set(widths))
    assert len(widths) <= 8
    assert all(width == number * widths[0] for number, width in enumerate(widths[:-1], 1))
    assert widths[0] == capacity or widths[0] >= 64
