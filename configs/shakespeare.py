"""tinyshakespeare in ten minutes on two CPU cores, with 1.9 M parameters; for a local file.

python -m chargpt_jax.main --config=configs/shakespeare.py --config.data.source=tinyshakespeare.txt

It reaches 1.46 nats per character on the last tenth of the text (docs/leaderboard.md).
"""

from chargpt_jax.config import Config


def get_config() -> Config:
    """Return the recipe; docs/leaderboard.md says how it was found."""
    config = Config()
    config.model.kind = "modern"
    config.model.block_size = 512
    config.model.n_embd = 160
    config.model.n_head = 3
    config.model.n_head_dim = 32
    config.model.n_ff = 640
    config.model.n_layer = 7
    config.model.dropout = 0.05
    config.model.attention_block = 128  # faster than 64 at this context length
    config.amp.dtype = "bfloat16"
    config.data.source = "tinyshakespeare.txt"
    config.data.batch_size = 8
    config.data.train_split = 0.9
    config.optimizer.kind = "muon"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.muon_factor = 8.0
    config.optimizer.muon_steps = 3
    config.optimizer.weight_decay = 0.05
    config.scheduler.max_steps = 1_440
    config.scheduler.warmup_epochs = 0.2
    config.scheduler.min_lr_factor = 0.03
    config.train.validate_every = 2.0
    config.sample.prompts = ("\n",)
    config.sample.max_new_tokens = 500
    return config
