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
    out: jax.Array,
    log: jax.Array,
    seeds: tuple[jax.Array, ...],
    tiles: Tiles,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of q, k and v.

    Args:
        q, k, v, seeds, tiles: as for `forward`.
        g: gradient of the output, an operand like q.
        out, log: results of `forward`.

    Returns:
        Three arrays of q's shape and dtype.
    """
    of_queries = pl.BlockSpec((None, tiles.count, 1, tiles.block), lambda n, i: (n, 0, 0, 0))
    if tiles.masked:  # the kernel computes g . y
        dot, of_dot = out, tiles.one_head()
    else:
        dot = jnp.sum(g.astype(log.dtype) * out.astype(log.dtype), axis=-1).reshape(log.shape)
        of_dot = of_queries
    arrays, specs = [q, k, v, g, log, dot], [tiles.one_head()] * 4 + [of_queries, of_dot]
    arrays, specs = [*arrays, *seeds], [*specs, *[tiles.one_seed()] * len(seeds)]
    call = pl.pallas_call(
        partial(_kernel, tiles=tiles),
        grid=(log.shape[0], tiles.count),
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
    """Compute one block of each gradient of one head; `refs` are the seeds, if there is dropout, and the results.

    `dot_ref` holds g . y of each query, or y.
    """
    seed, (dq_ref, dk_ref, dv_ref) = tiles.head_seed(refs[:-3]), refs[-3:]
    own = pl.program_id(1)
    zeros = jnp.zeros((tiles.block, tiles.padded_width), jnp.float32)

    k, v, keys = tiles.read(k_ref, own), tiles.read(v_ref, own), tiles.positions(own, 0)

    def dots(j: jax.Array, g: jax.Array) -> jax.Array:
        """Return g . y of a block of queries, float32 [block]."""
        return jnp.sum(g.astype(jnp.float32) * tiles.read(dot_ref, j).astype(jnp.float32), axis=1)

    def add_queries(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # Scores are transposed here, [s, t]: the queries' logs are a row, which broadcasts over the keys.
        dk, dv = carry
        q, g, queries = tiles.read(q_ref, j), tiles.read(g_ref, j), tiles.positions(j, 1)
        scores = jnp.where(keys <= queries, matmul("sd,td->st", k, q) * tiles.scale, -jnp.inf)
        weights = jnp.exp(scores - log_ref[j])
        kept = tiles.drop(weights, queries, keys, seed)
        dv += matmul("st,td->sd", kept.astype(g.dtype), g)
        dot = dots(j, g)[None, :] if tiles.masked else dot_ref[j]
        da = kept * matmul("sd,td->st", v, g) - weights * dot
        dk += matmul("st,td->sd", da.astype(q.dtype), q)
        return dk, dv

    dk, dv = jax.lax.fori_loop(own, tiles.count, add_queries, (zeros, zeros))
    tiles.write(dk_ref, own, dk * tiles.scale)
    tiles.write(dv_ref, own, dv)

    q, g, queries = tiles.read(q_ref, own), tiles.read(g_ref, own), tiles.positions(own, 0)
    log = tiles.as_column(log_ref[own])
    dot = dots(own, g)[:, None] if tiles.masked else tiles.as_column(dot_ref[own])

    def add_keys(j: jax.Array, dq: jax.Array) -> jax.Array:
        k, v, keys = tiles.read(k_ref, j), tiles.read(v_ref, j), tiles.positions(j, 1)
        scores = jnp.where(keys <= queries, matmul("td,sd->ts", q, k) * tiles.scale, -jnp.inf)
        weights = jnp.exp(scores - log)
        da = tiles.drop(weights, queries, keys, seed) * matmul("td,sd->ts", g, v) - weights * dot
        return dq + matmul("ts,sd->td", da.astype(k.dtype), k)

    dq = jax.lax.fori_loop(0, own + 1, add_keys, zeros)
    tiles.write(dq_ref, own, dq * tiles.scale)
