"""One query a sequence against the keys and values that are kept of it: attention when texts are written in turn.

Keys and values are [L, B, H, D, S] each: those of a place lie apart, so that a CPU reads along S.
"""

from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from chargpt_jax.devices.platform import on_cpu
from chargpt_jax.ops.matmul import product


@flax.struct.dataclass
class Rows:
    """Keys and values of every layer of a batch of texts, which are written by a character in turn."""

    keys: jax.Array
    """[L, B, H, D, S]."""
    values: jax.Array
    """The same."""

    @classmethod
    def of(cls, keys: jax.Array, values: jax.Array) -> "Rows":
        """Keep the keys and values of the first T places, [L, B, H, D, T] each."""
        return cls(keys, values)

    def enlarged(self, capacity: int) -> "Rows":
        """Return these with room for `capacity` places, which may not be fewer than there are."""
        room = [(0, 0)] * 4 + [(0, capacity - self.keys.shape[-1])]
        return jax.tree.map(lambda x: jnp.pad(x, room), self)

    def put(self, k: jax.Array, v: jax.Array, layer: jax.Array, position: jax.Array) -> "Rows":
        """Return these with new keys and values, [B, H, D] each, at the positions, int32 [B]."""
        return Rows(with_place(self.keys, k, layer, position), with_place(self.values, v, layer, position))

    def attend(self, q: jax.Array, layer: jax.Array, position: jax.Array, platform: str | None = None) -> jax.Array:
        """Attend as `cached_attention` does."""
        return cached_attention(q, self.keys, self.values, layer, position, platform)


def cached_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array | int,
    position: jax.Array,
    platform: str | None = None,
    width: int | None = None,
) -> jax.Array:
    """Attend from one query a sequence to the keys up to its position.

    Args:
        q: [B, H, D].
        keys, values: [L, B, H, D, S], the whole cache, of which places 0 to position are filled. (A CPU reads it
            fastest along S.)
        layer: which of the L, an int32 scalar or a number.
        position: int32 [B].
        platform: that the program is made for, 'cpu' or another; None: JAX's default.
        width: how many places are read; None: as many of `read_widths` as hold every position.

    Returns:
        [B, H, D], of q's dtype.
    """
    cpu = on_cpu(platform)
    ways = (_summed_scores, _summed_outputs, _summed) if cpu else (_scores_of, _outputs_of, _sum)
    scores_of, outputs_of, total_of = ways

    def sums(width: int, shifted: bool) -> tuple[jax.Array, jax.Array]:
        """Return the sum of the weights, [B, H, 1], and of the values times them, [B, H, D]."""
        scores = scores_of(q, _Cached(keys, layer, width)) * q.shape[-1] ** -0.5
        scores = jnp.where(jnp.arange(width) > position[:, None, None], -jnp.inf, scores)
        if shifted:
            scores -= jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores)
        return total_of(weights), outputs_of(weights, _Cached(values, layer, width))

    widths = read_widths(keys.shape[-1]) if width is None else [width]
    number = jnp.sum(jnp.max(position) >= jnp.array(widths[:-1], jnp.int32))
    total, outputs = jax.lax.switch(number, [partial(sums, width, not cpu) for width in widths])
    if cpu:
        total, outputs = _unless_out_of_range(total, outputs, partial(sums, widths[-1], shifted=True))
    return (outputs / total).astype(q.dtype)


def _unless_out_of_range(
    total: jax.Array, outputs: jax.Array, shifted: Callable[[], tuple[jax.Array, jax.Array]]
) -> tuple[jax.Array, jax.Array]:
    """Return sums made of exp(score), or of exp(score - the largest) for the queries where the former say nothing.

    Whatever is taken from all scores, their softmax is the same. To take the largest a CPU would have to go through
    the keys twice, so it does where it must: where a sum leaves the middle of its dtype's range (in float32 where the
    largest score is beyond some 40), since there single weights may have left the whole of it.
    """
    sound = in_range(total)

    def again() -> tuple[jax.Array, jax.Array]:
        return jax.tree.map(partial(jnp.where, sound), (total, outputs), shifted())

    return jax.lax.cond(jnp.all(sound), lambda: (total, outputs), again)


