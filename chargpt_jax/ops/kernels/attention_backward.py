"""Causal attention, backward pass, in one kernel, which recomputes the weights from the scores.

With the weights p, dropout's mask m, y's gradient g and the scores' gradient da (blockwise_attention.py derives them):

    dv_s = sum_t m_ts p_ts g_t      da_ts = p_ts (m_ts g_t . v_s - g_t . y_t)
    dq_t = sum_s da_ts k_s / sqrt(D)      dk_s = sum_t da_ts q_t / sqrt(D)

A program computes dk and dv of one block of keys, and then dq of the block of queries with the same index. No two
programs add to the same sum, so the result is deterministic.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from chargpt_jax.ops.kernels.tiles import Tiles
from chargpt_jax.ops.matmul import matmul


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    log: jax.Array,
    dot: jax.Array,
    seeds: jax.Array | None,
    tiles: Tiles,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of q, k and v.

    Args:
        q, k, v: [N, padded length, padded width], as for `forward`.
        g: gradient of the output, of the same shape; 0 at padded positions.
        log: of the softmax's denominators, float32 [N, blocks, 1, block].
        dot: g . y of each query, of log's shape and dtype.
        seeds: uint32 [N, 1, 2], or None: no dropout.
        tiles: the blocks.

    Returns:
        Three arrays of q's shape and dtype.
    """
    of_queries = pl.BlockSpec((None, tiles.count, 1, tiles.block), lambda n, i: (n, 0, 0, 0))
    arrays, specs = [q, k, v, g, log, dot], [tiles.one_head()] * 4 + [of_queries] * 2
    if seeds is not None:
        arrays.append(seeds)
        specs.append(pl.BlockSpec((None, 1, 2), lambda n, i: (n, 0, 0)))
    call = pl.pallas_call(
        partial(_kernel, tiles=tiles),
        grid=(q.shape[0], tiles.count),
        in_specs=specs,
        out_specs=(tiles.one_block(),) * 3,
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype),) * 3,
        name="attention_backward",
        **tiles.options(),
    )
    dq, dk, dv = call(*arrays)
    return dq, dk, dv


def _kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, g_ref: Any, log_ref: Any, dot_ref: Any, *refs: Any, tiles: Tiles
) -> None:
    """Compute one block of each gradient of one head; `refs` are the seeds, if there is dropout, and the results."""
    seed, (dq_ref, dk_ref, dv_ref) = refs[0] if len(refs) > 3 else None, refs[-3:]
    own = pl.program_id(1)
    here = tiles.rows_of(own)
    zeros = jnp.zeros((tiles.block, tiles.padded_width), jnp.float32)

    k, v, keys = k_ref[here, :], v_ref[here, :], tiles.positions(own, 0)

    def add_queries(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # Scores are transposed here, [s, t]: the queries' logs are a row, which broadcasts over the keys.
        dk, dv = carry
        rows, queries = tiles.rows_of(j), tiles.positions(j, 1)
        q, g = q_ref[rows, :], g_ref[rows, :]
        scores = jnp.where(keys <= queries, matmul("sd,td->st", k, q) * tiles.scale, -jnp.inf)
        weights = jnp.exp(scores - log_ref[j])
        kept = tiles.drop(weights, queries, keys, seed)
        dv += matmul("st,td->sd", kept.astype(g.dtype), g)
        da = kept * matmul("sd,td->st", v, g) - weights * dot_ref[j]
        dk += matmul("st,td->sd", da.astype(q.dtype), q)
        return dk, dv

    dk, dv = jax.lax.fori_loop(own, tiles.count, add_queries, (zeros, zeros))
    dk_ref[...] = (dk * tiles.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)

    q, g, queries = q_ref[here, :], g_ref[here, :], tiles.positions(own, 0)
    log, dot = tiles.as_column(log_ref[own]), tiles.as_column(dot_ref[own])

    def add_keys(j: jax.Array, dq: jax.Array) -> jax.Array:
        rows, keys = tiles.rows_of(j), tiles.positions(j, 1)
        k, v = k_ref[rows, :], v_ref[rows, :]
        scores = jnp.where(keys <= queries, matmul("td,sd->ts", q, k) * tiles.scale, -jnp.inf)
        weights = jnp.exp(scores - log)
        da = tiles.drop(weights, queries, keys, seed) * matmul("td,sd->ts", g, v) - weights * dot
        return dq + matmul("ts,sd->td", da.astype(k.dtype), k)

    dq = jax.lax.fori_loop(0, own + 1, add_keys, zeros)
    dq_ref[...] = (dq * tiles.scale).astype(dq_ref.dtype)
