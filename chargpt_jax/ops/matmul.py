"""Matrix products, as exact as the dtype of what is multiplied, whatever they run on.

Left to themselves a TPU rounds float32 to bfloat16 before it multiplies, and a GPU from Ampere on to TF32, which keeps
10 bits of 23. Here what is float32 is multiplied as float32; who wants it quicker computes in bfloat16, or sets
JAX_DEFAULT_MATMUL_PRECISION, which goes first.
"""

from typing import Any

import jax
import jax.numpy as jnp


def product(axes: str, a: jax.Array, b: jax.Array, dtype: Any = None) -> jax.Array:
    """Multiply two arrays of one dtype as jnp.einsum has it.

    Args:
        axes: in einsum's terms, 'bhtd,bhsd->bhts'.
        a, b: of one floating dtype.
        dtype: of the result; None: float32, or theirs where that is wider.
    """
    dtype = jnp.promote_types(a.dtype, jnp.float32) if dtype is None else dtype
    return jnp.einsum(axes, a, b, preferred_element_type=dtype, precision=_precision(a.dtype))


@jax.custom_vjp
def rows_of(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Look up rows of a table; its gradient is a product, with a 1 for each place where a row was looked up.

    Left to itself JAX would add to the table's rows one place after the other, or on a GPU in an order that differs
    from run to run.

    Args:
        table: [V, C].
        ids: int32 [...], each less than V.

    Returns:
        [..., C], of the table's dtype.
    """
    return jnp.take(table, ids, axis=0)


def _looked_up(table: jax.Array, ids: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return rows_of(table, ids), (table, ids)


def _put_back(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None]:
    table, ids = saved
    places = jax.nn.one_hot(ids.reshape(-1), table.shape[0], dtype=gradient.dtype)
    return product("nv,nc->vc", places, gradient.reshape(-1, gradient.shape[-1]), gradient.dtype), None


rows_of.defvjp(_looked_up, _put_back)


def _precision(dtype: Any) -> jax.lax.Precision | None:
    """Return what jax.lax.dot is told: to be exact, for float32; nothing, where the user or the dtype has said it."""
    said = getattr(jax.config, "jax_default_matmul_precision", None) is not None
    return None if said or dtype != jnp.float32 else jax.lax.Precision.HIGHEST
