"""A model of any size from 0.05 to 100 million parameters, set by one number: here 0.3 million.

python -m chargpt_jax.main --config=configs/sized.py:0.3 --config.scheduler.minutes=10

`--config=sized:0.3` is short for it. The text is The Scarlet Pimpernel; --config.data.source=FILE trains on one of
your own. With `scheduler.minutes` the number of training steps follows from the speed measured, on any machine.
Without it, a run has 20 / sqrt(size) epochs: 20 at 1 million parameters.

The size is N = L (4 C A + 2 C F) + 128 C parameters, for L layers of width C whose heads are together A wide. The table
of embeddings has 128 rows, for up to 127 distinct characters. From the size s in millions follow:

    L = 8 s^0.4, at most 7                       3 layers at 0.1, 5 at 0.3, 7 from 0.7 on
    C from N with A = 2/3 C and F = 4 C          a multiple of 16, from 128 on of 32
    A = 2/3 C, at least 3 heads                  heads are 16 wide, from C = 128 on 32
    F from N                                     the width of the MLP makes up for the rounding of C and A
    learning rate 4e-3 (160 / C)^(1/4)
    batch size 4 (s / 0.25)^(1/3)                an even number, at least 2

A model with fewer heads learns less per step, but its steps are faster. From width 64 on, matrix multiplications are in
bfloat16. From width 128 on, the weight decay is 0.05, and below there is none. Dropout is 0.05. The rules pass near two
recipes that were searched for, book.py (0.25 million) and shakespeare.py (1.9 million).
"""

from chargpt_jax.config import Config

SMALLEST, LARGEST = 0.05, 100.0
"""The limits of the size, in million parameters."""

EMBEDDINGS = 128
"""Size of the embedding table for a text of 64 to 127 distinct characters."""

WIDE = 128
"""The width from which on heads are 32 wide, and weights decay."""

ATTENTION = 2 / 3
"""Width of all heads together, as a part of the model's width."""

LOW_PRECISION = 64
"""The width from which on matrix multiplications are in bfloat16."""


def get_config(size: str = "1") -> Config:
    """Return the config of a model of `size` million parameters.

    Raises:
        ValueError: if the size is not a number from SMALLEST to LARGEST.
    """
    try:
        millions = float(size)
    except ValueError:
        millions = 0.0
    if not SMALLEST <= millions <= LARGEST:
        raise ValueError(f"the size must be a number from {SMALLEST:g} to {LARGEST:g}, in million parameters")
    return config_of(millions, depth(millions))


def depth(size: float) -> int:
    """Return the number of layers at a size in million parameters."""
    return min(7, round(8 * size**0.4))


def widths(size: float, n_layer: int) -> tuple[int, int, int, int]:
    """Return n_embd, n_head, n_head_dim and n_ff of a model of a size in million parameters."""
    parameters = 1e6 * size
    squares = n_layer * (4 * ATTENTION + 2 * 4)  # parameters per C^2, but for the embeddings
    exact = ((EMBEDDINGS**2 + 4 * squares * parameters) ** 0.5 - EMBEDDINGS) / (2 * squares)
    unit = 16 if exact < WIDE else 32
    n_embd = unit * max(1, round(exact / unit))
    n_head_dim = 32 if n_embd >= WIDE else 16
    n_head = max(3, round(ATTENTION * n_embd / n_head_dim))
    per_layer = (parameters - EMBEDDINGS * n_embd) / n_layer
    n_ff = (per_layer - 4 * n_embd * n_head * n_head_dim) / (2 * n_embd)
    return n_embd, n_head, n_head_dim, 8 * max(1, round(n_ff / 8))


def config_of(size: float, n_layer: int) -> Config:
    """Return the config of a model of a size in million parameters, and of any number of layers."""
    config = Config()
    model, optimizer = config.model, config.optimizer
    model.n_embd, model.n_head, model.n_head_dim, model.n_ff = widths(size, n_layer)
    wide = model.n_embd >= WIDE
    model.kind = "modern"
    model.block_size = 512
    model.n_layer = n_layer
    model.dropout = 0.05
    model.attention_block = 128  # faster than 64 at this context length
    if model.n_embd >= LOW_PRECISION:
        config.amp.dtype = "bfloat16"
    config.data.source = "60"
    config.data.batch_size = 2 * max(1, round(2 * (size / 0.25) ** (1 / 3)))
    config.data.train_split = 0.9
    optimizer.kind = "muon"
    optimizer.learning_rate = round(4e-3 * (160 / model.n_embd) ** 0.25, 5)
    optimizer.muon_factor = 8.0
    optimizer.muon_steps = 3
    optimizer.weight_decay = 0.05 if wide else 0.0
    config.scheduler.epochs = round(20 / size**0.5, 1)
    config.scheduler.warmup_epochs = 0.2
    config.scheduler.min_lr_factor = 0.03
    config.train.validate_every = 5.0
    config.sample.prompts = ("\n",)
    return config
