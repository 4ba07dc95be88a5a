"""Export to a folder that Hugging Face's transformers loads: a Starcoder2 model, and a tokenizer for characters.

Starcoder2 (Lozhkov et al. 2024) is the same decoder: pre-LayerNorm with biases, half rotation, exact GELU, a tied head.
There are two differences:

- Starcoder2 cannot mask unused token ids. If chargpt_jax masks them, the export has a head of its own, whose weights
  give those ids a probability of 0: see unused_ids.py. Losses and probabilities are the same.
- Beyond block_size, chargpt_jax recomputes the last block_size characters, but transformers continues with positions
  that the model was not trained on.
"""

import json
from pathlib import Path

import numpy as np

from chargpt_jax.config import Config
from chargpt_jax.data.tokenizer import PADDING, CharTokenizer
from chargpt_jax.errors import UserError
from chargpt_jax.interop.array_names import Params, layer_arrays
from chargpt_jax.interop.safetensors_file import write_safetensors
from chargpt_jax.interop.unused_ids import untied


def write(folder: Path, config: Config, tokenizer: CharTokenizer, params: Params) -> None:
    """Write the files of a model into an existing folder.

    Raises:
        UserError: if the vocabulary has a lone surrogate, which UTF-8 cannot encode.
    """
    broken = [c for c in tokenizer.vocabulary if "\ud800" <= c <= "\udfff"]
    if broken:
        raise UserError(
            f"The vocabulary has {broken[0]!r}, a lone surrogate: Hugging Face tokenizers do not support it."
        )
    files = {
        "config.json": model_config(config),
        "generation_config.json": generation_config(config),
        "tokenizer.json": tokenizer_file(tokenizer),
        "tokenizer_config.json": tokenizer_config(config, tokenizer),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_safetensors(folder / "model.safetensors", arrays(config, params), {"format": "pt"})


def arrays(config: Config, params: Params) -> dict[str, np.ndarray]:
    """Convert parameters to Starcoder2's arrays, by name; a head that is the embedding table is not listed."""
    table, scale, bias = params["wte"]["embedding"], params["ln_f"]["scale"], params["ln_f"]["bias"]
    found = {"model.embed_tokens.weight": table}
    if config.model.mask_unused_ids:
        scale, bias, found["lm_head.weight"] = untied(scale, bias, table, config.model.used_ids)
    found |= {"model.norm.weight": scale, "model.norm.bias": bias}
    qkv: dict[tuple[int, int, str], np.ndarray] = {}
    for names, layer, array in layer_arrays(params):
        if names.starcoder2:
            found[f"model.layers.{layer}.{names.starcoder2}"] = array
            continue
        kind = names.original.rpartition(".")[2]
        qkv |= {(i, layer, kind): part for i, part in enumerate(np.split(array, 3))}
    # Queries, keys and values come last, each layer's weight before its bias: the order of the arrays in the file.
    for i, layer, kind in sorted(qkv, key=lambda key: (key[0], key[1], key[2] == "bias")):
        found[f"model.layers.{layer}.self_attn.{'qkv'[i]}_proj.{kind}"] = qkv[i, layer, kind]
    return found


def model_config(config: Config) -> dict[str, object]:
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
        "hidden_act": "gelu",  # exact (erf); Starcoder2's default is "gelu_pytorch_tanh"
        "max_position_embeddings": model.block_size,
        "norm_epsilon": 1e-5,
        "rope_theta": 10_000.0,
        "use_bias": True,
        "tie_word_embeddings": not model.mask_unused_ids,
        "sliding_window": None,
        "attention_dropout": model.dropout,
        "residual_dropout": model.dropout,
        "embedding_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": PADDING,
        "torch_dtype": "float32",
    }


def generation_config(config: Config) -> dict[str, object]:
    """Describe which tokens `generate` must not sample at any temperature: those that chargpt_jax masks."""
    model = config.model
    given: dict[str, object] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": PADDING}
    if model.mask_unused_ids:
        given["suppress_tokens"] = [PADDING, *range(model.used_ids, model.vocab_size)]
    return given


def padding_name(tokenizer: CharTokenizer) -> str:
    """Return a name for the padding token that no text of this vocabulary can contain."""
    names = ["<pad>", *map(chr, range(0xE000, 0xF900))]
    return next(name for name in names if not set(name) <= set(tokenizer.vocabulary))


def tokenizer_file(tokenizer: CharTokenizer) -> dict[str, object]:
    """Describe the tokenizer for the `tokenizers` library: one token per character, no unknown ones."""
    padding = padding_name(tokenizer)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": PADDING, "content": padding, **flags}],
        "normalizer": None,
        # Not ".": regex engines differ in the characters that it does not match.
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {padding if i == PADDING else name: i for i, name in enumerate(tokenizer.vocabulary)},
            "unk_token": "",
        },
    }


def tokenizer_config(config: Config, tokenizer: CharTokenizer) -> dict[str, object]:
    """Describe the tokenizer for transformers."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": padding_name(tokenizer),
        "padding_side": "left",
        "model_max_length": config.model.block_size,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
