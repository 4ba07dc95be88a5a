"""The PyTorch original's files, config and arrays, and the same things as ours. It is z0u/mi-ni at commit 2a991f7.

Its state dict has our numbers under other names: one set of arrays a block where ours are stacked, weights [out, in]
where ours are [in, out], the tied table twice, and the rotary frequencies as a buffer. Nothing in a file is believed
before it is checked.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from chargpt_jax.config import Config, ModelConfig
from chargpt_jax.config_io import from_dict, read_json
from chargpt_jax.data.tokenizer import CharTokenizer
from chargpt_jax.errors import UserError
from chargpt_jax.interop.safetensors_file import Stored, read_npz, read_safetensors, reading
from chargpt_jax.interop.torch_pickle import read_torch

WTE, HEAD = "transformer.wte.weight", "lm_head.weight"

LAYER = {
    ("ln_1", "scale"): "ln_1.weight",
    ("ln_1", "bias"): "ln_1.bias",
    ("attn", "qkv", "kernel"): "attn.qkv.weight",
    ("attn", "qkv", "bias"): "attn.qkv.bias",
    ("attn", "proj", "kernel"): "attn.proj.weight",
    ("attn", "proj", "bias"): "attn.proj.bias",
    ("ln_2", "scale"): "ln_2.weight",
    ("ln_2", "bias"): "ln_2.bias",
    ("mlp", "up", "kernel"): "mlp.net.0.weight",
    ("mlp", "up", "bias"): "mlp.net.0.bias",
    ("mlp", "down", "kernel"): "mlp.net.2.weight",
    ("mlp", "down", "bias"): "mlp.net.2.bias",
}
"""Our path below `blocks` -> the original's name below `transformer.blocks.N`; kernels are transposed."""

SECTIONS = {
    "model": ("vocab_size", "block_size", "n_embd", "n_head", "n_head_dim", "n_ff", "n_layer", "dropout"),
    "data": ("batch_size", "oversample", "train_split", "padding_chance"),
    "optimizer": ("weight_decay", "learning_rate", "betas"),
    "scheduler": ("epochs", "warmup_epochs", "min_lr_factor"),
    "amp": ("enabled", "dtype"),
}
"""The fields of the original's config, which mean the same in ours."""

MULTIPLES = {"vocab_size": 64, "block_size": 64, "n_embd": 8, "n_head": 8, "n_head_dim": 8, "n_ff": 32}
"""What the original's config insists on, and ours does not."""


def read(path: Path) -> tuple[Any, dict[str, Stored]]:
    """Read a checkpoint's config, as it stands there, and the table of its arrays.

    Raises:
        UserError: where the file is missing, damaged or of another kind.
    """
    if not path.is_file():
        raise UserError(f"--from is {str(path)[:200]!r}, but there is no such file: give a checkpoint.")
    if path.suffix in (".pt", ".pth", ".ckpt"):
        return read_torch(path)
    if path.suffix == ".npz":
        return _json(path.with_name("config.json"), path), read_npz(path)
    if path.suffix != ".safetensors":
        raise UserError(f"--from is {str(path)[:200]!r}, but a .pt, .safetensors or .npz file is needed: give one.")
    arrays, metadata = read_safetensors(path)
    # safetensors' save_model leaves out the second name of a tied array, and says so in the metadata.
    for name, kept in ((WTE, HEAD), (HEAD, WTE)):
        if name not in arrays and metadata.get(name) == kept and kept in arrays:
            arrays[name] = arrays[kept]
    if "config" in metadata:
        with reading(path):
            return json.loads(metadata["config"]), arrays
    return _json(path.with_name("config.json"), path), arrays


def _json(config: Path, path: Path) -> Any:
    if not config.is_file():
        raise UserError(f"{path} does not hold its config: put the original's beside it, as {config.name}.")
    with reading(config):
        return read_json(config)


