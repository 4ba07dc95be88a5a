"""nGPT, the normalised transformer: all hidden states and all rows or columns of its matrices have length 1.

With norm(x) = x / |x|, one layer moves a hidden state h [C] on the unit sphere,

    h <- norm(h + a_1 (norm(attention(h)) - h))      h <- norm(h + a_2 (norm(mlp(h)) - h))

where a_1 and a_2 [C] are learned step sizes. Queries and keys are normalised as well, and multiplied by learned
lengths; scores are multiplied by sqrt(D) instead of divided. The MLP is SwiGLU with learned scales s_u and s_g [F],
down(s_u up(h) silu(s_g sqrt(C) gate(h))). Logits are s_z (E h), with a head E [V, C] of its own and a learned scale s_z
[V]. There are no biases and no LayerNorm. After each training step every matrix is normalised along its axis of C
(`unit_norm`), so its products with hidden states are cosines.

Loshchilov, Hsieh, Sun and Ginsburg 2024, "nGPT: Normalized Transformer with Representation Learning on the Hypersphere"
(arXiv 2410.01131). Axes are those of gpt.py.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from chargpt_jax.config import ModelConfig
from chargpt_jax.model import gpt
from chargpt_jax.model.gpt import GPT, Attend, Embedding, LayerCache, Multiply, Rope
from chargpt_jax.ops.dropout import Dropout, fold_seeds
from chargpt_jax.ops.plain import Ops

UNIT_AXES = {
    "wte.embedding": -1,  # [V, C]
    "head.embedding": -1,  # [V, C]
    "blocks.attn.qkv.kernel": -2,  # [L, C, 3 H D]
    "blocks.attn.proj.kernel": -1,  # [L, H D, C]
    "blocks.mlp.up.kernel": -2,  # [L, C, F]
    "blocks.mlp.gate.kernel": -2,  # [L, C, F]
    "blocks.mlp.down.kernel": -1,  # [L, F, C]
}
"""The axis of C of each matrix, along which its vectors have length 1."""

STEP_SIZE = 0.05
"""Initial value of the step sizes a_1 and a_2."""


MIN_SQUARE = 1e-24
"""Vectors with a smaller square of their length are not normalised, but multiplied by 1e12."""


def norm(x: jax.Array, axis: int = -1) -> jax.Array:
    """Return x / |x| along an axis, in x's dtype; 0 where x is 0. Lengths are computed in float32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squares = jnp.sum(wide * wide, axis=axis, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.maximum(squares, MIN_SQUARE))).astype(x.dtype)


