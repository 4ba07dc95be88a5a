"""Prompts and scored texts get the repairs of the corpus; what is dropped from them is named."""

import pytest

from chargpt_jax.data.given_text import like_corpus, without_unknown
from chargpt_jax.data.repair import DEFAULT
from chargpt_jax.data.tokenizer import CharTokenizer
from chargpt_jax.errors import UserError

TOKENIZER = CharTokenizer("aé\n")


def test_a_text_is_repaired_like_the_corpus() -> None:
    assert like_corpus("e\u0301\r\na?", TOKENIZER, [DEFAULT]) == "é\na?"


@pytest.mark.parametrize("code", [0xD800, 0xDC00, 0xDFFF])
def test_half_of_a_surrogate_pair_is_refused_by_its_code_point(code: int) -> None:
    with pytest.raises(UserError, match=rf"U\+{code:04X}\) at character 1, which is half of a surrogate pair"):
        like_corpus(f"a{chr(code)}a", TOKENIZER, [DEFAULT])


def test_dropped_characters_are_named_once() -> None:
    assert without_unknown("xa\ud800e\u0301yxa", TOKENIZER, [DEFAULT]) == ("aéa", ["\ud800", "x", "y"])
    assert without_unknown("aé", TOKENIZER, [DEFAULT]) == ("aé", [])
