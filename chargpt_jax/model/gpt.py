"""The RoPE GPT and nothing else: token ids in, logits out, with or without a KV cache.

A decoder of pre-LayerNorm blocks with rotary positions (Su et al. 2021, "RoFormer") and an embedding tied to the head:
the mathematics of the original. docs/model.md draws it. How each operation is computed on a device is decided by `Ops`.

Axes: B batch, T positions of queries, S positions of keys, C channels (n_embd), H heads, D head width, F feed-forward
width, V vocabulary, L layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from chargpt_jax.config import ModelConfig
from chargpt_jax.ops.dropout import Dropout, fold_seeds
from chargpt_jax.ops.kv_cache import KVCache
from chargpt_jax.ops.plain import Ops, rotary

LayerCache = TypeVar("LayerCache")
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, LayerCache]]
"""From q, k and v, [B, H, T, D] each, to the heads' outputs [B, H, T, D] and the layer's cache.

The cache is None in training, new keys and values in prefill, and the whole KV cache in decoding.
"""

Multiply = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""From x [..., fan_in], a kernel [fan_in, fan_out] and a bias [fan_out] to [..., fan_out]: an operation of `Ops`."""

Rope = tuple[jax.Array, jax.Array]
"""cos and sin of the positions' angles, [..., D / 2] each."""

Cache = TypeVar("Cache", bound=KVCache)

MASKED = -1e9
"""The logit of an unused token id: its probability is exactly 0."""


class Linear(nnx.Module):
    """x W + b, by one of the two operations of `Ops`: `linear` or `linear_out`."""

    def __init__(self, fan_in: int, fan_out: int, linear: Multiply):
        self.linear = linear
        self.kernel = nnx.Param(jnp.zeros((fan_in, fan_out)))
        self.bias = nnx.Param(jnp.zeros(fan_out))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [..., fan_in] to [..., fan_out], of x's dtype."""
        return self.linear(x, self.kernel[...], self.bias[...])


class LayerNorm(nnx.Module):
    """Normalisation of each position's channels, then a scale and a bias per channel."""

    def __init__(self, width: int, ops: Ops):
        self.ops = ops
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [..., width] of the residual stream to [..., width] of `ops.activations`."""
        return self.ops.layer_norm(x, self.scale[...], self.bias[...], self.ops.activations)


def gelu(x: jax.Array) -> jax.Array:
    """Return x P(X < x) for a standard normal X, from erf as in PyTorch (jax.nn.gelu uses erfc: twice the cost)."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


