"""Attention weights and predictions after each layer equal the float64 reference; the last layer equals `score`."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chargpt_jax.analysis.inspection import Inspection, inspect
from chargpt_jax.errors import UserError
from tests import reference
from tests.interop.page_models import arrays_of, random_model

MODEL = random_model()
CONFIG = MODEL.config.model
TEXT = "the cat's é 漢\t😀"
FOUND = inspect(MODEL, TEXT)
ROWS = MODEL.tokenizer.encode_text(TEXT)


def truncated(layers: int) -> reference.Params:
    """Return the reference's parameters without the blocks after the first so many."""
    names = [f"transformer.blocks.{n}." for n in range(layers, CONFIG.n_layer)]
    return {name: array for name, array in arrays_of(CONFIG).items() if not name.startswith(tuple(names))}


@pytest.mark.parametrize("layers", range(CONFIG.n_layer + 1))
def test_predictions_after_k_layers_equal_a_reference_model_of_k_layers(layers):
    logits = reference.logits(truncated(layers), ROWS, CONFIG.n_head, CONFIG.n_head_dim, CONFIG.used_ids)[:-1]
    log_p = np.stack([reference.log_softmax(row) for row in logits])
    np.testing.assert_allclose(FOUND.surprisal[layers, 1:], -log_p[np.arange(len(log_p)), ROWS[1:]], atol=2e-5)
    np.testing.assert_allclose(FOUND.entropy[layers, 1:], [reference.entropy_of(row) for row in logits], atol=2e-5)
    likeliest = [MODEL.tokenizer.vocabulary[i] for i in logits.argmax(axis=-1)]
    assert FOUND.likeliest[layers, 1:].tolist() == likeliest


def test_last_layer_equals_score():
    scored = MODEL.score(TEXT)
    np.testing.assert_allclose(FOUND.entropy[-1], scored.entropy, rtol=1e-6)
    np.testing.assert_allclose(FOUND.surprisal[-1], scored.surprisal, rtol=1e-6)
    assert FOUND.likeliest[-1].tolist() == ["", *scored.alternatives.characters[1:, 0]]
    assert FOUND.tokens == scored.tokens


def reference_weights(head: int) -> np.ndarray:
    """Return the attention weights of a head of the first layer, float64 [T, T]."""
    params, D, width = arrays_of(CONFIG), CONFIG.n_head_dim, CONFIG.n_head * CONFIG.n_head_dim
    x = params["transformer.wte.weight"][ROWS]
    name = "transformer.blocks.0."
    x = reference.layer_norm(x, params[name + "ln_1.weight"], params[name + "ln_1.bias"])
    qkv = reference.linear(x, params, name + "attn.qkv")
    q, k = (qkv[:, start + head * D : start + (head + 1) * D] for start in (0, width))
    q, k = (reference.rope(part, np.arange(len(ROWS))) for part in (q, k))
    weights = np.zeros((len(ROWS), len(ROWS)))
    for t in range(len(ROWS)):
        weights[t, : t + 1] = np.exp(reference.log_softmax(k[: t + 1] @ q[t] / math.sqrt(D)))
    return weights


@pytest.mark.parametrize("head", range(CONFIG.n_head))
def test_attention_weights_of_the_first_layer_equal_the_reference(head):
    np.testing.assert_allclose(FOUND.attention[0, head], reference_weights(head), atol=1e-5)


def test_attention_weights_of_each_character_are_of_its_past_and_add_up_to_1():
    L, H, T, _ = FOUND.attention.shape
    assert (CONFIG.n_layer, CONFIG.n_head, len(TEXT)) == (L, H, T)
    np.testing.assert_allclose(FOUND.attention.sum(axis=-1), 1, atol=1e-6)
    assert (FOUND.attention * np.triu(np.ones((T, T)), 1) == 0).all()


def test_inspection_of_a_beginning_is_the_beginning_of_the_inspection():
    """Causality; the two texts have different padded lengths."""
    part = inspect(MODEL, TEXT[:7])
    np.testing.assert_allclose(part.attention, FOUND.attention[:, :, :7, :7], atol=1e-6)
    np.testing.assert_allclose(part.entropy, FOUND.entropy[:, :7], atol=1e-5)


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=3, max_size=3), min_size=2, max_size=5))
def test_settled_is_the_first_layer_whose_choice_stays(rows):
    found = dataclasses.replace(FOUND, likeliest=np.array(rows))
    expected = [next(k for k in range(len(rows)) if len({row[t] for row in rows[k:]}) == 1) for t in range(3)]
    assert found.settled.tolist() == expected


def test_first_character_has_no_predictions():
    assert np.isnan(FOUND.entropy[:, 0]).all()
    assert np.isnan(FOUND.surprisal[:, 0]).all()
    assert set(FOUND.likeliest[:, 0]) == {""}


def test_text_is_repaired_and_unknown_characters_are_dropped_if_asked():
    assert inspect(MODEL, "a\r\nb").text == "a\nb"
    assert inspect(MODEL, "a§b", skip_unknown=True).text == "ab"


def test_a_notebook_shows_the_layers():
    assert FOUND._repr_html_() == FOUND.by_layer().svg
    assert f"row k: after k of {CONFIG.n_layer} layers" in FOUND._repr_html_()


def test_one_head_and_all_heads_are_pictures():
    assert "layer 2, head 1" in FOUND.attention_maps().svg
    assert 'aria-label="Attention of layer 2, head 1"' in FOUND.attention_maps(layer=2, head=1).svg
    assert FOUND.attention_maps(1, 1) != FOUND.attention_maps(2, 1)


def long_text() -> Inspection:
    return dataclasses.replace(FOUND, tokens=("a",) * 121)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: inspect("runs/tiny", "ab"), "model is 'runs/tiny', but it must be a Model"),
        (lambda: inspect(MODEL, 5), "text is 5"),
        (lambda: inspect(MODEL, "a"), "The text has 1 character, but scoring needs at least 2"),
        (lambda: inspect(MODEL, "a" * 17), "The text has 17 characters, but the model reads at most 16 at once"),
        (lambda: inspect(MODEL, "a§b"), "§"),
        (lambda: FOUND.attention_maps(layer=1), "The head is missing"),
        (lambda: FOUND.attention_maps(head=1), "The layer is missing"),
        (lambda: FOUND.attention_maps(0, 1), "layer is 0, but the model has 2: give a number from 1 to 2"),
        (lambda: FOUND.attention_maps(1, 3), "head is 3, but the model has 2"),
        (lambda: FOUND.attention_maps("1", 3), "layer is '1'"),
        (lambda: FOUND.by_layer(0), "chars_per_line is 0"),
        (lambda: long_text().attention_maps(), "The text has 121 characters, but a picture of attention holds at most"),
    ],
)
def test_a_mistake_is_answered_in_a_sentence(call, sentence):
    with pytest.raises(UserError) as error:
        call()
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
