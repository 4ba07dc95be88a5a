"""nanoGPT's CPU set-up for Shakespeare, for a local tinyshakespeare file: 4 layers of width 128, 2,000 steps.

python -m chargpt_jax.main --config=configs/nanogpt_cpu.py --config.data.source=tinyshakespeare.txt

About 90 seconds on two shared CPU cores (Zen 4), with a final validation loss of 1.68 nats per character.
"""

from chargpt_jax.config import Config


def get_config() -> Config:
    """Return the values that nanoGPT's README gives for a laptop."""
    config = Config()
    config.model.block_size = 64
    config.model.n_embd = 128
    config.model.n_head = 4
    config.model.n_head_dim = 32
    config.model.n_ff = 512
    config.model.n_layer = 4
    config.model.dropout = 0.0
    config.data.source = "tinyshakespeare.txt"
    config.data.batch_size = 12
    config.data.train_split = 0.9
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.1
    config.optimizer.betas = (0.9, 0.99)
    config.optimizer.clip_norm = 1.0
    config.scheduler.max_steps = 2000
    config.scheduler.warmup_epochs = 0.0765  # 100 steps
    config.scheduler.min_lr_factor = 0.1
    config.train.validate_every = 0.2
    config.sample.prompts = ("\n",)
    config.sample.max_new_tokens = 500
    return config
