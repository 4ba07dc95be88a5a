"""What the attention kernels share: the size of their blocks, causality and dropout's mask inside a block.

A kernel computes one block of queries or keys of one head. It reads the other axis of the head block by block. The
length T is padded to whole blocks and the head width D to a power of two. Causality keeps every padded key from the
real queries, and the gradient of a padded query is 0, so the padding needs no mask of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from chargpt_jax.hash_rng import bits_of, derived
from chargpt_jax.ops.dropout import NONE, Dropout, head_seeds, threshold

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
    heads: int = 1
    """Heads per sequence, H."""
    seeds_of_heads: bool = False
    """Whether each head is given seeds of its own, as opposed to those of its sequence."""

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

    @property
    def masked(self) -> bool:
        """Whether the kernels read arrays [B, T, H, D] as they are, and mask what a block has beyond their ends.

        A TPU's kernels read padded copies, because they cannot read one head of such an array.
        """
        return self.compiler != "mosaic"

    def operand(self, x: jax.Array) -> jax.Array:
        """Return x [B, H, T, D] as the kernels read it: [B, T, H, D], or [B H, padded length, padded width]."""
        if self.masked:
            return x.swapaxes(1, 2)
        x = x.reshape(-1, *x.shape[2:])
        return jnp.pad(x, ((0, 0), (0, self.padded_length - self.length), (0, self.padded_width - self.width)))

    def result(self, x: jax.Array) -> jax.Array:
        """Return an array of an operand's shape as [B, H, T, D]."""
        if self.masked:
            return x.swapaxes(1, 2)
        return x[:, : self.length, : self.width].reshape(-1, self.heads, self.length, self.width)

    def one_block(self) -> pl.BlockSpec:
        """Return the part of an operand that a program sees as one block, [block, padded width]."""
        return self._part(self.block, lambda i: i)

    def one_head(self) -> pl.BlockSpec:
        """Return the part of an operand that holds all positions of a program's head."""
        return self._part(self.padded_length, lambda i: 0)

    def _part(self, rows: int, index: Callable[[Any], Any]) -> pl.BlockSpec:
        if self.masked:
            shape = (None, rows, None, self.padded_width)
            return pl.BlockSpec(shape, lambda n, i: (n // self.heads, index(i), n % self.heads, 0))
        return pl.BlockSpec((None, rows, self.padded_width), lambda n, i: (n, index(i), 0))

    @property
    def derives_seeds(self) -> bool:
        """Whether the kernels derive the seed of a head from that of its sequence. Those of a TPU do not."""
        return self.masked and not self.seeds_of_heads

    def seeds(self, seeds: jax.Array | None) -> tuple[jax.Array, ...]:
        """Return seeds uint32 [B, 2] or [B, H, 2] as the kernels read them: both parts, [N, 1, 1] each.

        () without dropout.
        """
        if seeds is None:
            return ()
        if not self.derives_seeds:
            seeds = head_seeds(seeds, self.heads).reshape(-1, 2)
        return seeds[:, :1, None], seeds[:, 1:, None]

    def one_seed(self) -> pl.BlockSpec:
        """Return the part of one of the arrays of `seeds` that a program sees, [1, 1]."""
        return pl.BlockSpec((None, 1, 1), lambda n, i: (n // self.heads if self.derives_seeds else n, 0, 0))

    def head_seed(self, parts: Sequence[Any]) -> tuple[jax.Array, jax.Array] | None:
        """Return both parts of the seed of a program's head, from references to its `seeds`; None: no dropout."""
        if not parts:
            return None
        first, second = parts[0][0, 0], parts[1][0, 0]
        return derived(first, second, pl.program_id(0) % self.heads) if self.derives_seeds else (first, second)

    def read(self, head: Any, index: jax.Array) -> jax.Array:
        """Return a block [block, padded width] of a reference to all positions of a head; 0 beyond the ends."""
        return self._read(head.at[self.rows_of(index), :], index)

    def read_block(self, block: Any, index: jax.Array) -> jax.Array:
        """Return the same from a reference to this block alone."""
        return self._read(block, index)

    def _read(self, block: Any, index: jax.Array) -> jax.Array:
        if self._fits:
            return block[...]
        from jax.experimental.pallas import triton

        return triton.load(block, mask=self._inside(index), other=0.0)

    def write(self, block: Any, index: jax.Array, values: jax.Array) -> None:
        """Store a block [block, padded width] in the reference to it, in the dtype of its array."""
        values = values.astype(block.dtype)
        if self._fits:
            block[...] = values
            return
        from jax.experimental.pallas import triton

        triton.store(block, values, mask=self._inside(index))

    @property
    def _fits(self) -> bool:
        """Whether the operands have no element beyond the ends of the arrays."""
        whole = (self.padded_length, self.padded_width) == (self.length, self.width)
        return whole or not self.masked

    def _inside(self, index: jax.Array) -> jax.Array:
        """Return which elements of a block are inside the array, bool [block, padded width]."""
        shape = (self.block, self.padded_width)
        position = index * self.block + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        return (position < self.length) & (jax.lax.broadcasted_iota(jnp.int32, shape, 1) < self.width)

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
            seed: both parts of the head's seed; None: no dropout.
        """
        if seed is None:
            return weights
        index = queries.astype(jnp.uint32) * jnp.uint32(self.length) + keys.astype(jnp.uint32)
        kept = bits_of(index, *seed) >= threshold(self.how)
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
