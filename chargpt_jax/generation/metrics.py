"""Metrics per character of a text: entropy, surprisal, and S2 (surprise-surprise).

With p the model's distribution of a character, given the characters before it, at temperature 1:

    entropy h = -sum p log p      surprisal i = -log p(character)      S2 = (i - h) / log(vocab_size)

Entropy and surprisal are in nats. S2 has no unit; above 0, the surprisal is larger than the model expected. The
metrics are NaN for the first character of a text, which has no context, and for padding.
"""

import math

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
