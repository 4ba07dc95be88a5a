"""KV caches for a CPU: one for a batch, and one for sequences that are generated one by one, each in a fused kernel.

XLA:CPU would copy the keys out of the cache before it multiplies them, and call a library once per head and sequence.
With the sums written out, one pass over the keys computes all weights and one pass over the values all outputs.
"""

from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import Any, ClassVar, NamedTuple, Self

import flax.struct
import jax
import jax.numpy as jnp

from chargpt_jax.ops.cpu_decode import fused, is_fusible, layers_in_place, sequence_of, with_sequence
from chargpt_jax.ops.kv_cache import Generation, StackedKVCache, at_read_width, read_widths

BLOCK, LANES = 32, 16
"""Positions per block, and partial sums per channel: as many as the widest vectors of a CPU hold.

With fewer positions XLA makes no vector loop; with more, most of a block is read for nothing at the start of a text.
"""


@flax.struct.dataclass
class CpuKVCache(StackedKVCache):
    """Keys and values of a batch, read by sums that are written out."""

    def attend(self, q: jax.Array, layer: jax.Array, position: jax.Array) -> jax.Array:
        """Attend from one query per sequence, [B, H, D], to the positions up to its own, int32 [B]: [B, H, D]."""
        return cached_attention(q, self.keys, self.values, layer, position)


@flax.struct.dataclass
class BlockedKVCache(StackedKVCache):
    """Keys and values in blocks of 32 positions, so that a query reads one contiguous range of memory.

    Layer l of sequence b of B is at index l B + b.
    """

    keys: jax.Array
    """[L B, S / 32, H, D, 32], or [L, B, S / 32, H, D, 32] outside `generate`."""
    values: jax.Array
    """The same."""

    one_by_one: ClassVar[bool] = True

    @classmethod
    def of(cls, keys: jax.Array, values: jax.Array) -> Self:
        """Make a cache of the first T positions, [L, B, H, D, T] each."""

        def blocks(x: jax.Array) -> jax.Array:
            x = jnp.pad(x, ((0, 0),) * 4 + ((0, -x.shape[-1] % BLOCK),))
            return jnp.moveaxis(x.reshape(*x.shape[:-1], -1, BLOCK), 4, 2)

        return cls(blocks(keys), blocks(values))

    def enlarged(self, capacity: int) -> Self:
        """Return the cache with `capacity` positions, at least as many as now, in at least two blocks.

        If there were one block, XLA would copy the entire cache for every token.
        """
        room = max(2, -(-capacity // BLOCK)) - self.keys.shape[-4]
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0),) * (x.ndim - 4) + ((0, room), *((0, 0),) * 3)), self)

    def allocated(self, capacity: int, final: bool) -> Self:
        """Return the cache as `generate` needs it; if `final`, that allocates one sequence's capacity for all."""
        return self if final else self.enlarged(capacity)

    def of_sequence(self, index: jax.Array) -> Self:
        """Return the cache of one sequence, [L, S / 32, H, D, 32], from [L, B, S / 32, H, D, 32]."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 1, keepdims=False), self)

    def overwritten(self, start: "BlockedKVCache") -> Self:
        """Return this memory with another sequence's cache at its beginning.

        What an earlier sequence left behind it is not cleared: it has no weight until it is overwritten.
        """
        return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice(x, new, (0,) * 5), self, start)

    def append(self, k: jax.Array, v: jax.Array, layer: jax.Array, position: jax.Array) -> Self:
        """Write a new key and value, [1, H, D] each, at the position, int32 [1], of a layer."""
        block, offset = jnp.divmod(position[0].astype(int), BLOCK)

        def write(x: jax.Array, new: jax.Array) -> jax.Array:
            start = (jnp.asarray(layer, int), block, 0, 0, offset)
            return jax.lax.dynamic_update_slice(x, new[:, None, ..., None], start)

        return type(self)(write(self.keys, k), write(self.values, v))

    def attend(self, q: jax.Array, layer: jax.Array, position: jax.Array) -> jax.Array:
        """Attend from one query, [1, H, D], to the positions up to its own, int32 [1]: [1, H, D] of q's dtype."""
        dtype = jnp.promote_types(q.dtype, jnp.float32)
        query = _Query(self, jnp.asarray(layer, int), q[0].astype(dtype) * q.shape[-1] ** -0.5, position[0].astype(int))
        total, outputs = query.sums()
        # Softmax is shift-invariant, so the maximum is not subtracted unless a weight would leave its dtype's range.
        usable = jnp.all(in_range(total))
        total, outputs = jax.lax.cond(usable, lambda: (total, outputs), lambda: query.sums(query.largest_scores()))
        return (outputs / total[:, None]).astype(q.dtype)[None]

    @staticmethod
    def generate(
        plan: Callable[..., Generation], params: Any, carry: Any, cache: Any, sampler: Any, *, final: bool = False
    ) -> tuple[Any, Any]:
        """Run the generation loop for one sequence after the other; arguments as for `KVCache.generate`.

        Each sequence is one kernel if the sampler can be a part of it, otherwise each token's layers are.
        """
        indices, loop_of, capacity, vocab_size, sorts, _ = plan(params, carry, sampler)
        B, fuse = len(indices), is_fusible(vocab_size, sorts)
        if cache is None:
            room = None
        elif final:  # memory for one sequence, reused by all
            room = cache.of_sequence(jnp.zeros((), int)).enlarged(capacity)
        else:  # all layers of all sequences on one axis, so that each sequence's cache is updated in place
            room = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), cache)

        def one(b: jax.Array, both: tuple[Any, Any]) -> tuple[Any, Any]:
            carry, room = both
            own, index = sequence_of((carry, indices), b)
            if cache is None:
                done, room = loop_of(index)((own, None))
                return with_sequence(carry, b, done), room
            room = room.overwritten(cache.of_sequence(b)) if final else room
            shared = not final and B > 1
            layers = partial(
                layers_in_place, fused_kernel=True, index_of=(lambda layer: layer * B + b) if shared else None
            )
            loop = loop_of(index, layers)
            done, room = fused(jax.jit(loop)((own, room))) if fuse else loop((own, room))
            return with_sequence(carry, b, done), room

        carry, room = jax.lax.fori_loop(0, B, one, (carry, room))
        if cache is None or final:
            return carry, None
        return carry, jax.tree.map(lambda x, to: x.reshape(to.shape), room, cache)


