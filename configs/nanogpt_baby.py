"""nanoGPT's "baby GPT" for Shakespeare, for a local tinyshakespeare file: 6 layers of width 384, 10.7 M parameters.

python -m chargpt_jax.main --config=configs/nanogpt_baby.py --config.data.source=tinyshakespeare.txt

For an accelerator; the full run has not been tested. nanoGPT reports a validation loss of about 1.47 nats.
"""

from chargpt_jax.config import Config


def get_config() -> Config:
    """Return the values of nanoGPT's train_shakespeare_char.py."""
    config = Config()
    config.model.block_size = 256
    config.model.n_embd = 384
    config.model.n_head = 6
    config.model.n_head_dim = 64
    config.model.n_ff = 1536
    config.model.n_layer = 6
    config.model.dropout = 0.2
    config.model.attention_block = 128  # as fast as 64 here, and compiles faster
    config.data.source = "tinyshakespeare.txt"
    config.data.batch_size = 64
    config.data.train_split = 0.9
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.1
    config.optimizer.betas = (0.9, 0.99)
    config.optimizer.clip_norm = 1.0
    config.scheduler.max_steps = 5000
    config.scheduler.warmup_epochs = 1.613  # 100 steps
    config.scheduler.min_lr_factor = 0.1
    config.train.validate_every = 4.0
    config.sample.prompts = ("\n",)
    config.sample.max_new_tokens = 500
    return config
