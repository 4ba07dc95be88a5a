"""Samplers that make tokens less likely which the end of the text has already, prompt included."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from chargpt_jax.generation.samplers.contract import MAX_RECENT, SamplerBase, State, setting, static

BREAKERS = '\n:"*'
"""Characters at which a repetition ends: the sequence breakers of DRY's author."""


def window(default: int) -> Any:
    """Declare the number of last tokens that a penalty looks at."""
    return setting(default, "number of last characters to look at", least=1, most=MAX_RECENT)


def counts(state: State, last_n: jax.Array | int, vocab_size: int) -> jax.Array:
    """Return how often each token is among the last ones, float32 [V]."""
    tokens, given = state.recent(last_n)
    return jnp.zeros(vocab_size).at[tokens].add(given.astype(jnp.float32))


class Penalty(SamplerBase):
    """A penalty that depends on how often a token is among the last ones."""

    last_n: int

    def changed(self, logits: jax.Array, count: jax.Array) -> jax.Array:
        """Return logits with the penalty, float32 [V], for counts of each token."""
        raise NotImplementedError

    def __call__(self, state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        """Change the logits; the number of different tokens that have a penalty is shown."""
        count = counts(state, self.last_n, len(logits))
        return replace(state, shown=jnp.sum(count > 0).astype(jnp.float32)), self.changed(logits, count)

    def top(self) -> float:
        """Return the number of characters, at most 64."""
        return min(64.0, float(self.last_n))


@flax.struct.dataclass
class Repetition(Penalty):
    """Repetition penalty: Keskar et al., 2019 (CTRL), arXiv:1909.05858, with negative logits multiplied."""

    name, series = "repetition", "Characters with a repetition penalty"
    penalty: float = setting(1.1, "a logit is divided by it if positive, multiplied if negative", above=0.0)
    last_n: int = window(64)

    def changed(self, logits: jax.Array, count: jax.Array) -> jax.Array:
        """Return l / penalty if l > 0, otherwise l penalty, for tokens that were there."""
        changed = jnp.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return jnp.where(count > 0, changed, logits)


@flax.struct.dataclass
class Presence(Penalty):
    """Presence penalty of OpenAI's API: l - penalty for tokens that were there."""

    name, series = "presence", "Characters with a presence penalty"
    penalty: float = setting(0.5, "is subtracted from the logit", least=-100.0, most=100.0)
    last_n: int = window(64)

    def changed(self, logits: jax.Array, count: jax.Array) -> jax.Array:
        """Return l - penalty if count > 0."""
        return logits - self.penalty * (count > 0)


@flax.struct.dataclass
class Frequency(Penalty):
    """Frequency penalty of OpenAI's API: l - penalty count."""

    name, series = "frequency", "Characters with a frequency penalty"
    penalty: float = setting(0.1, "is subtracted from the logit once per occurrence", least=-100.0, most=100.0)
    last_n: int = window(64)

    def changed(self, logits: jax.Array, count: jax.Array) -> jax.Array:
        """Return l - penalty count."""
        return logits - self.penalty * count


@flax.struct.dataclass
class DRY(SamplerBase):
    """Don't repeat yourself: a penalty for the token that would continue a repetition.

    p-e-w, 2024 (text-generation-webui pull request 5677; llama.cpp). If the last n characters stand earlier in the
    text, and a token follows them there, with the largest such n,

        l := l - multiplier base^(n - allowed_length)    if n >= allowed_length

    A repetition does not reach over a breaker, and breakers have no penalty. The defaults are for characters, not for
    the longer tokens of other models.
    """

    name, series = "dry", "DRY: repeated characters"
    multiplier: float = setting(0.8, "penalty of the shortest repetition that has one", least=0.0, most=1000.0)
    base: float = setting(1.2, "factor for each further repeated character", least=1.0, most=100.0)
    allowed_length: int = setting(12, "repeated characters up to which there is no penalty", least=1, most=MAX_RECENT)
    last_n: int = window(MAX_RECENT)
    breakers: str = static(BREAKERS, "characters at which a repetition ends")
    breaks: Any = flax.struct.field(default=None)
    """bool [V]: breakers; set by `bound`."""

    def __call__(self, state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        """Subtract the penalty from the tokens that would continue a repetition."""
        tokens, given = state.recent(self.last_n)
        lengths = repeated(tokens, given, self.breaks[tokens] & given)
        # Position j continues the repetition that ends before it; the token there would repeat it.
        longest = jnp.zeros(len(logits), jnp.int32).at[tokens[1:]].max(jnp.where(given[1:], lengths[:-1], 0))
        exponent = jnp.minimum(longest - self.allowed_length, 88.0 / jnp.maximum(jnp.log(self.base), 1e-6))
        penalty = self.multiplier * self.base**exponent
        excess = jnp.where((longest >= self.allowed_length) & ~self.breaks, penalty, 0)
        return replace(state, shown=jnp.max(longest).astype(jnp.float32)), logits - jnp.minimum(excess, 1e30)

    def top(self) -> float:
        """Return twice the length up to which there is no penalty."""
        return 2.0 * float(self.allowed_length)

    def bound(self, characters: Sequence[str], vocab_size: int) -> Self:
        """Return the sampler for a vocabulary."""
        breaks = np.zeros(vocab_size, bool)
        for i, character in enumerate(characters):
            breaks[i] = character != "" and character in self.breakers
        return replace(super().bound(characters, vocab_size), breaks=jnp.asarray(breaks))


def repeated(tokens: jax.Array, given: jax.Array, breaks: jax.Array) -> jax.Array:
    """Return for each position how many tokens up to it are those at the end of the text, int32 [W].

    The last position, where all are, has 0.

    Args:
        tokens: int32 [W].
        given: bool [W]: which are text.
        breaks: bool [W]: at which a repetition ends; it starts behind the last one.
    """
    W = len(tokens)
    back = jnp.arange(W - 1, -1, -1)
    limit = jnp.min(jnp.where(breaks, back, W))

    def unfinished(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        n, equal, _ = carry
        return (n < limit) & jnp.any(equal)

    def compare(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        n, equal, lengths = carry
        earlier = jnp.arange(W) - n
        there = (earlier >= 0) & given[jnp.maximum(earlier, 0)]
        equal = equal & there & (tokens[jnp.maximum(earlier, 0)] == tokens[jnp.maximum(W - 1 - n, 0)])
        return n + 1, equal, lengths + equal

    start = jnp.int32(0), given & (back > 0), jnp.zeros(W, jnp.int32)
    return jax.lax.while_loop(unfinished, compare, start)[2]
