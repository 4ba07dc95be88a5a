"""The visual order of mixed writing directions; the expected orders are those of a browser."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chargpt_jax.pictures.bidi import base_level, levels, visual_order


def drawn(text: str, base: int | None = None) -> str:
    """Return the characters of one line from left to right."""
    base = base_level(text) if base is None else base
    order = visual_order(levels(text, base), [c.isspace() for c in text], base)
    return "".join(text[i] for i in order)


@pytest.mark.parametrize(
    ("text", "base"), [("", 0), ("1 2", 0), ("abc", 0), ("abc אב", 0), ("אבג ab", 1), ("العربية", 1), ("ab אב", 0)]
)
def test_most_letters_give_the_direction(text, base):
    assert base_level(text) == base


@pytest.mark.parametrize(
    ("text", "base", "wanted"),
    [
        ("abc def", 0, "abc def"),
        ("אבג", 1, "גבא"),
        ("אב 12 גד", 1, "דג 12 בא"),
        ("אב 3.14, גד", 1, "דג ,3.14 בא"),
        ("אב cd ef גה", 1, "הג cd ef בא"),
        ("ab אב גד ef", 0, "ab דג בא ef"),
        ("ab אב.", 0, "ab בא."),
        ("אב ab.", 1, ".ab בא"),
        ("ab אב 12", 0, "ab 12 בא"),
        ("في ١٢ (٣)", 1, ")٣( ١٢ يف"),
        ("من 12%", 1, "%12 نم"),
        ("אב 12%", 1, "12% בא"),
        ("אב  ", 1, "  בא"),
        ("אב  ", 0, "בא  "),
        ("אב\tגד", 0, "בא\tדג"),
        ("12-אב", 1, "בא-12"),
    ],
)
def test_a_line_is_ordered_as_in_a_browser(text, base, wanted):
    assert drawn(text, base) == wanted


@given(st.text("abאב12 ,.-%()\t١\u0301字", max_size=30), st.sampled_from([0, 1]))
def test_the_order_is_a_permutation(text, base):
    found = levels(text, base)
    order = visual_order(found, [c.isspace() for c in text], base)
    assert sorted(order) == list(range(len(text)))
    assert all(base <= level <= 2 for level in found)


@given(st.text("abc 12,.-()"))
def test_a_text_without_letters_from_right_to_left_keeps_its_order(text):
    assert drawn(text, 0) == text


@given(st.text("אבג !", max_size=20))
def test_a_text_from_right_to_left_is_reversed(text):
    assert drawn(text, 1) == text[::-1]
