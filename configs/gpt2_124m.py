"""The size of GPT-2 small, on characters: 12 layers of width 768, a context of 1,024, 85 M parameters.

python -m chargpt_jax.main --config=configs/gpt2_124m.py --config.data.source=my_text.txt

For accelerators; it has been compiled, but not trained. --mode=compile --topology=h100 shows what it needs.
"""

from chargpt_jax.config import Config


def get_config() -> Config:
    """Return the shape of GPT-2 small (Radford et al. 2019) with the settings of nanoGPT's train_gpt2.py."""
    config = Config()
    config.model.block_size = 1024
    config.model.n_embd = 768
    config.model.n_head = 12
    config.model.n_head_dim = 64
    config.model.n_ff = 3072
    config.model.n_layer = 12
    config.model.attention_block = 128
    config.data.source = "my_text.txt"
    config.data.batch_size = 480
    config.data.train_split = 0.95
    config.optimizer.accumulation_steps = 40
    config.optimizer.learning_rate = 6e-4
    config.optimizer.weight_decay = 0.1
    config.optimizer.betas = (0.9, 0.95)
    config.optimizer.clip_norm = 1.0
    config.scheduler.epochs = 1.0
    config.scheduler.warmup_epochs = 0.01
    config.sample.prompts = ("\n",)
    config.sample.max_new_tokens = 500
    return config
