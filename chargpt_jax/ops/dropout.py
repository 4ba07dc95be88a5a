"""Dropout with masks from a counter hash: cheap, reproducible from (seed, step), equal on any number of devices.

Each element's index in its array is hashed (hash_rng.py) with a 64-bit seed per sequence. A mask depends on nothing
else, so splitting a batch, or computing attention in blocks, gives the same masks. `bits="jax"` uses Threefry on the
same indices: the tests compare the hash with it.
"""

from dataclasses import dataclass
from typing import overload

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from chargpt_jax.hash_rng import derived, random_bits

SEEDS = "seeds"
"""The name of seeds in programs, by which rematerialisation may save them."""


@dataclass(frozen=True)
class Dropout:
    """How elements are dropped."""

    rate: float = 0.0
    """Probability that an element is dropped, in [0, 1)."""
    bits: str = "hash"
    """Source of the random bits: 'hash', or 'jax' for Threefry."""


NONE = Dropout()


def seeds_for(key: jax.Array, batch_size: int) -> jax.Array:
    """Return a training step's dropout seeds, uint32 [B, 2], one pair per sequence."""
    return jax.random.bits(key, (batch_size, 2), jnp.uint32)


@overload
def fold_seeds(seeds: jax.Array, index: jax.Array | int) -> jax.Array: ...
@overload
def fold_seeds(seeds: None, index: jax.Array | int) -> None: ...
def fold_seeds(seeds: jax.Array | None, index: jax.Array | int) -> jax.Array | None:
    """Return new seeds for a part of the model, unrelated for every index; None (no dropout) stays None."""
    if seeds is None:
        return None
    parts = derived(seeds[..., 0], seeds[..., 1], index)
    return jnp.stack([checkpoint_name(part, SEEDS) for part in parts], axis=-1)


def head_seeds(seeds: jax.Array, heads: int, first: jax.Array | int = 0) -> jax.Array:
    """Return seeds for the heads from `first` on, uint32 [B, H, 2], given [B, 2]; seeds [B, H, 2] stay as they are."""
    return fold_seeds(seeds[:, None], first + jnp.arange(heads)) if seeds.ndim == 2 else seeds


def keep_mask(seeds: jax.Array, index: jax.Array, how: Dropout) -> jax.Array:
    """Return which elements are not dropped.

    Args:
        seeds: uint32 [B, 2].
        index: uint32 [...], which identifies the elements of one sequence.
        how: rate and source of random bits.

    Returns:
        bool [B, ...], True with probability 1 - rate (to 2**-32).
    """
    bits = {"hash": _hashed, "jax": _threefry}[how.bits](seeds, index)
    return bits >= threshold(how)


def threshold(how: Dropout) -> jax.Array:
    """Return the smallest random bits, a uint32 scalar, with which an element is not dropped."""
    return jnp.uint32(min(round(how.rate * 2**32), 2**32 - 1))


def dropout(x: jax.Array, seeds: jax.Array | None, how: Dropout) -> jax.Array:
    """Drop elements of x [B, ...] with probability `rate` and scale the rest by 1 / (1 - rate).

    Without seeds x is returned as it is.
    """
    if seeds is None or not how.rate:
        return x
    index = jnp.arange(x[0].size, dtype=jnp.uint32).reshape(x.shape[1:])
    return jnp.where(keep_mask(seeds, index, how), x * (1 / (1 - how.rate)), 0)


def _hashed(seeds: jax.Array, index: jax.Array) -> jax.Array:
    """Return uint32 [B, ...]: random bits for each of B seeds and each index."""
    return random_bits(seeds.reshape(-1, *(1,) * index.ndim, 2), index)


def _threefry(seeds: jax.Array, index: jax.Array) -> jax.Array:
    """Return the same from Threefry-2x32, with a sequence's seeds as the key and the index as the counter."""
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    keys = fold(jax.random.wrap_key_data(seeds, impl="threefry2x32"), index.reshape(-1))
    return jax.random.key_data(keys)[..., 0].reshape(-1, *index.shape)
