"""The original's run: a 15-layer GPT of 0.26 M parameters on The Scarlet Pimpernel.

python -m chargpt_jax.main --config=configs/small.py

25 to 60 seconds per epoch on two CPU cores. With a schedule of 25 epochs, the validation loss is 1.94 nats per
character after 10 epochs and 1.73 at the end. The full 100 epochs have not been run.
"""

from chargpt_jax.config import Config


def get_config() -> Config:
    """Return the original's values; the range test chooses the learning rate."""
    config = Config()
    config.model.block_size = 512
    config.model.n_embd = 32
    config.model.n_head = 8
    config.model.n_head_dim = 8
    config.model.n_ff = 128
    config.model.n_layer = 15
    config.model.dropout = 0.2
    config.model.attention_block = 128  # as fast as 64 here; compiles faster and in less memory
    config.data.source = "60"
    config.data.start_at = r"^CHAPTER I\b"
    config.data.batch_size = 16
    config.data.oversample = 1.0
    config.data.train_split = 0.8
    config.data.padding_chance = 0.1
    config.optimizer.weight_decay = 0.1
    config.optimizer.betas = (0.9, 0.95)
    config.scheduler.epochs = 100.0
    config.scheduler.warmup_epochs = 1.0
    config.scheduler.min_lr_factor = 0.1
    config.sample.prompts = ("Sir Percy Bla", "She looked at Sir Andrew with eager curi")
    config.sample.max_new_tokens = 300
    config.sample.temperature = 0.8
    return config
