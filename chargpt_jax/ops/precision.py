"""Mixed precision: what is narrow, bfloat16 or float16, and where.

Parameters, the residual stream and everything that is summed are float32 or wider. A matrix product takes narrow
numbers in one of two ways, told by its inputs: narrow already, with a narrow result, which halves what a TPU or GPU has
to read; or wide ones, rounded for the product alone, with a wide result. The second is a CPU's: it is slow at narrow
numbers but in products, which AMX makes several times as fast in bfloat16.
"""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from chargpt_jax.devices.platform import on_cpu
from chargpt_jax.ops.matmul import product


def widened(dtype: Any) -> Any:
    """Return the dtype of what must not lose precision: float32, or `dtype` where that is wider."""
    return jnp.promote_types(dtype, jnp.float32)


def between_products(dtype: Any, platform: str | None = None) -> Any:
    """Return the dtype of what goes from one matrix product to the next, where those run in `dtype`.

    TPU, GPU: `dtype`. CPU: float32, or `dtype` where that is wider. JAX's devices are not started to find out what
    makes no difference.

    Args:
        dtype: of the matrix products.
        platform: that the program is made for, 'cpu' or another; None: JAX's default.
    """
    wide = widened(dtype)
    return wide if dtype == wide or on_cpu(platform) else dtype


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def rounded_product(axes: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """Round two matrices, then multiply them; gradients are products of the same kind.

    Left to itself JAX would multiply a gradient that is wide with what has been rounded, which no library does quickly.

    Args:
        axes: 'rc,cf->rf', or in another order.
        a: [rows, columns], float32 or wider.
        b: with a's columns as one of its two axes.
        dtype: to round to.

    Returns:
        [rows, b's other axis], summed in float32 or wider, of a's dtype.
    """
    return _rounded(axes, a, b, dtype)


def _rounded(axes: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    return product(axes, a.astype(dtype), b.astype(dtype), a.dtype)


def _result(axes: str, a: jax.Array, b: jax.Array, dtype: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rounded(axes, a, b, dtype), (a, b)


def _gradients(
    axes: str, dtype: Any, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    (a, b), (left, right, out) = saved, re.split(",|->", axes)
    to_a = _rounded(f"{out},{right}->{left}", gradient, b, dtype)
    return to_a, _summed_over_rows(a, gradient, dtype) if right[0] in left else _summed_over_rows(gradient, a, dtype)


def _summed_over_rows(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """Round [R, N] and [R, M] and multiply them over R: [N, M].

    Where XLA's library for CPUs multiplies bfloat16 as such, the sum must be over the first array's last axis. Over two
    axes, halves of the rows and the rows in them, XLA turns that array round; over one it would take float32.
    """
    (R, N), M = a.shape, b.shape[1]
    if M < N and M % 2 == 0:
        # The narrower one is turned round, and the result, in halves: XLA would have exchanged the arrays instead.
        return _summed_over_rows(b, a, dtype).reshape(2, M // 2, N).transpose(2, 0, 1).reshape(N, M)
    a, b = (x.reshape(2 - R % 2, -1, x.shape[1]) for x in (a, b))
    return _rounded("hrn,hrm->nm", a, b, dtype)


rounded_product.defvjp(_result, _gradients)
