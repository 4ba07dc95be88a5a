"""Generation for a GPU equals the plain operations and the full model: run on a CPU, and compiled for a GPU."""

import functools
import importlib.util
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chargpt_jax.compile.compiled import compile_program
from chargpt_jax.compile.programs import programs
from chargpt_jax.compile.topology import open_topology
from chargpt_jax.config import ModelConfig, SampleConfig
from chargpt_jax.generation.generate import bucket, decode, prefill
from chargpt_jax.generation.sampler import Sampler
from chargpt_jax.ops import plain
from chargpt_jax.ops.choose import ops_for
from chargpt_jax.ops.gpu import decode as gpu_decode
from chargpt_jax.ops.gpu.decode import GpuKVCache
from configs import nanogpt_baby, small
from tests.pairing import built, x64

CONFIG = ModelConfig(
    vocab_size=64, used_ids=30, block_size=24, n_embd=16, n_head=2, n_head_dim=8, n_ff=32, n_layer=3, attention_block=9
)
EXACT = {jnp.float32: 1e-6, jnp.float64: 1e-14, jnp.bfloat16: 1e-2, jnp.float16: 1e-3}


@functools.cache
def generated(platform, lengths, count, temperature=1.0, final=False):
    """Generate with the operations of a platform, on this machine."""
    graphdef, params = built(CONFIG, 0, jnp.float32, platform)
    tokens = np.zeros((len(lengths), bucket(max(lengths) + count)), np.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = np.random.default_rng(length).integers(1, 30, length)
    width = min(CONFIG.block_size, bucket(max(lengths)))
    state = prefill(params, tokens, np.array(lengths, np.int32), graphdef=graphdef, width=width, final=final)
    assert isinstance(state.cache, GpuKVCache) == (platform == "cuda")
    sampler = Sampler(temperature).with_key(jax.random.key(3))
    return decode(params, state, count, sampler, graphdef=graphdef, final=final)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(5,), (3, 11), (1, 7, 30)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_gpu_generates_the_text_and_metrics_of_a_cpu(lengths, temperature):
    """Batches of one, of which a row of zeros is a part, and of several, inside the context and beyond it."""
    ours, theirs = (generated(platform, lengths, 30, temperature) for platform in ("cuda", "cpu"))
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_allclose(ours.surprisal, theirs.surprisal, atol=1e-5)
    np.testing.assert_allclose(ours.entropy, theirs.entropy, atol=1e-5)


@pytest.mark.slow
def test_final_generation_gives_the_same_text():
    once, more = (generated("cuda", (5,), 30, final=final) for final in (True, False))
    np.testing.assert_array_equal(once.tokens, more.tokens)


@pytest.mark.parametrize("dtype", list(EXACT), ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(("B", "T", "C", "F"), [(1, 1, 9, 7), (5, 1, 3, 1), (2, 2, 8, 8)])
def test_sums_equal_the_linear_layer(dtype, B, T, C, F):
    rng = np.random.default_rng(0)
    with x64(dtype == jnp.float64):
        wide = jnp.promote_types(dtype, jnp.float32)
        x, kernel, bias = (jnp.asarray(rng.normal(size=shape), wide) for shape in [(B, T, C), (C, F), (F,)])
        x = x.astype(dtype)
        exact = x.astype(wide) @ kernel.astype(dtype).astype(wide) + bias
        found = gpu_decode.linear(x, kernel, bias)
        logits, expected = gpu_decode.unembed(x, kernel.T), plain.unembed(x, kernel.T)
    assert (found.dtype, logits.dtype) == (x.dtype, expected.dtype)
    np.testing.assert_allclose(np.asarray(found, float), exact, rtol=EXACT[dtype], atol=9 * EXACT[dtype])
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_large_batches_are_matrix_multiplications():
    def is_matmul(B, T, C, F):
        shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((B, T, C), (C, F), (F,)))
        return "dot_general" in str(jax.make_jaxpr(gpu_decode.linear)(*shapes))

    assert not is_matmul(1, 1, 4096, 4096)
    assert not is_matmul(32, 1, 256, 256)
    assert is_matmul(33, 1, 256, 256)
    assert is_matmul(1, 2, 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("largest", [0, gpu_decode.MAX_BYTES])
@pytest.mark.parametrize("positions", [(0,), (64,), (199,), (62, 128), (199, 3)], ids=str)
def test_attention_equals_the_plain_one(positions, largest, monkeypatch):
    """All positions are read at once, or as many as are needed; rows beyond the batch are ignored."""
    monkeypatch.setattr(gpu_decode, "MAX_BYTES", largest)
    rng = np.random.default_rng(0)
    B, H, D, S = len(positions), 3, 8, 200
    keys, values = (jnp.asarray(rng.normal(size=(2, B, H, D, S)), jnp.float32) for _ in range(2))
    q, k, v = (jnp.asarray(rng.normal(size=(B, H, D)), jnp.float32) for _ in range(3))
    position = jnp.array(positions)
    cache = GpuKVCache.of(keys[..., :100], values[..., :100]).enlarged(S)
    cache = replace(cache, layers=GpuKVCache.of(keys, values).layers)
    q, k, v = (jnp.pad(x, ((0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    new = cache.append(k, v, 1, position)
    found = jax.jit(lambda cache, q, position: cache.attend(q, 1, position))(new, q, position)
    rows = jnp.arange(B)
    keys, values = (x[1].at[rows, :, :, position].set(own[:B]) for x, own in ((keys, k), (values, v)))
    expected = plain.query_attention(q[:B], keys, values, position)
    np.testing.assert_allclose(found[:B], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found[B:], 0)
    np.testing.assert_array_equal(new.layers[0], cache.layers[0])
    np.testing.assert_array_equal(new.layers[1].swapaxes(-1, -2), jnp.stack([keys, values]))


def test_enlarged_cache_keeps_its_positions():
    keys, values = jnp.arange(2.0 * 2 * 3 * 1 * 4 * 5).reshape(2, 2, 3, 1, 4, 5)
    for layer, small_one in enumerate(GpuKVCache.of(keys, values).layers):
        large = GpuKVCache.of(keys, values).enlarged(9).layers[layer]
        np.testing.assert_array_equal(large[..., :5, :], small_one)
        np.testing.assert_array_equal(large[..., 5:, :], 0)
        np.testing.assert_array_equal(small_one, jnp.stack([keys[layer], values[layer]]).swapaxes(-1, -2))


@pytest.mark.parametrize("platform", ["gpu", "cuda", "rocm"])
def test_only_gpus_use_it(platform):
    assert ops_for(jnp.bfloat16, 64, platform).cache_type(1, 1, 1) is GpuKVCache
    assert ops_for(jnp.bfloat16, 64, "tpu").cache_type(1, 1, 1) is not GpuKVCache
    assert ops_for(jnp.bfloat16, 64, "tpu").linear is plain.linear


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs jax[cuda12]")
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("config", [small, nanogpt_baby], ids=lambda module: module.__name__)
def test_token_takes_at_most_16_kernels_per_layer(config, batch):
    config, topology = config.get_config(), open_topology("h100")
    config.sample = SampleConfig(prompts=("a sentence",) * batch)
    (decoding,) = (program for program in programs(config, topology.devices) if program.name == "decoding")
    compiled = compile_program(decoding, config, topology)
    print(f"{config.model.n_layer} layers, batch {batch}: {compiled.work.total} kernels per character")
    assert compiled.work.total <= 16 * config.model.n_layer
