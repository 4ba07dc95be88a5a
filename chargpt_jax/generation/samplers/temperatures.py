"""Samplers that divide the logits by a temperature: below 1 likely tokens become more likely, above 1 less.

H is the entropy of the softmax of the logits that a sampler gets, in nats.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from chargpt_jax.config.sections import MAX_TEMPERATURE
from chargpt_jax.generation.samplers.contract import SamplerBase, State, as_array, entropy, log_probabilities, setting

MIN_TEMPERATURE = 1e-6
"""Below it the most likely character is certain in float32, and is chosen: a division by less would overflow."""

APOSTROPHES = "'\u2019"


def heated(state: State, logits: jax.Array, temperature: jax.Array) -> tuple[State, jax.Array]:
    """Divide by a temperature, and show it."""
    temperature = jnp.maximum(temperature, MIN_TEMPERATURE)
    return replace(state, shown=temperature), logits / temperature


@flax.struct.dataclass
class Temperature(SamplerBase):
    """The same temperature everywhere; 0: the most likely token of the whole chain's logits is chosen (greedy)."""

    name, sorts = "temperature", False
    temperature: float = setting(1.0, "temperature; 0: greedy", least=0.0, most=MAX_TEMPERATURE)

    def __call__(self, state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        """Return l / T."""
        return state, logits / jnp.where(self.temperature > 0, self.temperature, 1)

    def bound(self, characters: Sequence[str], vocab_size: int) -> Self:
        """Return the sampler with an array; a temperature that is too small for a division becomes 0."""
        large = self.temperature >= MIN_TEMPERATURE
        return replace(super().bound(characters, vocab_size), temperature=as_array(self.temperature if large else 0.0))


@flax.struct.dataclass
class DynamicTemperature(SamplerBase):
    """A temperature that grows with the entropy, from `low` if the model is certain to `high` if it is uniform.

    kalomaze, 2023 (koboldcpp; llama.cpp, `temp_ext`).
    """

    name, series = "dynatemp", "Temperature (dynatemp)"
    low: float = setting(0.5, "temperature at an entropy of 0", least=0.0, most=MAX_TEMPERATURE)
    high: float = setting(1.5, "temperature at the largest possible entropy", least=0.0, most=MAX_TEMPERATURE)
    exponent: float = setting(1.0, "of the entropy as a fraction of the largest possible one", above=0.0, most=100.0)

    def __call__(self, state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        """T = low + (high - low) (H / ln n)^exponent; n is the number of tokens that are not excluded."""
        highest = jnp.log(jnp.maximum(jnp.sum(jnp.isfinite(logits)), 2))
        part = jnp.clip(entropy(*log_probabilities(logits)) / highest, 0, 1)
        return heated(state, logits, self.low + (self.high - self.low) * part**self.exponent)

    def top(self) -> float:
        """Return the larger temperature."""
        return max(float(self.low), float(self.high))


@flax.struct.dataclass
class EDT(SamplerBase):
    """Entropy-based dynamic temperature: lower if the model is sure (Zhang et al., 2024, arXiv:2403.14541)."""

    name, series = "edt", "Temperature (EDT)"
    temperature: float = setting(1.0, "temperature at a large entropy", above=0.0, most=MAX_TEMPERATURE)
    theta: float = setting(1.0, "strength: at an entropy of theta nats the temperature is 0.8 of it", least=0.0)

    def __call__(self, state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        """T = T0 0.8^(theta / H)."""
        H = jnp.maximum(entropy(*log_probabilities(logits)), 1e-30)
        return heated(state, logits, self.temperature * 0.8 ** (self.theta / H))

    def top(self) -> float:
        """Return the largest temperature."""
        return float(self.temperature)


@flax.struct.dataclass
class Budget(SamplerBase):
    """Temperature as a resource: a budget that unlikely tokens spend and likely ones refill.

    The budget b has a number of nats, at first the full capacity c. A token with surprisal i, where the entropy was H,
    changes it by H - i, within 0 and c; i and H are of the logits that this sampler gets. The temperature is

        T = low + (high - low) b / c

    At T = 1 the expected change is 0. Above 1 the budget is spent, and below 1 it is refilled.
    """

    name, series = "budget", "Budget, nats"
    capacity: float = setting(10.0, "largest budget, nats", above=0.0)
    low: float = setting(0.4, "temperature at an empty budget", least=0.0, most=MAX_TEMPERATURE)
    high: float = setting(1.3, "temperature at a full budget", least=0.0, most=MAX_TEMPERATURE)

    def __call__(self, state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        """Change the budget by the last token, then divide by its temperature."""
        budget, change = state.memory
        budget = jnp.clip(budget + change[state.last], 0, self.capacity)
        log_p, p = log_probabilities(logits)
        _, scaled = heated(state, logits, self.low + (self.high - self.low) * budget / self.capacity)
        return replace(state, memory=(budget, entropy(log_p, p) + log_p), shown=budget), scaled

    def first(self, vocab_size: int) -> Any:
        """Return the full budget, and the change of it by each token that was sampled before: none."""
        return jnp.float32(self.capacity), jnp.zeros(vocab_size)

    def top(self) -> float:
        """Return the capacity."""
        return float(self.capacity)


@flax.struct.dataclass
class WordStart(SamplerBase):
    """A lower temperature after a word's first letter: words are chosen freely and then spelled carefully.

    A word is a run of letters and digits with their combining marks; an apostrophe behind one of them belongs to it.
    """

    name, series = "word_start", "Temperature (word start)"
    rest: float = setting(0.5, "temperature inside of words, after the first letter", least=0.0, most=MAX_TEMPERATURE)
    first_letter: float = setting(1.0, "temperature elsewhere", least=0.0, most=MAX_TEMPERATURE)
    letters: Any = flax.struct.field(default=None)
    """bool [V]: letters, digits and marks; set by `bound`."""
    apostrophes: Any = flax.struct.field(default=None)
    """bool [V]; set by `bound`."""

    def __call__(self, state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        """T = rest behind a letter, or behind a letter and an apostrophe; otherwise first_letter."""
        before = self.letters[state.tokens[jnp.maximum(state.length - 2, 0)]] & (state.length > 1)
        inside = self.letters[state.last] | (self.apostrophes[state.last] & before)
        return heated(state, logits, jnp.where(inside, self.rest, self.first_letter))

    def top(self) -> float:
        """Return the larger temperature."""
        return max(float(self.rest), float(self.first_letter))

    def bound(self, characters: Sequence[str], vocab_size: int) -> Self:
        """Return the sampler for a vocabulary."""
        letters, apostrophes = np.zeros((2, vocab_size), bool)
        for i, character in enumerate(characters):
            letters[i] = bool(character) and unicodedata.category(character[0])[0] in "LNM"
            apostrophes[i] = character != "" and character in APOSTROPHES
        return replace(
            super().bound(characters, vocab_size), letters=jnp.asarray(letters), apostrophes=jnp.asarray(apostrophes)
        )
