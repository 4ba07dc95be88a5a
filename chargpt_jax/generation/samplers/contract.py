"""What a sampler is: a pure function from (state, logits) to (state, logits), written for one sequence.

Before each token, a sampler gets the model's logits and returns those that the token is sampled from. -inf excludes a
token. Generation maps it over the sequences of a batch and compiles it into its loop.

The state holds the text so far, so a sampler sees at its next call which token was sampled. What it has to remember
between calls is its memory, a tree of arrays that it returns.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

MAX_RECENT = 1024
"""Tokens that samplers look back at most: it limits their time per token."""


@flax.struct.dataclass
class State:
    """One sequence, before its next token is sampled."""

    tokens: jax.Array
    """int32 [N]: the prompt and the text so far; 0 from `length` on."""
    length: jax.Array
    """int32 []: at least 1."""
    key: jax.Array
    """A random key that depends on (seed, sequence, position, sampler) alone, so every batch gives the same text."""
    memory: Any = ()
    """A tree of arrays: what the sampler returned before the last token; at first, `SamplerBase.first`."""
    shown: Any = None
    """float32 []: a number to plot under the token, in a state that is returned; None: none."""

    @property
    def last(self) -> jax.Array:
        """The token that was sampled last, or the prompt's last one, int32 []."""
        return self.tokens[self.length - 1]

    def recent(self, count: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """Return the end of the text, int32 [W], W = min(N, MAX_RECENT), and which are its last `count` tokens.

        The tokens end with the last one; of a shorter text, the first of the W are not text. bool [W].
        """
        width = min(self.tokens.shape[0], MAX_RECENT)
        back = jnp.arange(width - 1, -1, -1)  # 0: the last token
        index = self.length - 1 - back
        return self.tokens[jnp.maximum(index, 0)], (index >= 0) & (back < count)


class SamplerBase:
    """Base of the samplers: their settings are the fields of a tree, so one compiled program serves all values."""

    name: ClassVar[str]
    """In chains that are written as text."""
    series: ClassVar[str] = ""
    """What `State.shown` is, with its unit; '': nothing is shown."""
    sorts: ClassVar[bool] = True
    """Whether the sampler needs operations that one fused kernel of a CPU cannot contain: sorting, scattering."""

    def __call__(self, state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        """Return the next state, and the logits to sample from, float32 [V]."""
        raise NotImplementedError

    def first(self, vocab_size: int) -> Any:
        """Return the memory before the first token."""
        return ()

    def top(self) -> float:
        """Return the value of `State.shown` at full height of a plot."""
        return 1.0

    def bound(self, characters: Sequence[str], vocab_size: int) -> Self:
        """Return the sampler for a vocabulary, with arrays in place of its numbers.

        Args:
            characters: of each token id; '' for an id without one.
            vocab_size: V, at least as many.
        """
        return jax.tree.map(as_array, self)


def as_array(number: Any) -> Any:
    """Return a number of Python as a scalar, float32 or int32."""
    if isinstance(number, int):
        return np.int32(min(number, np.iinfo(np.int32).max))
    return np.float32(number) if isinstance(number, float) else number


def setting(default: Any, about: str, **limits: Any) -> Any:
    """Declare a setting of a sampler with its meaning and limits (`above`, `least`, `most`)."""
    return flax.struct.field(default=default, metadata={"about": about, **limits})


def static(default: Any, about: str) -> Any:
    """Declare a setting that is not a number; another value is another program."""
    return flax.struct.field(pytree_node=False, default=default, metadata={"about": about})


def log_probabilities(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return ln p and p of logits [V]; an excluded token has ln p = -inf and p = 0."""
    log_p = jax.nn.log_softmax(logits)
    return log_p, jnp.exp(log_p)


def entropy(log_p: jax.Array, p: jax.Array) -> jax.Array:
    """Return the entropy of a distribution [V], nats."""
    return -jnp.sum(jnp.where(p > 0, p * log_p, 0))


def keeping(logits: jax.Array, kept: jax.Array) -> jax.Array:
    """Exclude the tokens that are not kept, bool [V]; the most likely ones always stay."""
    return jnp.where(kept | (logits == jnp.max(logits)), logits, -jnp.inf)
