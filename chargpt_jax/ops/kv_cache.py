"""The KV cache of a batch, and attention from one query per sequence to it.

`KVCache` says what every cache can do; each platform has its own. In `StackedKVCache`, keys and values are
[L, B, H, D, S] each, S positions last. All sequences are decoded together, one token per sequence per step;
`KVCache.generate` is that loop.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self

import flax.struct
import jax
import jax.numpy as jnp

from chargpt_jax.ops.matmul import matmul

Loop = Callable[[Any], Any]
"""A generation loop: from (carry, cache) to (carry, cache)."""


class Generation(NamedTuple):
    """What a cache needs to know to run the generation loop for a batch."""

    indices: jax.Array
    """int32 [B]: the sequences' indices, on which their random numbers depend."""
    loop_of: Callable[..., Loop]
    """loop_of(indices[, run_layers]): the loop for some sequences; `run_layers` as for `GPT.decode`."""
    capacity: int
    """Positions that a cache has to hold."""
    vocab_size: int
    sorts: bool
    """Whether the sampler sorts the vocabulary."""
    blocks: Any
    """The model's blocks, one module with stacked parameters: a cache may prepare them outside the loop."""


class KVCache:
    """Keys and values of every layer of a batch: a tree of arrays, with the batch on each array's second axis."""

    one_by_one: ClassVar[bool] = False
    """Whether sequences are generated one after the other, not one token per sequence per step."""

    @classmethod
    def of(cls, keys: jax.Array, values: jax.Array) -> Self:
        """Make a cache of the first T positions, [L, B, H, D, T] each."""
        raise NotImplementedError

    def enlarged(self, capacity: int) -> Self:
        """Return the cache with `capacity` positions, at least as many as now."""
        raise NotImplementedError

    def allocated(self, capacity: int, final: bool) -> Self:
        """Return the cache as generation needs it; `final`: one call of `generate` follows and no other."""
        return self.enlarged(capacity)

    def append(self, k: jax.Array, v: jax.Array, layer: Any, position: jax.Array) -> Self:
        """Write a new key and value per sequence, [B, H, D] each, at the positions, int32 [B], of a layer."""
        raise NotImplementedError

    def attend(self, q: jax.Array, layer: Any, position: jax.Array) -> jax.Array:
        """Attend from one query per sequence, [B, H, D], to the positions up to its own, int32 [B]: [B, H, D]."""
        raise NotImplementedError

    @staticmethod
    def generate(
        plan: Callable[..., Generation], params: Any, carry: Any, cache: Any, sampler: Any, *, final: bool = False
    ) -> tuple[Any, Any]:
        """Run the generation loop for the batch, one token per sequence per step.

        Args:
            plan: makes the loop from (params, carry, sampler).
            params: of the model.
            carry: a tree of arrays [B, ...].
            cache: the KV cache, or None for a loop without one.
            sampler: how tokens are sampled.
            final: the cache is not needed afterwards.
        """
        generation = plan(params, carry, sampler)
        return generation.loop_of(generation.indices)((carry, cache))


@flax.struct.dataclass
class StackedKVCache(KVCache):
    """Keys and values with the layers on the first axis."""

    keys: jax.Array
    """[L, B, H, D, S]."""
    values: jax.Array
    """[L, B, H, D, S]."""

    @classmethod
    def of(cls, keys: jax.Array, values: jax.Array) -> Self:
        """Make a cache of the first T positions, [L, B, H, D, T] each."""
        return cls(keys, values)

    def enlarged(self, capacity: int) -> Self:
        """Return the cache with `capacity` positions, at least as many as now."""
        room = [(0, 0)] * 4 + [(0, capacity - self.keys.shape[-1])]
        return jax.tree.map(lambda x: jnp.pad(x, room), self)

    def append(self, k: jax.Array, v: jax.Array, layer: jax.Array, position: jax.Array) -> Self:
        """Write a new key and value per sequence, [B, H, D] each, at the positions, int32 [B], of a layer."""
        keys, values = (
            write_position(self.keys, k, layer, position),
            write_position(self.values, v, layer, position),
        )
        return type(self)(keys, values)

    def attend(self, q: jax.Array, layer: jax.Array, position: jax.Array) -> jax.Array:
        """Attend from one query per sequence, [B, H, D], to the positions up to its own, int32 [B]: [B, H, D]."""
        return cached_attention(q, self.keys, self.values, layer, position)


def cached_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array | int,
    position: jax.Array,
    width: int | None = None,
) -> jax.Array:
    """Attend from one query per sequence to the keys up to its position, reading only as much as holds them.

    Args:
        q: [B, H, D].
        keys, values: [L, B, H, D, S], filled up to the positions.
        layer: index of the layer.
        position: int32 [B].
        width: number of positions to read; None: the smallest of `read_widths` that holds every position.

    Returns:
        [B, H, D], of q's dtype.
    """

    def sums(width: int) -> tuple[jax.Array, jax.Array]:
        """Return the sum of the weights, [B, H, 1], and of the weighted values, [B, H, D]."""
        scores = matmul("bhd,bhds->bhs", q, layer_slice(keys, layer, width)) * q.shape[-1] ** -0.5
        scores = jnp.where(jnp.arange(width) > position[:, None, None], -jnp.inf, scores)
        scores -= jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores)
        outputs = matmul("bhs,bhds->bhd", weights.astype(values.dtype), layer_slice(values, layer, width))
        return jnp.sum(weights, axis=-1, keepdims=True), outputs

    total, outputs = at_read_width(sums, keys.shape[-1], position, width)
    return (outputs / total).astype(q.dtype)


def query_attention(q: jax.Array, keys: jax.Array, values: jax.Array, position: jax.Array) -> jax.Array:
    """Compute `plain.query_attention` as `cached_attention` does."""
    return cached_attention(q, keys[None], values[None], 0, position, keys.shape[-1])


def at_read_width(sums: Callable[[int], Any], capacity: int, position: jax.Array, width: int | None = None) -> Any:
    """Return sums(width) for the smallest of `read_widths` that holds every position, or for a given width."""
    widths = read_widths(capacity) if width is None else [width]
    choice = jnp.sum(jnp.max(position) >= jnp.array(widths[:-1], jnp.int32))
    return jax.lax.switch(choice, [partial(sums, width) for width in widths])


def read_widths(capacity: int) -> list[int]:
    """Return how many positions may be read: an eighth of the capacity (at least 64), twice that, and so on."""
    step = max(64, -(-capacity // 8))
    return [*range(step, capacity, step), capacity]


def layer_slice(cache: jax.Array, layer: jax.Array | int, width: int) -> jax.Array:
    """Return the first `width` positions of one layer of a cache [L, B, H, D, S]: [B, H, D, width]."""
    sizes = (1, *cache.shape[1:4], width)
    return jax.lax.dynamic_slice(cache, (jnp.asarray(layer, int), 0, 0, 0, 0), sizes)[0]


def write_position(cache: jax.Array, new: jax.Array, layer: jax.Array | int, position: jax.Array) -> jax.Array:
    """Return a cache [L, B, H, D, S] with new keys or values, [B, H, D], at the sequences' positions, int32 [B]."""
    if len(position) == 1:  # XLA replaces a slice in fewer kernels than it scatters rows
        start = (jnp.asarray(layer, int), 0, 0, 0, position[0].astype(int))
        return jax.lax.dynamic_update_slice(cache, new[None, ..., None], start)
    return cache.at[layer, jnp.arange(len(position)), :, :, position].set(new)
