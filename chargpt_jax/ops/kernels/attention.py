"""Causal attention from two Pallas kernels, `forward` and `backward`, with dropout inside them.

It computes `plain.attention`. Dropout's mask comes from the same hash of the same element indices, and is recomputed
in each kernel.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from chargpt_jax.ops.dropout import NONE, Dropout, fold_seeds
from chargpt_jax.ops.kernels.attention_backward import backward
from chargpt_jax.ops.kernels.attention_forward import forward
from chargpt_jax.ops.kernels.tiles import Tiles
from chargpt_jax.ops.plain import SAVED


@functools.cache
def attention_in_kernels(compiler: str) -> Callable[..., jax.Array]:
    """Return `plain.attention` in kernels, compiled by one of `tiles.COMPILERS`."""

    def attention(
        q: jax.Array, k: jax.Array, v: jax.Array, seeds: jax.Array | None = None, how: Dropout = NONE
    ) -> jax.Array:
        return kernel_attention(q, k, v, seeds if how.rate else None, how, compiler)

    return attention


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def kernel_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, seeds: jax.Array | None, how: Dropout, compiler: str
) -> jax.Array:
    """Attend to the past.

    Args:
        q, k, v: [B, H, T, D], of one of `tiles.DTYPES`; D is at most `tiles.MAX_WIDTH`.
        seeds: uint32 [B, 2] for dropout on the attention weights, or None.
        how: dropout's rate; its bits must be those of the hash.
        compiler: one of `tiles.COMPILERS`.

    Returns:
        [B, H, T, D], of the inputs' dtype.
    """
    return _forward(q, k, v, seeds, how, compiler)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, seeds: jax.Array | None, how: Dropout, compiler: str
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    tiles = Tiles(q.shape[2], q.shape[3], q.dtype, compiler, how)
    padded, log = forward(tiles.pad(q), tiles.pad(k), tiles.pad(v), _of_heads(seeds, q.shape[1]), tiles)
    out = checkpoint_name(tiles.unpad(padded, q.shape), SAVED)
    return out, (q, k, v, seeds, out, checkpoint_name(log, SAVED))


def _backward(how: Dropout, compiler: str, saved: Any, g: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, seeds, out, log = saved
    tiles = Tiles(q.shape[2], q.shape[3], q.dtype, compiler, how)
    dot = jnp.sum(g.astype(log.dtype) * out.astype(log.dtype), axis=-1).reshape(-1, tiles.length)
    dot = jnp.pad(dot, ((0, 0), (0, tiles.padded_length - tiles.length))).reshape(log.shape)
    own = _of_heads(seeds, q.shape[1])
    grads = backward(tiles.pad(q), tiles.pad(k), tiles.pad(v), tiles.pad(g), log, dot, own, tiles)
    return *(tiles.unpad(grad, q.shape) for grad in grads), None


kernel_attention.defvjp(_forward, _backward)


def _of_heads(seeds: jax.Array | None, heads: int) -> jax.Array | None:
    """Return seeds for each head of each sequence, uint32 [B H, 1, 2]."""
    return None if seeds is None else fold_seeds(seeds[:, None], jnp.arange(heads)).reshape(-1, 1, 2)
