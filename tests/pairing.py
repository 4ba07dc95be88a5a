"""Our parameters under the names and in the orientation that tests/reference.py (and the PyTorch ancestor) use."""

from typing import Any

import numpy as np

# Our path below 'blocks' -> the ancestor's name below 'transformer.blocks.N', and whether the matrix is transposed.
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


def from_reference(params: dict[str, np.ndarray], n_layer: int, dtype: Any) -> dict[str, Any]:
    """Build our nested, stacked tree from the ancestor's flat one."""
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
