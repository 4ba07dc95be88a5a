"""Which fixes run, and how prompts are repaired like the corpus; test_corpus.py compares the results with ftfy."""

import re

import ftfy
import pytest
from ftfy.badness import is_bad
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt_jax.data.repair import (
    ALL,
    DEFAULT,
    FIXES,
    Repaired,
    Repairs,
    fixes_of,
    may_be_bad,
    repair,
    repaired_as,
)
from chargpt_jax.data.streams.text_file import NeedsWhole


def test_the_table_covers_every_setting_of_ftfy_that_changes_a_text() -> None:
    named = [field for fields in FIXES.values() for field in fields]
    assert sorted(named) == sorted(set(ftfy.TextFixerConfig._fields) - {"max_decode_length", "explain"})


@pytest.mark.parametrize(
    ("setting", "gutenberg", "wanted"),
    [
        ("auto", True, ALL),
        ("auto", False, DEFAULT),
        ("all", False, ALL),
        ("none", True, ()),
        ("quotes,nfc", True, ("nfc", "quotes")),
    ],
)
def test_a_setting_names_fixes(setting: str, gutenberg: bool, wanted: tuple[str, ...]) -> None:
    assert fixes_of(setting, gutenberg) == wanted


def test_one_broken_line_is_repaired_in_a_right_text() -> None:
    text = "“今天”，很好。\nThe cafÃ©.\n“明天”。"
    assert repair(text, DEFAULT).text == "“今天”，很好。\nThe café.\n“明天”。"
    assert repair(text, DEFAULT).lines == 1


@pytest.mark.parametrize(
    ("text", "ways", "wanted"),
    [
        ("e\u0301\r\n“a”", [DEFAULT], "é\n“a”"),
        ("“a”", [ALL], '"a"'),
        ("“a”", [ALL, DEFAULT], "“a”"),
        ("ａ", [DEFAULT, ALL], "a"),
        ("字", [DEFAULT, ALL], "字"),
        ("e\u0301", [()], "e\u0301"),
        ("e\u0301", [], "é"),
    ],
)
def test_a_prompt_is_repaired_like_the_corpus(text: str, ways: list[tuple[str, ...]], wanted: str) -> None:
    assert repaired_as(text, 'aé\n“”"', ways) == wanted


# A text in pieces

PARTS = st.sampled_from(
    [
        *(
            "plain",
            "a",
            " ",
            "  ",
            "\n",
            "\n\n",
            "é",
            "e\u0301",
            "\u0301",
            "ﬁ",
            "“q”",
            "’",
            "Ã©",
            "â€œ",
            "Â ",
            "Ã ",
            "Â£",
        ),
        *(
            "&amp;",
            "&#13;",
            "&",
            "lt;",
            "<b>",
            "&lt;",
            "\x85",
            "\u2028",
            "\x1b[31m",
            "\x07",
            "ＡＢ",
            "\ufffd",
            "œ",
            "Œ",
        ),
        *(
            "кот",
            "вЂ",
            "×",
            "²",
            "…",
            "\x93",
            "日本",
            "ã\x83\x84",
            "&eacute;",
            "&ATILDE;&copy;",
            "\ufeff",
            "–",
            "1",
            "Ø",
        ),
    ]
)


def in_pieces(lines: list[str], names: tuple[str, ...]) -> Repaired:
    text = "".join(lines)
    repairs = Repairs(names, has_tags="<" in text)
    try:
        repaired = "".join(repairs.repaired(lines))
    except NeedsWhole:
        assert names == ALL
        return repair(text, names)
    return Repaired(repaired, repairs.fixes, repairs.lines)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.lists(PARTS, max_size=6), min_size=1, max_size=6), st.data())
@pytest.mark.parametrize(
    "names",
    [
        ALL,
        *(
            pytest.param(some, marks=pytest.mark.slow)
            for some in (DEFAULT, (), ("quotes", "nfc"), ("entities", "mojibake"))
        ),
    ],
)
def test_repair_in_pieces_equals_the_whole(names, lines, data):
    text = "\n".join("".join(line) for line in lines)
    complete = re.findall(r"[^\n]*\n|[^\n]+", text)
    size = data.draw(st.integers(1, 4))
    pieces = ["".join(complete[i : i + size]) for i in range(0, len(complete), size)]
    whole, found = repair(text, names), in_pieces(pieces, names)
    assert found.text == whole.text
    assert set(found.fixes) == set(whole.fixes)
    if whole.text.count("\n") == text.count("\n"):
        assert found.lines == whole.lines


def test_mojibake_in_another_piece_needs_the_whole_text():
    pieces = ["plain\n", "It’s “right”.\n", "schÃ¶n\n"]
    assert "".join(Repairs(ALL, False).repaired(pieces[:2])) == 'plain\nIt\'s "right".\n'
    with pytest.raises(NeedsWhole):
        list(Repairs(ALL, False).repaired(pieces))
    assert "".join(Repairs(DEFAULT, False).repaired(pieces)) == "plain\nIt’s “right”.\nschön\n"


@settings(max_examples=300, deadline=None)
@given(st.lists(PARTS, max_size=12))
def test_mojibake_is_never_overlooked(parts):
    text = "".join(parts)
    if is_bad(text) or any(map(is_bad, text.split("\n"))):
        assert may_be_bad(text)
