"""Causal attention in blocks of queries, with a backward pass that recomputes the scores.

For one head with queries q_t, keys k_s and values v_s, and for s <= t only:

    a_ts = q_t . k_s / sqrt(D)      p_ts = exp(a_ts) / sum_s exp(a_ts)      y_t = sum_s m_ts p_ts v_s

where m is dropout's mask, 0 or 1 / (1 - rate). Scores are computed for `block` queries at a time and only for keys that
causality allows; no block's scores outlive the block. The forward pass saves y and the log of the softmax's denominator
l_t (Dao et al. 2022, "FlashAttention"). The backward pass recomputes p_ts = exp(a_ts - l_t) and, from y's gradient g,

    dv_s = sum_t m_ts p_ts g_t      da_ts = p_ts (m_ts g_t . v_s - g_t . y_t)
    dq_t = sum_s da_ts k_s / sqrt(D)      dk_s = sum_t da_ts q_t / sqrt(D)

so training memory grows with T, not with its square. A CPU computes a few heads at a time, so that their scores stay in
its cache (`map_chunks`). Without dropout a CPU skips l if no gradient is taken (`_forward_without_log`). The softmax is
float32 or wider whatever the inputs are.
"""

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from chargpt_jax.ops.dropout import NONE, Dropout, head_seeds, keep_mask
from chargpt_jax.ops.matmul import matmul
from chargpt_jax.ops.plain import INPUTS, SAVED

MAX_QUERIES = 64
"""Queries per block on a CPU if no gradient is taken: the scores of more would leave its cache."""


MAX_UNCHUNKED, CHUNK = 2**20, 2**18
"""Bytes: a CPU computes arrays of up to MAX_UNCHUNKED at once, larger ones in chunks that fit into a core's cache."""


@functools.cache
def attention_in_blocks(block: int, chunked: bool) -> Callable[..., jax.Array]:
    """Return `plain.attention` in blocks of queries; `chunked`: a few heads at a time, as is best on a CPU."""

    def attention(
        q: jax.Array, k: jax.Array, v: jax.Array, seeds: jax.Array | None = None, how: Dropout = NONE
    ) -> jax.Array:
        return causal_attention(q, k, v, seeds, how, block, chunked)

    return attention


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seeds: jax.Array | None,
    how: Dropout,
    block: int,
    chunked: bool,
) -> jax.Array:
    """Attend to the past.

    Args:
        q, k, v: [B, H, T, D], of one floating dtype.
        seeds: uint32 [B, 2], or [B, H, 2] for each head, for dropout on the attention weights, or None.
        how: dropout's rate and source of random bits.
        block: queries whose scores are in memory together.
        chunked: compute a few heads at a time.

    Returns:
        [B, H, T, D], of the inputs' dtype. Rounding may differ if a gradient is taken.
    """
    if chunked and (seeds is None or not how.rate):
        return _forward_without_log(q, k, v, block=min(block, MAX_QUERIES))
    return _forward(q, k, v, seeds, how, block, chunked)[0]


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seeds: jax.Array | None,
    how: Dropout,
    block: int,
    chunked: bool,
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    q, k, v = (checkpoint_name(x, INPUTS) for x in (q, k, v))
    arrays = (q, k, v, _of_heads(seeds, q.shape))
    out, log = map_chunks(partial(_outputs, how=how, block=block), _score_bytes(q, block), arrays, chunked)
    out, log = checkpoint_name(out, SAVED), checkpoint_name(log, SAVED)
    return out, (q, k, v, seeds, out, log)


