"""Checkpoints and configs of the original, the PyTorch character experiment of z0u/mi-ni at commit 2a991f7.

Its state dict has the same values under other names. It has one set of arrays per layer (stacked here), weights
[out, in] ([in, out] here), the tied table twice, and the rotary frequencies as a buffer. Every file is checked before
it is used.
"""

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from chargpt_jax.config import Config, ModelConfig
from chargpt_jax.config.json_file import read_json
from chargpt_jax.config.saved import from_dict
from chargpt_jax.data.tokenizer import CharTokenizer
from chargpt_jax.errors import UserError
from chargpt_jax.interop.array_names import LAYER, Params, layer_arrays
from chargpt_jax.interop.safetensors_file import Stored, read_npz, read_safetensors, reading
from chargpt_jax.interop.torch_pickle import read_torch

WTE, HEAD = "transformer.wte.weight", "lm_head.weight"

SECTIONS = {
    "model": ("vocab_size", "block_size", "n_embd", "n_head", "n_head_dim", "n_ff", "n_layer", "dropout"),
    "data": ("batch_size", "oversample", "train_split", "padding_chance"),
    "optimizer": ("weight_decay", "learning_rate", "betas"),
    "scheduler": ("epochs", "warmup_epochs", "min_lr_factor"),
    "amp": ("enabled", "dtype"),
}
"""The fields of the original's config, which have the same meaning here."""

MULTIPLES = {"vocab_size": 64, "block_size": 64, "n_embd": 8, "n_head": 8, "n_head_dim": 8, "n_ff": 32}
"""The original's config requires multiples of these numbers; chargpt_jax does not."""


def read(path: Path) -> tuple[object, dict[str, Stored]]:
    """Read the config of a checkpoint, unchecked, and the table of its arrays.

    Raises:
        UserError: if the file is missing, damaged or of an unsupported type.
    """
    if not path.is_file():
        fault = "that is not a regular file" if path.exists() else "no such file exists"
        raise UserError(f"--from is {str(path)[:200]!r}, but {fault}: give a .pt, .safetensors or .npz file.")
    if path.suffix in (".pt", ".pth", ".ckpt"):
        return read_torch(path)
    if path.suffix == ".npz":
        return _json(path.with_name("config.json"), path), read_npz(path)
    if path.suffix != ".safetensors":
        raise UserError(f"--from is {str(path)[:200]!r}, but must be a .pt, .safetensors or .npz file: give one.")
    arrays, metadata = read_safetensors(path)
    # safetensors' save_model omits the second name of a tied array, and lists it in the metadata.
    for name, other in ((WTE, HEAD), (HEAD, WTE)):
        if name not in arrays and metadata.get(name) == other and other in arrays:
            arrays[name] = arrays[other]
    if "config" in metadata:
        with reading(path):
            return json.loads(metadata["config"]), arrays
    return _json(path.with_name("config.json"), path), arrays


def _json(config: Path, path: Path) -> object:
    if not config.is_file():
        raise UserError(f"{path} does not contain its config: put the original's config next to it, as {config.name}.")
    with reading(config):
        return read_json(config)


def from_original(described: object, path: Path) -> tuple[Config, CharTokenizer]:
    """Convert the original's config to a `Config`, and its vocabulary to a tokenizer.

    Raises:
        UserError: naming what is missing or invalid.
    """
    if not isinstance(described, dict):
        raise UserError(f"The config of {path} is not an object of sections: give a checkpoint of the original.")
    sections: dict[str, dict[str, object]] = {}
    for section, fields in SECTIONS.items():
        given = described.get(section, {})
        if not isinstance(given, dict):
            raise UserError(f"The config of {path} is invalid: its section {section!r} is not an object.")
        sections[section] = {name: _plain(given[name], f"{section}.{name}", path) for name in fields if name in given}
    if missing := [name for name in SECTIONS["model"] if name not in sections["model"]]:
        raise UserError(f"The config of {path} has no model.{missing[0]}: give a checkpoint of the original.")
    vocabulary = described.get("tokenizer")
    letters = vocabulary.get("vocabulary") if isinstance(vocabulary, dict) else None
    if not isinstance(letters, list):
        raise UserError(f"The config of {path} has no tokenizer.vocabulary: give a checkpoint of the original.")
    if not all(isinstance(letter, str) and len(letter) < 2 for letter in letters):
        raise UserError(f"The vocabulary of {path} is invalid: its elements must be single characters.")
    if repeated := [letter for letter, count in collections.Counter(letters).items() if count > 1]:
        raise UserError(
            f"The vocabulary of {path} has {repeated[0]!r} more than once, so its ids are not known: give a checkpoint "
            "of the original."
        )
    # The original sorts the list as well, so its order does not matter.
    tokenizer, model = CharTokenizer(letters), sections["model"]
    model |= {"used_ids": tokenizer.n_ids, "mask_unused_ids": False}
    sections["amp"] = {name: value for name, value in sections["amp"].items() if value is not None}
    # 0 stands for an unset learning rate, which the range test then finds.
    sections["optimizer"]["learning_rate"] = sections["optimizer"].get("learning_rate") or None
    config = from_dict({**sections, "data": {**sections["data"], "source": ""}})
    if tokenizer.n_ids > config.model.vocab_size:
        raise UserError(
            f"{path} has {tokenizer.n_ids} token ids, padding included, but model.vocab_size is only "
            f"{config.model.vocab_size}: give a checkpoint of the original."
        )
    return config, tokenizer


