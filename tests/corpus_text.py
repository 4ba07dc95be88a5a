"""A small text with known entropy, and a config small enough to train on it in a test."""

from pathlib import Path

import numpy as np

from chargpt_jax.config import Config

WORDS = ("ab", "cde", "fghi", "jk")
ENTROPY_PER_WORD = np.log(len(WORDS))
"""Nats: the words have equal probability, and the first letter of a word determines the rest."""

CHARACTERS_PER_WORD = 1 + np.mean([len(word) for word in WORDS])
FLOOR = ENTROPY_PER_WORD / CHARACTERS_PER_WORD
"""Lowest possible loss, nats per character: a choice among four words every 3.75 characters on average."""


def write_words(path: Path, n_words: int = 4000, seed: int = 0) -> Path:
    """Write random words of equal probability, separated by spaces."""
    rng = np.random.default_rng(seed)
    path.write_text(" ".join(WORDS[i] for i in rng.integers(0, len(WORDS), n_words)) + " ", encoding="utf-8")
    return path


def small_config(source: Path, **model: int | float) -> Config:
    """Return a config whose training steps take milliseconds."""
    config = Config()
    sizes = {"block_size": 32, "n_embd": 16, "n_head": 2, "n_head_dim": 8, "n_ff": 32, "n_layer": 2, "dropout": 0.1}
    for name, value in {**sizes, "attention_block": 16, **model}.items():
        setattr(config.model, name, value)
    config.data.source = str(source)
    config.data.batch_size = 8
    config.data.padding_chance = 0.1
    config.optimizer.learning_rate = 1e-2
    config.scheduler.max_steps = 30
    config.scheduler.warmup_epochs = 0.1
    config.train.log_every = 1
    config.train.validate_every = 0.1
    config.sample.prompts = ("ab c",)
    config.sample.max_new_tokens = 20
    return config
