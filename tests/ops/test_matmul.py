"""Matrix products have the precision of their dtype; embedding lookup by a product is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt_jax.devices.platform import BFLOAT16_ON_CPU
from chargpt_jax.ops.matmul import deterministic_lookup, matmul
from tests.pairing import x64

AXES = "btc,vc->btv"


def arrays(dtype):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((2, 5, 7), (3, 7)))


def asked(dtype):
    """Return the precision with which a product of a dtype is traced."""
    (dot,) = jax.make_jaxpr(lambda a, b: matmul(AXES, a, b))(*arrays(dtype)).eqns
    return dot.params["precision"]


@pytest.mark.parametrize(
    ("dtype", "exact"),
    [
        (jnp.float32, 1e-6),
        pytest.param(
            jnp.bfloat16,
            1e-6,
            marks=pytest.mark.skipif(
                jax.default_backend() == "cpu" and jax.__version_info__ < BFLOAT16_ON_CPU,
                reason="this JAX cannot multiply bfloat16 on a CPU",
            ),
        ),
        (jnp.float64, 1e-14),
    ],
)
def test_product_has_the_precision_of_its_dtype(dtype, exact):
    with x64(dtype == jnp.float64):
        a, b = arrays(dtype)
        ours = jax.jit(lambda a, b: matmul(AXES, a, b))(a, b)
        assert ours.dtype == jnp.promote_types(dtype, jnp.float32)
        expected = np.einsum(AXES, *(np.asarray(x, np.float64) for x in (a, b)))
        np.testing.assert_allclose(ours, expected, rtol=exact, atol=exact)


def test_result_has_the_requested_dtype():
    assert matmul(AXES, *arrays(jnp.bfloat16), jnp.bfloat16).dtype == jnp.bfloat16


def test_float32_is_multiplied_in_float32():
    """Otherwise a TPU would round it to bfloat16 first, and a GPU to TF32."""
    assert asked(jnp.float32) == (jax.lax.Precision.HIGHEST,) * 2
    assert asked(jnp.bfloat16) is None
    with x64(True):
        assert asked(jnp.float64) is None


def test_default_matmul_precision_setting_is_respected():
    with jax.default_matmul_precision("tensorfloat32"):
        assert asked(jnp.float32) == (jax.lax.Precision.HIGH,) * 2


def test_gradients_have_the_same_precision():
    a, b = arrays(jnp.float32)
    graph = jax.make_jaxpr(jax.grad(lambda a: jnp.sum(jnp.sin(matmul(AXES, a, b)))))(a)
    dots = [line for line in graph.eqns if line.primitive.name == "dot_general"]
    assert len(dots) == 2
    assert {line.params["precision"] for line in dots} == {(jax.lax.Precision.HIGHEST,) * 2}


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=30))
def test_looked_up_rows_are_exact_and_gradients_are_summed(ids):
    table = jnp.asarray(np.random.default_rng(1).normal(size=(7, 3)), jnp.float32)
    weight = np.random.default_rng(2).normal(size=(len(ids), 3)).astype(np.float32)
    rows, back = jax.vjp(lambda table: deterministic_lookup(table, jnp.array(ids)), table)
    np.testing.assert_array_equal(rows, np.asarray(table)[ids])
    expected = np.zeros((7, 3))
    np.add.at(expected, ids, weight)
    np.testing.assert_allclose(back(weight)[0], expected, rtol=1e-5, atol=1e-6)
