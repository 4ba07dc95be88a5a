"""The trial of attention operations: wrong and failing ones are found, and the fastest of the others is chosen."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from chargpt_jax.ops import plain
from chargpt_jax.ops.dropout import Dropout
from chargpt_jax.ops.kernels.trial import CALLS, ROUNDS, Shape, Tried, fastest, try_all

SHAPE = Shape(sequences=2, heads=2, length=9, width=4, rate=0.25, remat=True)


def known(q, k, v, seeds=None, how=Dropout()):  # noqa: B008
    return plain.attention(q, k, v, seeds, how)


def other_mask(q, k, v, seeds, how):
    return plain.attention(q, k, v, seeds + 1, how)


def one_element(q, k, v, seeds, how):
    """Differs in one element of the output."""
    return known(q, k, v, seeds, how).at[1, 1, 8, 3].add(0.1)


@jax.custom_vjp
def wrong_gradient(q, k, v, seeds, how):
    return known(q, k, v, seeds, Dropout(SHAPE.rate))


wrong_gradient.defvjp(
    lambda q, k, v, seeds, how: (known(q, k, v, seeds, Dropout(SHAPE.rate)), (q, k, v)),
    lambda saved, g: (g, g, g, None, None),
)


def not_a_number(q, k, v, seeds, how):
    return known(q, k, v, seeds, how) + jnp.nan


def unsupported(q, k, v, seeds, how):
    raise NotImplementedError("no kernel\nfor this device " + "x" * 1000)


def tried(candidates, dtype=jnp.float32, shape=SHAPE, **rest):
    return try_all(candidates, known, shape, dtype, jax.devices()[0], **rest)


@pytest.mark.parametrize("wrong", [other_mask, one_element, not_a_number], ids=lambda f: f.__name__)
def test_trial_rejects_wrong_numbers(wrong):
    first, second = tried({"blocks": known, "kernel": wrong})
    assert (first.fault, second.seconds) == ("", None)
    assert first.error < 1e-6
    assert not second.error < 1e-3
    assert "allowed" in second.fault
    assert fastest((first, second)) == "blocks"


def test_trial_rejects_wrong_gradients():
    def attention(q, k, v, seeds, how):
        return wrong_gradient(q, k, v, seeds, 0.0)

    _, second = tried({"blocks": known, "kernel": attention}, shape=dataclasses.replace(SHAPE, remat=False))
    assert second.error > 0.1
    assert second.fault


def test_trial_reports_a_failure_in_one_line_and_goes_on():
    _, failed, last = tried({"blocks": known, "kernel": unsupported, "cudnn": known})
    assert failed.fault.startswith("did not run (no kernel for this device xxx")
    assert len(failed.fault) < 250
    assert (failed.error, failed.seconds) == (None, None)
    assert last.seconds is not None


def test_trial_raises_if_the_known_operation_fails():
    with pytest.raises(NotImplementedError):
        tried({"blocks": unsupported, "kernel": known})


def test_trial_accepts_rounding_of_the_dtype_only():
    """In bfloat16 a candidate may differ by twice the error of the known operation, and no more."""

    def coarse(q, k, v, seeds, how):
        return known(q, k, v, seeds, how) * (1 + 2.0**-4)

    first, same, other = tried({"blocks": known, "kernel": known, "cudnn": coarse}, jnp.bfloat16)
    assert 1e-4 < first.error < 2.0**-6
    assert (same.error, same.fault) == (first.error, "")
    assert other.error > 2 * first.error
    assert other.fault


def test_trial_alternates_and_takes_the_median_per_call():
    """The clock is read before and after each measurement; kernel's five take 3, 100, 3, 3 and 3 seconds."""
    times = [value for i in range(ROUNDS) for value in (7.0, 1000.0, 100.0 if i == 1 else 3.0, 1000.0)]
    clock = iter([0.0, *[sum(times[: i + 1]) for i in range(len(times))]])
    first, second = tried({"blocks": known, "kernel": known}, clock=lambda: next(clock))
    assert (first.seconds, second.seconds) == pytest.approx((7.0 / CALLS, 3.0 / CALLS))
    assert fastest((first, second)) == "kernel"


def test_the_first_of_equally_fast_operations_is_chosen():
    assert fastest((Tried("blocks", 0.0, 1.0), Tried("kernel", 0.0, 1.0), Tried("cudnn", 1.0, None, "x"))) == "blocks"
