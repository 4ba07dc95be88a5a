"""The keys and values of texts that are written alone, and attention to them inside one kernel.

They lie by blocks of 32 places: what a query needs is one stretch of memory, read from its start to the query's own
block, and a loop over blocks costs nothing in one kernel.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from chargpt_jax.ops.kv_cache import in_range

BLOCK, LANES = 32, 16
"""Places in a block, and how many sums are kept of each channel: the numbers in a vector of the widest CPUs.

Of fewer places XLA makes no loop over vectors, and of more most are read for nothing at the start of a text.
"""


@flax.struct.dataclass
class Blocks:
    """Keys and values of every layer of a text, or of several: then layer l of text b of B is at l B + b."""

    keys: jax.Array
    """[L B, S / 32, H, D, 32], or [L, B, S / 32, H, D, 32] while nothing is written."""
    values: jax.Array
    """The same."""

    @classmethod
    def of(cls, keys: jax.Array, values: jax.Array) -> "Blocks":
        """Keep the keys and values of the first T places, [L, B, H, D, T] each."""

        def blocks(x: jax.Array) -> jax.Array:
            x = jnp.pad(x, ((0, 0),) * 4 + ((0, -x.shape[-1] % BLOCK),))
            return jnp.moveaxis(x.reshape(*x.shape[:-1], -1, BLOCK), 4, 2)

        return cls(blocks(keys), blocks(values))

    def enlarged(self, capacity: int) -> "Blocks":
        """Return these with room for `capacity` places, which may not be fewer than there are.

        Two blocks at least: where there is one, XLA copies the whole for every character.
        """
        room = max(2, -(-capacity // BLOCK)) - self.keys.shape[-4]
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0),) * (x.ndim - 4) + ((0, room), *((0, 0),) * 3)), self)

    def only(self, text: jax.Array) -> "Blocks":
        """Return those of one text, [L, S / 32, H, D, 32], of [L, B, S / 32, H, D, 32]."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, text, 1, keepdims=False), self)

    def begun_with(self, start: "Blocks") -> "Blocks":
        """Return these with another text's in the place of the first.

        What is left behind them of a text before is not cleared: it weighs nothing until it is replaced.
        """
        return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice(x, new, (0,) * 5), self, start)

    def put(self, k: jax.Array, v: jax.Array, layer: jax.Array, position: jax.Array) -> "Blocks":
        """Return these with a new key and value, [1, H, D] each, at the position, int32 [1]."""
        block, place = jnp.divmod(position[0].astype(int), BLOCK)

        def with_place(x: jax.Array, new: jax.Array) -> jax.Array:
            start = (jnp.asarray(layer, int), block, 0, 0, place)
            return jax.lax.dynamic_update_slice(x, new[:, None, ..., None], start)

        return Blocks(with_place(self.keys, k), with_place(self.values, v))

    def attend(self, q: jax.Array, layer: jax.Array, position: jax.Array, platform: str | None = None) -> jax.Array:
        """Attend from one query, [1, H, D], to the places up to its position, int32 [1]: [1, H, D] of q's dtype."""
        dtype = jnp.promote_types(q.dtype, jnp.float32)
        query = _Query(self, jnp.asarray(layer, int), q[0].astype(dtype) * q.shape[-1] ** -0.5, position[0].astype(int))
        total, outputs = query.sums()
        # Whatever is taken from all scores, their softmax is the same: nothing, where no weight leaves its range so.
        in_one_go = jnp.all(in_range(total))
        total, outputs = jax.lax.cond(in_one_go, lambda: (total, outputs), lambda: query.sums(query.largest_scores()))
        return (outputs / total[:, None]).astype(q.dtype)[None]


class _Query(NamedTuple):
    """A query, [H, D], with what its scores are scaled by in it, and what it attends to: places 0 to `last`."""

    blocks: Blocks
    layer: jax.Array
    q: jax.Array
    last: jax.Array

    def sums(self, shift: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Return the sum of the weights exp(score - shift), [H], and of the values times them, [H, D]."""
        H, D = self.q.shape

        def of(number: jax.Array) -> tuple[jax.Array, jax.Array]:
            scores = self._scores(number)
            weights = jnp.exp(scores if shift is None else scores - shift)
            lanes = (jnp.split(x, BLOCK // LANES, axis=-1) for x in (weights, self._block(self.blocks.values, number)))
            terms = (w[:, None] * v for w, v in zip(*lanes, strict=True))
            return weights, reduce(jnp.add, terms)

        total, outputs = self._over(of, jnp.add)
        ones = jnp.ones(BLOCK, self.q.dtype)
        return total @ ones, (outputs.reshape(-1, LANES) @ ones[:LANES]).reshape(H, D)

    def largest_scores(self) -> jax.Array:
        """Return [H, 1]."""
        largest = self._over(self._scores, jnp.maximum)
        while largest.shape[-1] > 1:  # a reduction might be left to a library, which one kernel can't hold
            largest = jnp.maximum(*jnp.split(largest, 2, axis=-1))
        return largest

    def _scores(self, number: jax.Array) -> jax.Array:
        """Return those of a block's places, [H, 32]; beyond the last place, -inf."""
        k = self._block(self.blocks.keys, number)
        sums = reduce(jnp.add, (self.q[:, d, None] * k[:, d] for d in range(k.shape[1])))
        return jnp.where(number * BLOCK + jnp.arange(BLOCK) > self.last, -jnp.inf, sums)

    def _over(self, of: Callable[[jax.Array], Any], join: Callable[[jax.Array, jax.Array], jax.Array]) -> Any:
        """Join of(number), a tree of arrays, of one block after the other."""

        def step(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            number, found = carry
            return number + 1, jax.tree.map(join, found, of(number))

        begun = jnp.ones((), int), of(jnp.zeros((), int))  # nothing to join with would first be written to memory
        return jax.lax.while_loop(lambda carry: carry[0] * BLOCK <= self.last, step, begun)[1]

    def _block(self, x: jax.Array, number: jax.Array) -> jax.Array:
        """Return [H, D, 32]."""
        return jax.lax.dynamic_slice(x, (self.layer, number, 0, 0, 0), (1, 1, *x.shape[2:]))[0, 0].astype(self.q.dtype)
