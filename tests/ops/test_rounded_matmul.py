"""Matrix products of operands rounded to a narrow dtype, and where activations stay float32."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt_jax.config import ModelConfig
from chargpt_jax.devices.platform import BFLOAT16_ON_CPU
from chargpt_jax.ops.choose import ops_for
from chargpt_jax.ops.rounded_matmul import rounded_matmul
from tests.pairing import built

NARROW = [
    pytest.param(
        jnp.bfloat16,
        marks=pytest.mark.skipif(
            jax.default_backend() == "cpu" and jax.__version_info__ < BFLOAT16_ON_CPU,
            reason="this JAX cannot multiply bfloat16 on a CPU",
        ),
    ),
    jnp.float16,
]
"""The dtypes to round to."""

CONFIG = ModelConfig(vocab_size=11, used_ids=11, block_size=16, n_layer=2, n_embd=8, n_head=2, n_head_dim=4, n_ff=16)


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def exactly(axes, a, b, dtype):
    """Return the float64 product of two arrays that are rounded to a dtype."""
    return np.einsum(axes, *(np.asarray(x.astype(dtype), np.float64) for x in (a, b)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("axes", "turned"), [("rc,cf->rf", False), ("rc,vc->rv", True)])
@settings(deadline=None, max_examples=12)
@given(rows=st.integers(1, 40), columns=st.integers(1, 20), others=st.integers(1, 20))
def test_product_and_gradients_use_rounded_operands(dtype, axes, turned, rows, columns, others):
    """For all shapes: an odd number of rows, or a wider first or second operand, use other code."""
    a, weight = drawn(rows, columns), drawn(rows, others, seed=2)
    b = drawn(*((others, columns) if turned else (columns, others)), seed=1)

    @jax.jit
    def products(a, b, weight):
        result, back = jax.vjp(lambda a, b: rounded_matmul(axes, a, b, dtype), a, b)
        return result, *back(weight)

    left, right, out = axes[:2], axes[3:5], axes[-2:]
    results = products(a, b, weight)
    assert {x.dtype for x in results} == {jnp.dtype(jnp.float32)}
    expected = (
        exactly(axes, a, b, dtype),
        exactly(f"{out},{right}->{left}", weight, b, dtype),
        exactly(f"{left},{out}->{right}", a, weight, dtype),
    )
    for result, right_one in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, right_one, rtol=1e-5, atol=1e-5)


def multiplied(function, *args):
    """Return the (operand, operand, result) dtypes of the matrix products in a lowered function."""
    text = jax.jit(function).lower(*args).as_text()
    products = re.findall(r"dot_general .*: \(tensor<(\S+)>, tensor<(\S+)>\) -> tensor<(\S+)>", text)
    assert len(products) == text.count("dot_general ")
    return {tuple(shape.split("x")[-1] for shape in found) for found in products}


def test_gradients_are_rounded_before_products():
    a, b = drawn(6, 4), drawn(4, 10, seed=1)
    graph = jax.grad(lambda a, b: jnp.sum(jnp.sin(rounded_matmul("rc,cf->rf", a, b, jnp.bfloat16))), (0, 1))
    assert multiplied(graph, a, b) == {("bf16", "bf16", "f32")}


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_only_a_cpu_keeps_activations_in_float32(platform):
    wide = platform == "cpu"
    for dtype in (jnp.bfloat16, jnp.float16):
        ops = ops_for(dtype, platform=platform)
        assert ops.residual == jnp.float32
        assert ops.activations == (jnp.float32 if wide else dtype)
    for dtype in (jnp.float32, jnp.float64):
        ops = ops_for(dtype, platform=platform)
        assert {jnp.dtype(x) for x in (ops.activations, ops.residual)} == {jnp.dtype(dtype)}


def test_building_a_model_for_a_named_platform_starts_no_devices():
    """After that, a process can still fork, and set the number of CPU devices."""
    code = (
        "import jax; from tests.pairing import built; from chargpt_jax.config import ModelConfig;"
        "jax.eval_shape(lambda: built(ModelConfig(vocab_size=9, used_ids=9, n_layer=1), 0, platform='cpu')[1]);"
        "jax.config.update('jax_num_cpu_devices', 3); assert len(jax.devices('cpu')) == 3"
    )
    said = {name: text for name, text in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200, env=said)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_model_multiplies_narrow_except_in_cpu_attention(platform):
    graphdef, params = built(CONFIG, 0, jnp.bfloat16, platform)
    tokens = jnp.ones((2, 8), jnp.int32)
    found = multiplied(lambda params: nnx.merge(graphdef, params).features(tokens), params)
    narrow = {kind for kind in found if kind[0] == kind[1] == "bf16"}
    if platform == "cpu":
        assert narrow == {("bf16", "bf16", "f32")}
        assert found - narrow == {("f32", "f32", "f32")}
    else:
        assert narrow == found
        assert ("bf16", "bf16", "bf16") in found