def _plain(value: object, name: str, path: Path) -> object:
    """Check that the value of a field is a number, a string or a pair; a hostile file could nest it deeply."""
    parts = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    if not all(part is None or isinstance(part, int | float | str) for part in parts) or len(str(parts)) > 200:
        raise UserError(
            f"The config of {path} has a {type(value).__name__} as {name}: it must be a number or a string."
        )
    return value


def to_original(config: Config, tokenizer: CharTokenizer) -> dict[str, dict[str, Any]]:
    """Convert a config to the form that the original's `TrainingConfig` reads."""
    flat = dataclasses.asdict(config)
    described: dict[str, dict[str, Any]] = {
        section: {n: flat[section][n] for n in names} for section, names in SECTIONS.items()
    }
    described["tokenizer"] = {"vocabulary": list(tokenizer.vocabulary[1:])}
    described["optimizer"]["learning_rate"] = config.optimizer.learning_rate or 0.0
    described["scheduler"]["epochs"] = max(1, round(config.scheduler.epochs))
    described["amp"]["dtype"] = None if config.amp.dtype == "auto" else config.amp.dtype
    return described


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of the original's arrays, in its order."""
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
    """Return the rotary frequencies that the original stores, float32 [D / 2]."""
    exponents = np.arange(0, n_head_dim, 2, dtype=np.float32) / np.float32(n_head_dim)
    # Rounded where torch rounds: bit-identical to the original's up to n_head_dim 64.
    return np.float32(1) / np.power(10_000.0, exponents, dtype=np.float64).astype(np.float32)


def checked(arrays: dict[str, Stored], model: ModelConfig, path: Path) -> dict[str, np.ndarray]:
    """Read the original's arrays, after comparing their names and shapes with the config.

    Raises:
        UserError: naming the first array that is missing, unknown, or has a wrong shape or values.
    """
    if model.n_layer > len(arrays):  # before names are created for every layer that a config claims
        raise UserError(f"{path} has {len(arrays)} arrays, too few for {model.n_layer} layers: its config is wrong.")
    wanted = shapes(model)
    for name in wanted:
        if name not in arrays:
            raise UserError(f"{path} has no array {name!r}: give a complete checkpoint of the original.")
    for name, stored in arrays.items():
        if name not in wanted:
            raise UserError(f"{path} has an array {name[:80]!r}, which the model of its config does not have.")
        if stored.shape != wanted[name]:
            raise UserError(f"{path} has {name!r} with shape {stored.shape}, but its config requires {wanted[name]}.")
    numbers = {name: arrays[name].read() for name in wanted}
    for name, array in numbers.items():
        if not np.isfinite(array).all():
            raise UserError(f"{path} has NaN or infinite values in {name!r}: give another checkpoint.")
        if name.endswith("inv_freq") and not np.allclose(array, inverse_frequencies(model.n_head_dim), rtol=1e-2):
            raise UserError(
                f"{path} has {name!r} of a rotary encoding with another base than 10,000: it is unsupported."
            )
    if not np.array_equal(numbers[HEAD], numbers[WTE]):
        raise UserError(f"{path} has {HEAD!r} that differs from {WTE!r}, but in this model the two are one array.")
    return numbers


def to_params(arrays: dict[str, np.ndarray], model: ModelConfig) -> Params:
    """Convert the original's arrays to parameters: nested dicts, the layers stacked."""
    params: Params = {
        "wte": {"embedding": arrays[WTE]},
        "ln_f": {"scale": arrays["transformer.ln_f.weight"], "bias": arrays["transformer.ln_f.bias"]},
        "blocks": {},
    }
    for path, names in LAYER.items():
        layers = [arrays[f"transformer.blocks.{i}.{names.original}"] for i in range(model.n_layer)]
        node = params["blocks"]
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = np.stack([array.T if path[-1] == "kernel" else array for array in layers])
    return params


def from_params(params: Params, model: ModelConfig) -> dict[str, np.ndarray]:
    """Convert parameters to the original's arrays, in its order."""
    arrays = {
        WTE: params["wte"]["embedding"],
        "transformer.ln_f.weight": params["ln_f"]["scale"],
        "transformer.ln_f.bias": params["ln_f"]["bias"],
        HEAD: params["wte"]["embedding"],
    }
    for names, layer, array in layer_arrays(params):
        arrays[f"transformer.blocks.{layer}.{names.original}"] = array
    for i in range(model.n_layer):
        arrays[f"transformer.blocks.{i}.attn.rotary_enc.inv_freq"] = inverse_frequencies(model.n_head_dim)
    assert {name: array.shape for name, array in arrays.items()} == shapes(model)
    return {name: arrays[name] for name in shapes(model)}
