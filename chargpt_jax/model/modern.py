"""The GPT with value residuals and layers that start as the identity: `model.kind` 'modern'.

It differs from gpt.py in two things:

- Value residuals: with v the values of a layer and u those of the first one, attention averages a_1 v + a_2 u, with
  two learned numbers per layer that start at 1/2 (Zhou et al. 2024, "Value Residual Learning", arXiv 2410.17897). The
  first layer's values depend on the character alone, so `embed` computes u: every layer can read which characters it
  attends to, and its own values are free for what earlier layers have found out.
- The output projections of attention and MLP start at zero (as in ReZero, Bachlechner et al. 2020), so each layer
  starts as the identity.

The residual stream that passes from layer to layer carries u behind x: [B, T, C + H D]. Axes are those of gpt.py.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from chargpt_jax.config import ModelConfig
from chargpt_jax.model import gpt
from chargpt_jax.model.gpt import GPT, Attend, Embedding, LayerCache, LayerNorm, Rope
from chargpt_jax.ops.plain import Ops

MIXTURE = (0.5, 0.5)
"""Initial a_1 and a_2."""

OUTPUTS = (("attn", "proj"), ("mlp", "down"))
"""The parts of a block that start at zero: the output projections of attention and MLP."""


class Block(gpt.Block):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)); the first layer's values u pass unchanged."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__(config, ops)
        self.n_embd = config.n_embd
        self.mixture = nnx.Param(jnp.array(MIXTURE))

    def project(self, x: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries, keys and mixed values of the layer's input x [B, T, C + H D], [B, H, T, D] each."""
        x, first = jnp.split(x, [self.n_embd], axis=-1)
        q, k, v = super().project(x, rope)
        return q, k, self.mixed(v, first)

    def mixed(self, v: jax.Array, first: jax.Array) -> jax.Array:
        """Return a_1 v + a_2 u, [B, H, T, D], for v [B, H, T, D] and u as it is in the stream, [B, T, H D]."""
        B, H, T, D = v.shape
        own, earlier = self.mixture[...]
        return (own * v + earlier * first.reshape(B, T, H, D).swapaxes(1, 2)).astype(v.dtype)

    def __call__(
        self, x: jax.Array, rope: Rope, attend: Attend[LayerCache], seeds: jax.Array | None = None
    ) -> tuple[jax.Array, LayerCache]:
        """Map x [B, T, C + H D] to the same shape, as `gpt.Block` does."""
        x, first = jnp.split(x, [self.n_embd], axis=-1)
        x, cache = super().__call__(x, rope, lambda q, k, v: attend(q, k, self.mixed(v, first)), seeds)
        return stream(x, first), cache


def stream(x: jax.Array, first: jax.Array) -> jax.Array:
    """Put the first layer's values [..., H D] behind x [..., C], in x's dtype."""
    return jnp.concatenate([x, first.astype(x.dtype)], axis=-1)


class Modern(GPT):
    """The decoder. `GPT` says what its methods do; the stream between the layers is wider."""

    def __init__(self, config: ModelConfig, ops: Ops):
        self.config = config = dataclasses.replace(config)  # a copy, as in GPT
        self.ops = ops
        self.wte = Embedding(config)
        self.blocks = nnx.vmap(lambda _: Block(config, ops))(jnp.arange(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, ops)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Return the embeddings of tokens, int32 [B, T], and the first layer's values: [B, T, C + H D]."""
        x, norm, qkv = super().embed(tokens), self.blocks.ln_1, self.blocks.attn.qkv
        normalised = self.ops.layer_norm(x, norm.scale[...][0], norm.bias[...][0], self.ops.activations)
        width = self.config.n_head * self.config.n_head_dim
        kernel, bias = (param[...][0, ..., 2 * width :] for param in (qkv.kernel, qkv.bias))
        return stream(x, self.ops.linear(normalised, kernel, bias))

    def unmasked_logits(self, x: jax.Array) -> jax.Array:
        """Map the last block's output [B, T, C + H D] to logits, float32 [B, T, V]."""
        return super().unmasked_logits(x[..., : self.config.n_embd])


def initial_params(params: dict[str, Any]) -> dict[str, Any]:
    """Return the initial parameters, given those of a `GPT` of the same sizes."""
    blocks = params["blocks"]
    mixture = jnp.tile(jnp.array(MIXTURE), (len(blocks["ln_1"]["scale"]), 1))
    attn, mlp = ({**blocks[part], name: zeros(blocks[part][name])} for part, name in OUTPUTS)
    return {**params, "blocks": {**blocks, "attn": attn, "mlp": mlp, "mixture": mixture}}


def zeros(tree: Any) -> Any:
    """Return zeros in place of the arrays of a tree."""
    return jax.tree.map(jnp.zeros_like, tree)
