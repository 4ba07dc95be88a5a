"""What a model does inside on one text: its attention weights, and its predictions after each layer.

A prediction after layer k is the head's, applied to the residual stream there instead of at the end: the "logit lens"
(nostalgebraist 2020). The model was trained to predict after its last layer only, so the predictions of the first
layers are what the head reads from a stream that is not complete yet.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chargpt_jax.config.values import argument, shown
from chargpt_jax.errors import UserError
from chargpt_jax.generation.arguments import check_scored
from chargpt_jax.generation.generate import bucket
from chargpt_jax.generation.metrics import surprisal_and_entropy
from chargpt_jax.generation.sample import checked_columns
from chargpt_jax.generation.trained_model import Model
from chargpt_jax.model.gpt import GPT, Block
from chargpt_jax.model.init import Params
from chargpt_jax.ops.plain import attention_weights, rotary
from chargpt_jax.pictures.attention_maps import MAX_CHARACTERS, attention_map, attention_maps
from chargpt_jax.pictures.layers import layers
from chargpt_jax.pictures.svg import Picture


@dataclass(frozen=True, repr=False, eq=False)
class Inspection:
    """A text of T characters, inside a model of L layers with H heads each."""

    tokens: tuple[str, ...]
    attention: np.ndarray
    """float32 [L, H, T, T]: the weight that a character (axis 2) gives to each earlier one and itself (axis 3)."""
    surprisal: np.ndarray
    """float32 [L + 1, T], nats: of each character after 0, 1, ..., L layers; NaN for the first character."""
    entropy: np.ndarray
    """float32 [L + 1, T], nats; NaN for the first character."""
    likeliest: np.ndarray
    """str [L + 1, T]: the most likely character in place of each character; '' for the first one."""
    vocab_size: int

    @property
    def text(self) -> str:
        """The text."""
        return "".join(self.tokens)

    @property
    def settled(self) -> np.ndarray:
        """The number of layers after which the most likely character is the final one and stays it, int32 [T]."""
        final = self.likeliest == self.likeliest[-1]
        stays = np.logical_and.accumulate(final[::-1])[::-1]
        return (len(final) - stays.sum(axis=0)).astype(np.int32)

    def __repr__(self) -> str:
        L, H = self.attention.shape[:2]
        return f"Inspection({self.text!r}, {L} layers of {H} heads)"

    def by_layer(self, chars_per_line: int = 80) -> Picture:
        """Plot the text with the entropy and the surprisal after each layer below it; a notebook shows the result."""
        columns = checked_columns(chars_per_line)
        return Picture(layers(self.tokens, self.entropy, self.surprisal, self.settled, self.vocab_size, columns))

    def attention_maps(self, layer: int | None = None, head: int | None = None) -> Picture:
        """Plot the attention weights: of all heads side by side, or large, with the text, those of one head.

        Args:
            layer: 1 to L.
            head: 1 to H; give both, or none.

        Raises:
            UserError: if there is no such head, or the text is too long for a picture.
        """
        if len(self.tokens) > MAX_CHARACTERS:
            raise UserError(
                f"The text has {len(self.tokens)} characters, but a picture of attention holds at most "
                f"{MAX_CHARACTERS}: inspect a part of it."
            )
        if layer is None and head is None:
            return Picture(attention_maps(self.tokens, self.attention))
        L, H = self.attention.shape[:2]
        i, j = _numbered("layer", layer, L), _numbered("head", head, H)
        return Picture(attention_map(self.tokens, self.attention[i, j], f"Attention of layer {layer}, head {head}"))

    def _repr_html_(self) -> str:
        return self.by_layer().svg


def _numbered(name: str, number: int | None, count: int) -> int:
    """Return the index of a layer or head, which are counted from 1."""
    if number is None:
        raise UserError(f"The {name} is missing: give a layer and a head, or neither.")
    if not 1 <= argument(name, number, int, f"try {count}") <= count:
        raise UserError(f"{name} is {shown(number)}, but the model has {count}: give a number from 1 to {count}.")
    return number - 1


class _Inside(NamedTuple):
    attention: jax.Array
    surprisal: jax.Array
    entropy: jax.Array
    likeliest: jax.Array


def inspect(model: Model, text: str, *, skip_unknown: bool = False) -> Inspection:
    """Read a text, and keep the attention weights and the predictions after each layer.

    Args:
        model: a trained model.
        text: two characters to block_size characters; it is repaired like the corpus.
        skip_unknown: drop characters that are not in the vocabulary, instead of rejecting them.

    Raises:
        UserError: if an argument is invalid.
    """
    if not isinstance(model, Model):
        raise UserError(f"model is {shown(model)}, but it must be a Model: give one that load returned.")
    text, block_size = model.known(text, skip_unknown), model.config.model.block_size
    check_scored(len(text))
    if len(text) > block_size:
        raise UserError(
            f"The text has {len(text):,} characters, but the model reads at most {block_size} at once: inspect a part "
            "of it."
        )
    tokens = np.zeros((1, min(block_size, bucket(len(text)))), np.int32)
    tokens[0, : len(text)] = model.tokenizer.encode_text(text)
    found = jax.tree.map(np.asarray, _inside(model.params, tokens, graphdef=model.graphdef))
    T = len(text)
    return Inspection(
        tokens=tuple(text),
        attention=found.attention[:, :, :T, :T].astype(np.float32),
        surprisal=_after_first(found.surprisal[:, : T - 1], np.nan),
        entropy=_after_first(found.entropy[:, : T - 1], np.nan),
        likeliest=_after_first(model.characters[found.likeliest[:, : T - 1]], ""),
        vocab_size=model.config.model.vocab_size,
    )


@partial(jax.jit, static_argnames="graphdef")
def _inside(params: Params, tokens: jax.Array, *, graphdef: nnx.GraphDef) -> _Inside:
    """Run the model on tokens int32 [1, T]; predictions at t are of token t + 1, so they have T - 1 of them."""
    model: GPT = nnx.merge(graphdef, params)
    rope = rotary(jnp.arange(tokens.shape[1]), model.config.n_head_dim)

    def layer(block: Block, x: jax.Array, _: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        x, weights = block(x, rope, lambda q, k, v: (model.ops.attention(q, k, v), attention_weights(q, k)))
        return x, (x, weights)

    embedded = model.embed(tokens)
    _, (outputs, weights) = model.ops.layers(layer, model.blocks, embedded)
    streams = jnp.concatenate([embedded[None], outputs])[:, 0, :-1]  # [L + 1, T - 1, C]
    logits = model.logits(streams)
    surprisal, entropy = surprisal_and_entropy(logits, jnp.broadcast_to(tokens[0, 1:], logits.shape[:2]))
    return _Inside(weights[:, 0], surprisal, entropy, jnp.argmax(logits, axis=-1))


def _after_first(values: np.ndarray, first: float | str) -> np.ndarray:
    """Return values [L + 1, T - 1] after a column for the first character, which nothing predicts."""
    return np.concatenate([np.full((len(values), 1), first, values.dtype), values], axis=1)