def in_range(total: jax.Array) -> jax.Array:
    """Say of each sum of weights exp(score) whether it lies in the middle of its dtype's range."""
    most = float(jnp.finfo(total.dtype).max) ** 0.5
    return (total > 1 / most) & (total < most)


def with_place(cache: jax.Array, new: jax.Array, layer: jax.Array | int, position: jax.Array) -> jax.Array:
    """Return a cache [L, B, H, D, S] with new keys or values, [B, H, D], at the sequences' positions, int32 [B]."""
    if len(position) == 1:  # a slice, which XLA replaces in fewer kernels than it scatters rows
        start = (jnp.asarray(layer, int), 0, 0, 0, position[0].astype(int))
        return jax.lax.dynamic_update_slice(cache, new[None, ..., None], start)
    return cache.at[layer, jnp.arange(len(position)), :, :, position].set(new)


class _Cached(NamedTuple):
    """The first `width` places of one layer of a cache [L, B, H, D, S], and its parts."""

    cache: jax.Array
    layer: jax.Array | int
    width: int

    def whole(self) -> jax.Array:
        """Return [B, H, D, width]."""
        return self._part(0, 0, self.cache.shape[3], self.width)

    def channels(self) -> Iterator[jax.Array]:
        """Return [B, H, width] for each of D."""
        return (self._part(d, 0, 1, self.width)[:, :, 0] for d in range(self.cache.shape[3]))

    def stretches(self, length: int) -> Iterator[jax.Array]:
        """Return [B, H, D, length], one after the other."""
        return (self._part(0, start, self.cache.shape[3], length) for start in range(0, self.width, length))

    def _part(self, d: int, s: int, channels: int, places: int) -> jax.Array:
        """Return [B, H, channels, places]."""
        sizes = (1, *self.cache.shape[1:3], channels, places)
        return jax.lax.dynamic_slice(self.cache, (jnp.asarray(self.layer, int), 0, 0, d, s), sizes)[0]


def _scores_of(q: jax.Array, keys: _Cached) -> jax.Array:
    return product("bhd,bhds->bhs", q, keys.whole())


def _outputs_of(weights: jax.Array, values: _Cached) -> jax.Array:
    return product("bhs,bhds->bhd", weights.astype(values.cache.dtype), values.whole())


def _sum(weights: jax.Array) -> jax.Array:
    return jnp.sum(weights, axis=-1, keepdims=True)


# A CPU would copy what it multiplies out of the cache, and call a product for each head of each sequence. With the sums
# written out, one pass over the keys makes all weights, and one over the values all outputs.


def _summed_scores(q: jax.Array, keys: _Cached) -> jax.Array:
    wide = jnp.promote_types(q.dtype, jnp.float32)
    terms = (q[:, :, d, None].astype(wide) * k.astype(wide) for d, k in enumerate(keys.channels()))
    return reduce(jnp.add, terms)


def _summed_outputs(weights: jax.Array, values: _Cached) -> jax.Array:
    parts = _stretches(weights)
    length = parts[0].shape[-1]
    terms = (w[:, :, None] * v.astype(w.dtype) for w, v in zip(parts, values.stretches(length), strict=True))
    return reduce(jnp.add, terms) @ jnp.ones(length, weights.dtype)


def _summed(weights: jax.Array) -> jax.Array:
    parts = _stretches(weights)
    return reduce(jnp.add, parts) @ jnp.ones((parts[0].shape[-1], 1), weights.dtype)


def _stretches(x: jax.Array) -> list[jax.Array]:
    """Cut [B, H, S] along S into equal parts: as many as give each a few vectors, 32 numbers or more, up to 16."""
    count = max(n for n in range(1, 17) if n == 1 or x.shape[-1] % (32 * n) == 0)
    return jnp.split(x, count, axis=-1)


def read_widths(capacity: int) -> list[int]:
    """Return how much of a cache may be read at once: an eighth of it or 64 places, twice that, three times, ..."""
    step = max(64, -(-capacity // 8))
    return [*range(step, capacity, step), capacity]
