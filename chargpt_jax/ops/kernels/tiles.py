"""What the attention kernels share: the size of their blocks, causality and dropout's mask inside a block.

A kernel computes one block of queries or keys of one head. It reads the other axis of the head block by block. The
length T is padded to whole blocks and the head width D to a power of two. Causality keeps every padded key from the
real queries, and the gradient of a padded query is 0, so the padding needs no mask of its own.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from chargpt_jax.hash_rng import bits_of
from chargpt_jax.ops.dropout import NONE, Dropout, threshold

MIN_BLOCK = MIN_WIDTH = 16
"""A tensor core of a GPU multiplies matrices of at least 16 x 16."""

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
"""Dtypes of queries, keys and values that the kernels accept."""

MAX_WIDTH = 128
"""The widest head: the sums of a wider one would leave a GPU's registers."""

MAX_VMEM = 10 * 2**20
"""Bytes of a TPU's vector memory, of the 16 MiB that a kernel may use, for the arrays of which it sees a full head."""

LANES = 128
"""Elements in a row of a TPU's vector memory: narrower rows take as much."""

COMPILERS = ("triton", "mosaic", "interpret")
"""Pallas' compilers for GPUs and for TPUs, and its interpreter, which runs the same kernels with XLA's operations."""


@dataclass(frozen=True)
class Tiles:
    """The shapes of the kernels of one attention, and how they are compiled."""

    length: int
    """Positions, T."""
    width: int
    """Head width, D."""
    dtype: Any
    """Of queries, keys and values."""
    compiler: str
    """One of COMPILERS."""
    how: Dropout = NONE
    """Dropout of the attention weights."""

    @property
    def block(self) -> int:
        """Queries, and keys, per block: a power of two."""
        largest = 128 if self.compiler == "mosaic" else 32 if self._has_long_sums else 64
        return max(MIN_BLOCK, min(largest, _power_of_two(self.length)))

    @property
    def _has_long_sums(self) -> bool:
        """Whether a GPU multiplies in float32, without tensor cores: larger blocks would not fit into its registers."""
        return jnp.dtype(self.dtype).itemsize > 2 and self.padded_width > MIN_WIDTH

    @property
    def count(self) -> int:
        """Blocks per head."""
        return -(-self.length // self.block)

    @property
    def padded_length(self) -> int:
        """Positions of whole blocks."""
        return self.count * self.block

    @property
    def padded_width(self) -> int:
        """Width that the kernels compute with, a power of two."""
        return max(MIN_WIDTH, _power_of_two(self.width))

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        return float(self.width**-0.5)

    @property
    def supported(self) -> bool:
        """Whether the kernels can be compiled for these shapes and this dtype."""
        if self.dtype not in DTYPES or self.width > MAX_WIDTH or self.how.bits != "hash":
            return False
        if self.compiler != "mosaic":
            return True
        # The backward kernel reads queries, keys, values and a gradient of a head while those of the next one arrive.
        head = self.padded_length * LANES * jnp.dtype(self.dtype).itemsize
        return jnp.dtype(self.dtype) != jnp.float16 and 2 * 4 * head <= MAX_VMEM

    def options(self) -> dict[str, Any]:
        """Return pallas_call's arguments that choose and set the compiler."""
        if self.compiler == "interpret":
            return {"interpret": True}
        if self.compiler == "mosaic":
            from jax.experimental.pallas import tpu

            return {"compiler_params": tpu.CompilerParams(dimension_semantics=("parallel", "parallel"))}
        from jax.experimental.pallas import triton

        warps = 8 if self.padded_width > 64 else 4
        return {"compiler_params": triton.CompilerParams(num_warps=warps, num_stages=2)}

    def pad(self, x: jax.Array) -> jax.Array:
        """Return x [B, H, T, D] as [B H, padded length, padded width], with zeros added."""
        x = x.reshape(-1, *x.shape[2:])
        return jnp.pad(x, ((0, 0), (0, self.padded_length - self.length), (0, self.padded_width - self.width)))

    def unpad(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Return the padded x as the array [B, H, T, D] of the given shape."""
        return x[:, : self.length, : self.width].reshape(shape)

    def one_block(self) -> pl.BlockSpec:
        """Return the part of a padded array that a program sees as one block, [block, padded width]."""
        return pl.BlockSpec((None, self.block, self.padded_width), lambda n, i: (n, i, 0))

    def one_head(self) -> pl.BlockSpec:
        """Return the part of a padded array that holds all positions of a program's head."""
        return pl.BlockSpec((None, self.padded_length, self.padded_width), lambda n, i: (n, 0, 0))

    def positions(self, index: jax.Array, axis: int) -> jax.Array:
        """Return the positions of a block's elements along an axis of its scores, int32 [block, block]."""
        return index * self.block + jax.lax.broadcasted_iota(jnp.int32, (self.block, self.block), axis)

    def rows_of(self, index: jax.Array) -> Any:
        """Return the slice of a block's positions in an array of a head."""
        return pl.ds(pl.multiple_of(index * self.block, self.block), self.block)

    def drop(self, weights: jax.Array, queries: jax.Array, keys: jax.Array, seed: Any) -> jax.Array:
        """Apply dropout to a block of weights, with the mask of the plain operation.

        Args:
            weights: float32 [block, block], one axis of queries and one of keys.
            queries, keys: positions of each element, int32 of the same shape.
            seed: reference to the head's seeds, uint32 [1, 2]; None: no dropout.
        """
        if seed is None:
            return weights
        index = queries.astype(jnp.uint32) * jnp.uint32(self.length) + keys.astype(jnp.uint32)
        kept = bits_of(index, seed[0, 0], seed[0, 1]) >= threshold(self.how)
        return jnp.where(kept, weights * (1 / (1 - self.how.rate)), 0.0)

    def as_row(self, column: jax.Array) -> jax.Array:
        """Return values [block, 1] as [1, block]: a TPU cannot reshape one to the other."""
        return jnp.sum(jnp.where(self._diagonal(), column, 0.0), axis=0, keepdims=True)

    def as_column(self, row: jax.Array) -> jax.Array:
        """Return values [1, block] as [block, 1]."""
        return jnp.sum(jnp.where(self._diagonal(), row, 0.0), axis=1, keepdims=True)

    def _diagonal(self) -> jax.Array:
        return self.positions(jnp.int32(0), 0) == self.positions(jnp.int32(0), 1)


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is not less than a number."""
    return 1 << (number - 1).bit_length()