def _backward(how: Dropout, block: int, chunked: bool, saved: Any, g: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, seeds, out, log = saved
    own = _of_heads(seeds, q.shape)
    dot = jnp.sum(g.astype(log.dtype) * out.astype(log.dtype), axis=-1, keepdims=True)
    arrays = (q, k, v, own, dot, log, g)
    return *map_chunks(partial(_gradients, how=how, block=block), _score_bytes(q, block), arrays, chunked), None


@partial(jax.jit, static_argnames=("block",))
def _forward_without_log(q: jax.Array, k: jax.Array, v: jax.Array, *, block: int) -> jax.Array:
    """Return y [B, H, T, D] without dropout, and without l.

    Only sums stand between the two matrix multiplications, so that XLA's CPU library compiles each block as one kernel:
    the mask is added, and a column of ones next to the values sums the weights.
    """
    B, H, T, D = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    # Slice flattened keys: XLA would recompute the keys of each block (rotate them again) rather than slice them.
    keys, values = k.reshape(B, H, T * D), jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    outs = []
    for rows in _blocks(T, block):
        scores = _scaled_scores(q[:, :, rows], keys[:, :, : rows.stop * D].reshape(B, H, rows.stop, D))
        scores += jnp.where(_ahead(rows.stop - rows.start, rows.stop, rows.start), jnp.asarray(-jnp.inf, wide), 0)
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)).astype(v.dtype)
        sums = matmul("bhts,bhsd->bhtd", weights, values[:, :, : rows.stop])
        outs.append((sums[..., :-1] / sums[..., -1:]).astype(v.dtype))
    return jnp.concatenate(outs, axis=2)


# Its own jit, as for the gradients: a training step uses it several times and then traces it once.
@partial(jax.jit, static_argnames=("how", "block"))
def _outputs(
    q: jax.Array, k: jax.Array, v: jax.Array, seeds: jax.Array | None, *, how: Dropout, block: int
) -> tuple[jax.Array, jax.Array]:
    """Return y [B, H, T, D] and l [B, H, T, 1]; seeds are uint32 [B, H, 2]."""
    outs, logs = [], []
    for rows in _blocks(q.shape[2], block):
        past = slice(0, rows.stop)
        scores, ahead = (
            _scaled_scores(q[:, :, rows], k[:, :, past]),
            _ahead(rows.stop - rows.start, rows.stop, rows.start),
        )
        # Apply the mask twice instead of keeping masked scores: XLA:CPU would reuse their buffer for the weights and
        # stop vectorising exp.
        top = jnp.max(jnp.where(ahead, -jnp.inf, scores), axis=-1, keepdims=True)
        weights = jnp.where(ahead, 0, jnp.exp(scores - top))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        kept = _drop(weights, seeds, how, rows.start, q.shape[2]).astype(v.dtype)
        sums = matmul("bhts,bhsd->bhtd", kept, v[:, :, past])
        outs.append((sums / total).astype(v.dtype))
        logs.append(top + jnp.log(total))
    return jnp.concatenate(outs, axis=2), jnp.concatenate(logs, axis=2)


@partial(jax.jit, static_argnames=("how", "block"))
def _gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seeds: jax.Array | None,
    dot: jax.Array,
    log: jax.Array,
    g: jax.Array,
    *,
    how: Dropout,
    block: int,
) -> tuple[jax.Array, ...]:
    """Return the gradients of q, k and v from that of y, g; dot [B, H, T, 1] is g . y, the rest as in `_outputs`."""
    wide = log.dtype
    # dk and dv are computed transposed, [B, H, D, S]: a CPU is slow at sums over the rows of a block of scores.
    transposed = (*k.shape[:2], k.shape[3], k.shape[2])
    dq, dk, dv = [], jnp.zeros(transposed, wide), jnp.zeros(transposed, wide)
    qT, gT = q.swapaxes(2, 3), g.swapaxes(2, 3)
    for rows in _blocks(q.shape[2], block):
        past = slice(0, rows.stop)
        p = jnp.exp(_scores(q[:, :, rows], k[:, :, past], rows.start) - log[:, :, rows])
        kept = _drop(p, seeds, how, rows.start, q.shape[2])
        dp = matmul("bhtd,bhsd->bhts", g[:, :, rows], v[:, :, past])
        da = (kept * dp - p * dot[:, :, rows]).astype(q.dtype)
        kept = kept.astype(v.dtype)
        dv = dv.at[..., past].add(matmul("bhdt,bhts->bhds", gT[..., rows], kept))
        dk = dk.at[..., past].add(matmul("bhdt,bhts->bhds", qT[..., rows], da))
        dq.append(matmul("bhts,bhsd->bhtd", da, k[:, :, past]))
    scale = q.shape[-1] ** -0.5
    grads = (jnp.concatenate(dq, axis=2) * scale, dk.swapaxes(2, 3) * scale, dv.swapaxes(2, 3))
    return tuple(grad.astype(q.dtype) for grad in grads)


