"""The KV cache in blocks: the same attention as with the plain cache, at any position and size of scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chargpt_jax.ops.cpu_decode import fused
from chargpt_jax.ops.cpu_kv_cache import BLOCK, BlockedKVCache
from chargpt_jax.ops.kv_cache import StackedKVCache
from tests.ops.test_kv_cache import around
from tests.pairing import x64


def in_one_kernel(f):
    """Return f as one fused kernel, for a call inside jit."""
    return lambda *args: fused(jax.jit(f)(*args))


def both(seed=0, texts=2, places=200, dtype=jnp.float32, shape=(3, 8)):
    """Return a query, and a plain and a block cache of the same keys and values of three layers."""
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.normal(size=(texts, *shape)), dtype)
    kept = [jnp.asarray(rng.normal(size=(3, texts, *shape, places)), dtype) for _ in range(2)]
    blocks = BlockedKVCache.of(*kept).enlarged(places)
    return q, StackedKVCache(*kept), jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), blocks)


@pytest.mark.parametrize("position", [0, 1, 62, 63, 64, 65, 127, 128, 199])
@pytest.mark.parametrize("whole", [True, False], ids=["one kernel", "operations"])
def test_block_cache_attention_equals_plain_cache_attention(position, whole):
    q, rows, blocks = both()
    attend = in_one_kernel(BlockedKVCache.attend) if whole else BlockedKVCache.attend
    attend = jax.jit(attend)
    for layer in range(3):
        expected = rows.attend(q, layer, jnp.array([position] * 2))
        for text in range(2):
            at = jnp.int32(2 * layer + text)
            found = attend(blocks, q[text : text + 1], at, jnp.array([position]))
            np.testing.assert_allclose(found[0], expected[text], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "exact"), [(jnp.float32, 1e-5), (jnp.float64, 1e-13), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(1, 2), (3, 8), (2, 33)], ids=str)
def test_blocks_are_of_any_dtype_and_width(dtype, exact, shape):
    with x64(dtype == jnp.float64):
        q, rows, blocks = both(1, 1, 70, dtype, shape)
        found = jax.jit(BlockedKVCache.attend)(blocks, q, jnp.int32(1), jnp.array([66]))
        assert found.dtype == dtype
        expected = rows.attend(q, 1, jnp.array([66]))
        np.testing.assert_allclose(found.astype(float), expected.astype(float), rtol=exact, atol=exact / 10)


def test_positions_beyond_the_query_are_not_read():
    q, _, blocks = both()
    ahead = jnp.arange(blocks.keys.shape[1] * BLOCK).reshape(-1, 1, 1, BLOCK) > 70
    junk = jax.tree.map(lambda x: jnp.where(ahead, 99.0, x), blocks)
    attend = jax.jit(lambda blocks: blocks.attend(q[:1], jnp.int32(0), jnp.array([70])))
    np.testing.assert_array_equal(attend(junk), attend(blocks))


@pytest.mark.parametrize("middle", [0, 38, -40, 60, -60, 88, -104, 3000, -3000])
def test_scores_may_be_of_any_size(middle):
    q, k, v = around(middle, rows=1)
    blocks = jax.tree.map(lambda x: x[:, 0], BlockedKVCache.of(k, v).enlarged(256))
    attend = in_one_kernel(lambda blocks, q, position: blocks.attend(q, 0, position))
    found = jax.jit(attend)(blocks, q, jnp.array([255]))
    scores = np.einsum("hd,hds->hs", *(np.asarray(x, np.float64) for x in (q[0], k[0, 0]))) * 8**-0.5
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("hs,hds->hd", weights, np.asarray(v[0, 0], np.float64))
    assert np.abs(scores - middle).max() < 6
    exact = 1e-6 * max(10, abs(middle))  # a score is rounded before its weight is made
    np.testing.assert_allclose(found[0], expected, rtol=exact, atol=exact)


@pytest.mark.parametrize("capacity", [20, 64, 100, 128])
def test_blocks_are_filled_by_position(capacity):
    rng = np.random.default_rng(0)
    keys, values = (jnp.asarray(rng.normal(size=(2, 1, 3, 4, capacity)), jnp.float32) for _ in range(2))
    filled = jax.tree.map(lambda x: x[:, 0], BlockedKVCache.of(keys, values).enlarged(capacity))
    kept = jax.tree.map(lambda x: x[:, 0], BlockedKVCache.of(keys[..., :7], values[..., :7]).enlarged(capacity))
    put = jax.jit(BlockedKVCache.append)
    for t in range(7, capacity):
        for layer in range(2):
            kept = put(kept, keys[layer, ..., t], values[layer, ..., t], jnp.int32(layer), jnp.array([t]))
    assert kept.keys.shape == (2, max(2, -(-capacity // BLOCK)), 3, 4, BLOCK)
    for found, expected in ((kept.keys, filled.keys), (kept.values, filled.values)):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("places", [30, 64, 512])
def test_decoding_does_not_copy_the_blocks(places):
    """Keys and values are written in place, and read without a copy."""
    _, _, blocks = both(0, 8, places, shape=(4, 16))

    def step(blocks, x):
        def layer(number, c):
            blocks, x = c
            blocks = blocks.append(x, x, number, jnp.array([places - 1]))
            return blocks, blocks.attend(x, number, jnp.array([places - 1]))

        return jax.lax.fori_loop(0, 24, layer, (blocks, x))

    with jax.default_device(jax.devices("cpu")[0]):  # every machine has one, also with an accelerator
        lowered = jax.jit(in_one_kernel(step), donate_argnums=0).lower(blocks, jnp.ones((1, 4, 16)))
        memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes < blocks.keys.nbytes / 8
    assert memory.alias_size_in_bytes >= 2 * blocks.keys.nbytes