class Attention(nnx.Module):
    """Multi-head self-attention; the caller's `attend` says which keys the queries see."""

    def __init__(self, config: ModelConfig, ops: Ops):
        width = config.n_head * config.n_head_dim
        self.ops, self.n_head_dim = ops, config.n_head_dim
        self.qkv = Linear(config.n_embd, 3 * width, ops.linear)
        self.proj = Linear(width, config.n_embd, ops.linear_out)

    def __call__(self, x: jax.Array, rope: Rope, attend: Attend[LayerCache]) -> tuple[jax.Array, LayerCache]:
        """Map x [B, T, C] to [B, T, C]; also returns `attend`'s cache."""
        y, cache = attend(*self.project(x, rope))
        return self.proj(y.swapaxes(1, 2).reshape(*x.shape[:2], -1)), cache

    def project(self, x: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries, keys and values of x [B, T, C], [B, H, T, D] each; queries and keys are rotated."""
        parts = jnp.split(self.qkv(x), 3, axis=-1)
        q, k, v = (part.reshape(*x.shape[:2], -1, self.n_head_dim).swapaxes(1, 2) for part in parts)
        return self.ops.rotate(q, *rope), self.ops.rotate(k, *rope), v


class MLP(nnx.Module):
    """Linear, GELU, Linear."""

    def __init__(self, config: ModelConfig, ops: Ops):
        self.up = Linear(config.n_embd, config.n_ff, ops.linear)
        self.down = Linear(config.n_ff, config.n_embd, ops.linear_out)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [B, T, C] to [B, T, C]."""
        return self.down(gelu(self.up(x)))


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, ops: Ops):
        self.ops, self.dropout = ops, Dropout(config.dropout)
        self.ln_1 = LayerNorm(config.n_embd, ops)
        self.attn = Attention(config, ops)
        self.ln_2 = LayerNorm(config.n_embd, ops)
        self.mlp = MLP(config, ops)

    def project(self, x: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the queries, keys and values of the layer's input x, as `Attention.project` does."""
        return self.attn.project(self.ln_1(x), rope)

    def __call__(
        self, x: jax.Array, rope: Rope, attend: Attend[LayerCache], seeds: jax.Array | None = None
    ) -> tuple[jax.Array, LayerCache]:
        """Map x [B, T, C] to [B, T, C]; `seeds`, uint32 [B, 2], turn dropout on. Also returns `attend`'s cache."""
        y, cache = self.attn(self.ln_1(x), rope, attend)
        x = x + self.ops.dropout(y, fold_seeds(seeds, 1), self.dropout)
        y = self.mlp(self.ln_2(x))
        return x + self.ops.dropout(y, fold_seeds(seeds, 2), self.dropout), cache


class Embedding(nnx.Module):
    """The table of embeddings, which is also the head."""

    def __init__(self, config: ModelConfig):
        self.embedding = nnx.Param(jnp.zeros((config.vocab_size, config.n_embd)))


class GPT(nnx.Module):
    """The decoder. `blocks` is one Block whose parameters have a leading axis of L; `ops.layers` runs it L times."""

    def __init__(self, config: ModelConfig, ops: Ops):
        self.config = config = dataclasses.replace(config)  # a copy, so that nobody changes it after compilation
        self.ops = ops
        self.wte = Embedding(config)
        self.blocks = nnx.vmap(lambda _: Block(config, ops))(jnp.arange(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, ops)

    def __call__(self, tokens: jax.Array, seeds: jax.Array | None = None) -> jax.Array:
        """Predict the token after each token.

        Args:
            tokens: int32 [B, T].
            seeds: uint32 [B, 2] turn dropout on (training).

        Returns:
            Logits, float32 [B, T, V].
        """
        return self.logits(self.features(tokens, seeds))

    def features(self, tokens: jax.Array, seeds: jax.Array | None = None, layers: int | None = None) -> jax.Array:
        """Return the last block's output, [B, T, C], for tokens int32 [B, T]; `layers`: of the first so many blocks."""
        rope = rotary(jnp.arange(tokens.shape[1]), self.config.n_head_dim)

        def layer(block: Block, x: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
            own = fold_seeds(seeds, index + 1)

            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
                return self.ops.attention(q, k, v, fold_seeds(own, 0), block.dropout), None

            return block(x, rope, attend, own)

        return self.ops.layers(layer, self.blocks, self.embed(tokens), remat=self.config.remat, count=layers)[0]

    def prefill(self, tokens: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Read int32 [B, T] without dropout; return the last block's output [B, T, C] and all keys and values.

        Keys and values are [L, B, H, D, T] each: `KVCache.of` makes the cache from them that `decode` continues.
        """
        rope = rotary(jnp.arange(tokens.shape[1]), self.config.n_head_dim)

        def layer(block: Block, x: jax.Array, _: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            return block(x, rope, lambda q, k, v: (self.ops.attention(q, k, v), (k.swapaxes(2, 3), v.swapaxes(2, 3))))

        return self.ops.layers(layer, self.blocks, self.embed(tokens))

    def decode(
        self, tokens: jax.Array, position: jax.Array, cache: Cache, run_layers: Callable[..., Any] | None = None
    ) -> tuple[jax.Array, Cache]:
        """Predict the token after one token per sequence.

        Args:
            tokens: int32 [B].
            position: int32 [B], each token's position in its sequence.
            cache: keys and values of all earlier positions.
            run_layers: runs the stack of blocks; None: `ops.decode_layers`.

        Returns:
            Logits, float32 [B, V], and the cache with this position filled.
        """
        rope = rotary(position[:, None, None], self.config.n_head_dim)  # [B, 1, 1, D / 2]

        def layer(block: Block, carry: tuple[jax.Array, Cache], index: jax.Array) -> tuple[Any, None]:
            x, cache = carry

            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Cache]:
                new = cache.append(k[:, :, 0], v[:, :, 0], index, position)
                return new.attend(q[:, :, 0], index, position)[:, :, None], new

            return block(x, rope, attend), None

        run_layers = run_layers or self.ops.decode_layers
        x, cache = run_layers(layer, self.blocks, (self.embed(tokens[:, None]), cache))
        return self.logits(x)[:, 0], cache

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Return the embeddings of tokens, int32 [...] to [..., C]."""
        return self.ops.embedding_lookup(self.wte.embedding[...], tokens, self.ops.residual)

    def logits(self, x: jax.Array) -> jax.Array:
        """Map the last block's output [B, T, C] to logits, float32 [B, T, V]; those of unused ids are `MASKED`."""
        logits = self.unmasked_logits(x)
        if not self.config.mask_unused_ids:
            return logits
        ids = jnp.arange(self.config.vocab_size)
        return jnp.where((ids > 0) & (ids < self.config.used_ids), logits, MASKED)

    def unmasked_logits(self, x: jax.Array) -> jax.Array:
        """Map the last block's output [B, T, C] to logits, float32 [B, T, V], of all ids."""
        return self.ops.unembed(self.ln_f(x), self.wte.embedding[...])
