"""Fused kernels on a CPU: results, number of kernels, fallback, and matrices that are read from their stack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chargpt_jax.ops import cpu_decode
from chargpt_jax.ops.choose import ops_for
from chargpt_jax.ops.cpu_decode import MAX_PARAMETERS, FusedJit, LayerSlice, fused, fusion_available
from chargpt_jax.ops.cpu_kv_cache import BlockedKVCache, CpuKVCache
from chargpt_jax.ops.gpu.decode import GpuKVCache
from chargpt_jax.ops.kv_cache import StackedKVCache
from tests.pairing import x64


def walk(x, w):
    """Apply matrices sequentially, with a loop, a branch, a product and a sum."""

    def step(i, x):
        y = jnp.exp(-jnp.abs(x @ w[i])) - jnp.mean(x)
        return jax.lax.cond(jnp.sum(y) > 0, lambda: y, lambda: y + 1)

    return jax.lax.fori_loop(0, len(w), step, x)


def in_one_kernel(f):
    """Return f as one fused kernel, for a call inside jit."""
    return lambda *args: fused(jax.jit(f)(*args))


@pytest.fixture
def numbers():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, 24), (5, 24, 24)))


def test_fused_kernel_equals_separate_operations(numbers):
    np.testing.assert_allclose(jax.jit(in_one_kernel(walk))(*numbers), jax.jit(walk)(*numbers), rtol=1e-5)


def test_cpu_program_is_one_kernel(numbers):
    with jax.default_device(jax.devices("cpu")[0]):  # every machine has one, also with an accelerator
        text = jax.jit(lambda *x: in_one_kernel(walk)(*x) + 1).lower(*numbers).compile().as_text()
        (main,) = (part for part in text.split("\n\n") if part.startswith("ENTRY"))
    assert main.count(" call(") == 1
    assert 'xla_cpu_small_call="true"' in main
    assert " while(" not in main


class Refusing:
    """Replacement of jax.jit, for a function that XLA compiles only if it is not fused."""

    def __init__(self, message):
        self.message, self.fused = message, []

    def __call__(self, function, **options):
        def call(x):
            self.fused.append(cpu_decode._FUSING.get())
            if self.fused[-1]:
                raise jax.errors.JaxRuntimeError(self.message)
            return function(x)

        return call


@pytest.mark.parametrize("message", ["UNIMPLEMENTED: Fusion kind not implemented on CPU", "INTERNAL: no symbol"])
def test_fused_jit_falls_back_for_good_if_xla_refuses(message, caplog, monkeypatch):
    refusing = Refusing(message)
    monkeypatch.setattr(jax, "jit", refusing)
    f = FusedJit(lambda x: x + 1)
    assert [f(1), f(2), f(3)] == [2, 3, 4]
    assert refusing.fused == [True, False, False, False]
    assert caplog.text.count("cannot compile a full decoding step as one kernel") == 1


def test_fused_jit_raises_other_errors(monkeypatch):
    monkeypatch.setattr(jax, "jit", Refusing("RESOURCE_EXHAUSTED: out of memory"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        FusedJit(lambda x: x)(1)


def test_fused_jit_runs_what_cannot_be_fused(numbers):
    """A fused kernel cannot sort (XLA of jax 0.7.2 compiles it)."""
    f = FusedJit(lambda x: fused(jax.jit(jnp.sort)(x)))
    with jax.default_device(jax.devices("cpu")[0]):
        np.testing.assert_array_equal(f(numbers[0]), np.sort(numbers[0]))
    assert f.refused or jax.__version__ == "0.7.2"


@pytest.fixture
def availability():
    """Clear the cache of `fusion_available` before and after a test."""
    fusion_available.cache_clear()
    yield
    fusion_available.cache_clear()


def chosen(sequences, elements, parameters, dtype=jnp.float32, platform="cpu"):
    return ops_for(dtype, platform=platform).cache_type(sequences, elements, parameters)


def test_sequential_decoding_depends_on_platform_and_sizes(availability, monkeypatch):
    monkeypatch.setattr(cpu_decode, "TESTED_JAX", (jax.__version__,))
    assert chosen(1, 10, MAX_PARAMETERS) is BlockedKVCache
    assert chosen(1, 10, MAX_PARAMETERS + 1) is CpuKVCache
    assert chosen(2, 480, 479) is BlockedKVCache
    assert chosen(7, 480, 479, jnp.float64) is BlockedKVCache
    assert chosen(7, 480, 480) is CpuKVCache
    assert chosen(1, 480, 479, jnp.bfloat16) is CpuKVCache
    assert chosen(2, 480, 479, jnp.bfloat16) is CpuKVCache
    assert chosen(1, 480, 479, platform="tpu") is StackedKVCache
    assert chosen(2, 480, 479, platform="gpu") is GpuKVCache


def test_fused_kernels_are_used_only_with_tested_jax_versions(availability, monkeypatch, caplog):
    monkeypatch.setattr(cpu_decode, "TESTED_JAX", ("0.0.1",))
    assert [chosen(1, 10, 10), chosen(1, 10, 10)] == [CpuKVCache] * 2
    assert caplog.text.count("fused decoding has not been tested with jax") == 1


def test_an_environment_variable_switches_fused_kernels_off(availability, monkeypatch, caplog):
    monkeypatch.setattr(cpu_decode, "TESTED_JAX", (jax.__version__,))
    monkeypatch.setenv("CHARGPT_FUSED_DECODING", "0")
    assert chosen(1, 10, 10) is CpuKVCache
    assert not caplog.text


@pytest.mark.parametrize("C", [1, 7, 16, 24, 100, 384])
@pytest.mark.parametrize(("dtype", "exact"), [(jnp.float32, 1e-5), (jnp.float64, 1e-13)])
def test_row_is_multiplied_by_the_matrix_of_its_layer(C, dtype, exact):
    with x64(dtype == jnp.float64):
        rng = np.random.default_rng(0)
        stack, row = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((3, C, 5), (1, C)))
        times = jax.jit(lambda row, stack, number: LayerSlice(stack, number).times(row))
        for number in range(3):
            found = times(row, stack, jnp.int32(number))
            assert found.dtype == dtype
            expected = np.asarray(row, np.float64) @ np.asarray(stack[number], np.float64)
            np.testing.assert_allclose(found, expected, rtol=exact, atol=exact)


def test_cpu_does_not_copy_the_matrix():
    def loop(row, stack):
        return jax.lax.fori_loop(0, 4, lambda number, x: x + LayerSlice(stack, number).times(x), row)

    with jax.default_device(jax.devices("cpu")[0]):  # every machine has one, also with an accelerator
        compiled = jax.jit(loop).lower(jnp.ones((1, 384)), jnp.ones((4, 384, 384))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 384 * 384 * 4 / 4


def test_batch_size_1_reads_matrices_from_the_stack():
    stacks = jnp.ones((3, 8, 8))

    def seen(rows, dtype, platform):
        """Return whether a layer receives its matrix as a LayerSlice."""
        found = []

        class Stack(nnx.Module):
            def __init__(self):
                self.kernel = nnx.Param(stacks.astype(dtype))

        def layer(block, carry, index):
            found.append(isinstance(block.kernel[...], LayerSlice))
            return carry, None

        ops_for(dtype, platform=platform).decode_layers(layer, Stack(), (jnp.ones((rows, 1, 8)), None))
        return found[0]

    assert seen(1, jnp.float32, "cpu")
    assert not seen(2, jnp.float32, "cpu")
    assert not seen(1, jnp.bfloat16, "cpu")
    assert not seen(1, jnp.float16, "cpu")
    assert not seen(1, jnp.float32, "tpu")
