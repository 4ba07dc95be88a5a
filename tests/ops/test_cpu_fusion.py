"""What runs as one kernel of a CPU: its numbers, that it is one, and what happens where XLA refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chargpt_jax.ops.cpu_kernel import MOST_ALONE, WithKernels, in_one_kernel, kernels_allowed, writes_alone


def walk(x, w):
    """Go through matrices in turn with a loop, a branch, a product and a sum."""

    def step(i, x):
        y = jnp.exp(-jnp.abs(x @ w[i])) - jnp.mean(x)
        return jax.lax.cond(jnp.sum(y) > 0, lambda: y, lambda: y + 1)

    return jax.lax.fori_loop(0, len(w), step, x)


@pytest.fixture
def numbers():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, 24), (5, 24, 24)))


def test_one_kernel_gives_what_the_operations_give(numbers):
    np.testing.assert_allclose(jax.jit(in_one_kernel(walk))(*numbers), jax.jit(walk)(*numbers), rtol=1e-5)


def test_a_cpu_makes_one_kernel_of_it(numbers):
    with jax.default_device(jax.devices("cpu")[0]):  # which there is beside any accelerator
        text = jax.jit(lambda *x: in_one_kernel(walk)(*x) + 1).lower(*numbers).compile().as_text()
        (main,) = (part for part in text.split("\n\n") if part.startswith("ENTRY"))
    assert main.count(" call(") == 1
    assert 'xla_cpu_small_call="true"' in main
    assert " while(" not in main


def test_operations_stay_themselves_where_kernels_are_not_allowed(numbers):
    def f(*x):
        with kernels_allowed(False):
            return in_one_kernel(walk)(*x)

    assert "small_call" not in jax.jit(f).lower(*numbers).as_text()
    assert "small_call" in jax.jit(in_one_kernel(walk)).lower(*numbers).as_text()


class Refusing:
    """Stand in for a function that XLA compiles without kernels only."""

    def __init__(self, message):
        self.message, self.asked = message, []

    def __call__(self, x, *, kernels):
        self.asked.append(kernels)
        if kernels:
            raise jax.errors.JaxRuntimeError(self.message)
        return x + 1


@pytest.mark.parametrize("message", ["UNIMPLEMENTED: Fusion kind not implemented on CPU", "INTERNAL: no symbol"])
def test_where_xla_refuses_a_kernel_it_is_asked_once_and_the_operations_are_run(message, caplog):
    refusing = Refusing(message)
    f = WithKernels(refusing)
    assert [f(1), f(2), f(3)] == [2, 3, 4]
    assert refusing.asked == [True, False, False, False]
    assert caplog.text.count("makes no kernel") == 1


def test_other_errors_are_told():
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        WithKernels(Refusing("RESOURCE_EXHAUSTED: out of memory"))(1)


def test_what_xla_refuses_is_run_by_its_operations(numbers):
    """Sorting is what one kernel cannot do."""
    compiled = jax.jit(lambda x, *, kernels: sorting(x, kernels), static_argnames="kernels")
    f = WithKernels(compiled)
    with jax.default_device(jax.devices("cpu")[0]):
        np.testing.assert_array_equal(f(numbers[0]), np.sort(numbers[0]))


def sorting(x, kernels):
    with kernels_allowed(kernels):
        return in_one_kernel(jnp.sort)(x)


def test_a_cpu_writes_a_small_models_text_alone_and_several_where_they_outweigh_the_parameters():
    assert writes_alone(1, 10, MOST_ALONE, 32, "cpu")
    assert not writes_alone(1, 10, MOST_ALONE + 1, 32, "cpu")
    assert writes_alone(2, 480, 479, 32, "cpu")
    assert writes_alone(7, 480, 479, 64, "cpu")
    assert not writes_alone(7, 480, 480, 32, "cpu")
    assert not writes_alone(1, 480, 479, 16, "cpu")
    assert not writes_alone(2, 480, 479, 16, "cpu")
    assert not writes_alone(1, 480, 479, 32, "tpu")
    assert not writes_alone(2, 480, 479, 32, "gpu")
