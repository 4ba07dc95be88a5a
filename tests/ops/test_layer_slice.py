"""The product of one row by a matrix that stays in its stack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chargpt_jax.ops.layer_slice import OfStack, leaves_in_stack
from tests.pairing import x64


@pytest.mark.parametrize("C", [1, 7, 16, 24, 100, 384])
@pytest.mark.parametrize(("dtype", "exact"), [(jnp.float32, 1e-5), (jnp.float64, 1e-13)])
def test_a_row_is_multiplied_by_the_matrix_of_that_number(C, dtype, exact):
    with x64(dtype == jnp.float64):
        rng = np.random.default_rng(0)
        stack, row = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((3, C, 5), (1, C)))
        times = jax.jit(lambda row, stack, number: OfStack(stack, number).times(row))
        for number in range(3):
            found = times(row, stack, jnp.int32(number))
            assert found.dtype == dtype
            expected = np.asarray(row, np.float64) @ np.asarray(stack[number], np.float64)
            np.testing.assert_allclose(found, expected, rtol=exact, atol=exact)


def test_a_cpu_writes_no_copy_of_the_matrix():
    def loop(row, stack):
        return jax.lax.fori_loop(0, 4, lambda number, x: x + OfStack(stack, number).times(x), row)

    with jax.default_device(jax.devices("cpu")[0]):  # which there is beside any accelerator
        compiled = jax.jit(loop).lower(jnp.ones((1, 384)), jnp.ones((4, 384, 384))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 384 * 384 * 4 / 4


def test_matrices_are_left_in_their_stack_by_a_cpu_for_one_row_in_float32_or_wider():
    assert leaves_in_stack(1, jnp.float32, "cpu")
    assert leaves_in_stack(1, jnp.float64, "cpu")
    assert not leaves_in_stack(2, jnp.float32, "cpu")
    assert not leaves_in_stack(1, jnp.bfloat16, "cpu")
    assert not leaves_in_stack(1, jnp.float16, "cpu")
    assert not leaves_in_stack(1, jnp.float32, "tpu")
