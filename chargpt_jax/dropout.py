"""Dropout whose masks are a counter hash: cheap, reproducible from (seed, step), equal on any device layout.

Threefry bits cost more than the rest of a small model's training step. A mask needs far less than a cryptographic
stream: here each element's place in its array goes through two multiply-xorshift rounds (constants: Ellis 2018,
"lowbias32") with a 64-bit seed for each sequence. A mask depends on the sequence's seeds and the element's place and
on nothing else, so splitting a batch, or a block of attention rows, gives the same masks as the whole. `bits="jax"`
takes Threefry over the same places instead: what the hash is checked against, at a higher cost.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

_GOLDEN = 0x9E3779B9


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


def site(seeds: jax.Array, number: jax.Array | int) -> jax.Array:
    """Derive the seeds of one place in the network (a layer, its attention, one head of it) from those of the whole.

    Args:
        seeds: uint32 [..., 2].
        number: the place's, broadcast against the seeds' leading axes.
    """
    salt = jnp.asarray(number).astype(jnp.uint32) * jnp.uint32(_GOLDEN)
    first, second = seeds[..., 0], seeds[..., 1]
    return jnp.stack([_rounds(first ^ salt, second), _rounds(second + salt, first)], axis=-1)


def keep_mask(seeds: jax.Array, place: jax.Array, how: Dropout) -> jax.Array:
    """Say which elements survive.

    Args:
        seeds: uint32 [B, 2].
        place: uint32 [...], a number that tells the elements of one sequence apart.
        how: rate and source.

    Returns:
        bool [B, ...], true with probability 1 - rate (to 2**-32).
    """
    draw = {"hash": _hashed, "jax": _threefry}[how.bits]
    return draw(seeds, place) >= jnp.uint32(min(round(how.rate * 2**32), 2**32 - 1))


def dropout(x: jax.Array, seeds: jax.Array | None, how: Dropout) -> jax.Array:
    """Drop elements of x [B, ...] with chance `rate` and scale the rest by 1 / (1 - rate); None: leave x alone."""
    if seeds is None or not how.rate:
        return x
    place = jnp.arange(x[0].size, dtype=jnp.uint32).reshape(x.shape[1:])
    return jnp.where(keep_mask(seeds, place, how), x * (1 / (1 - how.rate)), 0)


def _hashed(seeds: jax.Array, place: jax.Array) -> jax.Array:
    """Return a uint32 [B, ...] for each of B seeds and each place."""
    first, second = (seeds[:, i].reshape((-1,) + (1,) * place.ndim) for i in range(2))
    return _rounds(place[None] * jnp.uint32(_GOLDEN) + first, second)


def _threefry(seeds: jax.Array, place: jax.Array) -> jax.Array:
    """Return the same from Threefry-2x32 with a sequence's seeds as its key and the place as its counter."""
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    keys = fold(jax.random.wrap_key_data(seeds, impl="threefry2x32"), place.reshape(-1))
    return jax.random.key_data(keys)[..., 0].reshape(-1, *place.shape)


def _rounds(x: jax.Array, second: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D) + second
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
