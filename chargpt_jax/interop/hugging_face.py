"""A folder that Hugging Face's transformers loads as it is: our model under Starcoder2's names, a token a character.

Starcoder2 (Lozhkov et al. 2024) happens to be this decoder: pre-LayerNorm with biases, half rotation, exact GELU, a
tied head. Two things of ours have no name there. Ids without a character cannot be masked inside the model, so
generation_config.json suppresses them; and past block_size ours reads the last window anew, where transformers goes on
to positions the model has never seen.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from chargpt_jax.config import Config
from chargpt_jax.data.tokenizer import PADDING, CharTokenizer
from chargpt_jax.errors import UserError
from chargpt_jax.interop.safetensors_file import write_safetensors

LAYER = {
    ("ln_1", "scale"): "input_layernorm.weight",
    ("ln_1", "bias"): "input_layernorm.bias",
    ("attn", "proj", "kernel"): "self_attn.o_proj.weight",
    ("attn", "proj", "bias"): "self_attn.o_proj.bias",
    ("ln_2", "scale"): "post_attention_layernorm.weight",
    ("ln_2", "bias"): "post_attention_layernorm.bias",
    ("mlp", "up", "kernel"): "mlp.c_fc.weight",
    ("mlp", "up", "bias"): "mlp.c_fc.bias",
    ("mlp", "down", "kernel"): "mlp.c_proj.weight",
    ("mlp", "down", "bias"): "mlp.c_proj.bias",
}
"""Our path below `blocks` -> Starcoder2's name below `model.layers.N`; kernels are transposed."""


def write(folder: Path, config: Config, tokenizer: CharTokenizer, params: dict[str, Any]) -> None:
    """Write the files of a model into a folder that exists.

    Raises:
        UserError: where the vocabulary has a character that no UTF-8 file can hold.
    """
    broken = [c for c in tokenizer.vocabulary if "\ud800" <= c <= "\udfff"]
    if broken:
        raise UserError(f"The vocabulary holds {broken[0]!r}, half a character: a Hugging Face tokenizer cannot.")
    files = {
        "config.json": model_config(config),
        "generation_config.json": generation_config(config),
        "tokenizer.json": tokenizer_file(tokenizer),
        "tokenizer_config.json": tokenizer_config(config, tokenizer),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_safetensors(folder / "model.safetensors", arrays(params), {"format": "pt"})


def arrays(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Take our nested dicts apart into Starcoder2's arrays; the tied head is not among them."""
    found = {
        "model.embed_tokens.weight": params["wte"]["embedding"],
        "model.norm.weight": params["ln_f"]["scale"],
        "model.norm.bias": params["ln_f"]["bias"],
    }
    for keys, name in LAYER.items():
        stacked = params["blocks"]
        for key in keys:
            stacked = stacked[key]
        for i, array in enumerate(stacked):
            found[f"model.layers.{i}.{name}"] = array.T if keys[-1] == "kernel" else array
    qkv = params["blocks"]["attn"]["qkv"]
    for letter, kernel, bias in zip(
        "qkv", np.split(qkv["kernel"], 3, axis=-1), np.split(qkv["bias"], 3, axis=-1), strict=True
    ):
        for i in range(len(kernel)):
            found[f"model.layers.{i}.self_attn.{letter}_proj.weight"] = kernel[i].T
            found[f"model.layers.{i}.self_attn.{letter}_proj.bias"] = bias[i]
    return found


def model_config(config: Config) -> dict[str, Any]:
    """Describe the model as transformers' Starcoder2Config."""
    model = config.model
    return {
        "architectures": ["Starcoder2ForCausalLM"],
        "model_type": "starcoder2",
        "vocab_size": model.vocab_size,
        "hidden_size": model.n_embd,
        "intermediate_size": model.n_ff,
        "num_hidden_layers": model.n_layer,
        "num_attention_heads": model.n_head,
        "num_key_value_heads": model.n_head,
        "head_dim": model.n_head_dim,
        "hidden_act": "gelu",  # the exact one; "gelu_pytorch_tanh" is Starcoder2's own
        "max_position_embeddings": model.block_size,
        "norm_epsilon": 1e-5,
        "rope_theta": 10_000.0,
        "use_bias": True,
        "tie_word_embeddings": True,
        "sliding_window": None,
        "attention_dropout": model.dropout,
        "residual_dropout": model.dropout,
        "embedding_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": PADDING,
        "torch_dtype": "float32",
    }


def generation_config(config: Config) -> dict[str, Any]:
    """Say what `generate` must not write, where our own never writes it."""
    model = config.model
    given: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": PADDING}
    if model.mask_unused_ids:
        given["suppress_tokens"] = [PADDING, *range(model.used_ids, model.vocab_size)]
    return given


def padding_name(tokenizer: CharTokenizer) -> str:
    """Return a name for the padding that no text of this vocabulary can contain."""
    names = ["<pad>", *map(chr, range(0xE000, 0xF900))]
    return next(name for name in names if not set(name) <= set(tokenizer.vocabulary))


def tokenizer_file(tokenizer: CharTokenizer) -> dict[str, Any]:
    """Describe the tokenizer for the `tokenizers` library: a token is a character, and an unknown one is an error."""
    padding = padding_name(tokenizer)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": PADDING, "content": padding, **flags}],
        "normalizer": None,
        # A set of everything, since what "." leaves out differs between engines.
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {padding if i == PADDING else name: i for i, name in enumerate(tokenizer.vocabulary)},
            "unk_token": "",
        },
    }


def tokenizer_config(config: Config, tokenizer: CharTokenizer) -> dict[str, Any]:
    """Describe the tokenizer for transformers."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": padding_name(tokenizer),
        "padding_side": "left",
        "model_max_length": config.model.block_size,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
