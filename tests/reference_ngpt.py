"""Reference implementation of nGPT in NumPy and float64: slow and plain, one sequence at a time, without dropout.

It does not import the package. It follows Loshchilov et al. 2024 (arXiv 2410.01131), sections 2.1 to 2.6, with the
rotation of reference.py. Axes: T time, C channels, H heads, D head width, F feed-forward width, V vocabulary.
"""

import math

import numpy as np

from tests.reference import rope

Params = dict[str, np.ndarray]


def unit(x: np.ndarray) -> np.ndarray:
    """Divide each vector of the last axis by its length."""
    return x / np.sqrt((x * x).sum(axis=-1, keepdims=True))


def random_parameters(
    rng: np.random.Generator, *, vocab_size: int, n_embd: int, n_head: int, n_head_dim: int, n_ff: int, n_layer: int
) -> Params:
    """Return random parameters, float64: each matrix has a vector of C per row, of length 1; scales are around 1.

    'embed' and 'head' [V, C], 's_z' [V]; for each layer N, under 'N.': 'q', 'k', 'v' and 'o' [H*D, C] (the output of
    attention is a sum of rows of 'o'), 's_qk' [H*D], 'a_1' and 'a_2' [C], 'up', 'gate' and 'down' [F, C], 's_u' and
    's_g' [F]. Scales are those of the formulas, not those that an optimizer moves.
    """
    params = {}

    def matrix(name: str, rows: int) -> None:
        params[name] = unit(rng.normal(size=(rows, n_embd)))

    def scale(name: str, size: int, around: float = 1.0) -> None:
        params[name] = around * (1 + 0.3 * rng.normal(size=size))

    matrix("embed", vocab_size)
    matrix("head", vocab_size)
    scale("s_z", vocab_size, 4.0)
    for n in range(n_layer):
        for name in ("q", "k", "v", "o"):
            matrix(f"{n}.{name}", n_head * n_head_dim)
        scale(f"{n}.s_qk", n_head * n_head_dim)
        for name in ("up", "gate", "down"):
            matrix(f"{n}.{name}", n_ff)
        scale(f"{n}.s_u", n_ff)
        scale(f"{n}.s_g", n_ff)
        scale(f"{n}.a_1", n_embd, 0.3)
        scale(f"{n}.a_2", n_embd, -0.3)  # the sign of a step size does not count
    return params


def attention(h: np.ndarray, params: Params, n: int, n_head: int, n_head_dim: int) -> np.ndarray:
    """Apply layer n's attention to h [T, C]."""
    T = len(h)
    out = np.zeros_like(h)
    for head in range(n_head):
        own = slice(head * n_head_dim, (head + 1) * n_head_dim)
        q, k, v = (h @ params[f"{n}.{name}"][own].T for name in "qkv")
        s = params[f"{n}.s_qk"][own]
        q, k = (s * unit(rope(part, np.arange(T))) for part in (q, k))
        for t in range(T):
            scores = math.sqrt(n_head_dim) * (k[: t + 1] @ q[t])
            weights = np.exp(scores - scores.max())
            out[t] += (weights / weights.sum()) @ v[: t + 1] @ params[f"{n}.o"][own]
    return out


def mlp(h: np.ndarray, params: Params, n: int) -> np.ndarray:
    """Apply layer n's MLP to h [T, C]."""
    up = h @ params[f"{n}.up"].T * params[f"{n}.s_u"]
    gate = h @ params[f"{n}.gate"].T * params[f"{n}.s_g"] * math.sqrt(h.shape[1])
    return (up * gate / (1 + np.exp(-gate))) @ params[f"{n}.down"]


def hidden_states(params: Params, tokens: np.ndarray, n_layer: int, n_head: int, n_head_dim: int) -> list[np.ndarray]:
    """Return h [T, C] before the first layer and after each."""
    h = params["embed"][tokens]
    states = [h]
    for n in range(n_layer):
        h = unit(h + np.abs(params[f"{n}.a_1"]) * (unit(attention(h, params, n, n_head, n_head_dim)) - h))
        h = unit(h + np.abs(params[f"{n}.a_2"]) * (unit(mlp(h, params, n)) - h))
        states.append(h)
    return states


def logits(params: Params, tokens: np.ndarray, n_layer: int, n_head: int, n_head_dim: int) -> np.ndarray:
    """Return the logits [T, V] of tokens [T]."""
    return hidden_states(params, tokens, n_layer, n_head, n_head_dim)[-1] @ params["head"].T * params["s_z"]
