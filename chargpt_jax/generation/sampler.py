"""How the next character is sampled: a chain of samplers adjusts the model's logits, Gumbel noise chooses a token.

Without a chain of the user's own: temperature, then top_k, then top_p. `samplers/` has the samplers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from chargpt_jax.config.sections import MAX_TEMPERATURE, SampleConfig
from chargpt_jax.config.values import argument, shown
from chargpt_jax.errors import UserError
from chargpt_jax.generation.samplers.chain import Chain, Given, chain_of
from chargpt_jax.generation.samplers.contract import SamplerBase, State
from chargpt_jax.generation.samplers.filters import TopK, TopP
from chargpt_jax.generation.samplers.stop import StopStrings
from chargpt_jax.generation.samplers.temperatures import Temperature
from chargpt_jax.model.gpt import MASKED

INDIFFERENT = (Temperature, TopK, TopP)
"""Samplers to which the model's logit of an unused id, `MASKED`, means what -inf means: it is excluded."""

OF_SAMPLERS = 2**32 - 1
"""Random keys of samplers are derived from this number, those of the Gumbel noise from a sequence's index."""


@flax.struct.dataclass
class SamplerState:
    """A Sampler with a key, as arrays: one compiled program serves all values of a chain's settings."""

    key: jax.Array
    """The token at position t of sequence b is sampled with fold_in(fold_in(key, b), t)."""
    chain: Chain
    stop: StopStrings | None = None
    """Where a text ends; None: at its length."""

    @property
    def sorts(self) -> bool:
        """Whether the chain needs operations that one fused kernel cannot contain."""
        return self.chain.sorts

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

    def states(self, indices: jax.Array, tokens: jax.Array, length: jax.Array, memory: Any = ()) -> State:
        """Return the states of B sequences before their next tokens.

        Args:
            indices: int32 [B], of the sequences.
            tokens: int32 [B, N].
            length: int32 [B].
            memory: of the chain, a tree of arrays [B, ...].
        """
        own = jax.random.fold_in(self.key, OF_SAMPLERS)
        keys = jax.vmap(lambda b, t: jax.random.fold_in(jax.random.fold_in(own, b), t))(indices, length)
        return State(tokens, length, keys, memory)

    def sample(self, states: State, logits: jax.Array, gumbel: jax.Array) -> tuple[State, jax.Array, jax.Array]:
        """Sample from the softmax of the logits [B, V] that the chain returns, with Gumbel noise of the same shape.

        The largest sum of a logit and its Gumbel noise is such a sample: the one of jax.random.categorical.

        Returns:
            The states, the tokens, int32 [B], and the probability with which each was sampled, float32 [B].
        """
        if not all(isinstance(sampler, INDIFFERENT) for sampler in self.chain.samplers):
            logits = jnp.where(logits <= MASKED, -jnp.inf, logits)
        states, adjusted = jax.vmap(self.chain)(states, logits)
        random = self.chain.random()
        noisy = gumbel + adjusted
        tokens = jnp.argmax(jnp.where(random, noisy, adjusted), axis=-1).astype(jnp.int32)
        p = jnp.take_along_axis(jax.nn.softmax(adjusted, axis=-1), tokens[:, None], axis=-1)[:, 0]
        return states, tokens, jnp.where(random, p, 1.0)

    def first(self, tokens: jax.Array, vocab_size: int) -> tuple[Any, dict[str, jax.Array]]:
        """Return the memory of B sequences before their first tokens, and an empty series of what the chain shows.

        Args:
            tokens: int32 [B, N].
            vocab_size: V.

        Returns:
            A tree of arrays [B, ...]; and by name float32 [B, N], NaN.
        """
        B, N = tokens.shape
        memory = self.chain.first(vocab_size)
        if not memory and not any(sampler.series for sampler in self.chain.samplers):
            return memory, {}  # tracing the chain would take as long as 50 characters of a small model
        scalar, key = jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(jax.random.fold_in, self.key, 0)
        text, logits = jax.ShapeDtypeStruct((N,), jnp.int32), jax.ShapeDtypeStruct((vocab_size,), jnp.float32)
        after, _ = jax.eval_shape(lambda x, *parts: self.chain(State(*parts), x), logits, text, scalar, key, memory)
        series = {name: jnp.full((B, N), jnp.nan) for name in after.shown}
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (B, *jnp.shape(x))), memory), series


KINDS: dict[str, tuple[type, str]] = {
    "temperature": (float, "try 0.8"),
    "top_k": (int, "leave it out to sample from all"),
    "top_p": (float, "leave it out to sample from all"),
}
"""For each setting of a sampler its type, and what to do about a value of another type."""


@dataclass(frozen=True)
class Sampler:
    """The sampling settings that a user gives: a chain of samplers, or the three settings before it."""

    temperature: float = 1.0
    """0: greedy, the most likely character."""
    top_k: int | None = None
    """Sample from the k most likely characters; None: from all."""
    top_p: float | None = None
    """Nucleus sampling: from the fewest most likely characters with total probability of at least p; None: all."""

    chain: Given | Iterable[Given] | None = None
    """Samplers in their order, as `chain_of` reads them; None: temperature, then top_k, then top_p."""

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
        if self.chain is not None:
            given = [name for name in KINDS if getattr(self, name) != getattr(type(self), name)]
            if given:
                raise UserError(
                    f"sampler and {given[0]} are both given, but a chain of samplers has its own settings: write "
                    f"{given[0]} into the chain, or leave one of them out."
                )
            object.__setattr__(self, "chain", chain_of(self.chain))

    @classmethod
    def of(cls, how: SampleConfig) -> "Sampler":
        """Return the sampling settings of a config: its chain of samplers, or its three settings.

        Raises:
            UserError: if the chain is invalid; the message names the field.
        """
        if not how.sampler:
            return cls(how.temperature, how.top_k, how.top_p)
        try:
            return cls(chain=how.sampler)
        except UserError as error:
            of_chain = str(error).startswith("sampler ")
            raise UserError(f"{'sample.' if of_chain else 'In sample.sampler, '}{error}") from None

    @property
    def samplers(self) -> Chain:
        """The chain of samplers."""
        if isinstance(self.chain, Chain):
            return self.chain
        found: list[SamplerBase] = [Temperature(self.temperature)]
        found += [] if self.top_k is None else [TopK(self.top_k)]
        found += [] if self.top_p is None else [TopP(self.top_p)]
        return Chain(tuple(found))

    def with_key(
        self, key: jax.Array, characters: Sequence[str] = (), vocab_size: int = 0, stop: Sequence[np.ndarray] = ()
    ) -> SamplerState:
        """Return the sampler's state for generation.

        Args:
            key: of JAX.
            characters: of the token ids, which some samplers need; '' for an id without one.
            vocab_size: V, if `characters` are given.
            stop: token ids of the stop strings, int32 [M] each.
        """
        return SamplerState(key, self.samplers.bound(characters, vocab_size), StopStrings.of(stop) if stop else None)
