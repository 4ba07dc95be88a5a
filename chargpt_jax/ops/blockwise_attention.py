"""Causal attention, block by block, with a backward pass that recomputes.

For one head with queries q_t, keys k_s and values v_s, and for s <= t only:

    a_ts = q_t . k_s / sqrt(D)      p_ts = exp(a_ts) / sum_s exp(a_ts)      y_t = sum_s m_ts p_ts v_s

where m is dropout's mask, 0 or 1 / (1 - rate). Scores are made for `block` queries at a time and only for keys that
causality leaves them; none outlives its block. The forward pass keeps y and the log of the softmax's denominator l_t
(Dao et al. 2022, "FlashAttention"); the backward pass makes p_ts = exp(a_ts - l_t) again and, from the gradient g of
y,

    dv_s = sum_t m_ts p_ts g_t      da_ts = p_ts (m_ts g_t . v_s - g_t . y_t)
    dq_t = sum_s da_ts k_s / sqrt(D)      dk_s = sum_t da_ts q_t / sqrt(D)

so training memory grows with T, not with its square. A CPU takes the heads of all sequences a few at a time, so that
what they need stays in its cache (map_chunks). Where no gradient is wanted l need not be kept: there a CPU makes
each block's y in one go (`_attended`). Softmax is float32 or wider whatever the inputs are.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from chargpt_jax.devices.platform import on_cpu
from chargpt_jax.hash_rng import derive
from chargpt_jax.ops.dropout import Dropout, keep_mask
from chargpt_jax.ops.matmul import product

SAVED = "attention"
"""The name under which y and l are known to a rematerialisation policy: they are dear to make again."""

AT_ONCE = 64
"""How many queries at most a CPU takes in one go: the scores of more would leave its cache."""


WHOLE, PART = 2**20, 2**18
"""On a CPU an array of up to WHOLE bytes is worked on at once, a larger one by PART bytes, which a core keeps close."""


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seeds: jax.Array | None,
    how: Dropout,
    block: int,
    platform: str | None = None,
) -> jax.Array:
    """Attend to the past.

    Args:
        q, k, v: [B, H, T, D], of one floating dtype.
        seeds: uint32 [B, 2] for dropout on the attention weights, or None.
        how: dropout's rate and the source of its masks.
        block: how many queries' scores are held at once.
        platform: that the program is made for, 'cpu' or another; None: JAX's default.

    Returns:
        [B, H, T, D], of the inputs' dtype. Its last bits may differ where a gradient is taken.
    """
    if on_cpu(platform) and (seeds is None or not how.rate):
        return _attended(q, k, v, block=min(block, AT_ONCE))
    return _forward(q, k, v, seeds, how, block, platform)[0]


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seeds: jax.Array | None,
    how: Dropout,
    block: int,
    platform: str | None,
) -> tuple[jax.Array, Any]:
    arrays = (q, k, v, _of_heads(seeds, q.shape))
    out, log = map_chunks(partial(_outputs, how=how, block=block), _score_bytes(q, block), arrays, platform)
    out, log = checkpoint_name(out, SAVED), checkpoint_name(log, SAVED)
    return out, (q, k, v, seeds, out, log)


def _backward(how: Dropout, block: int, platform: str | None, saved: Any, g: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, seeds, out, log = saved
    own = _of_heads(seeds, q.shape)
    dot = jnp.sum(g.astype(log.dtype) * out.astype(log.dtype), axis=-1, keepdims=True)
    arrays = (q, k, v, own, dot, log, g)
    return *map_chunks(partial(_gradients, how=how, block=block), _score_bytes(q, block), arrays, platform), None


@partial(jax.jit, static_argnames=("block",))
def _attended(q: jax.Array, k: jax.Array, v: jax.Array, *, block: int) -> jax.Array:
    """Return y [B, H, T, D] alone, without dropout.

    From one product to the next nothing but sums, so that XLA's library for CPUs makes one kernel of each block: the
    future is masked by adding, and a column of ones beside the values sums the weights.
    """
    B, H, T, D = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    # Cut from keys that lie flat, since XLA would make keys anew for each block (rotate them) rather than cut theirs.
    keys, values = k.reshape(B, H, T * D), jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    outs = []
    for rows in _blocks(T, block):
        scores = _products(q[:, :, rows], keys[:, :, : rows.stop * D].reshape(B, H, rows.stop, D))
        scores += jnp.where(_ahead(rows.stop - rows.start, rows.stop, rows.start), jnp.asarray(-jnp.inf, wide), 0)
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)).astype(v.dtype)
        sums = product("bhts,bhsd->bhtd", weights, values[:, :, : rows.stop])
        outs.append((sums[..., :-1] / sums[..., -1:]).astype(v.dtype))
    return jnp.concatenate(outs, axis=2)


# A jit of its own, as for the gradients: what a training step traces several times over is then traced once.
@partial(jax.jit, static_argnames=("how", "block"))
def _outputs(
    q: jax.Array, k: jax.Array, v: jax.Array, seeds: jax.Array | None, *, how: Dropout, block: int
) -> tuple[jax.Array, jax.Array]:
    """Return y [B, H, T, D] and l [B, H, T, 1]; seeds are uint32 [B, H, 2]."""
    outs, logs = [], []
    for rows in _blocks(q.shape[2], block):
        past = slice(0, rows.stop)
        products, ahead = _products(q[:, :, rows], k[:, :, past]), _ahead(rows.stop - rows.start, rows.stop, rows.start)
        # Masked again rather than kept masked: a CPU would write the weights over those scores, and so one by one.
        top = jnp.max(jnp.where(ahead, -jnp.inf, products), axis=-1, keepdims=True)
        weights = jnp.where(ahead, 0, jnp.exp(products - top))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        kept = _drop(weights, seeds, how, rows.start, q.shape[2]).astype(v.dtype)
        sums = product("bhts,bhsd->bhtd", kept, v[:, :, past])
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
    # dk and dv are made lying, [B, H, D, S]: a CPU multiplies slowly what sums over the rows of a block of scores.
    lying = (*k.shape[:2], k.shape[3], k.shape[2])
    dq, dk, dv = [], jnp.zeros(lying, wide), jnp.zeros(lying, wide)
    qT, gT = q.swapaxes(2, 3), g.swapaxes(2, 3)
    for rows in _blocks(q.shape[2], block):
        past = slice(0, rows.stop)
        p = jnp.exp(_scores(q[:, :, rows], k[:, :, past], rows.start) - log[:, :, rows])
        kept = _drop(p, seeds, how, rows.start, q.shape[2])
        dp = product("bhtd,bhsd->bhts", g[:, :, rows], v[:, :, past])
        da = (kept * dp - p * dot[:, :, rows]).astype(q.dtype)
        kept = kept.astype(v.dtype)
        dv = dv.at[..., past].add(product("bhdt,bhts->bhds", gT[..., rows], kept))
        dk = dk.at[..., past].add(product("bhdt,bhts->bhds", qT[..., rows], da))
        dq.append(product("bhts,bhsd->bhtd", da, k[:, :, past]))
    scale = q.shape[-1] ** -0.5
    grads = (jnp.concatenate(dq, axis=2) * scale, dk.swapaxes(2, 3) * scale, dv.swapaxes(2, 3))
    return tuple(grad.astype(q.dtype) for grad in grads)


causal_attention.defvjp(_forward, _backward)


def _blocks(length: int, block: int) -> Iterator[slice]:
    return (slice(start, min(start + block, length)) for start in range(0, length, block))


def _scores(q: jax.Array, k: jax.Array, start: int) -> jax.Array:
    """Make the scaled scores of queries [B, H, t, D] that begin at `start` on keys [B, H, s, D]; -inf ahead of them."""
    return jnp.where(_ahead(q.shape[2], k.shape[2], start), -jnp.inf, _products(q, k))


def _products(q: jax.Array, k: jax.Array) -> jax.Array:
    """Return the scaled products of queries [B, H, t, D] with keys [B, H, s, D]."""
    B, H, t, D = q.shape
    # Rows and heads on one axis: what takes exp of the products has another shape then, and does not write over them.
    both = product("ntd,nsd->nts", q.reshape(-1, t, D), k.reshape(-1, k.shape[2], D))
    return both.reshape(B, H, t, -1) * D**-0.5


def _ahead(queries: int, keys: int, start: int) -> jax.Array:
    """Say which of so many keys lie ahead of which queries, of which the first stands at `start`; [t, s]."""
    return jnp.arange(keys) > start + jnp.arange(queries)[:, None]


def _score_bytes(q: jax.Array, block: int) -> int:
    """Return the bytes of one head's largest block of scores."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    return min(block, q.shape[2]) * q.shape[2] * wide.itemsize


