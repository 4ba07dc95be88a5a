"""The operations of the model as mathematics, and `Ops`: the set of operations that a model is built with.

A device may do each of these operations in its own way. `choose.py` picks the ways; tests hold each of them to the
function here that it replaces. Axes: B batch, T queries, S keys, C channels, H heads, D head width, V vocabulary, L
layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from chargpt_jax.ops.dropout import NONE, Dropout, dropout, head_seeds
from chargpt_jax.ops.kv_cache import KVCache, StackedKVCache
from chargpt_jax.ops.matmul import matmul

SAVED = "attention"
"""The name of what fast attentions save for the backward pass, which rematerialisation does not recompute."""

LAYER_NORM_EPSILON = 1e-5
"""Added to the variance in LayerNorm, as in PyTorch."""

INPUTS = "attention inputs"
"""The name of the queries, keys and values that an attention kernel reads."""

Layer = Callable[[Any, Any, jax.Array], tuple[Any, Any]]
"""layer(block, carry, index) -> (carry, output): one block of the stack; `index` is an int32 scalar."""


def embedding_lookup(table: jax.Array, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Look up embeddings: table [V, C] and ids int32 [...] to [..., C] of `dtype`."""
    return jnp.take(table.astype(dtype), ids, axis=0)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Normalise x [..., C], float32 or wider, to mean 0 and variance 1; apply scale and bias [C]; return `dtype`.

    Ba et al. 2016, "Layer normalization". Inputs are rounded to `dtype` first; mean and variance are float32 or wider.
    """
    x, scale, bias = (each.astype(dtype) for each in (x, scale, bias))
    wide = x.astype(jnp.promote_types(dtype, jnp.float32))
    mean = jnp.mean(wide, axis=-1)[..., None]
    variance = jnp.mean(jax.lax.square(wide - mean), axis=-1)[..., None]
    return ((x - mean) * (jax.lax.rsqrt(variance + LAYER_NORM_EPSILON) * scale) + bias).astype(dtype)


def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Map x [..., fan_in] to [..., fan_out], of x's dtype; kernel [fan_in, fan_out] and bias [fan_out] are float32.

    The bias is added in float32: its gradient is a sum over all positions, which bfloat16 cannot hold.
    """
    y = matmul("rc,cf->rf", x.reshape(-1, x.shape[-1]), kernel.astype(x.dtype), x.dtype)
    return (y.reshape(*x.shape[:-1], -1) + bias).astype(x.dtype)


def unembed(x: jax.Array, table: jax.Array) -> jax.Array:
    """Map x [B, T, C] to logits, float32 or wider [B, T, V], with the embedding table [V, C]."""
    return matmul("btc,vc->btv", x, table.astype(x.dtype))


