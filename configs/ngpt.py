"""nGPT, the normalised transformer, with Muon: 4 layers of width 96, for comparisons with a GPT of the same size.

python -m chargpt_jax.main --config=configs/ngpt.py --config.data.source=tinyshakespeare.txt

docs/leaderboard.md compares the kinds of model.
"""

from chargpt_jax.config import Config


def get_config() -> Config:
    """Return an nGPT with 0.47 million parameters; its MLPs have three matrices."""
    config = Config()
    config.model.kind = "ngpt"
    config.model.block_size = 128
    config.model.n_embd = 96
    config.model.n_head = 3
    config.model.n_head_dim = 32
    config.model.n_ff = 256
    config.model.n_layer = 4
    config.data.source = "tinyshakespeare.txt"
    config.data.batch_size = 8
    config.data.train_split = 0.9
    config.optimizer.kind = "muon"
    config.optimizer.learning_rate = 8e-3
    config.optimizer.muon_factor = 8.0
    config.optimizer.muon_steps = 3
    config.optimizer.weight_decay = 0.0
    config.scheduler.epochs = 2.0
    config.scheduler.warmup_epochs = 0.02
    config.scheduler.min_lr_factor = 0.03
    config.train.validate_every = 0.5
    return config
