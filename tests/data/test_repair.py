"""Which fixes run, and how prompts are repaired like the corpus; test_corpus.py compares the results with ftfy."""

import ftfy
import pytest

from chargpt_jax.data.repair import ALL, DEFAULT, FIXES, fixes_of, repair, repaired_as


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
