"""100 MB of the English Wikipedia in the letters a to z and spaces: 12 layers of width 512, 38 M parameters.

python -m chargpt_jax.main --config=configs/text8.py --config.data.source=text8

Get the file from https://mattmahoney.net/dc/text8.zip and unpack it. The split is that of the literature: 90 MB for
training, the next 5 MB for validation, and 5 MB that are left out. For an accelerator; the full run has not been
tested.
"""

from chargpt_jax.config import Config


def get_config() -> Config:
    """Return the model of the config enwik8 for characters."""
    config = Config()
    config.model.block_size = 512
    config.model.n_embd = 512
    config.model.n_head = 8
    config.model.n_head_dim = 64
    config.model.n_ff = 2048
    config.model.n_layer = 12
    config.model.dropout = 0.1
    config.model.attention_block = 128
    config.data.source = "text8"
    config.data.repair = "none"  # the text is one line of 100 MB, and has nothing to repair
    config.data.batch_size = 64
    config.data.train_split = 0.9
    config.data.test_split = 0.05
    config.optimizer.learning_rate = 6e-4
    config.optimizer.betas = (0.9, 0.95)
    config.optimizer.clip_norm = 1.0
    config.scheduler.epochs = 10.0
    config.scheduler.warmup_epochs = 0.5
    config.train.validate_every = 0.5
    config.sample.prompts = (" the ",)
    config.sample.max_new_tokens = 500
    return config
