"""Positions of letters in words agree with a regular expression; the means are those of the characters."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chargpt_jax.analysis.words import LAST, by_letter, letters_of_words
from chargpt_jax.errors import UserError
from chargpt_jax.generation.sample import Sample

TEXTS = st.text(alphabet="ab1 .,'\u2019é\n漢-")


def sample(text: str, entropy=None, surprisal=None) -> Sample:
    n = len(text)
    known = np.arange(n, dtype=np.float32)
    known[:1] = np.nan
    return Sample(
        "", tuple(text), known if surprisal is None else surprisal, 2 * known if entropy is None else entropy, 64
    )


@given(TEXTS)
def test_positions_count_within_matches_of_a_regular_expression(text):
    expected = np.zeros(len(text), int)
    for word in re.finditer(r"[^\W_]+(?:['\u2019][^\W_]+)*", text):
        expected[word.start() : word.end()] = np.arange(1, len(word[0]) + 1)
    assert letters_of_words(text).tolist() == expected.tolist()


def test_combining_marks_and_tokens_without_a_character_are_counted_right():
    assert letters_of_words("e\u0301t").tolist() == [1, 2, 3]
    assert letters_of_words(["a", "", "b"]).tolist() == [1, 0, 1]
    assert letters_of_words([]).tolist() == []


@given(TEXTS.filter(lambda text: any(c.isalnum() for c in text[1:])))
def test_means_by_letter_give_the_mean_of_the_text(text):
    one = sample(text)
    found = by_letter(one)
    total = np.nansum(found.surprisal * found.characters)
    total += found.outside_surprisal * found.outside if found.outside else 0
    assert found.characters.sum() + found.outside == len(text) - 1
    assert total == pytest.approx(float(np.nansum(one.surprisal)))
    assert 0 <= found.first_letters <= 1


def test_mean_of_a_position_is_over_all_texts():
    found = by_letter([sample("ab cd"), sample("x yz")])
    assert found.surprisal[0] == pytest.approx((3 + 2) / 2)  # c and y; a and x have no metrics
    assert found.surprisal[1] == pytest.approx((1 + 4 + 3) / 3)
    assert found.entropy[1] == pytest.approx(2 * (1 + 4 + 3) / 3)
    assert found.outside_surprisal == pytest.approx((2 + 1) / 2)
    assert found.characters.tolist() == [2, 3] + [0] * (LAST - 2)
    assert np.isnan(found.surprisal[2:]).all()


def test_later_letters_are_counted_with_the_tenth():
    found = by_letter(sample(" " + "a" * 25))
    assert found.characters.tolist() == [1] * (LAST - 1) + [25 - LAST + 1]


def test_first_letters_have_all_surprisal_if_the_rest_is_certain():
    surprisal = np.array([np.nan, 0, 3, 0, 0, 2, 0], np.float32)
    found = by_letter(sample("a bcd efg"[2:], surprisal=np.array([np.nan, 0, 0, 0, 3, 0, 0], np.float32)))
    assert found.first_letters == 1
    assert by_letter(sample("a bc de", surprisal=surprisal)).first_letters == 1


def test_picture_names_every_letter_and_repr_the_means():
    found = by_letter(sample("ab cd ef"))
    assert found._repr_html_() == found.svg()
    assert "10 or later" in found.svg()
    assert "1: entropy 9.00, surprisal 4.50" in found.svg()
    assert "nan" not in found.svg()
    assert repr(found).startswith("LettersOfWords(entropy by letter 9.00, ")


@pytest.mark.parametrize("samples", [[], ["text"], "text", None, 4])
def test_only_samples_are_accepted(samples):
    with pytest.raises(UserError, match="by_letter needs a Sample"):
        by_letter(samples)


def test_text_without_a_word_is_refused():
    with pytest.raises(UserError, match="The text has no word with metrics"):
        by_letter(sample("a ... !"))
