"""The training batch of a step, and the batches of a validation.

There is no iterator. A training batch is a pure function of (text, key, step), so a resumed run gets exactly the
batches of an uninterrupted run. Its windows are cut from the training set, by `windows_at` on the device, or from the
file by `streams/windows.py`, which gives the same ones. B is the batch size, T the block size.

Each pass over the training set splits it into consecutive windows, starting at a random offset, and visits the windows
in a random order. A pass therefore covers each character once, except for less than two windows at the ends; the next
pass has another offset. Three consequences matter for short texts:

- Ends: in a pass, the probability of being a target rises evenly from 0 to 1 over the first characters, and falls in
  the same way over the last. Each of these ends has T to 2 T - 1 characters, depending on the length of the text. The
  outermost T characters of an end have a probability of 0.25 to 0.5 (mean over lengths: 0.35).
- Epochs: an epoch is rounded up to full batches, by at most B - 1 windows. With T = 512 and B = 16 an epoch has 1.065
  times the characters of a training set of 100,000, and 1.024 times those of 240,000.
- Order: the orders of few windows are not equally likely. The 24 orders of four windows have 0.73 to 1.19 times the
  probability of a uniform permutation, the 120 orders of five windows 0.36 to 3.23 times. One of 64 windows is at a
  given position with 0.87 to 1.12 times the uniform probability. (48,000 keys each.)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from chargpt_jax.config import DataConfig
from chargpt_jax.errors import UserError
from chargpt_jax.hash_rng import derive, random_bits, seeds_of, unit

MAX_ON_DEVICE = 2**31 - 1
"""Maximum number of characters in a training set on the device: their positions are int32."""

Batch = tuple[jax.Array, jax.Array]
"""Inputs and targets, int32 [B, T] each; targets of 0 are padding and do not count."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Windows:
    """The windows of consecutive steps, cut from the training set."""

    ids: jax.Array
    """Integers [steps, B, T + 1] of any width."""
    first: jax.Array
    """The first of the steps, int32 scalar."""
    n_tokens: int = field(metadata={"static": True})
    """Length of the training set."""


def sizes(n_tokens: int, data: DataConfig) -> tuple[int, int]:
    """Return the lengths of the training set and of the validation set, which follows it, in a corpus."""
    n_train = int(data.train_split * n_tokens)
    return n_train, n_tokens - n_train - int(data.test_split * n_tokens)


