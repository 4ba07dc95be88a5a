"""Matrix multiplication in the full precision of its inputs' dtype, and embedding lookup, on every device.

By default JAX rounds float32 to bfloat16 on a TPU, and to TF32 (10 bits of 23) on a GPU from Ampere on. Here float32
stays float32. For more speed compute in bfloat16, or set JAX_DEFAULT_MATMUL_PRECISION, which takes precedence.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def matmul(axes: str, a: jax.Array, b: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """Multiply two arrays of one dtype, as jnp.einsum does.

    Args:
        axes: einsum's subscripts, for example 'bhtd,bhsd->bhts'.
        a, b: of one floating dtype.
        dtype: of the result; None: float32, or the inputs' dtype if that is wider.
    """
    dtype = jnp.promote_types(a.dtype, jnp.float32) if dtype is None else dtype
    return jnp.einsum(axes, a, b, preferred_element_type=dtype, precision=_precision(a.dtype))


@jax.custom_vjp
def deterministic_lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Look up embeddings; the gradient is a matrix multiplication with one-hot vectors.

    The default gradient is a scatter-add: one position after another on a CPU, and in an order that differs from run
    to run on a GPU.

    Args:
        table: [V, C].
        ids: int32 [...], each less than V.

    Returns:
        [..., C], of the table's dtype.
    """
    return jnp.take(table, ids, axis=0)


def _lookup_forward(table: jax.Array, ids: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return deterministic_lookup(table, ids), (table, ids)


def _lookup_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None]:
    table, ids = saved
    one_hot = jax.nn.one_hot(ids.reshape(-1), table.shape[0], dtype=gradient.dtype)
    return matmul("nv,nc->vc", one_hot, gradient.reshape(-1, gradient.shape[-1]), gradient.dtype), None


deterministic_lookup.defvjp(_lookup_forward, _lookup_backward)


def _precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """Return HIGHEST for float32, and None (JAX's default) for other dtypes or if the user has set a precision."""
    is_set = getattr(jax.config, "jax_default_matmul_precision", None) is not None
    return None if is_set or dtype != jnp.float32 else jax.lax.Precision.HIGHEST
