"""Mixed precision on a CPU: float32 activations that are rounded to bfloat16 or float16 only as inputs of a matmul.

On a TPU or GPU activations stay in bfloat16 between matrix multiplications, which halves memory traffic. A CPU is slow
at bfloat16 apart from AMX matrix multiplications, so there activations stay in float32.
"""

import re
from functools import partial

import jax
from jax.typing import DTypeLike

from chargpt_jax.ops.matmul import matmul


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def rounded_matmul(axes: str, a: jax.Array, b: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Round two matrices, then multiply them; gradients are computed by the same kind of multiplication.

    By default JAX would multiply a float32 gradient with a rounded matrix, for which no library has a fast kernel.

    Args:
        axes: 'rc,cf->rf', or in another order.
        a: [rows, columns], float32 or wider.
        b: with a's columns as one of its two axes.
        dtype: to round to, bfloat16 or float16.

    Returns:
        [rows, b's other axis], summed in float32 or wider, of a's dtype.
    """
    return _rounded(axes, a, b, dtype)


def _rounded(axes: str, a: jax.Array, b: jax.Array, dtype: DTypeLike) -> jax.Array:
    return matmul(axes, a.astype(dtype), b.astype(dtype), a.dtype)


def _result(axes: str, a: jax.Array, b: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rounded(axes, a, b, dtype), (a, b)


def _gradients(
    axes: str, dtype: DTypeLike, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    (a, b), (left, right, out) = saved, re.split(",|->", axes)
    to_a = _rounded(f"{out},{right}->{left}", gradient, b, dtype)
    return to_a, _summed_over_rows(a, gradient, dtype) if right[0] in left else _summed_over_rows(gradient, a, dtype)


def _summed_over_rows(a: jax.Array, b: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Round [R, N] and [R, M] and sum their products over R: [N, M].

    XLA's CPU library has a bfloat16 kernel only if the sum is over the first array's last axis. If the sum is over two
    axes (two halves of the rows, and the rows in each half), XLA transposes that array itself; over one axis it would
    fall back to float32.
    """
    (R, N), M = a.shape, b.shape[1]
    if M < N and M % 2 == 0:
        # Transpose the narrower array, and the result in halves: otherwise XLA would exchange the two arrays.
        return _summed_over_rows(b, a, dtype).reshape(2, M // 2, N).transpose(2, 0, 1).reshape(N, M)
    a, b = (x.reshape(2 - R % 2, -1, x.shape[1]) for x in (a, b))
    return _rounded("hrn,hrm->nm", a, b, dtype)


rounded_matmul.defvjp(_result, _gradients)


def rounding_linear(x: jax.Array, kernel: jax.Array, bias: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Compute `plain.linear` with the inputs of the multiplication rounded to `dtype`."""
    y = rounded_matmul("rc,cf->rf", x.reshape(-1, x.shape[-1]), kernel, dtype)
    return (y.reshape(*x.shape[:-1], -1) + bias).astype(x.dtype)


def rounding_unembed(x: jax.Array, table: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Compute `plain.unembed` with the inputs of the multiplication rounded to `dtype`."""
    logits = rounded_matmul("rc,vc->rv", x.reshape(-1, x.shape[-1]), table, dtype)
    return logits.reshape(*x.shape[:-1], -1)