def split(tokens: np.ndarray, data: DataConfig, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Split a corpus into the training set, its leading part, and the validation set, which follows it.

    Args:
        tokens: integers [N].
        data: train_split and test_split are used.
        block_size: T.

    Returns:
        The two sets, whose lengths are those of `sizes`.

    Raises:
        UserError: if a set is shorter than block_size + 1 characters.
    """
    n, n_validation = sizes(len(tokens), data)
    validation_set = tokens[n : n + n_validation]
    for name, part in (("training", tokens[:n]), ("validation", validation_set)):
        if len(part) < block_size + 1:
            raise UserError(
                f"The {name} part has {len(part)} characters, but model.block_size {block_size} needs at least "
                f"{block_size + 1}: use a longer text, a smaller block_size, or another data.train_split "
                f"(now {data.train_split})."
            )
    return tokens[:n], validation_set


def windows_per_pass(n_tokens: int, block_size: int) -> int:
    """Return the number of windows in one pass over n_tokens, at least 1."""
    return max(1, (n_tokens - 1) // block_size - 1)


def steps_per_epoch(n_tokens: int, block_size: int, data: DataConfig, short_epochs: bool = False) -> int:
    """Return the number of training steps that cover the training set `oversample` times, rounded up, at least 1.

    With `short_epochs` that number is divided by the batch size once more, and rounded like the original's.
    """
    if short_epochs:
        return math.ceil(_crops_per_epoch(n_tokens, block_size, data.batch_size, data.oversample) / data.batch_size)
    return max(1, math.ceil(windows_per_pass(n_tokens, block_size) * data.oversample / data.batch_size))


def _crops_per_epoch(n_tokens: int, block_size: int, batch_size: int, oversample: float = 1.0) -> int:
    """Return the number of sequences in an epoch of the original, which divides by batch_size too often; at least 1."""
    return max(1, math.ceil((n_tokens - block_size - 1) * oversample / batch_size / block_size))


def batch_at(text: jax.Array | Windows, key: jax.Array, step: jax.Array, block_size: int, data: DataConfig) -> Batch:
    """Return the training batch of a step; call it inside jit.

    Args:
        text: the training set, integers [n] of any width; or the windows of some steps, this one among them.
        key: the run's data key.
        step: int32 scalar, counted from 0.
        block_size: T.
        data: batch_size and padding_chance are used.

    Returns:
        Inputs and targets, int32 [B, T]: the same windows, one character apart.
    """
    if isinstance(text, Windows):
        n, windows = text.n_tokens, jax.lax.dynamic_index_in_dim(text.ids, step - text.first, keepdims=False)
    else:
        n, windows = text.shape[0], windows_at(text, key, step, block_size, data.batch_size)
    count = windows_per_pass(n, block_size)

    def row(number: jax.Array, window: jax.Array) -> Batch:
        seeds = derive(derive(seeds_of(key), number // count), 2)
        return _padded(window.astype(jnp.int32), derive(seeds, number % count), data.padding_chance)

    return jax.vmap(row)(_numbers(step, data.batch_size), windows)


def windows_at(tokens: jax.Array, key: jax.Array, step: jax.Array, block_size: int, batch_size: int) -> jax.Array:
    """Return the windows of a step, [B, T + 1], in the width of the training set; the arguments are as above."""
    count = windows_per_pass(tokens.shape[0], block_size)
    slack = tokens.shape[0] - 1 - count * block_size

    def window(number: jax.Array) -> jax.Array:
        seeds = derive(seeds_of(key), number // count)
        phase = below(slack + 1, random_bits(seeds, 0))
        position = shuffled(number % count, count, derive(seeds, 1))
        return jax.lax.dynamic_slice(tokens, (phase + position * block_size,), (block_size + 1,))

    return jax.vmap(window)(_numbers(step, batch_size))


def windows_of_steps(
    tokens: jax.Array, key: jax.Array, first: jax.Array, count: jax.Array, block_size: int, batch_size: int, most: int
) -> Windows:
    """Return the windows of `count` steps from `first` on, int32 scalars, and zeros for the others of `most` steps."""

    def cut(i: jax.Array, ids: jax.Array) -> jax.Array:
        return ids.at[i].set(windows_at(tokens, key, first + i, block_size, batch_size))

    ids = jnp.zeros((most, batch_size, block_size + 1), tokens.dtype)
    return Windows(jax.lax.fori_loop(0, count, cut, ids), first, tokens.shape[0])


def _numbers(step: jax.Array, batch_size: int) -> jax.Array:
    """Return the numbers of a step's sequences, counted from the start of training; int32 [B]."""
    return step * batch_size + jnp.arange(batch_size)


def below(limit: int, bits: jax.Array) -> jax.Array:
    """Map 32 random bits to an integer, int32, from 0 to limit - 1; probabilities differ by at most limit / 2**32."""
    remainder: jax.Array = bits % jnp.uint32(limit)
    return remainder.astype(jnp.int32)


def _padded(text: jax.Array, seeds: jax.Array, chance: float) -> Batch:
    """Split int32 [T + 1] into inputs and targets; with probability `chance`, pad up to a third of the front."""
    if not chance:
        return text[:-1], text[1:]
    block_size = text.shape[0] - 1
    length = 1 + below(max(2, block_size // 3) - 1, random_bits(seeds, 1))
    length = jnp.where(unit(random_bits(seeds, 0)) < chance, length, 0)
    position = jnp.arange(block_size)
    # The first target after the padding counts: padding also marks the beginning of a text.
    return jnp.where(position < length, 0, text[:-1]), jnp.where(position < length - 1, 0, text[1:])


def shuffled(index: jax.Array, size: int, seeds: jax.Array) -> jax.Array:
    """Return element `index` of a random permutation of range(size), without computing the whole permutation.

    A four-round Feistel network permutes range(4**k), the next even power of two. A result outside range(size) is
    permuted again until it is inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").

    The permutations of a small range are not equally likely: the module's docstring has the figures.

    Args:
        index: int32 scalar in [0, size).
        size: length of the permutation.
        seeds: uint32 [2]; they select the permutation.
    """
    half = max(1, math.ceil(math.log2(max(size, 2)) / 2))
    mask = jnp.uint32(2**half - 1)
    rounds = derive(seeds, jnp.arange(4))

    def permute(x: jax.Array) -> jax.Array:
        left, right = x >> half, x & mask
        for own in rounds:
            left, right = right, left ^ (random_bits(own, right) & mask)
        joined: jax.Array = (left << half) | right
        return joined

    image = jax.lax.while_loop(lambda x: x >= size, permute, permute(index.astype(jnp.uint32)))
    return image.astype(jnp.int32)


def validation_batches(tokens: np.ndarray, first: int, block_size: int, batch_size: int) -> Iterator[np.ndarray]:
    """Split the validation set, or the test set, into windows in which each of its characters is a target exactly once.

    Args:
        tokens: integers [N], the corpus to the end of the set: its first character is predicted from the one before.
        first: position of the first character of the set, at least 1.
        block_size: T.
        batch_size: B.

    Yields:
        Inputs and targets, int32 [2, B, T]; the last batch is filled with padding.
    """
    per_batch = batch_size * block_size
    for start in range(first, len(tokens), per_batch):
        part = tokens[start - 1 : start + per_batch]
        batch = np.zeros((2, per_batch), dtype=np.int32)
        batch[:, : len(part) - 1] = part[:-1], part[1:]
        yield batch.reshape(2, batch_size, block_size)


def validation_crops(tokens: jax.Array, key: jax.Array, block_size: int, data: DataConfig) -> Batch:
    """Return validation batches like the original's: a few random crops of the validation set, some with padding.

    Args:
        tokens: integers [n] of any width, the validation set.
        key: selects the crops.
        block_size: T.
        data: batch_size and padding_chance are used.

    Returns:
        Inputs and targets, int32 [batches, B, T]; the last batch is filled with padding.
    """
    count = _crops_per_epoch(tokens.shape[0], block_size, data.batch_size)
    steps = math.ceil(count / data.batch_size)

    def crop(seeds: jax.Array) -> Batch:
        start = below(max(1, tokens.shape[0] - block_size - 1), random_bits(seeds, 0))
        text = jax.lax.dynamic_slice(tokens, (start,), (block_size + 1,)).astype(jnp.int32)
        return _padded(text, derive(seeds, 1), data.padding_chance)

    def filled(rows: jax.Array) -> jax.Array:
        rows = jnp.pad(rows, ((0, steps * data.batch_size - count), (0, 0)))
        return rows.reshape(steps, data.batch_size, block_size)

    inputs, targets = jax.vmap(crop)(derive(seeds_of(key), jnp.arange(count)))
    return filled(inputs), filled(targets)