def from_original(described: Any, path: Path) -> tuple[Config, CharTokenizer]:
    """Turn the original's config into ours, and its vocabulary into a tokenizer.

    Raises:
        UserError: naming what is missing or wrong.
    """
    if not isinstance(described, dict):
        raise UserError(f"The config of {path} is no object of sections: give a checkpoint of the original.")
    sections: dict[str, Any] = {}
    for section, fields in SECTIONS.items():
        given = described.get(section, {})
        if not isinstance(given, dict):
            raise UserError(f"The config of {path} has a section {section!r} that is no object: it cannot be used.")
        sections[section] = {name: _plain(given[name], f"{section}.{name}", path) for name in fields if name in given}
    if missing := [name for name in SECTIONS["model"] if name not in sections["model"]]:
        raise UserError(f"The config of {path} has no model.{missing[0]}: give a checkpoint of the original.")
    vocabulary = described.get("tokenizer")
    letters = vocabulary.get("vocabulary") if isinstance(vocabulary, dict) else None
    if not isinstance(letters, list):
        raise UserError(f"The config of {path} has no tokenizer.vocabulary: give a checkpoint of the original.")
    if not all(isinstance(letter, str) and len(letter) < 2 for letter in letters):
        raise UserError(f"The vocabulary of {path} holds something other than single characters: it cannot be used.")
    tokenizer, model = CharTokenizer(letters), sections["model"]
    model |= {"used_ids": tokenizer.n_ids, "mask_unused_ids": False}
    sections["amp"] = {name: value for name, value in sections["amp"].items() if value is not None}
    # A rate of 0 says nothing: ours is then found by the range test.
    sections["optimizer"]["learning_rate"] = sections["optimizer"].get("learning_rate") or None
    config = from_dict({**sections, "data": {**sections["data"], "source": ""}})
    if tokenizer.n_ids > config.model.vocab_size:
        raise UserError(
            f"{path} has {tokenizer.n_ids} ids with the padding, but model.vocab_size is {config.model.vocab_size}: "
            "its last characters have no row in the table."
        )
    return config, tokenizer


def _plain(value: Any, name: str, path: Path) -> Any:
    """Return a field's value where it is plain; a hostile file could nest it without end."""
    parts = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    if not all(part is None or isinstance(part, int | float | str) for part in parts) or len(str(parts)) > 200:
        raise UserError(f"The config of {path} has a {type(value).__name__} as {name}: it must be a number or a word.")
    return value