def rotary(positions: jax.Array, n_head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin, [..., D / 2], of int32 positions [...], base 10,000; float32, or float64 under x64."""
    inverse = 10_000.0 ** -(jnp.arange(0, n_head_dim, 2) / n_head_dim)
    angles = positions[..., None] * inverse
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate each pair (x_i, x_{i + D/2}) of x [..., D] by its angle, in the dtype of cos; returns x's dtype."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, seeds: jax.Array | None = None, how: Dropout = NONE
) -> jax.Array:
    """Attend to the past: y_t = sum_s m_ts softmax_s(q_t . k_s / sqrt(D)) v_s over s <= t, with dropout's mask m.

    Args:
        q, k, v: [B, H, T, D], of one floating dtype.
        seeds: uint32 [B, 2], or [B, H, 2] for each head, turn dropout of the weights on; None: no dropout.
        how: dropout's rate and random bits.

    Returns:
        [B, H, T, D], of the inputs' dtype.
    """
    B, H, T, _ = q.shape
    weights = attention_weights(q, k).reshape(B * H, T, T)
    if seeds is not None:
        weights = dropout(weights, head_seeds(seeds, H).reshape(-1, 2), how)
    weights = weights.reshape(B, H, T, T)
    return matmul("bhts,bhsd->bhtd", weights.astype(v.dtype), v).astype(q.dtype)


def attention_weights(q: jax.Array, k: jax.Array) -> jax.Array:
    """Return softmax_s(q_t . k_s / sqrt(D)) over s <= t, [B, H, T, T], for q and k [B, H, T, D]; 0 for s > t."""
    T, D = q.shape[2:]
    scores = matmul("bhtd,bhsd->bhts", q, k) * D**-0.5
    past = jnp.arange(T) <= jnp.arange(T)[:, None]
    return jax.nn.softmax(jnp.where(past, scores, -jnp.inf), axis=-1)


def query_attention(q: jax.Array, keys: jax.Array, values: jax.Array, position: jax.Array) -> jax.Array:
    """Attend from one query per sequence to the keys at positions 0 to its own.

    Used beyond the context; inside it the KV cache attends.

    Args:
        q: [B, H, D].
        keys, values: [B, H, D, S].
        position: int32 [B], less than S.

    Returns:
        [B, H, D], of q's dtype.
    """
    scores = matmul("bhd,bhds->bhs", q, keys) * q.shape[-1] ** -0.5
    ahead = jnp.arange(keys.shape[-1]) > position[:, None, None]
    weights = jax.nn.softmax(jnp.where(ahead, -jnp.inf, scores), axis=-1)
    return matmul("bhs,bhds->bhd", weights.astype(values.dtype), values).astype(q.dtype)


def layers(layer: Layer, blocks: nnx.Module, carry: Any, *, remat: bool = False, count: int | None = None) -> Any:
    """Run `layer` through a stack of blocks, whose parameters have a leading axis of L.

    Args:
        layer: called once per block.
        blocks: one module that holds the parameters of all blocks.
        carry: the first layer's input.
        remat: recompute cheap activations (norms, GELU, masks) in the backward pass instead of saving them.
        count: run the first so many layers only; None: all.

    Returns:
        The last layer's carry, and the layers' outputs stacked.
    """
    graphdef, stacked = nnx.split(blocks)
    if count is not None:
        stacked = jax.tree.map(lambda x: x[:count], stacked)

    def body(carry: Any, xs: Any) -> tuple[Any, Any]:
        return layer(nnx.merge(graphdef, xs[0]), carry, xs[1])

    if remat:
        body = rematerialised(body)
    L = len(jax.tree.leaves(stacked)[0])
    return jax.lax.scan(body, carry, (stacked, jnp.arange(L)))


def rematerialised(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose gradient recomputes all but matrix multiplications and what is named SAVED.

    It must run inside a loop, such as a scan over layers, that keeps XLA from merging the two computations.
    """
    policies = jax.checkpoint_policies
    policy = policies.save_from_both_policies(
        policies.save_only_these_names(SAVED), policies.dots_with_no_batch_dims_saveable
    )
    return jax.checkpoint(f, prevent_cse=False, policy=policy)


def decode_layers(layer: Layer, blocks: nnx.Module, carry: Any) -> Any:
    """Run `layer` through the stack for one token per sequence; returns the last carry, (x [B, 1, C], cache)."""
    return layers(layer, blocks, carry)[0]


def cache_type(sequences: int, elements: int, parameters: int) -> type[KVCache]:
    """Return the KV cache to generate with.

    Args:
        sequences: in the batch.
        elements: keys and values in the cache of one sequence.
        parameters: of the model.
    """
    return StackedKVCache


@dataclass(frozen=True)
class Ops:
    """How a model is computed; the defaults are the mathematics above. Equal `Ops` share a compilation."""

    activations: DTypeLike = jnp.float32
    """Of LayerNorm's output and all that follows it up to the residual stream."""
    residual: DTypeLike = jnp.float32
    """Of the residual stream: float32 or wider."""
    embedding_lookup: Callable[[jax.Array, jax.Array, DTypeLike], jax.Array] = embedding_lookup
    layer_norm: Callable[[jax.Array, jax.Array, jax.Array, DTypeLike], jax.Array] = layer_norm
    linear: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = linear
    """From the residual stream to heads or hidden units."""
    linear_out: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = linear
    """From heads or hidden units back to the residual stream."""
    unembed: Callable[[jax.Array, jax.Array], jax.Array] = unembed
    dropout: Callable[[jax.Array, jax.Array | None, Dropout], jax.Array] = dropout
    rotate: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = rotate
    attention: Callable[..., jax.Array] = attention
    query_attention: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array] = query_attention
    layers: Callable[..., Any] = layers
    decode_layers: Callable[..., Any] = decode_layers
    cache_type: Callable[[int, int, int], type[KVCache]] = cache_type
