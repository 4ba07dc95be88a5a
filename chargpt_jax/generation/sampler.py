"""How the next character is sampled from the model's distribution: temperature, then top_k, then top_p."""

from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from chargpt_jax.config import MAX_TEMPERATURE, argument, shown
from chargpt_jax.errors import UserError

MIN_TEMPERATURE = 1e-6
"""Below it the most likely character is certain in float32, and is chosen: a division by less would overflow."""


@flax.struct.dataclass
class SamplerState:
    """A Sampler with a key, as arrays: one compiled program serves all temperatures, values of k and values of p."""

    key: jax.Array
    """The token at position t of sequence b is sampled with fold_in(fold_in(key, b), t)."""
    temperature: np.float32
    top_k: np.int32
    top_p: np.float32
    use_top_k: bool = flax.struct.field(pytree_node=False)
    use_top_p: bool = flax.struct.field(pytree_node=False)

    @property
    def filters(self) -> bool:
        """Whether some tokens may be excluded. Both filters sort the logits, which a fused kernel cannot do."""
        return self.use_top_k or self.use_top_p

    def gumbel(self, indices: jax.Array, positions: jax.Array, logits: jax.Array) -> jax.Array:
        """Return Gumbel noise for n positions of B sequences: [n, B, V].

        Args:
            indices: int32 [B], of the sequences.
            positions: int32 [n, B].
            logits: [B, V], with the shape and dtype of the logits that the noise will be added to.
        """

        def one(index: jax.Array, position: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(self.key, index), position)
            return jax.random.gumbel(key, logits.shape[1:], logits.dtype)

        return jax.vmap(jax.vmap(one), (None, 0))(indices, positions)

    def sample(self, logits: jax.Array, gumbel: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Sample from the softmax of logits [B, V] with Gumbel noise of the same shape.

        The largest sum of a logit and its Gumbel noise is such a sample: the one of jax.random.categorical.

        Returns:
            The tokens, int32 [B], and the probability with which each was sampled, float32 [B].
        """
        adjusted = self.adjusted(logits)
        noisy = gumbel + adjusted
        tokens = jnp.argmax(jnp.where(self.temperature > 0, noisy, logits), axis=-1).astype(jnp.int32)
        p = jnp.take_along_axis(jax.nn.softmax(adjusted, axis=-1), tokens[:, None], axis=-1)[:, 0]
        return tokens, jnp.where(self.temperature > 0, p, 1.0)

    def adjusted(self, logits: jax.Array) -> jax.Array:
        """Return logits [B, V] whose softmax is sampled from: at the temperature, without excluded tokens."""
        scaled = logits / jnp.where(self.temperature > 0, self.temperature, 1)
        return self.filtered(scaled) if self.filters else scaled

    def filtered(self, logits: jax.Array) -> jax.Array:
        """Set the logits [B, V] of all tokens that top_k and top_p exclude to -inf."""
        if self.use_top_k:
            ranked = jnp.sort(logits, axis=-1)
            smallest = ranked[:, jnp.maximum(logits.shape[-1] - self.top_k, 0)]
            logits = jnp.where(logits < smallest[:, None], -jnp.inf, logits)
        if self.use_top_p:
            ranked = -jnp.sort(-logits, axis=-1)
            p = jax.nn.softmax(ranked, axis=-1)
            before = jnp.cumsum(p, axis=-1) - p  # 0 for the most likely token, which therefore always stays
            smallest = jnp.min(jnp.where(before < self.top_p, ranked, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits < smallest, -jnp.inf, logits)
        return logits


KINDS: dict[str, tuple[type, str]] = {
    "temperature": (float, "try 0.8"),
    "top_k": (int, "leave it out to sample from all"),
    "top_p": (float, "leave it out to sample from all"),
}
"""For each setting of a sampler its type, and what to do about a value of another type."""


@dataclass(frozen=True)
class Sampler:
    """The sampling settings that a user gives."""

    temperature: float = 1.0
    """0: greedy, the most likely character."""
    top_k: int | None = None
    """Sample from the k most likely characters; None: from all."""
    top_p: float | None = None
    """Nucleus sampling: from the fewest most likely characters with total probability of at least p; None: all."""

    def __post_init__(self) -> None:
        """Reject invalid values, in one sentence each; NumPy scalars become Python's numbers."""
        for name, (kind, fix) in KINDS.items():
            if (value := getattr(self, name)) is not None or name == "temperature":
                object.__setattr__(self, name, argument(name, value, kind, fix))
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise UserError(
                f"temperature is {shown(self.temperature)}, but it must be between 0 (greedy) and {MAX_TEMPERATURE:g}: "
                "try 0.8."
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(
                f"top_k is {shown(self.top_k)}, but it must be at least 1: leave it out to sample from all."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(
                f"top_p is {shown(self.top_p)}, but it must be above 0 and at most 1: leave it out to sample from all."
            )

    def with_key(self, key: jax.Array) -> SamplerState:
        """Return the sampler's state for generation with a JAX key."""
        return SamplerState(
            key,
            np.float32(self.temperature if self.temperature >= MIN_TEMPERATURE else 0.0),
            np.int32(min(self.top_k or 0, np.iinfo(np.int32).max)),
            np.float32(max(self.top_p or 1.0, 1e-30)),  # a smaller p would be 0 in float32, which excludes all
            use_top_k=self.top_k is not None,
            use_top_p=self.top_p is not None,
        )