def cached_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array | int,
    position: jax.Array,
    width: int | None = None,
) -> jax.Array:
    """Compute `kv_cache.cached_attention` in one pass over the keys and one over the values."""

    def sums(width: int, shifted: bool) -> tuple[jax.Array, jax.Array]:
        """Return the sum of the weights, [B, H, 1], and of the weighted values, [B, H, D]."""
        scores = _scores(q, _CacheSlice(keys, layer, width)) * q.shape[-1] ** -0.5
        scores = jnp.where(jnp.arange(width) > position[:, None, None], -jnp.inf, scores)
        if shifted:
            scores -= jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores)
        return _sum(weights), _outputs(weights, _CacheSlice(values, layer, width))

    total, outputs = at_read_width(partial(sums, shifted=False), keys.shape[-1], position, width)
    widest = read_widths(keys.shape[-1])[-1] if width is None else width
    total, outputs = _recomputed_if_out_of_range(total, outputs, partial(sums, widest, shifted=True))
    return (outputs / total).astype(q.dtype)


def query_attention(q: jax.Array, keys: jax.Array, values: jax.Array, position: jax.Array) -> jax.Array:
    """Compute `plain.query_attention` as `cached_attention` does."""
    return cached_attention(q, keys[None], values[None], 0, position, keys.shape[-1])


def _recomputed_if_out_of_range(
    total: jax.Array, outputs: jax.Array, shifted: Callable[[], tuple[jax.Array, jax.Array]]
) -> tuple[jax.Array, jax.Array]:
    """Return sums of exp(score), or of exp(score - maximum) for the queries whose sum nears the limits of its dtype.

    Softmax is shift-invariant, so the maximum is not subtracted at first: that would need a second pass over the keys.
    In float32 a sum nears the limits if the largest score is beyond about 40; single weights may then be out of range.
    """
    usable = in_range(total)

    def again() -> tuple[jax.Array, jax.Array]:
        return jax.tree.map(partial(jnp.where, usable), (total, outputs), shifted())

    return jax.lax.cond(jnp.all(usable), lambda: (total, outputs), again)


def in_range(total: jax.Array) -> jax.Array:
    """Return for each sum of weights exp(score) whether it lies in the middle of its dtype's range."""
    limit = float(jnp.finfo(total.dtype).max) ** 0.5
    return (total > 1 / limit) & (total < limit)


