"""Causal attention from two Pallas kernels, `forward` and `backward`, with dropout inside them.

It computes `plain.attention`. Dropout's mask comes from the same hash of the same element indices, and is recomputed
in each kernel.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from chargpt_jax.ops.dropout import NONE, Dropout
from chargpt_jax.ops.kernels.attention_backward import backward
from chargpt_jax.ops.kernels.attention_forward import forward
from chargpt_jax.ops.kernels.tiles import Tiles
from chargpt_jax.ops.plain import INPUTS, SAVED


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
        seeds: uint32 [B, 2], or [B, H, 2] for each head, for dropout on the attention weights, or None.
        how: dropout's rate; its bits must be those of the hash.
        compiler: one of `tiles.COMPILERS`.

    Returns:
        [B, H, T, D], of the inputs' dtype.
    """
    return _forward(q, k, v, seeds, how, compiler)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, seeds: jax.Array | None, how: Dropout, compiler: str
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    q, k, v = (checkpoint_name(x, INPUTS) for x in (q, k, v))
    tiles = _tiles(q, seeds, how, compiler)
    out, log = forward(tiles.operand(q), tiles.operand(k), tiles.operand(v), tiles.seeds(seeds), tiles)
    out, log = checkpoint_name(tiles.result(out), SAVED), checkpoint_name(log, SAVED)
    return out, (q, k, v, seeds, out, log)


def _backward(how: Dropout, compiler: str, saved: Any, g: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, seeds, out, log = saved
    tiles = _tiles(q, seeds, how, compiler)
    q, k, v, g, out = (tiles.operand(x) for x in (q, k, v, g, out))
    grads = backward(q, k, v, g, out, log, tiles.seeds(seeds), tiles)
    return *(tiles.result(grad) for grad in grads), None


kernel_attention.defvjp(_forward, _backward)


def _tiles(q: jax.Array, seeds: jax.Array | None, how: Dropout, compiler: str) -> Tiles:
    seeds_of_heads = seeds is not None and seeds.ndim == 3
    return Tiles(q.shape[2], q.shape[3], q.dtype, compiler, how, q.shape[1], seeds_of_heads)