causal_attention.defvjp(_forward, _backward)


def _blocks(length: int, block: int) -> Iterator[slice]:
    return (slice(start, min(start + block, length)) for start in range(0, length, block))


def _scores(q: jax.Array, k: jax.Array, start: int) -> jax.Array:
    """Return the scores of queries [B, H, t, D] from position `start` on keys [B, H, s, D]; -inf for keys ahead."""
    return jnp.where(_ahead(q.shape[2], k.shape[2], start), -jnp.inf, _scaled_scores(q, k))


def _scaled_scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Return the scaled scores of queries [B, H, t, D] on keys [B, H, s, D], not masked."""
    B, H, t, D = q.shape
    # Sequences and heads on one axis: exp of the scores then has another shape, and does not overwrite their buffer.
    both = matmul("ntd,nsd->nts", q.reshape(-1, t, D), k.reshape(-1, k.shape[2], D))
    return both.reshape(B, H, t, -1) * D**-0.5


def _ahead(queries: int, keys: int, start: int) -> jax.Array:
    """Return which keys are ahead of which queries, the first query at position `start`: bool [t, s]."""
    return jnp.arange(keys) > start + jnp.arange(queries)[:, None]


def _score_bytes(q: jax.Array, block: int) -> int:
    """Return the bytes of one head's largest block of scores."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    return min(block, q.shape[2]) * q.shape[2] * wide.itemsize


def _of_heads(seeds: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | None:
    """Return seeds for each head of q [B, H, T, D], uint32 [B, H, 2]."""
    return None if seeds is None else head_seeds(seeds, shape[1])


def _drop(x: jax.Array, seeds: jax.Array | None, how: Dropout, start: int, length: int) -> jax.Array:
    """Apply dropout to x [B, H, t, s]: rows `start` and following of an array [B, H, length, length]."""
    if seeds is None or not how.rate:
        return x
    row = start + jnp.arange(x.shape[2], dtype=jnp.uint32)
    index = row[:, None] * jnp.uint32(length) + jnp.arange(x.shape[3], dtype=jnp.uint32)
    mask = keep_mask(seeds.reshape(-1, 2), index, how).reshape(x.shape)
    return jnp.where(mask, x * (1 / (1 - how.rate)), 0)


def map_chunks(
    f: Callable[..., tuple[jax.Array, ...]], row_bytes: int, arrays: tuple[jax.Array | None, ...], chunked: bool
) -> tuple[jax.Array, ...]:
    """Call f on arrays [B, H, ...] with B x H independent rows: all at once, or in chunks that fit into a core's cache.

    Args:
        f: from arrays [B, H, ...], or None, to a tuple of arrays [B, H, ...].
        row_bytes: size of one row of f's largest temporary array.
        arrays: f's arguments.
        chunked: whether to use chunks, which f gets as arrays [rows, 1, ...].
    """
    first = arrays[0]
    assert first is not None
    B, H = first.shape[:2]
    chunks = chunk_count(B * H, row_bytes) if chunked else 1
    if chunks == 1:
        return f(*arrays)
    # Every n-th row belongs to one of n chunks, so that each device of a mesh has a part of every chunk.
    split = jax.tree.map(lambda x: x.reshape(-1, chunks, 1, *x.shape[2:]).swapaxes(0, 1), arrays)
    done = jax.lax.map(lambda chunk: f(*chunk), split)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, H, *x.shape[3:]), done)


def chunk_count(rows: int, row_bytes: int) -> int:
    """Return the number of equal chunks for so many rows: as few as fit into a core's cache."""
    if rows * row_bytes <= MAX_UNCHUNKED:
        return 1
    return next(n for n in range(1, rows + 1) if rows % n == 0 and (rows // n * row_bytes <= CHUNK or n == rows))
