"""Samplers that exclude unlikely tokens, or (typical, xtc) likely ones.

p is the softmax of the logits that a filter gets, H its entropy in nats. Tokens of equal probability are kept or
excluded together, and at least one token is kept.
"""

from dataclasses import replace

import flax.struct
import jax
import jax.numpy as jnp

from chargpt_jax.generation.samplers.contract import SamplerBase, State, entropy, keeping, log_probabilities, setting

MIN_TOP_P = 1e-30
"""A smaller p would be 0 in float32, which excludes all."""


@flax.struct.dataclass
class TopK(SamplerBase):
    """Keep the k most likely tokens (Fan et al., 2018, arXiv:1805.04833)."""

    name = "top_k"
    k: int = setting(40, "number of most likely characters to keep", least=1)

    def __call__(self, state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        """Keep l >= the k-th largest logit."""
        ranked = jnp.sort(logits)
        smallest = ranked[jnp.maximum(logits.shape[-1] - self.k, 0)]
        return state, jnp.where(logits < smallest, -jnp.inf, logits)


@flax.struct.dataclass
class TopP(SamplerBase):
    """Nucleus sampling: keep the fewest most likely tokens with total probability of at least p.

    Holtzman et al., 2020, arXiv:1904.09751.
    """

    name = "top_p"
    p: float = setting(0.95, "total probability of the characters to keep", above=0.0, most=1.0)

    def __call__(self, state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        """Keep a token while the total probability of the more likely ones is below p."""
        ranked = -jnp.sort(-logits)
        p = jax.nn.softmax(ranked)
        before = jnp.cumsum(p) - p  # 0 for the most likely token, which therefore always stays
        smallest = jnp.min(jnp.where(before < jnp.maximum(self.p, MIN_TOP_P), ranked, jnp.inf))
        return state, jnp.where(logits < smallest, -jnp.inf, logits)


@flax.struct.dataclass
class MinP(SamplerBase):
    """Keep tokens with p >= f max(p): Nguyen et al., 2024, arXiv:2407.01082."""

    name = "min_p"
    p: float = setting(0.05, "smallest probability to keep, as a fraction of the largest one", least=0.0, most=1.0)

    def __call__(self, state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        """Keep l >= max(l) + ln f."""
        return state, keeping(logits, logits >= jnp.max(logits) + jnp.log(self.p))


@flax.struct.dataclass
class Typical(SamplerBase):
    """Keep the tokens whose surprisal is closest to the entropy: Meister et al., 2022, arXiv:2202.00666."""

    name = "typical"
    p: float = setting(0.95, "total probability of the characters to keep", above=0.0, most=1.0)

    def __call__(self, state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        """Keep tokens in ascending order of |-ln p - H| until their total probability is above p."""
        log_p, p = log_probabilities(logits)
        distance = jnp.abs(-log_p - entropy(log_p, p))
        ranked, mass = jax.lax.sort((distance, p), num_keys=1)
        before = jnp.cumsum(mass) - mass
        largest = jnp.max(jnp.where(before <= self.p, ranked, -jnp.inf))
        return state, jnp.where(distance <= largest, logits, -jnp.inf)


@flax.struct.dataclass
class Eta(SamplerBase):
    """Keep tokens with p >= min(e, sqrt(e) exp(-H)): eta sampling, Hewitt et al., 2022, arXiv:2210.15191."""

    name = "eta"
    epsilon: float = setting(0.002, "smallest probability to keep where the model is sure", above=0.0, below=1.0)

    def __call__(self, state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        """Keep p >= min(e, sqrt(e) exp(-H))."""
        log_p, p = log_probabilities(logits)
        smallest = jnp.minimum(self.epsilon, jnp.sqrt(self.epsilon) * jnp.exp(-entropy(log_p, p)))
        return state, keeping(logits, p >= smallest)


@flax.struct.dataclass
class TopNSigma(SamplerBase):
    """Keep logits within n standard deviations of the largest one: Tang et al., 2024, arXiv:2411.07641."""

    name = "top_n_sigma"
    n: float = setting(1.0, "distance from the largest logit, in standard deviations of the logits", above=0.0)

    def __call__(self, state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        """Keep l >= max(l) - n std(l); mean and standard deviation are of the tokens that are not excluded."""
        given = jnp.isfinite(logits)
        deviation = jnp.std(logits, where=given)
        return state, keeping(logits, logits >= jnp.max(logits) - self.n * deviation)


@flax.struct.dataclass
class PLess(SamplerBase):
    """Keep tokens with p >= sum(p^2), the probability that two samples are equal (2025, arXiv:2509.23234)."""

    name = "p_less"

    def __call__(self, state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        """Keep p >= sum(p^2)."""
        _, p = log_probabilities(logits)
        return state, keeping(logits, p >= jnp.sum(p * p))


@flax.struct.dataclass
class XTC(SamplerBase):
    """Exclude top choices, with a probability per token (p-e-w, 2024, text-generation-webui pull request 6335).

    Of the tokens with p of at least the threshold, only the least likely stays, if there are several.
    """

    name, series = "xtc", "XTC: 1 where it excludes"
    probability: float = setting(0.5, "probability that a character is sampled this way", least=0.0, most=1.0)
    threshold: float = setting(0.1, "probability from which a character is a top choice", above=0.0, most=1.0)

    def __call__(self, state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        """Exclude p > min(p where p >= threshold), with the given probability."""
        _, p = log_probabilities(logits)
        smallest = jnp.min(jnp.where(p >= self.threshold, p, jnp.inf))
        excluded = (p > smallest) & (jax.random.uniform(state.key) < self.probability)
        shown = jnp.any(excluded).astype(jnp.float32)
        return replace(state, shown=shown), jnp.where(excluded, -jnp.inf, logits)
