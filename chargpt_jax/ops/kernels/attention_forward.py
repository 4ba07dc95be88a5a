"""Causal attention, forward pass, in one kernel: scores and dropout's mask never leave the chip.

The kernel reads the keys of a block of queries block by block, and keeps three sums per query (Milakov and
Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022, "FlashAttention"):

    top = max_s a_ts      total = sum_s exp(a_ts - top)      sums = sum_s m_ts exp(a_ts - top) v_s

where a are the scores and m is dropout's mask. If a later block raises `top`, the other two are scaled down to it.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from chargpt_jax.ops.kernels.tiles import Tiles
from chargpt_jax.ops.matmul import matmul


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, seeds: tuple[jax.Array, ...], tiles: Tiles
) -> tuple[jax.Array, jax.Array]:
    """Return the outputs of all heads, and the logs of their softmax's denominators.

    Args:
        q, k, v: operands of `tiles`.
        seeds: from `tiles.seeds`.
        tiles: the blocks.

    Returns:
        An array of q's shape and dtype, and float32 [B H, blocks, 1, block].
    """
    N = q.size // (q.shape[-1] * (tiles.length if tiles.masked else tiles.padded_length))
    shapes = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((N, tiles.count, 1, tiles.block), jnp.float32),
    )
    of_log = pl.BlockSpec((None, None, 1, tiles.block), lambda n, i: (n, i, 0, 0))
    arrays, specs = [q, k, v], [tiles.one_block(), tiles.one_head(), tiles.one_head()]
    arrays, specs = [*arrays, *seeds], [*specs, *[tiles.one_seed()] * len(seeds)]
    call = pl.pallas_call(
        partial(_kernel, tiles=tiles),
        grid=(N, tiles.count),
        in_specs=specs,
        out_specs=(tiles.one_block(), of_log),
        out_shape=shapes,
        name="attention_forward",
        **tiles.options(),
    )
    out, log = call(*arrays)
    return out, log


def _kernel(q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any, tiles: Tiles) -> None:
    """Compute one block of queries of one head; `refs` are the seeds, if there is dropout, and the two results."""
    seed, (out_ref, log_ref) = tiles.head_seed(refs[:-2]), refs[-2:]
    own = pl.program_id(1)
    q, queries = tiles.read_block(q_ref, own), tiles.positions(own, 0)

    def add_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, sums = carry
        keys = tiles.positions(j, 1)
        scores = matmul("td,sd->ts", q, tiles.read(k_ref, j)) * tiles.scale
        scores = jnp.where(keys <= queries, scores, -jnp.inf)
        # Key 0 is in the first block and ahead of no query, so `top` is finite from there on.
        new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
        weights, shrink = jnp.exp(scores - new_top), jnp.exp(top - new_top)
        kept = tiles.drop(weights, queries, keys, seed).astype(v_ref.dtype)
        total = total * shrink + jnp.sum(weights, axis=1, keepdims=True)
        sums = sums * shrink + matmul("ts,sd->td", kept, tiles.read(v_ref, j))
        return new_top, total, sums

    column = (tiles.block, 1)
    start = (
        jnp.full(column, -jnp.inf, jnp.float32),
        jnp.zeros(column, jnp.float32),
        jnp.zeros((tiles.block, tiles.padded_width), jnp.float32),
    )
    top, total, sums = jax.lax.fori_loop(0, own + 1, add_block, start)
    tiles.write(out_ref, own, sums / total)
    log_ref[...] = tiles.as_row(top + jnp.log(total))
