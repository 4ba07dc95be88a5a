"""The first 100 MB of the English Wikipedia as bytes, the Hutter Prize corpus: 12 layers of width 512, 38 M parameters.

python -m chargpt_jax.main --config=configs/enwik8.py --config.data.source=enwik8

Get the file from https://mattmahoney.net/dc/enwik8.zip and unpack it. The split is that of the literature: 90 MB for
training, the next 5 MB for validation, and 5 MB that are left out. For an accelerator; the full run has not been
tested.
"""

from chargpt_jax.config import Config


def get_config() -> Config:
    """Return a model of the size that results in bits per byte are often given for."""
    config = Config()
    config.model.block_size = 512
    config.model.n_embd = 512
    config.model.n_head = 8
    config.model.n_head_dim = 64
    config.model.n_ff = 2048
    config.model.n_layer = 12
    config.model.dropout = 0.1
    config.model.attention_block = 128
    config.data.source = "enwik8"
    config.data.unit = "byte"
    config.data.batch_size = 64
    config.data.train_split = 0.9
    config.data.test_split = 0.05
    config.optimizer.learning_rate = 6e-4
    config.optimizer.betas = (0.9, 0.95)
    config.optimizer.clip_norm = 1.0
    config.scheduler.epochs = 10.0
    config.scheduler.warmup_epochs = 0.5
    config.train.validate_every = 0.5
    config.sample.prompts = ("'''",)
    config.sample.max_new_tokens = 500
    return config
