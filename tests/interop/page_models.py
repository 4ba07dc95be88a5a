"""Small random models for the tests of a model as a page, and their pages."""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from chargpt_jax.api import Model
from chargpt_jax.config import Config, ModelConfig
from chargpt_jax.data.tokenizer import CharTokenizer
from chargpt_jax.interop import html_page
from chargpt_jax.interop.html_page import About
from tests import reference
from tests.pairing import built, from_reference

LETTERS = "\t\n 'abcdefghijklmnopqrstuvwxyzé漢😀"
SIZES: dict[str, dict[str, Any]] = {
    "even": {"n_embd": 16, "n_head": 2, "n_head_dim": 8, "n_ff": 32, "n_layer": 2, "block_size": 16},
    "odd": {"n_embd": 7, "n_head": 3, "n_head_dim": 2, "n_ff": 5, "n_layer": 3, "block_size": 9},
    "one character": {"n_embd": 8, "n_head": 2, "n_head_dim": 4, "n_ff": 8, "n_layer": 2, "block_size": 1},
    "unmasked": {"n_embd": 6, "n_head": 1, "n_head_dim": 10, "n_ff": 13, "n_layer": 1, "block_size": 12},
    "wide vocabulary": {"n_embd": 12, "n_head": 2, "n_head_dim": 6, "n_ff": 20, "n_layer": 2, "block_size": 20},
}
"""Models by name."""


def arrays_of(config: ModelConfig) -> reference.Params:
    """Return random values for all arrays of a model, biases and scales included, by the original's names."""
    names = ("vocab_size", "n_embd", "n_head", "n_head_dim", "n_ff", "n_layer")
    return reference.random_parameters(np.random.default_rng(0), **{name: getattr(config, name) for name in names})


def random_model(name: str = "even", vocabulary: str = LETTERS) -> Model:
    """Return a model of SIZES with the values of `arrays_of`."""
    if name == "wide vocabulary":
        vocabulary += "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
    tokenizer = CharTokenizer(vocabulary)
    used = {"vocab_size": tokenizer.vocab_size, "used_ids": tokenizer.n_ids, "mask_unused_ids": name != "unmasked"}
    config = ModelConfig(**SIZES[name], **used)
    graphdef, _ = built(config, 0)
    params = from_reference(arrays_of(config), config.n_layer, jnp.float32)
    return Model(Config(model=config), tokenizer, graphdef, params, 7)


def page(model: Model, about: About | None = None) -> str:
    """Return a model's page."""
    return html_page.page(model.config, model.tokenizer, model.params, about or About("a run"))


def block(text: str, name: str) -> str:
    """Return what a data block of a page contains."""
    (found,) = re.findall(rf'<script type="[^"]*" id="{name}">(.*?)</script>', text, re.DOTALL)
    return str(found)
