"""Dropout whose masks are a counter hash: cheap, reproducible from (seed, step), equal on any device layout.

Each element's place in its array is hashed (bits.py) with a 64-bit seed for each sequence. A mask depends on the
sequence's seeds and the element's place and on nothing else, so splitting a batch, or a block of attention rows, gives
the same masks as the whole. `bits="jax"` takes Threefry over the same places instead: what the hash is checked against,
at a higher cost.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from chargpt_jax.hash_rng import draw


@dataclass(frozen=True)
class Dropout:
    """How elements are dropped."""

    rate: float = 0.0
    """The chance of an element to be dropped, in [0, 1)."""
    bits: str = "hash"
    """Where masks come from: 'hash', or 'jax' for JAX's own bits."""


def seeds_for(key: jax.Array, batch_size: int) -> jax.Array:
    """Draw a step's dropout seeds, uint32 [B, 2], one pair a sequence."""
    return jax.random.bits(key, (batch_size, 2), jnp.uint32)


def keep_mask(seeds: jax.Array, place: jax.Array, how: Dropout) -> jax.Array:
    """Say which elements survive.

    Args:
        seeds: uint32 [B, 2].
        place: uint32 [...], a number that tells the elements of one sequence apart.
        how: rate and source.

    Returns:
        bool [B, ...], true with probability 1 - rate (to 2**-32).
    """
    bits = {"hash": _hashed, "jax": _threefry}[how.bits](seeds, place)
    return bits >= jnp.uint32(min(round(how.rate * 2**32), 2**32 - 1))


def dropout(x: jax.Array, seeds: jax.Array | None, how: Dropout) -> jax.Array:
    """Drop elements of x [B, ...] with chance `rate` and scale the rest by 1 / (1 - rate); None: leave x alone."""
    if seeds is None or not how.rate:
        return x
    place = jnp.arange(x[0].size, dtype=jnp.uint32).reshape(x.shape[1:])
    return jnp.where(keep_mask(seeds, place, how), x * (1 / (1 - how.rate)), 0)


def _hashed(seeds: jax.Array, place: jax.Array) -> jax.Array:
    """Return a uint32 [B, ...] for each of B seeds and each place."""
    return draw(seeds.reshape(-1, *(1,) * place.ndim, 2), place)


def _threefry(seeds: jax.Array, place: jax.Array) -> jax.Array:
    """Return the same from Threefry-2x32 with a sequence's seeds as its key and the place as its counter."""
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    keys = fold(jax.random.wrap_key_data(seeds, impl="threefry2x32"), place.reshape(-1))
    return jax.random.key_data(keys)[..., 0].reshape(-1, *place.shape)
