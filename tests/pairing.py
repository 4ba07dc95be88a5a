"""Helpers for comparisons with a reference implementation: names and orientation of the parameters, float64.

The reference implementations, tests/reference.py and tests/pytorch_reference.py, use the original's names.
"""

from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chargpt_jax.config import ModelConfig
from chargpt_jax.model.init import create
from chargpt_jax.ops.choose import ops_for

# Path below 'blocks' -> the original's name below 'transformer.blocks.N', and whether the matrix is transposed.
LAYER = {
    ("ln_1", "scale"): ("ln_1.weight", False),
    ("ln_1", "bias"): ("ln_1.bias", False),
    ("attn", "qkv", "kernel"): ("attn.qkv.weight", True),
    ("attn", "qkv", "bias"): ("attn.qkv.bias", False),
    ("attn", "proj", "kernel"): ("attn.proj.weight", True),
    ("attn", "proj", "bias"): ("attn.proj.bias", False),
    ("ln_2", "scale"): ("ln_2.weight", False),
    ("ln_2", "bias"): ("ln_2.bias", False),
    ("mlp", "up", "kernel"): ("mlp.net.0.weight", True),
    ("mlp", "up", "bias"): ("mlp.net.0.bias", False),
    ("mlp", "down", "kernel"): ("mlp.net.2.weight", True),
    ("mlp", "down", "bias"): ("mlp.net.2.bias", False),
}


def built(config: ModelConfig, seed: int = 0, dtype: Any = jnp.float32, platform: str | None = None) -> Any:
    """Return a model's static description and parameters, with the operations that a run uses on a platform."""
    return create(config, seed, ops_for(dtype, config.attention_block, platform))


def logits_of(config: ModelConfig, params: Any, tokens: Any, dtype: Any = jnp.float32, seeds: Any = None) -> jax.Array:
    """Return a model's logits for tokens [B, T]; seeds: of dropout."""
    graphdef, _ = built(config, 0, dtype)
    return jax.jit(lambda p, t, s: nnx.merge(graphdef, p)(t, s))(params, tokens, seeds)


def from_reference(params: dict[str, np.ndarray], n_layer: int, dtype: Any) -> dict[str, Any]:
    """Convert the original's flat dict of arrays to nested dicts, with the layers stacked."""
    tree: dict[str, Any] = {
        "wte": {"embedding": params["transformer.wte.weight"].astype(dtype)},
        "ln_f": {
            "scale": params["transformer.ln_f.weight"].astype(dtype),
            "bias": params["transformer.ln_f.bias"].astype(dtype),
        },
        "blocks": {},
    }
    for path, (name, transposed) in LAYER.items():
        layers = [params[f"transformer.blocks.{i}.{name}"] for i in range(n_layer)]
        node = tree["blocks"]
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = np.stack([a.T if transposed else a for a in layers]).astype(dtype)
    return tree


def by_name(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    """Convert a tree of parameters or gradients to the original's flat dict of arrays."""
    flat = {
        "transformer.wte.weight": np.asarray(tree["wte"]["embedding"]),
        "transformer.ln_f.weight": np.asarray(tree["ln_f"]["scale"]),
        "transformer.ln_f.bias": np.asarray(tree["ln_f"]["bias"]),
    }
    for path, (name, transposed) in LAYER.items():
        node = tree["blocks"]
        for key in path:
            node = node[key]
        for index, layer in enumerate(np.asarray(node)):
            flat[f"transformer.blocks.{index}.{name}"] = layer.T if transposed else layer
    return flat


def x64(on: bool) -> AbstractContextManager:
    """Return a context that enables (or disables) float64; JAX 0.8 renamed the function."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(on)
    from jax.experimental import enable_x64

    return enable_x64(on)
