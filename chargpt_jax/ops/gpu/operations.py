"""LayerNorm, linear layer, dropout and rotation in the forms that XLA compiles to the fewest kernels on a GPU.

Each equals its operation in `plain.py`. The names that `checkpoint_name` gives to arrays let gpu/layers.py choose which
of them the backward pass recomputes.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from chargpt_jax.hash_rng import bits_of
from chargpt_jax.ops import dropout as plain_dropout
from chargpt_jax.ops import plain
from chargpt_jax.ops.dropout import Dropout, threshold

LINEAR = "linear"
"""The name of a linear layer's output."""

NORMALISED = "normalised"
"""The name of what LayerNorm's gradient is computed from."""


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return `plain.layer_norm` of x [..., C] without rounding x first; scale and bias [0]: only normalise."""
    normalised = normalise(x, dtype)
    return (normalised.astype(x.dtype) * scale + bias).astype(dtype) if scale.size else normalised


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def normalise(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return x [..., C] with mean 0 and variance 1, of `dtype`.

    The backward pass needs the result n and the inverse r of the standard deviation, and not x itself. From the
    gradient g of n, with means over the channels: r (g - mean(g) - n mean(g n)).
    """
    return _normalise(x, dtype)[0]


def _normalise(x: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + plain.LAYER_NORM_EPSILON)
    normalised = checkpoint_name(((x - mean) * inverse).astype(dtype), NORMALISED)
    return normalised, (normalised, checkpoint_name(inverse, NORMALISED))


def _normalise_backward(dtype: DTypeLike, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array]:
    normalised, inverse = saved
    n, g = normalised.astype(inverse.dtype), g.astype(inverse.dtype)
    zero = jnp.zeros((), g.dtype)
    # Both sums in one reduction, which is one kernel.
    sums = jax.lax.reduce((g, g * n), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), (g.ndim - 1,))
    mean_g, mean_gn = (total[..., None] / g.shape[-1] for total in sums)
    return (inverse * (g - mean_g - n * mean_gn),)


normalise.defvjp(_normalise, _normalise_backward)


def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Return `plain.linear`; the bias may also be [B, 1, fan_out], one for each sequence of x [B, T, fan_in]."""
    return checkpoint_name(_computed_once(plain.linear(x, kernel, bias)), LINEAR)


@jax.custom_vjp
def _computed_once(x: jax.Array) -> jax.Array:
    """Return x. Its gradient is stored by one kernel: XLA would compute it again for each of its three uses."""
    return x


_computed_once.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.optimization_barrier(g),))


def dropout(x: jax.Array, seeds: jax.Array | None, how: Dropout) -> jax.Array:
    """Return `dropout.dropout` of x [B, ...], with the same mask.

    Each part of the seeds is used on its own. XLA stacks both parts in a kernel if they are reshaped together.
    """
    if seeds is None or not how.rate or how.bits != "hash":
        return plain_dropout.dropout(x, seeds, how)
    index = jnp.arange(x[0].size, dtype=jnp.uint32).reshape(x.shape[1:])
    first, second = (seeds[:, part].reshape(-1, *(1,) * index.ndim) for part in (0, 1))
    return jnp.where(bits_of(index, first, second) >= threshold(how), x * (1 / (1 - how.rate)), 0)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Return `plain.rotate` of x [..., D].

    The halves are exchanged by reversing an axis of length 2. Concatenating them would need a kernel for each array.
    """
    halves = x.reshape(*x.shape[:-1], 2, -1)
    sign = jnp.array([[-1], [1]], cos.dtype)
    rotated = halves * cos[..., None, :] + sign * halves[..., ::-1, :] * sin[..., None, :]
    return rotated.astype(x.dtype).reshape(x.shape)