class _CacheSlice(NamedTuple):
    """The first `width` positions of one layer of a cache [L, B, H, D, S], and its parts."""

    cache: jax.Array
    layer: jax.Array | int
    width: int

    def channels(self) -> Iterator[jax.Array]:
        """Yield [B, H, width] for each of the D channels."""
        return (self._part(d, 0, 1, self.width)[:, :, 0] for d in range(self.cache.shape[3]))

    def stretches(self, length: int) -> Iterator[jax.Array]:
        """Yield [B, H, D, length], `length` positions after the other."""
        return (self._part(0, start, self.cache.shape[3], length) for start in range(0, self.width, length))

    def _part(self, d: int, s: int, channels: int, positions: int) -> jax.Array:
        """Return [B, H, channels, positions]."""
        sizes = (1, *self.cache.shape[1:3], channels, positions)
        return jax.lax.dynamic_slice(self.cache, (jnp.asarray(self.layer, int), 0, 0, d, s), sizes)[0]


def _scores(q: jax.Array, keys: _CacheSlice) -> jax.Array:
    wide = jnp.promote_types(q.dtype, jnp.float32)
    terms = (q[:, :, d, None].astype(wide) * k.astype(wide) for d, k in enumerate(keys.channels()))
    return reduce(jnp.add, terms)


def _outputs(weights: jax.Array, values: _CacheSlice) -> jax.Array:
    parts = _stretches(weights)
    length = parts[0].shape[-1]
    terms = (w[:, :, None] * v.astype(w.dtype) for w, v in zip(parts, values.stretches(length), strict=True))
    return reduce(jnp.add, terms) @ jnp.ones(length, weights.dtype)


def _sum(weights: jax.Array) -> jax.Array:
    parts = _stretches(weights)
    return reduce(jnp.add, parts) @ jnp.ones((parts[0].shape[-1], 1), weights.dtype)


def _stretches(x: jax.Array) -> list[jax.Array]:
    """Split [B, H, S] along S into at most 16 equal parts of several vectors (32 elements or more) each."""
    count = max(n for n in range(1, 17) if n == 1 or x.shape[-1] % (32 * n) == 0)
    return jnp.split(x, count, axis=-1)


class _Query(NamedTuple):
    """A query, [H, D], already multiplied by the scale of its scores, and the cache that it attends to."""

    cache: BlockedKVCache
    layer: jax.Array
    q: jax.Array
    last: jax.Array
    """The last position that is attended to."""

    def sums(self, shift: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Return the sum of the weights exp(score - shift), [H], and of the weighted values, [H, D]."""
        H, D = self.q.shape

        def of(block: jax.Array) -> tuple[jax.Array, jax.Array]:
            scores = self._scores(block)
            weights = jnp.exp(scores if shift is None else scores - shift)
            lanes = (jnp.split(x, BLOCK // LANES, axis=-1) for x in (weights, self._block(self.cache.values, block)))
            terms = (w[:, None] * v for w, v in zip(*lanes, strict=True))
            return weights, reduce(jnp.add, terms)

        total, outputs = self._over_blocks(of, jnp.add)
        ones = jnp.ones(BLOCK, self.q.dtype)
        return total @ ones, (outputs.reshape(-1, LANES) @ ones[:LANES]).reshape(H, D)

    def largest_scores(self) -> jax.Array:
        """Return [H, 1]."""
        largest = self._over_blocks(self._scores, jnp.maximum)
        while largest.shape[-1] > 1:  # XLA might hand a reduction to a library, which a fused kernel cannot call
            largest = jnp.maximum(*jnp.split(largest, 2, axis=-1))
        return largest

    def _scores(self, block: jax.Array) -> jax.Array:
        """Return the scores of a block's positions, [H, 32]; -inf beyond the last position."""
        k = self._block(self.cache.keys, block)
        sums = reduce(jnp.add, (self.q[:, d, None] * k[:, d] for d in range(k.shape[1])))
        return jnp.where(block * BLOCK + jnp.arange(BLOCK) > self.last, -jnp.inf, sums)

    def _over_blocks(self, of: Callable[[jax.Array], Any], join: Callable[[jax.Array, jax.Array], jax.Array]) -> Any:
        """Join of(block), a tree of arrays, over the blocks up to the last position."""

        def step(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            block, found = carry
            return block + 1, jax.tree.map(join, found, of(block))

        first = jnp.ones((), int), of(jnp.zeros((), int))  # zeros to start from would first be written to memory
        return jax.lax.while_loop(lambda carry: carry[0] * BLOCK <= self.last, step, first)[1]

    def _block(self, x: jax.Array, block: jax.Array) -> jax.Array:
        """Return [H, D, 32]."""
        start = (self.layer, block, 0, 0, 0)
        return jax.lax.dynamic_slice(x, start, (1, 1, *x.shape[2:]))[0, 0].astype(self.q.dtype)