def _of_heads(seeds: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | None:
    """Give each head of q [B, H, T, D] seeds of its own, uint32 [B, H, 2]."""
    return seeds if seeds is None else derive(seeds[:, None], jnp.arange(shape[1]))


def _drop(x: jax.Array, seeds: jax.Array | None, how: Dropout, start: int, length: int) -> jax.Array:
    """Apply dropout to rows `start`... of a [B, H, length, length] array of which x [B, H, t, s] is a part."""
    if seeds is None or not how.rate:
        return x
    row = start + jnp.arange(x.shape[2], dtype=jnp.uint32)
    place = row[:, None] * jnp.uint32(length) + jnp.arange(x.shape[3], dtype=jnp.uint32)
    mask = keep_mask(seeds.reshape(-1, 2), place, how).reshape(x.shape)
    return jnp.where(mask, x * (1 / (1 - how.rate)), 0)


def map_chunks(f: Callable[..., Any], row_bytes: int, arrays: Any, platform: str | None = None) -> Any:
    """Call f on arrays [B, H, ...], whose B x H rows do not concern each other.

    CPU: where f's temporaries would leave the cache, on some rows after the others, as arrays [rows, 1, ...]. TPU,
    GPU: on all at once.

    Args:
        f: from arrays [B, H, ...] to a tuple of arrays [B, H, ...].
        row_bytes: what one row takes in the largest of f's temporaries.
        arrays: a tuple of arrays, or None.
        platform: that the program is made for, 'cpu' or another; None: JAX's default. Said by the caller, since
            jax.lax.platform_dependent would trace both ways, a quarter of the tracing of a training step.
    """
    B, H = arrays[0].shape[:2]
    parts = chunk_count(B * H, row_bytes) if on_cpu(platform) else 1
    if parts == 1:
        return f(*arrays)
    # Every parts-th row makes a part, so that each device of a mesh holds a share of every part.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, 1, *x.shape[2:]).swapaxes(0, 1), arrays)
    done = jax.lax.map(lambda part: f(*part), split)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, H, *x.shape[3:]), done)


def chunk_count(rows: int, row_bytes: int) -> int:
    """Return into how many equal parts a CPU divides its work on so many rows: as few as fit into its cache."""
    if rows * row_bytes <= WHOLE:
        return 1
    return next(n for n in range(1, rows + 1) if rows % n == 0 and (rows // n * row_bytes <= PART or n == rows))
