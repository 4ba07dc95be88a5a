"""Metrics per character of a text: entropy, surprisal, S2 (surprise-surprise), and what the model predicted there.

With p the model's distribution of a character, given the characters before it, at temperature 1:

    entropy h = -sum p log p      surprisal i = -log p(character)      S2 = (i - h) / log(vocab_size)

Entropy and surprisal are in nats. S2 has no unit; above 0, the surprisal is larger than the model expected. The
metrics are NaN for the first character of a text, which has no context, and for padding.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from chargpt_jax.data.tokenizer import PADDING


def surprisal_and_entropy(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the surprisal of tokens, and the entropy of the predictions.

    Args:
        logits: float32 [..., V].
        tokens: int32 [...], the tokens that were predicted.

    Returns:
        Surprisal and entropy, float32 [...] each, nats.
    """
    log_p = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(log_p)
    entropy = -jnp.sum(jnp.where(p > 0, p * log_p, 0), axis=-1)
    return -jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0], entropy


def token_metrics(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return each token's surprisal and entropy, given the logits of the whole sequence.

    Args:
        logits: float32 [B, T, V]; position t predicts token t + 1.
        tokens: int32 [B, T].

    Returns:
        Surprisal and entropy, float32 [B, T] each, nats; NaN for the first token and for padding.
    """
    pair = surprisal_and_entropy(logits[:, :-1], tokens[:, 1:])
    padding = tokens == PADDING
    padded = (jnp.pad(x, ((0, 0), (1, 0)), constant_values=jnp.nan) for x in pair)
    surprisal, entropy = (jnp.where(padding, jnp.nan, x) for x in padded)
    return surprisal, entropy


def surprise_surprise(surprisal: np.ndarray, entropy: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return S2 = (surprisal - entropy) / log(vocab_size), in the arrays' shape."""
    return (surprisal - entropy) / math.log(vocab_size)


@flax.struct.dataclass
class Predictions:
    """The predictions for the tokens of a text, as arrays of JAX or NumPy; [...] is the shape of the tokens."""

    rank: jax.Array
    """int32 [...]: 1 for the likeliest token, 2 for the next one; 0 where undefined."""
    likeliest: jax.Array
    """int32 [..., k]: the likeliest tokens, in descending order."""
    log_p: jax.Array
    """float32 [..., k]: their log-probabilities at temperature 1, nats; NaN where undefined."""
    sampled: jax.Array
    """float32 [...]: the probability that the sampler gave the token; NaN where no sampler chose it."""

    @classmethod
    def undefined(cls, shape: tuple[int, ...], k: int) -> "Predictions":
        """Return predictions that are undefined everywhere, for tokens of this shape."""
        return cls(
            rank=jnp.zeros(shape, jnp.int32),
            likeliest=jnp.zeros((*shape, k), jnp.int32),
            log_p=jnp.full((*shape, k), jnp.nan),
            sampled=jnp.full(shape, jnp.nan),
        )


def predictions(logits: jax.Array, tokens: jax.Array, k: int, sampled: jax.Array | None = None) -> Predictions:
    """Return the predictions for tokens.

    Args:
        logits: float32 [..., V].
        tokens: int32 [...], the tokens that were predicted.
        k: number of the likeliest tokens, at most V.
        sampled: float32 [...], the probability that the sampler gave them; None: no sampler chose them.
    """
    # A generation loop has few logits at a time, and can be one kernel, in which XLA allows no top_k.
    select = jax.lax.top_k if sampled is None else largest
    log_p, likeliest = select(jax.nn.log_softmax(logits, axis=-1), k)
    own = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
    return Predictions(
        rank=1 + jnp.sum(logits > own, axis=-1, dtype=jnp.int32),
        likeliest=likeliest,
        log_p=log_p,
        sampled=jnp.full(tokens.shape, jnp.nan) if sampled is None else sampled,
    )


def largest(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Return the k largest values on the last axis and their indices, as jax.lax.top_k does.

    Finding one after the other suits a small k, and a kernel that may not sort can contain it.
    """

    def one(left: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        index = jnp.argmax(left, axis=-1).astype(jnp.int32)
        value = jnp.max(left, axis=-1)
        return jnp.where(jnp.arange(values.shape[-1]) == index[..., None], -jnp.inf, left), (value, index)

    _, (found, indices) = jax.lax.scan(one, values, length=k)
    return jnp.moveaxis(found, 0, -1), jnp.moveaxis(indices, 0, -1)


def token_predictions(logits: jax.Array, tokens: jax.Array, k: int) -> Predictions:
    """Return the predictions for sequences: position t of the logits [B, T, V] predicts token t + 1 of [B, T]."""
    found = predictions(logits[:, :-1], tokens[:, 1:], k)
    first = Predictions.undefined((len(tokens), 1), k)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), first, found)
