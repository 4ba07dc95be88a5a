"""Random bits from a counter-based hash: fast to compute, fast to compile, equal on every device and sharding.

JAX's Threefry is a cryptographic generator. It takes longer than the rest of a small model's training step, and each
use takes 0.1 s to compile. Initial parameters, the order of batches and dropout masks need far less. Here a counter
goes through two multiply-xorshift rounds (constants: Ellis 2018, "lowbias32") with a 64-bit seed. The result depends
only on the seed and the counter.
"""

import jax
import jax.numpy as jnp

_GOLDEN = 0x9E3779B9


def seeds_of(key: jax.Array) -> jax.Array:
    """Return the seeds, uint32 [2], that a JAX key holds."""
    return jax.random.key_data(key).reshape(-1)[:2]


def derive(seeds: jax.Array, number: jax.Array | int) -> jax.Array:
    """Return new seeds, independent for each number.

    Args:
        seeds: uint32 [..., 2].
        number: broadcast against the seeds' leading axes.

    Returns:
        uint32 [..., 2].
    """
    return jnp.stack(derived(seeds[..., 0], seeds[..., 1], number), axis=-1)


def derived(first: jax.Array, second: jax.Array, number: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Return `derive` of the two parts of a seed, as two parts: elementwise operations, for use in kernels."""
    salt = jnp.asarray(number).astype(jnp.uint32) * jnp.uint32(_GOLDEN)
    return _rounds(first ^ salt, second), _rounds(second + salt, first)


def random_bits(seeds: jax.Array, number: jax.Array | int) -> jax.Array:
    """Return 32 random bits for each number.

    Args:
        seeds: uint32 [..., 2].
        number: broadcast against the seeds' leading axes.

    Returns:
        uint32 [...].
    """
    return bits_of(jnp.asarray(number).astype(jnp.uint32), seeds[..., 0], seeds[..., 1])


def bits_of(number: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """Return `random_bits` of numbers and the two parts of a seed, uint32 arrays that broadcast together.

    Only elementwise operations: a kernel can use it on what it has in registers.
    """
    return _rounds(number * jnp.uint32(_GOLDEN) + first, second)


def unit(bits: jax.Array, dtype: jnp.dtype | type = jnp.float32) -> jax.Array:
    """Convert bits to numbers in [0, 1), multiples of 2**-24."""
    return (bits >> 8).astype(dtype) * 2**-24


@jax.jit  # traced once per shape, for all callers
def _rounds(x: jax.Array, second: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D) + second
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
