"""One query a sequence against the keys and values that are kept of it: attention when writing.

A cache is keys or values, [L, B, H, D, S]: those of a place lie apart, so that a CPU reads along S.
"""

from collections.abc import Iterator
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp

from chargpt_jax.devices import on_cpu
from chargpt_jax.products import product


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
    scores_of, outputs_of = (_summed_scores, _summed_outputs) if cpu else (_scores_of, _outputs_of)
    # Of several sequences XLA's library for CPUs takes the largest scores; where it does not, XLA would make them anew
    # for this, which is dear where heads are wide.
    stretched = cpu and q.shape[0] == 1 and q.shape[-1] <= 32
    largest = _stretched_max if stretched else partial(jnp.max, axis=-1, keepdims=True)

    def up_to(width: int) -> jax.Array:
        scores = scores_of(q, _Cached(keys, layer, width)) * q.shape[-1] ** -0.5
        masked = jnp.where(jnp.arange(width) > position[:, None, None], -jnp.inf, scores)
        weights = jnp.exp(masked - largest(masked))
        outputs = outputs_of(weights.astype(values.dtype), _Cached(values, layer, width))
        return (outputs / jnp.sum(weights, axis=-1, keepdims=True)).astype(q.dtype)

    if width is not None:
        return up_to(width)
    widths = read_widths(keys.shape[-1])
    number = jnp.sum(jnp.max(position) >= jnp.array(widths[:-1], jnp.int32))
    return jax.lax.switch(number, [partial(up_to, width) for width in widths])


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
        return jax.lax.dynamic_slice(self.cache, (self.layer, 0, 0, d, s), sizes)[0]


def _scores_of(q: jax.Array, keys: _Cached) -> jax.Array:
    return product("bhd,bhds->bhs", q, keys.whole())


def _outputs_of(weights: jax.Array, values: _Cached) -> jax.Array:
    return product("bhs,bhds->bhd", weights, values.whole())


# A CPU would copy what it multiplies out of the cache, and call a product for each head of each sequence. With the sums
# written out, one pass over the cache makes all scores, and another all outputs: a third of the time in large batches.


def _summed_scores(q: jax.Array, keys: _Cached) -> jax.Array:
    wide = jnp.promote_types(q.dtype, jnp.float32)
    terms = (q[:, :, d, None].astype(wide) * k.astype(wide) for d, k in enumerate(keys.channels()))
    return reduce(jnp.add, terms)


def _summed_outputs(weights: jax.Array, values: _Cached) -> jax.Array:
    wide = jnp.promote_types(weights.dtype, jnp.float32)
    parts = _stretches(weights)
    length = parts[0].shape[-1]
    terms = (w[:, :, None].astype(wide) * v.astype(wide) for w, v in zip(parts, values.stretches(length), strict=True))
    return reduce(jnp.add, terms) @ jnp.ones(length, wide)


def _stretched_max(scores: jax.Array) -> jax.Array:
    """Return the largest of each row of [B, H, S], [B, H, 1]: of up to 32 numbers a row, XLA takes several at once."""
    while len(parts := _stretches(scores)) > 1:
        scores = reduce(jnp.maximum, parts)
    return jnp.max(scores, axis=-1, keepdims=True)


def _stretches(x: jax.Array) -> list[jax.Array]:
    """Cut [B, H, S] along S into equal parts: as many as give each a few vectors, 32 numbers or more, up to 16."""
    count = max(n for n in range(1, 17) if n == 1 or x.shape[-1] % (32 * n) == 0)
    return jnp.split(x, count, axis=-1)


def read_widths(capacity: int) -> list[int]:
    """Return how much of a cache may be read at once: an eighth of it or 64 places, twice that, three times, ..."""
    step = max(64, -(-capacity // 8))
    return [*range(step, capacity, step), capacity]
