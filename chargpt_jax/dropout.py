"""Dropout whose masks are a counter hash: cheap, reproducible from (seed, step), equal on any device layout.

Threefry bits cost more than the rest of a small model's training step. A mask needs far less than a cryptographic
stream: here each element's place in its array goes through two multiply-xorshift rounds (constants: Ellis 2018,
"lowbias32") with a 64-bit seed for each sequence. A mask depends on the sequence's seeds and the element's place and
on nothing else, so splitting a batch, or a block of attention rows, gives the same masks as the whole.
"""

import jax
import jax.numpy as jnp

_GOLDEN = 0x9E3779B9


def seeds_for(key: jax.Array, batch_size: int) -> jax.Array:
    """Draw a step's dropout seeds, uint32 [B, 2], one pair a sequence."""
    return jax.random.bits(key, (batch_size, 2), jnp.uint32)


def site(seeds: jax.Array, number: jax.Array | int) -> jax.Array:
    """Derive the seeds, uint32 [B, 2], of one place in the network (a layer's attention, say) from a step's."""
    salt = jnp.asarray(number).astype(jnp.uint32) * jnp.uint32(_GOLDEN)
    first, second = _rounds(seeds[:, 0] ^ salt, seeds[:, 1]), _rounds(seeds[:, 1] + salt, seeds[:, 0])
    return jnp.stack([first, second], axis=1)


def keep_mask(seeds: jax.Array, place: jax.Array, rate: float) -> jax.Array:
    """Say which elements survive.

    Args:
        seeds: uint32 [B, 2].
        place: uint32 [...], a number that tells the elements of one sequence apart.
        rate: the chance of an element to be dropped, in [0, 1).

    Returns:
        bool [B, ...], true with probability 1 - rate (to 2**-32).
    """
    first, second = (seeds[:, i].reshape((-1,) + (1,) * place.ndim) for i in range(2))
    return _rounds(place[None] * jnp.uint32(_GOLDEN) + first, second) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def shifted(seeds: jax.Array, first: jax.Array) -> jax.Array:
    """Return the seeds, uint32 [..., 2], whose mask at place 0 is that of `seeds` at place `first`, uint32 [...]."""
    ahead = first * jnp.uint32(_GOLDEN)
    return jnp.stack(jnp.broadcast_arrays(seeds[..., 0] + ahead, seeds[..., 1]), axis=-1)


def dropout(x: jax.Array, seeds: jax.Array | None, rate: float) -> jax.Array:
    """Drop elements of x [B, ...] with chance `rate` and scale the rest by 1 / (1 - rate); None: leave x alone."""
    if seeds is None or not rate:
        return x
    place = jnp.arange(x[0].size, dtype=jnp.uint32).reshape(x.shape[1:])
    return jnp.where(keep_mask(seeds, place, rate), x * (1 / (1 - rate)), 0)


def _rounds(x: jax.Array, second: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D) + second
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
