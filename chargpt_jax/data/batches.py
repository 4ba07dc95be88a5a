"""The batch of a given step, and the windows of a full validation pass.

There is no iterator: a training batch is a pure function of (tokens, key, step), computed inside jit from the corpus
on the device, so a resumed run sees exactly what an uninterrupted one sees. B is the batch, T the block size.

Each pass over the training text cuts it into consecutive windows at a random phase and visits them in a random order,
so that a pass sees every character once (but for less than two windows at the ends, which the next phase shifts).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from chargpt_jax.config import DataConfig
from chargpt_jax.errors import UserError
from chargpt_jax.hash_rng import derive, draw, seeds_of, unit

Batch = tuple[jax.Array, jax.Array]
"""Inputs and targets, int32 [B, T] each; a target of 0 does not count."""


def split(tokens: np.ndarray, train_split: float, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a corpus into its leading training part and the held-out rest.

    Args:
        tokens: int32 [N].
        train_split: the training part's share.
        block_size: T.

    Returns:
        The two parts, int32 [n] and [N - n], with n = int(train_split * N).

    Raises:
        UserError: where a part is shorter than a window and its next character.
    """
    n = int(train_split * len(tokens))
    for name, part in (("training", tokens[:n]), ("validation", tokens[n:])):
        if len(part) < block_size + 1:
            raise UserError(
                f"The {name} part has {len(part)} characters, but model.block_size {block_size} needs at least "
                f"{block_size + 1}: use a longer text, a smaller block_size, or another data.train_split "
                f"(now {train_split})."
            )
    return tokens[:n], tokens[n:]


