"""The names of the parameters: paths in chargpt_jax, arrays of the original, arrays of Starcoder2."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

Params = dict[str, Any]
"""Parameters as nested dicts of arrays; those of the layers are stacked along axis 0."""


class Names(NamedTuple):
    """The names of one array of a layer."""

    original: str
    """Below `transformer.blocks.N.`."""
    starcoder2: str | None
    """Below `model.layers.N.`; None: split into three arrays there, for queries, keys and values."""


LAYER = {
    ("ln_1", "scale"): Names("ln_1.weight", "input_layernorm.weight"),
    ("ln_1", "bias"): Names("ln_1.bias", "input_layernorm.bias"),
    ("attn", "qkv", "kernel"): Names("attn.qkv.weight", None),
    ("attn", "qkv", "bias"): Names("attn.qkv.bias", None),
    ("attn", "proj", "kernel"): Names("attn.proj.weight", "self_attn.o_proj.weight"),
    ("attn", "proj", "bias"): Names("attn.proj.bias", "self_attn.o_proj.bias"),
    ("ln_2", "scale"): Names("ln_2.weight", "post_attention_layernorm.weight"),
    ("ln_2", "bias"): Names("ln_2.bias", "post_attention_layernorm.bias"),
    ("mlp", "up", "kernel"): Names("mlp.net.0.weight", "mlp.c_fc.weight"),
    ("mlp", "up", "bias"): Names("mlp.net.0.bias", "mlp.c_fc.bias"),
    ("mlp", "down", "kernel"): Names("mlp.net.2.weight", "mlp.c_proj.weight"),
    ("mlp", "down", "bias"): Names("mlp.net.2.bias", "mlp.c_proj.bias"),
}
"""{path below `blocks`: names in the other formats}. A kernel is [in, out] here, and [out, in] in both others."""


def layer_arrays(params: Params) -> Iterator[tuple[Names, int, np.ndarray]]:
    """Yield (names, layer, array) for each array of each layer, with kernels transposed to [out, in]."""
    for path, names in LAYER.items():
        stacked = params["blocks"]
        for key in path:
            stacked = stacked[key]
        for layer, array in enumerate(stacked):
            yield names, layer, array.T if path[-1] == "kernel" else array
