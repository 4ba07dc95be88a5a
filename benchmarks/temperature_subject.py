"""A trained model with what its generated texts are compared on: held-out text, the training text, a judge."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import chargpt_jax
from benchmarks import text_statistics as statistics
from chargpt_jax.generation.sampler import Sampler
from chargpt_jax.generation.samplers.contract import State
from chargpt_jax.model.gpt import MASKED

CONTEXT, PROMPT = 256, 16
"""Characters of a text with its prompt, and of the prompt: the end of a text is the end of the context."""

SETTLED = 32
"""Characters of held-out text before the first one whose probability counts: samplers with a state settle there."""

SHARE = 0.01
"""Of the unchanged model in the mixture that gives held-out text a finite likelihood."""


@dataclass
class Subject:
    """A trained model with the texts that it is compared on."""

    model: chargpt_jax.Model
    judge: chargpt_jax.Model
    training: str
    held_out: str
    sets: int
    texts: int
    """Of a set: the sets continue the same passages."""

    @cached_property
    def prompts(self) -> list[str]:
        """Passages of held-out text that end behind a space, evenly spaced."""
        return [passage[:PROMPT] for passage in self.passages]

    @cached_property
    def passages(self) -> list[str]:
        """Held-out text as long as the generated texts with their prompts."""
        found = []
        for i in range(self.texts):
            at = PROMPT + i * (len(self.held_out) - 2 * CONTEXT) // self.texts
            while not self.held_out[at - 1].isspace():
                at += 1
            found.append(self.held_out[at - PROMPT : at - PROMPT + CONTEXT])
        return found

    @cached_property
    def known(self) -> set[str]:
        """The words of the training text."""
        return set(statistics.words(self.training))

    @cached_property
    def parts(self) -> set[str]:
        """The substrings of the training text."""
        return set(statistics.substrings(self.training))

    def generate(self, chain: str) -> tuple[list[list[str]], np.ndarray]:
        """Return sets of texts, without their prompts, and the mean surprisals of the sets, nats per character."""
        how: dict[str, Any] = {"sampler": chain, "n": self.sets, "alternatives": 0, "repair": False}
        samples = self.model.generate(self.prompts, CONTEXT - PROMPT, **how)
        values = np.stack([sample.surprisal[PROMPT:] for sample in samples])
        texts = ["".join(sample.tokens[PROMPT:]) for sample in samples]
        return [texts[i :: self.sets] for i in range(self.sets)], values.reshape(self.texts, self.sets, -1).mean((0, 2))

    def figures(self, chain: str) -> dict[str, list[float]]:
        """Return the figures of a sampler's texts by name, one per set."""
        sets, means = self.generate(chain)
        found = [self.measured(texts) | {"surprisal": float(mean)} for texts, mean in zip(sets, means, strict=True)]
        return {name: [one[name] for one in found] for name in found[0]}

    def measured(self, texts: Sequence[str]) -> dict[str, float]:
        """Return the figures of a set of texts."""
        both = [prompt + text for prompt, text in zip(self.prompts, texts, strict=True)]
        return {
            "unknown": 100 * statistics.unknown_words(texts, self.known),
            "judge": float(surprisal(self.judge, both).mean()),
            "repeated": 100 * statistics.repeated(texts),
            "longest": statistics.mean_longest_repetition(texts),
            "copied": 100 * statistics.copied(texts, self.parts),
            "distinct": statistics.distinct_words(texts),
            "zlib": statistics.compressed_bits(texts),
        }

    def likelihood(self, chain: str) -> dict[str, float]:
        """Return how a sampler predicts held-out text, in percent and in nats per character."""
        tokens = np.stack([self.model.tokenizer.encode_text(passage) for passage in self.passages])
        size, names = self.model.config.model.vocab_size, self.model.tokenizer.vocabulary
        bound = Sampler(chain=chain).with_key(jax.random.key(0), names, size).chain
        of_sampler, of_model = _likelihood(self.model.params, tokens, bound, graphdef=self.model.graphdef)
        mixed = np.logaddexp(np.log1p(-SHARE) + of_sampler, np.log(SHARE) + of_model)[:, SETTLED:]
        return {
            "excluded": 100 * float(np.isneginf(of_sampler[:, SETTLED:]).mean()),
            "held_out": -float(mixed.mean()),
        }


@partial(jax.jit, static_argnames="graphdef")
def _likelihood(params: Any, tokens: jax.Array, chain: Any, *, graphdef: nnx.GraphDef) -> tuple[jax.Array, jax.Array]:
    """Return ln p of the characters after the first of each text, float32 [B, T - 1]: the sampler's, the model's."""
    logits = nnx.merge(graphdef, params)(tokens)
    logits = jnp.where(logits <= MASKED, -jnp.inf, logits)

    def one(tokens: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(memory: Any, t: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            after, adjusted = chain(State(tokens, t + 1, jax.random.key(0), memory), logits[t])
            # A character that mirostat excludes has an infinite error there, which must not change its state.
            memory = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), after.memory)
            return memory, tuple(jax.nn.log_softmax(x)[tokens[t + 1]] for x in (adjusted, logits[t]))

        return jax.lax.scan(step, chain.first(logits.shape[-1]), jnp.arange(len(tokens) - 1))[1]

    return jax.vmap(one)(tokens, logits)


def surprisal(model: chargpt_jax.Model, texts: Sequence[str]) -> np.ndarray:
    """Return the surprisal of texts of one length behind their prompts, float32 [texts, characters], nats."""
    tokens = np.stack([model.tokenizer.encode_text(text) for text in texts])
    return np.asarray(_surprisal(model.params, tokens, graphdef=model.graphdef))[:, PROMPT - 1 :]


@partial(jax.jit, static_argnames="graphdef")
def _surprisal(params: Any, tokens: jax.Array, *, graphdef: nnx.GraphDef) -> jax.Array:
    log_p = jax.nn.log_softmax(nnx.merge(graphdef, params)(tokens[:, :-1]))
    return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
