"""Matrix products, as exact as the dtype of what is multiplied, whatever they run on.

Left to themselves a TPU rounds float32 to bfloat16 before it multiplies, and a GPU from Ampere on to TF32, which keeps
10 bits of 23. Here what is float32 is multiplied as float32; who wants it quicker computes in bfloat16, or sets
JAX_DEFAULT_MATMUL_PRECISION, which goes first.
"""

from typing import Any

import jax
import jax.numpy as jnp

from chargpt_jax.devices import on_cpu


def product(axes: str, a: jax.Array, b: jax.Array, dtype: Any = None) -> jax.Array:
    """Multiply two arrays of one dtype as jnp.einsum has it.

    Args:
        axes: in einsum's terms, 'bhtd,bhsd->bhts'.
        a, b: of one floating dtype.
        dtype: of the result; None: float32, or theirs where that is wider.
    """
    dtype = jnp.promote_types(a.dtype, jnp.float32) if dtype is None else dtype
    return jnp.einsum(axes, a, b, preferred_element_type=dtype, precision=_precision(a.dtype))


def rows_of(table: jax.Array, ids: jax.Array, platform: str | None = None) -> jax.Array:
    """Look up rows of a table.

    Elsewhere than on a CPU as a product with rows of one 1 and zeros, which gives the same numbers: the gradient of a
    lookup adds to the table's rows one by one, or on a GPU in an order that differs from run to run.

    Args:
        table: [V, C].
        ids: int32 [...], each less than V.
        platform: that the program is made for, 'cpu' or another; None: JAX's default.

    Returns:
        [..., C], of the table's dtype.
    """
    if on_cpu(platform):
        return jnp.take(table, ids, axis=0)
    ones = jax.nn.one_hot(ids, table.shape[0], dtype=table.dtype)
    return jnp.matmul(ones, table, precision=jax.lax.Precision.HIGHEST)


def _precision(dtype: Any) -> jax.lax.Precision | None:
    """Return what jax.lax.dot is told: to be exact, for float32; nothing, where the user or the dtype has said it."""
    said = getattr(jax.config, "jax_default_matmul_precision", None) is not None
    return None if said or dtype != jnp.float32 else jax.lax.Precision.HIGHEST