class Matrix(gpt.Linear):
    """x W."""

    def __init__(self, fan_in: int, fan_out: int, linear: Multiply):
        self.linear, self.fan_out = linear, fan_out
        self.kernel = nnx.Param(jnp.zeros((fan_in, fan_out)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [..., fan_in] to [..., fan_out], of x's dtype."""
        return self.linear(x, self.kernel[...], jnp.zeros(self.fan_out))


class Scale(nnx.Module):
    """A learned vector that starts at `initial`, and is stored as a parameter that starts at `stored`.

    Adam moves every parameter by about the learning rate. The smaller `stored` is, the faster the vector changes in
    proportion.
    """

    def __init__(self, width: int, initial: float, stored: float):
        self.factor = initial / stored
        self.scale = nnx.Param(jnp.full(width, stored))

    def __call__(self) -> jax.Array:
        """Return the vector, float32 [width]."""
        return self.scale[...] * self.factor


class Attention(gpt.Attention):
    """Multi-head self-attention with queries and keys of a learned length; `gpt.Attention` has the rest."""

    def __init__(self, config: ModelConfig, ops: Ops):
        width = config.n_head * config.n_head_dim
        self.ops, self.n_head_dim = ops, config.n_head_dim
        self.qkv = Matrix(config.n_embd, 3 * width, ops.linear)
        self.proj = Matrix(width, config.n_embd, ops.linear_out)
        self.lengths = Scale(width, 1.0, config.n_embd**-0.5)

    def project(self, x: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries, keys and values of x [B, T, C], [B, H, T, D] each; scores need no other factor."""
        D = self.n_head_dim
        q, k, v = super().project(x, rope)
        lengths = self.lengths().reshape(-1, 1, D)
        q, k = ((norm(part) * lengths).astype(v.dtype) for part in (q, k))
        return q * D, k, v  # attention divides the scores by sqrt(D)


class MLP(gpt.MLP):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, ops: Ops):
        self.up = Matrix(config.n_embd, config.n_ff, ops.linear)
        self.gate = Matrix(config.n_embd, config.n_ff, ops.linear)
        self.down = Matrix(config.n_ff, config.n_embd, ops.linear_out)
        self.up_scale = Scale(config.n_ff, 1.0, 1.0)
        self.gate_scale = Scale(config.n_ff, config.n_embd**0.5, 1.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [B, T, C] to [B, T, C]."""
        hidden = self.up(x) * self.up_scale() * jax.nn.silu(self.gate(x) * self.gate_scale())
        return self.down(hidden.astype(x.dtype))


class Block(gpt.Block):
    """One layer: two steps on the unit sphere, towards the output of attention and towards that of the MLP."""

    def __init__(self, config: ModelConfig, ops: Ops):
        self.ops, self.dropout = ops, Dropout(config.dropout)
        self.attn = Attention(config, ops)
        self.attn_step = Scale(config.n_embd, STEP_SIZE, config.n_embd**-0.5)
        self.mlp = MLP(config, ops)
        self.mlp_step = Scale(config.n_embd, STEP_SIZE, config.n_embd**-0.5)

    def project(self, x: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the queries, keys and values of the layer's input x, as `Attention.project` does."""
        return self.attn.project(x.astype(self.ops.activations), rope)

    def __call__(
        self, x: jax.Array, rope: Rope, attend: Attend[LayerCache], seeds: jax.Array | None = None
    ) -> tuple[jax.Array, LayerCache]:
        """Map x [B, T, C] to [B, T, C]; `seeds`, uint32 [B, 2], turn dropout on. Also returns `attend`'s cache."""
        y, cache = self.attn(x.astype(self.ops.activations), rope, attend)
        x = step(x, self.ops.dropout(y, fold_seeds(seeds, 1), self.dropout), self.attn_step())
        y = self.mlp(x.astype(self.ops.activations))
        return step(x, self.ops.dropout(y, fold_seeds(seeds, 2), self.dropout), self.mlp_step()), cache


def step(x: jax.Array, y: jax.Array, size: jax.Array) -> jax.Array:
    """Move x [..., C], of length 1, towards norm(y) by a step of |size| [C], and return it with length 1."""
    return norm(x + jnp.abs(size) * (norm(y).astype(x.dtype) - x))


class NGPT(GPT):
    """The decoder. `GPT` says what its methods do; only the parts and the head differ."""

    def __init__(self, config: ModelConfig, ops: Ops):
        self.config = config = dataclasses.replace(config)  # a copy, as in GPT
        self.ops = ops
        self.wte = Embedding(config)
        self.blocks = nnx.vmap(lambda _: Block(config, ops))(jnp.arange(config.n_layer))
        self.head = Embedding(config)
        self.logit_scale = Scale(config.vocab_size, 1.0, config.n_embd**-0.5)

    def unmasked_logits(self, x: jax.Array) -> jax.Array:
        """Map the last block's output [B, T, C] to logits, float32 [B, T, V]."""
        return self.ops.unembed(x.astype(self.ops.activations), self.head.embedding[...]) * self.logit_scale()


def initial_params(config: ModelConfig, ops: Ops, key: jax.Array) -> dict[str, Any]:
    """Draw the parameters of a model: matrices of random directions, and scales at their initial values."""
    order = list(UNIT_AXES)

    def draw(path: Any, x: jax.Array) -> jax.Array:
        if name(path) not in order:
            return x
        return jax.random.normal(jax.random.fold_in(key, order.index(name(path))), x.shape)

    params = nnx.to_pure_dict(nnx.state(NGPT(config, ops)))
    return unit_norm(jax.tree_util.tree_map_with_path(draw, params))


def unit_norm(params: dict[str, Any]) -> dict[str, Any]:
    """Return parameters whose matrices have vectors of length 1 along the axis of C; scales stay as they are."""

    def normalised(path: Any, x: jax.Array) -> jax.Array:
        axis = UNIT_AXES.get(name(path))
        return x if axis is None else norm(x, axis)

    return jax.tree_util.tree_map_with_path(normalised, params)


def name(path: Any) -> str:
    """Return the name of an array from its path in nested dicts: 'blocks.attn.qkv.kernel'."""
    return ".".join(key.key for key in path)