def to_original(config: Config, tokenizer: CharTokenizer) -> dict[str, Any]:
    """Write a config as the original's `TrainingConfig` reads it."""
    flat = dataclasses.asdict(config)
    described: dict[str, Any] = {section: {n: flat[section][n] for n in names} for section, names in SECTIONS.items()}
    described["tokenizer"] = {"vocabulary": list(tokenizer.vocabulary[1:])}
    described["optimizer"]["learning_rate"] = config.optimizer.learning_rate or 0.0
    described["scheduler"]["epochs"] = max(1, round(config.scheduler.epochs))
    described["amp"]["dtype"] = None if config.amp.dtype == "auto" else config.amp.dtype
    return described


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """List the original's arrays, in its order: {name: shape}."""
    C, F, width, table = model.n_embd, model.n_ff, model.n_head * model.n_head_dim, (model.vocab_size, model.n_embd)
    layer: dict[str, tuple[int, ...]] = {
        "ln_1.weight": (C,),
        "ln_1.bias": (C,),
        "attn.qkv.weight": (3 * width, C),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (C, width),
        "attn.proj.bias": (C,),
        "attn.rotary_enc.inv_freq": (model.n_head_dim // 2,),
        "ln_2.weight": (C,),
        "ln_2.bias": (C,),
        "mlp.net.0.weight": (F, C),
        "mlp.net.0.bias": (F,),
        "mlp.net.2.weight": (C, F),
        "mlp.net.2.bias": (C,),
    }
    blocks = {f"transformer.blocks.{i}.{name}": shape for i in range(model.n_layer) for name, shape in layer.items()}
    return {WTE: table, **blocks, "transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,), HEAD: table}


def inverse_frequencies(n_head_dim: int) -> np.ndarray:
    """Return the rotary frequencies as the original keeps them, float32 [D / 2]."""
    exponents = np.arange(0, n_head_dim, 2, dtype=np.float32) / np.float32(n_head_dim)
    # Rounded where torch rounds: bit for bit the original's up to n_head_dim 64.
    return np.float32(1) / np.power(10_000.0, exponents, dtype=np.float64).astype(np.float32)


def checked(arrays: dict[str, Stored], model: ModelConfig, path: Path) -> dict[str, np.ndarray]:
    """Read the original's arrays after comparing their names and shapes with the config.

    Raises:
        UserError: naming the first array that is missing, too much, misshapen, or not what it must be.
    """
    if model.n_layer > len(arrays):  # before a name is made for every layer that a config claims
        raise UserError(f"{path} holds {len(arrays)} arrays, too few for {model.n_layer} layers: its config is wrong.")
    wanted = shapes(model)
    for name in wanted:
        if name not in arrays:
            raise UserError(f"{path} lacks the array {name!r}: give a whole checkpoint of the original.")
    for name, stored in arrays.items():
        if name not in wanted:
            raise UserError(f"{path} holds an array {name[:80]!r}, which the model of its config does not have.")
        if stored.shape != wanted[name]:
            raise UserError(f"{path} holds {name!r} with shape {stored.shape}, but its config says {wanted[name]}.")
    numbers = {name: arrays[name].read() for name in wanted}
    for name, array in numbers.items():
        if not np.isfinite(array).all():
            raise UserError(f"{path} holds {name!r} with values that are no finite float32: it cannot be used.")
        if name.endswith("inv_freq") and not np.allclose(array, inverse_frequencies(model.n_head_dim), rtol=1e-2):
            raise UserError(f"{path} holds {name!r} of another rotary encoding than base 10,000: it cannot be used.")
    if not np.array_equal(numbers[HEAD], numbers[WTE]):
        raise UserError(f"{path} holds {HEAD!r} that differs from {WTE!r}, but the two are one array in this model.")
    return numbers


def to_params(arrays: dict[str, np.ndarray], model: ModelConfig) -> dict[str, Any]:
    """Stack the original's arrays into our nested dicts."""
    params: dict[str, Any] = {
        "wte": {"embedding": arrays[WTE]},
        "ln_f": {"scale": arrays["transformer.ln_f.weight"], "bias": arrays["transformer.ln_f.bias"]},
        "blocks": {},
    }
    for keys, name in LAYER.items():
        layers = [arrays[f"transformer.blocks.{i}.{name}"] for i in range(model.n_layer)]
        node = params["blocks"]
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = np.stack([array.T if keys[-1] == "kernel" else array for array in layers])
    return params


def from_params(params: dict[str, Any], model: ModelConfig) -> dict[str, np.ndarray]:
    """Take our nested dicts apart into the original's arrays, in its order."""
    arrays = {
        WTE: params["wte"]["embedding"],
        "transformer.ln_f.weight": params["ln_f"]["scale"],
        "transformer.ln_f.bias": params["ln_f"]["bias"],
        HEAD: params["wte"]["embedding"],
    }
    for keys, name in LAYER.items():
        stacked = params["blocks"]
        for key in keys:
            stacked = stacked[key]
        for i, array in enumerate(stacked):
            arrays[f"transformer.blocks.{i}.{name}"] = array.T if keys[-1] == "kernel" else array
    for i in range(model.n_layer):
        arrays[f"transformer.blocks.{i}.attn.rotary_enc.inv_freq"] = inverse_frequencies(model.n_head_dim)
    assert {name: array.shape for name, array in arrays.items()} == shapes(model)
    return {name: arrays[name] for name in shapes(model)}