def windows_per_pass(n_tokens: int, block_size: int) -> int:
    """Count the windows of one pass over n_tokens; at least 1."""
    return max(1, (n_tokens - 1) // block_size - 1)


def steps_per_epoch(n_tokens: int, block_size: int, data: DataConfig, short_epochs: bool = False) -> int:
    """Count the updates in which the training text is covered `oversample` times; at least 1.

    With `short_epochs` that number is divided by the batch size once more, and rounded like the original's.
    """
    if short_epochs:
        return math.ceil(_crops_per_epoch(n_tokens, block_size, data.batch_size, data.oversample) / data.batch_size)
    return max(1, math.ceil(windows_per_pass(n_tokens, block_size) * data.oversample / data.batch_size))


def _crops_per_epoch(n_tokens: int, block_size: int, batch_size: int, oversample: float = 1.0) -> int:
    """Count the sequences in what the ancestor takes for an epoch: too few by a factor of batch_size; at least 1."""
    return max(1, math.ceil((n_tokens - block_size - 1) * oversample / batch_size / block_size))


def batch_at(tokens: jax.Array, key: jax.Array, step: jax.Array, block_size: int, data: DataConfig) -> Batch:
    """Gather the training batch of a step; call it inside jit.

    Args:
        tokens: int32 [n], the training part.
        key: the run's data key.
        step: int32 scalar, counted from 0.
        block_size: T.
        data: batch_size and padding_chance are read.

    Returns:
        Inputs and targets, int32 [B, T]: the same windows, one character apart.
    """
    count = windows_per_pass(tokens.shape[0], block_size)
    slack = tokens.shape[0] - 1 - count * block_size

    def row(number: jax.Array) -> Batch:
        seeds = derive(seeds_of(key), number // count)
        phase = below(slack + 1, draw(seeds, 0))
        window = shuffled(number % count, count, derive(seeds, 1))
        text = jax.lax.dynamic_slice(tokens, (phase + window * block_size,), (block_size + 1,))
        return _padded(text, derive(derive(seeds, 2), number % count), data.padding_chance)

    return jax.vmap(row)(step * data.batch_size + jnp.arange(data.batch_size))


def below(limit: int, bits: jax.Array) -> jax.Array:
    """Turn 32 bits into a whole number, int32, from 0 to limit - 1 (each to within limit / 2**32 as likely)."""
    return (bits % jnp.uint32(limit)).astype(jnp.int32)


def _padded(text: jax.Array, seeds: jax.Array, chance: float) -> Batch:
    """Split int32 [T + 1] into inputs and targets, sometimes with padding in place of up to a third of the front."""
    if not chance:
        return text[:-1], text[1:]
    block_size = text.shape[0] - 1
    length = 1 + below(max(2, block_size // 3) - 1, draw(seeds, 1))
    length = jnp.where(unit(draw(seeds, 0)) < chance, length, 0)
    place = jnp.arange(block_size)
    # The first target after the padding is kept: padding is also how a text begins.
    return jnp.where(place < length, 0, text[:-1]), jnp.where(place < length - 1, 0, text[1:])


def shuffled(index: jax.Array, size: int, seeds: jax.Array) -> jax.Array:
    """Return where `index` lies in a random order of range(size), without making the order.

    A four-round Feistel network permutes the next even power of two; an image outside range(size) is sent through
    again until it falls inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").

    Args:
        index: int32 scalar in [0, size).
        size: length of the order.
        seeds: uint32 [2]; select the order.
    """
    half = max(1, math.ceil(math.log2(max(size, 2)) / 2))
    mask = jnp.uint32(2**half - 1)
    rounds = derive(seeds, jnp.arange(4))

    def permute(x: jax.Array) -> jax.Array:
        left, right = x >> half, x & mask
        for own in rounds:
            left, right = right, left ^ (draw(own, right) & mask)
        return (left << half) | right

    image = jax.lax.while_loop(lambda x: x >= size, permute, permute(index.astype(jnp.uint32)))
    return image.astype(jnp.int32)


def validation_batches(tokens: np.ndarray, n_train: int, block_size: int, batch_size: int) -> tuple[np.ndarray, ...]:
    """Cut the held-out part into windows in which each of its characters is a target exactly once.

    Args:
        tokens: int32 [N], the whole corpus: the first held-out character is predicted from the last training one.
        n_train: length of the training part.
        block_size: T.
        batch_size: B.

    Returns:
        Inputs and targets, int32 [steps, B, T]; what fills up the last batch is 0 and does not count.
    """
    per_batch = batch_size * block_size
    steps = -(-(len(tokens) - n_train) // per_batch)
    inputs, targets = np.zeros((2, steps * per_batch), dtype=np.int32)
    inputs[: len(tokens) - n_train] = tokens[n_train - 1 : -1]
    targets[: len(tokens) - n_train] = tokens[n_train:]
    shape = (steps, batch_size, block_size)
    return inputs.reshape(shape), targets.reshape(shape)


def validation_crops(tokens: jax.Array, key: jax.Array, block_size: int, data: DataConfig) -> Batch:
    """Draw what the ancestor validates on: a few crops of the held-out part, anywhere, some with padding in front.

    Args:
        tokens: int32 [n], the held-out part; nothing is written into it.
        key: selects the crops.
        block_size: T.
        data: batch_size and padding_chance are read.

    Returns:
        Inputs and targets, int32 [steps, B, T]; what fills up the last batch is 0 and does not count.
    """
    count = _crops_per_epoch(tokens.shape[0], block_size, data.batch_size)
    steps = math.ceil(count / data.batch_size)

    def crop(seeds: jax.Array) -> Batch:
        start = below(max(1, tokens.shape[0] - block_size - 1), draw(seeds, 0))
        text = jax.lax.dynamic_slice(tokens, (start,), (block_size + 1,))
        return _padded(text, derive(seeds, 1), data.padding_chance)

    def filled(rows: jax.Array) -> jax.Array:
        rows = jnp.pad(rows, ((0, steps * data.batch_size - count), (0, 0)))
        return rows.reshape(steps, data.batch_size, block_size)

    inputs, targets = jax.vmap(crop)(derive(seeds_of(key), jnp.arange(count)))
    return filled(inputs), filled(targets)
