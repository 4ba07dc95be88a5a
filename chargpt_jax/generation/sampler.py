"""How the next character is drawn from the model's distribution: temperature, then top_k, then top_p."""

from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from chargpt_jax.config import MAX_TEMPERATURE
from chargpt_jax.errors import UserError

LEAST_TEMPERATURE = 1e-6
"""Below it the likeliest character is as good as certain, and is taken: a division by less would overflow."""


@flax.struct.dataclass
class Drawing:
    """A Sampler with a key, as compiled programs take it: they serve all of its numbers, and each pair of its flags."""

    key: jax.Array
    """Row b's token at place t is drawn with fold_in(fold_in(key, b), t)."""
    temperature: Any
    """float32 scalar."""
    top_k: Any
    """int32 scalar."""
    top_p: Any
    """float32 scalar."""
    use_top_k: bool = flax.struct.field(pytree_node=False)
    use_top_p: bool = flax.struct.field(pytree_node=False)

    @property
    def sorts(self) -> bool:
        """Whether logits are sorted."""
        return self.use_top_k or self.use_top_p

    def noise(self, numbers: jax.Array, places: jax.Array, logits: jax.Array) -> jax.Array:
        """Return the noise for each of n places, int32 [n, B], of rows with these numbers, int32 [B]: [n, B, V].

        `logits` have the shape, [B, V], and dtype of those that it will be added to.
        """

        def one(number: jax.Array, place: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(self.key, number), place)
            return jax.random.gumbel(key, logits.shape[1:], logits.dtype)

        return jax.vmap(jax.vmap(one), (None, 0))(numbers, places)

    def tokens(self, logits: jax.Array, noise: jax.Array) -> jax.Array:
        """Draw from the softmax of logits [B, V], with noise of the same shape: int32 [B].

        The largest of logits with Gumbel's noise is such a draw, the one of jax.random.categorical.
        """
        scaled = logits / jnp.where(self.temperature > 0, self.temperature, 1)
        noisy = noise + (self.filtered(scaled) if self.sorts else scaled)
        return jnp.argmax(jnp.where(self.temperature > 0, noisy, logits), axis=-1).astype(jnp.int32)

    def filtered(self, logits: jax.Array) -> jax.Array:
        """Put all but the allowed tokens of logits [B, V] at -inf."""
        if self.use_top_k:
            ranked = jnp.sort(logits, axis=-1)
            least = ranked[:, jnp.maximum(logits.shape[-1] - self.top_k, 0)]
            logits = jnp.where(logits < least[:, None], -jnp.inf, logits)
        if self.use_top_p:
            ranked = -jnp.sort(-logits, axis=-1)
            p = jax.nn.softmax(ranked, axis=-1)
            before = jnp.cumsum(p, axis=-1) - p  # the likeliest always stays: nothing comes before it
            least = jnp.min(jnp.where(before < self.top_p, ranked, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return logits


@dataclass(frozen=True)
class Sampler:
    """What a user asks for."""

    temperature: float = 1.0
    """0 takes the likeliest character."""
    top_k: int | None = None
    """Draw among the k likeliest; None: among all."""
    top_p: float | None = None
    """Draw among the fewest of the likeliest whose mass is at least p; None: among all."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning, in one sentence each."""
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise UserError(
                f"temperature is {self.temperature}, but it must be between 0 (greedy) and {MAX_TEMPERATURE:g}: "
                "try 0.8."
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}, but it must be at least 1: leave it out to draw among all.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(
                f"top_p is {self.top_p}, but it must be above 0 and at most 1: leave it out to draw among all."
            )

    def with_key(self, key: jax.Array) -> Drawing:
        """Return what draws so, with a key of JAX."""
        return Drawing(
            key,
            np.float32(self.temperature if self.temperature >= LEAST_TEMPERATURE else 0.0),
            np.int32(min(self.top_k or 0, np.iinfo(np.int32).max)),
            np.float32(max(self.top_p or 1.0, 1e-30)),  # float32 would make 0 of less, which holds nothing
            use_top_k=self.top_k is not None,
            use_top_p=self.top_p is not None,
        )
