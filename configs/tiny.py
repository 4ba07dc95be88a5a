"""A first run for any machine, without network: trains on the help texts that ship with Python.

python -m chargpt_jax.main --config=configs/tiny.py

About a minute on two CPU cores (Zen 4), with a final validation loss of 1.26 to 1.29 nats per character.
"""

from chargpt_jax.config import Config


def get_config() -> Config:
    """Return a model small enough for a CPU."""
    config = Config()
    config.model.block_size = 128
    config.model.n_embd = 64
    config.model.n_head = 4
    config.model.n_head_dim = 16
    config.model.n_ff = 256
    config.model.n_layer = 3
    config.data.source = "stdlib"
    config.data.batch_size = 16
    config.data.train_split = 0.9
    config.lr_finder.method = "balanced"
    config.scheduler.epochs = 5.0
    config.scheduler.warmup_epochs = 0.2
    config.sample.prompts = ("The ", "class ")
    config.sample.max_new_tokens = 300
    return config
