"""Causal attention, block by block, with a backward pass that recomputes.

For one head with queries q_t, keys k_s and values v_s, and for s <= t only:

    a_ts = q_t . k_s / sqrt(D)      p_ts = exp(a_ts) / sum_s exp(a_ts)      y_t = sum_s m_ts p_ts v_s

where m is dropout's mask, 0 or 1 / (1 - rate). Scores are made for `block` queries at a time and only for keys that
causality leaves them; none outlives its block. The forward pass keeps y and the log of the softmax's denominator l_t
(Dao et al. 2022, "FlashAttention"); the backward pass makes p_ts = exp(a_ts - l_t) again and, from the gradient g of
y,

    dv_s = sum_t m_ts p_ts g_t      da_ts = p_ts (m_ts g_t . v_s - g_t . y_t)
    dq_t = sum_s da_ts k_s / sqrt(D)      dk_s = sum_t da_ts q_t / sqrt(D)

so training memory grows with T, not with its square. Softmax is float32 or wider whatever the inputs are.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from chargpt_jax.dropout import keep_mask

SAVED = "attention"
"""The name under which y and l are known to a rematerialisation policy: they are dear to make again."""


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, seeds: jax.Array | None, rate: float, block: int
) -> jax.Array:
    """Attend to the past.

    Args:
        q, k, v: [B, H, T, D], of one floating dtype.
        seeds: uint32 [B, 2] for dropout on the attention weights, or None.
        rate: dropout's rate.
        block: how many queries' scores are held at once.

    Returns:
        [B, H, T, D], of the inputs' dtype.
    """
    return _forward(q, k, v, seeds, rate, block)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, seeds: jax.Array | None, rate: float, block: int
) -> tuple[jax.Array, Any]:
    outs, logs = [], []
    for rows in _blocks(q.shape[2], block):
        past = slice(0, rows.stop)
        scores = _scores(q[:, :, rows], k[:, :, past], rows.start)
        log = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        kept = _drop(jnp.exp(scores - log), seeds, rate, rows.start, q.shape[2])
        outs.append(jnp.einsum("bhts,bhsd->bhtd", kept.astype(v.dtype), v[:, :, past]))
        logs.append(log)
    out = checkpoint_name(jnp.concatenate(outs, axis=2), SAVED)
    log = checkpoint_name(jnp.concatenate(logs, axis=2), SAVED)
    return out, (q, k, v, seeds, out, log)


def _backward(rate: float, block: int, saved: Any, g: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, seeds, out, log = saved
    wide = log.dtype
    dot = jnp.sum(g.astype(wide) * out.astype(wide), axis=-1, keepdims=True)
    dq, dk, dv = [], jnp.zeros_like(k, wide), jnp.zeros_like(v, wide)
    for rows in _blocks(q.shape[2], block):
        past = slice(0, rows.stop)
        p = jnp.exp(_scores(q[:, :, rows], k[:, :, past], rows.start) - log[:, :, rows])
        dp = jnp.einsum("bhtd,bhsd->bhts", g[:, :, rows], v[:, :, past], preferred_element_type=wide)
        da = (p * (_drop(dp, seeds, rate, rows.start, q.shape[2]) - dot[:, :, rows])).astype(q.dtype)
        kept = _drop(p, seeds, rate, rows.start, q.shape[2]).astype(v.dtype)
        dv = dv.at[:, :, past].add(jnp.einsum("bhts,bhtd->bhsd", kept, g[:, :, rows], preferred_element_type=wide))
        dk = dk.at[:, :, past].add(jnp.einsum("bhts,bhtd->bhsd", da, q[:, :, rows], preferred_element_type=wide))
        dq.append(jnp.einsum("bhts,bhsd->bhtd", da, k[:, :, past], preferred_element_type=wide))
    scale = q.shape[-1] ** -0.5
    grads = (jnp.concatenate(dq, axis=2) * scale, dk * scale, dv)
    return *(grad.astype(q.dtype) for grad in grads), None


causal_attention.defvjp(_forward, _backward)


def _blocks(length: int, block: int) -> Iterator[slice]:
    return (slice(start, min(start + block, length)) for start in range(0, length, block))


def _scores(q: jax.Array, k: jax.Array, start: int) -> jax.Array:
    """Make the scaled scores of queries [B, H, t, D] that begin at `start` on keys [B, H, s, D]; -inf ahead of them."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
    ahead = jnp.arange(k.shape[2]) > start + jnp.arange(q.shape[2])[:, None]
    return jnp.where(ahead, -jnp.inf, scores)


def _drop(x: jax.Array, seeds: jax.Array | None, rate: float, start: int, length: int) -> jax.Array:
    """Apply dropout to rows `start`... of a [B, H, length, length] array of which x [B, H, t, s] is a part."""
    if seeds is None or not rate:
        return x
    _, heads, t, s = x.shape
    row = jnp.arange(heads, dtype=jnp.uint32)[:, None] * length + start + jnp.arange(t, dtype=jnp.uint32)
    place = row[:, :, None] * jnp.uint32(length) + jnp.arange(s, dtype=jnp.uint32)
    return jnp.where(keep_mask(seeds, place, rate), x * (1 / (1 - rate)), 0)


def cached_attention(q: jax.Array, k: jax.Array, v: jax.Array, position: jax.Array) -> jax.Array:
    """Attend from one query a sequence to the keys up to its position.

    Args:
        q: [B, H, D].
        k, v: [B, H, S, D], of which places 0 to position are filled.
        position: int32 [B].

    Returns:
        [B, H, D], of q's dtype.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bhd,bhsd->bhs", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
    ahead = jnp.arange(k.shape[2]) > position[:, None, None]
    weights = jax.nn.softmax(jnp.where(ahead, -jnp.inf, scores), axis=-1)
    return jnp.einsum("bhs,bhsd->bhd", weights.astype(v.dtype), v)
