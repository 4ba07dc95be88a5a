"""Generation on a GPU in few kernels.

For one token per sequence most kernels are so short that their number decides the time. XLA fuses the operations of a
layer into about eight kernels (nine to twelve for a batch) if

- the layers are unrolled, and each layer's parameters and cache are arrays of their own: XLA cannot fuse slices whose
  start is known only when the program runs;
- a few rows are multiplied by a matrix as sums, which XLA fuses with the operations before and after them;
- attention reads all positions, unless they are many: otherwise the host would have to choose how many.
"""

from collections.abc import Callable
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from chargpt_jax.ops import plain
from chargpt_jax.ops.gpu import operations
from chargpt_jax.ops.kv_cache import Generation, KVCache, at_read_width

MAX_SUMS = 2**21
"""Multiply-adds of a linear layer up to which sums replace a matrix multiplication: they read the matrix once per row,
which takes about a microsecond for so many, less than another kernel."""

MIN_ROWS = 2
"""XLA normalises two rows or more in one kernel, and a single row in three: a row of zeros is added to that one."""

MAX_BYTES = 2**24
"""Largest cache of a layer of which all positions are read: an H100 reads so many bytes in 5 microseconds. The host
takes longer to choose how many positions are read, and meanwhile the GPU waits."""


@flax.struct.dataclass
class GpuKVCache(KVCache):
    """Keys and values of a batch, each layer's in one array, so that one kernel writes both."""

    layers: tuple[jax.Array, ...]
    """[2, B, H, S, D] for each layer: keys, then values."""

    @classmethod
    def of(cls, keys: jax.Array, values: jax.Array) -> Self:
        """Make a cache of the first T positions, [L, B, H, D, T] each."""
        return cls(tuple(jnp.stack([keys, values], axis=1).swapaxes(-1, -2)))

    def enlarged(self, capacity: int) -> Self:
        """Return the cache with `capacity` positions, at least as many as now."""
        room = [(0, 0)] * 3 + [(0, capacity - self.layers[0].shape[-2]), (0, 0)]
        return jax.tree.map(lambda x: jnp.pad(x, room), self)

    def append(self, k: jax.Array, v: jax.Array, layer: int, position: jax.Array) -> Self:
        """Write a new key and value per sequence, [B, H, D] each, at the positions, int32 [B], of a layer.

        Rows of k and v beyond B are ignored.
        """
        B = len(position)
        new, old = jnp.stack([k[:B], v[:B]]), self.layers[layer]  # new: [2, B, H, D]
        if B == 1:
            written = jax.lax.dynamic_update_slice(old, new[:, :, :, None], (0, 0, 0, position[0], 0))
        else:
            written = old.at[:, jnp.arange(B), :, position].set(new.swapaxes(0, 1))
        return type(self)((*self.layers[:layer], written, *self.layers[layer + 1 :]))

    def attend(self, q: jax.Array, layer: int, position: jax.Array) -> jax.Array:
        """Attend from one query per sequence, [B, H, D], to the positions up to its own, int32 [B]: [B, H, D].

        For rows of q beyond B zeros are returned.
        """
        both, B = self.layers[layer], len(position)
        capacity = both.shape[-2]

        def attended(width: int) -> jax.Array:
            keys, values = both[:, :, :, :width].swapaxes(-1, -2)
            return plain.query_attention(q[:B], keys, values, position)

        width = capacity if both.nbytes <= MAX_BYTES else None
        return _with_rows(at_read_width(attended, capacity, position, width), len(q))

    @staticmethod
    def generate(
        plan: Callable[..., Generation], params: Any, carry: Any, cache: Any, sampler: Any, *, final: bool = False
    ) -> tuple[Any, Any]:
        """Run the generation loop for the batch; arguments as for `KVCache.generate`."""
        generation = plan(params, carry, sampler)
        if cache is None:
            return generation.loop_of(generation.indices)((carry, cache))
        run_layers = unrolled(generation.blocks, cache.layers[0].dtype)
        return generation.loop_of(generation.indices, run_layers)((carry, cache))


def unrolled(blocks: nnx.Module, dtype: Any) -> Callable[..., Any]:
    """Return a function that computes `plain.decode_layers`, layer after layer.

    Each layer's parameters become arrays of their own, which happens once if this is called outside the generation
    loop. The matrices are rounded to the dtype in which they are multiplied, and transposed: a sum over the last axis
    reads contiguous memory.

    Args:
        blocks: one module that holds the parameters of all blocks.
        dtype: of matrix multiplications.
    """
    stacked = nnx.split(blocks)[1]
    L = len(jax.tree.leaves(stacked)[0])

    def prepared(x: jax.Array) -> jax.Array:
        return x.astype(dtype).T if x.ndim == 2 else x

    each = [jax.tree.map(lambda x: prepared(x[i]), stacked) for i in range(L)]  # noqa: B023

    def run(layer: Callable[..., Any], blocks: nnx.Module, carry: Any) -> Any:
        graphdef = nnx.split(blocks)[0]
        x, cache = carry
        B, x = len(x), _with_rows(x, max(MIN_ROWS, len(x)))
        for i, own in enumerate(each):
            block = nnx.merge(graphdef, jax.tree.map(lambda x: x.T if x.ndim == 2 else x, own))
            (x, cache), _ = layer(block, (x, cache), i)
            # Otherwise XLA would compute the sum of all earlier layers' outputs again in each layer: no two layers
            # would share a kernel, and compilation would take several times as long.
            x = jax.lax.optimization_barrier(x)
        return x[:B], cache

    return run


def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Compute `operations.linear`, for one token per sequence of a small batch as sums."""
    if bias.ndim > 1 or not _as_sums(x, kernel):  # a bias per sequence: of LayerNorm, in training
        return operations.linear(x, kernel, bias)
    return (_sums(x, kernel.astype(x.dtype).T) + bias).astype(x.dtype)


def unembed(x: jax.Array, table: jax.Array) -> jax.Array:
    """Compute `plain.unembed`, for one token per sequence of a small batch as sums."""
    return _sums(x, table.astype(x.dtype)) if _as_sums(x, table) else plain.unembed(x, table)


def cache_type(sequences: int, elements: int, parameters: int) -> type[KVCache]:
    """Return the cache of a GPU, as `plain.cache_type` does."""
    return GpuKVCache


def _as_sums(x: jax.Array, matrix: jax.Array) -> bool:
    """Return whether x [B, T, C] is multiplied by a matrix as sums."""
    B, T = x.shape[:2]
    return T == 1 and (B <= MIN_ROWS or B * matrix.size <= MAX_SUMS)


def _sums(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Multiply x [B, 1, C] by each row of a matrix [F, C]: [B, 1, F], float32 or wider."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.sum(x.astype(wide)[:, :, None] * rows.astype(wide), axis=-1)


def _with_rows(x: jax.Array, count: int) -> jax.Array:
    """Return x [B, ...] with rows of zeros, `count` in all."""
    return jnp.pad(x, [(0, count - len(x))] + [(0, 0)] * (x.ndim - 1))
