"""Reference implementation of the kind 'modern' in NumPy and float64: one sequence at a time, without dropout.

It does not import the package. It is the GPT of reference.py, but attention averages a_1 v + a_2 u: v are the values of
the layer, u those of the first layer (Zhou et al. 2024, "Value Residual Learning", arXiv 2410.17897). Axes: T time, C
channels, H heads, D head width.
"""

import math

import numpy as np

from tests.reference import Params, layer_norm, linear, mlp, rope


def values(x: np.ndarray, params: Params, n: int) -> np.ndarray:
    """Return the values [T, H*D] that layer n computes from its normalised input x [T, C]."""
    return np.split(linear(x, params, f"transformer.blocks.{n}.attn.qkv"), 3, axis=-1)[2]


def attention(
    x: np.ndarray, u: np.ndarray, mixture: np.ndarray, params: Params, n: int, n_head: int, n_head_dim: int
) -> np.ndarray:
    """Apply layer n's attention to x [T, C], with the first layer's values u [T, H*D]; `mixture` is (a_1, a_2)."""
    name, T = f"transformer.blocks.{n}.attn", len(x)
    q_all, k_all, _ = np.split(linear(x, params, name + ".qkv"), 3, axis=-1)
    mixed = mixture[0] * values(x, params, n) + mixture[1] * u
    out = np.empty((T, n_head * n_head_dim))
    for head in range(n_head):
        own = slice(head * n_head_dim, (head + 1) * n_head_dim)
        q, k = rope(q_all[:, own], np.arange(T)), rope(k_all[:, own], np.arange(T))
        for t in range(T):
            scores = k[: t + 1] @ q[t] / math.sqrt(n_head_dim)
            weights = np.exp(scores - scores.max())
            out[t, own] = weights / weights.sum() @ mixed[: t + 1, own]
    return linear(out, params, name + ".proj")


def logits(
    params: Params, mixtures: np.ndarray, tokens: np.ndarray, n_layer: int, n_head: int, n_head_dim: int
) -> np.ndarray:
    """Return the logits [T, V] of tokens [T]; `mixtures` [L, 2] are a_1 and a_2 of each layer."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return layer_norm(x, params[f"transformer.{name}.weight"], params[f"transformer.{name}.bias"])

    x = params["transformer.wte.weight"][tokens]
    u = values(norm(x, "blocks.0.ln_1"), params, 0)
    for n in range(n_layer):
        x = x + attention(norm(x, f"blocks.{n}.ln_1"), u, mixtures[n], params, n, n_head, n_head_dim)
        x = x + mlp(norm(x, f"blocks.{n}.ln_2"), params, f"transformer.blocks.{n}.mlp")
    return norm(x, "ln_f") @ params["transformer.wte.weight"].T
