"""A model of one book in ten minutes on two CPU cores: at most 257,600 parameters, for any text of about 500 KB.

python -m chargpt_jax.main --config=configs/book.py

It reaches 1.815 bits per character on the last tenth of The Scarlet Pimpernel (docs/leaderboard.md).
The book is The Scarlet Pimpernel; --config.data.source=FILE trains on a text of your own.
"""

from chargpt_jax.config import Config


def get_config() -> Config:
    """Return the recipe; docs/leaderboard.md says how it was found."""
    config = Config()
    config.model.kind = "modern"
    config.model.block_size = 512
    config.model.n_embd = 64
    config.model.n_head = 3
    config.model.n_head_dim = 16
    config.model.n_ff = 280
    config.model.n_layer = 5
    config.model.dropout = 0.05
    config.model.attention_block = 128  # faster than 64 at this context length
    config.amp.dtype = "bfloat16"
    config.data.source = "60"
    config.data.batch_size = 4
    config.data.train_split = 0.9
    config.optimizer.kind = "muon"
    config.optimizer.learning_rate = 5e-3
    config.optimizer.muon_factor = 8.0
    config.optimizer.muon_steps = 3
    config.optimizer.weight_decay = 0.0
    config.scheduler.max_steps = 11_200
    config.scheduler.warmup_epochs = 0.4
    config.scheduler.min_lr_factor = 0.03
    config.train.validate_every = 10.0
    config.sample.prompts = ("\n",)
    return config
