"""Samplers that steer a quantity of the text to a target: after each token they correct themselves by its error.

They change the shape of the distribution, so they are usually the last ones of a chain.
"""

import math
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from chargpt_jax.generation.samplers.contract import SamplerBase, State, keeping, log_probabilities, setting

PEAK, SHARPNESS, WIDTH = 5.0, 10.0, 0.3
"""Of adaptive-p: the logit at the target, the fall of the logits, and the distance at which it becomes linear."""


@flax.struct.dataclass
class Mirostat(SamplerBase):
    """Mirostat 2.0: a surprisal of `tau` bits per character (Basu et al., 2021, arXiv:2007.14966, algorithm 2).

    mu, at first 2 tau, is the largest surprisal that is kept. s is the surprisal of the sampled token among those kept:

        keep -log2 p <= mu;    mu := mu - eta (s - tau)
    """

    name, series = "mirostat", "Mirostat: μ, bits"
    tau: float = setting(2.0, "target surprisal, bits per character", above=0.0, most=64.0)
    eta: float = setting(0.1, "learning rate of the largest surprisal", least=0.0, most=100.0)

    def __call__(self, state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        """Correct mu by the last token, then exclude the tokens above it."""
        mu, error = state.memory
        mu = mu - self.eta * error[state.last]
        log_p, _ = log_probabilities(logits)
        kept = keeping(logits, -log_p / math.log(2) <= mu)
        error = -log_probabilities(kept)[0] / math.log(2) - self.tau
        return replace(state, memory=(mu, error), shown=mu), kept

    def first(self, vocab_size: int) -> Any:
        """Return mu, and the error of each token that was sampled before: none."""
        return jnp.float32(2 * self.tau), jnp.zeros(vocab_size)

    def top(self) -> float:
        """Return 4 tau."""
        return 4 * float(self.tau)


@flax.struct.dataclass
class AdaptiveP(SamplerBase):
    """Adaptive-p: tokens whose probability is near a target that corrects for the mean so far (llama.cpp, pull 17927).

    m is the moving average of the probability p of the sampled tokens, at first the target t. With

        t' = clip(2 t - m, 0, 1);    d = |p - t'| / 0.3;    l' = 5 - 10 d^2 / (1 + d)

    l' are the logits to sample from, and m := decay m + (1 - decay) p(token).
    """

    name, series = "adaptive_p", "Adaptive-p: target"
    target: float = setting(0.5, "mean probability of the characters to sample", least=0.0, most=1.0)
    decay: float = setting(0.9, "of the moving average", least=0.0, most=0.99)

    def __call__(self, state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        """Update the average by the last token, then favour the probabilities near the corrected target."""
        mean, probability = state.memory
        mean = self.decay * mean + (1 - self.decay) * probability[state.last]
        target = jnp.clip(2 * self.target - mean, 0, 1)
        _, p = log_probabilities(logits)
        distance = jnp.abs(p - target) / WIDTH
        adapted = PEAK - SHARPNESS * distance**2 / (1 + distance)
        return replace(state, memory=(mean, p), shown=target), jnp.where(jnp.isfinite(logits), adapted, -jnp.inf)

    def first(self, vocab_size: int) -> Any:
        """Return the average, and the probability of each token that was sampled before: the target."""
        return jnp.float32(self.target), jnp.full(vocab_size, self.target, jnp.float32)
