"""A model of 1.2 billion parameters, for several accelerators: 24 layers of width 2,048, sharded over eight of them.

python -m chargpt_jax.main --config=configs/billion.py --mode=compile --topology=v5e:2x4

It has been compiled, but not trained. docs/devices.md explains the mesh.
"""

from chargpt_jax.config import Config


def get_config() -> Config:
    """Return a config whose parameters and optimizer state (19 GB) are shared by the devices of mesh.fsdp."""
    config = Config()
    config.model.block_size = 1024
    config.model.n_embd = 2048
    config.model.n_head = 16
    config.model.n_head_dim = 128
    config.model.n_ff = 8192
    config.model.n_layer = 24
    config.model.attention_block = 128
    config.data.source = "my_text.txt"
    config.data.batch_size = 64
    config.data.train_split = 0.99
    config.optimizer.accumulation_steps = 2
    config.optimizer.learning_rate = 2e-4
    config.optimizer.weight_decay = 0.1
    config.optimizer.betas = (0.9, 0.95)
    config.optimizer.clip_norm = 1.0
    config.mesh.fsdp = 8
    config.scheduler.epochs = 1.0
    config.scheduler.warmup_epochs = 0.01
    config.sample.prompts = ("\n",)
    config.sample.max_new_tokens = 500
    return config
