"""Text for a terminal: no character is lost, lines fit, rows are aligned, colours can be read on any background."""

import re
import unicodedata
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chargpt_jax.pictures.svg import columns, glyph, joins
from chargpt_jax.pictures.terminal_text import BLOCKS, COLOURS, GREY, Look, coloured, legend, lines, sublined

SGR = re.compile("\x1b\\[[0-9;]+m")
ANY = st.text(st.characters(exclude_categories=()), max_size=60)
MIXED = st.text(st.sampled_from("ab \n\t\u0301漢é😀\u200d\x1b"), max_size=60)
LOOK = Look(64, 256)
"""Full height is log(64) = 4.16 nats."""


def metrics(text):
    return np.linspace(0.0, 5.0, len(text), dtype=np.float32)


def rows_of(text, look):
    surprisal = metrics(text)
    drawn = [sublined(line, surprisal, surprisal[::-1], look) for line in lines(text, look.width)]
    return [[SGR.sub("", row) for row in rows.split("\n")[:-1]] for rows in drawn]


def width_of(row):
    """Return the columns of a row by its characters: marks and joiners take none."""
    found: list[str] = []
    for char in row:
        if joins(char) and found:
            found[-1] += char
        else:
            found.append(char)
    return sum(map(columns, found))


@given(ANY, st.sampled_from(list(COLOURS)))
def test_coloured_text_without_its_colours_is_the_text(text, colours):
    seen = coloured(text, metrics(text), Look(64, colours), n_prompt=3)
    bare = SGR.sub("", seen)
    assert bare == "".join(char if char in "\n\t" else glyph(char) for char in text)
    assert not [char for char in bare if unicodedata.category(char) == "Cc" and char not in "\n\t"]
    assert colours or seen == bare


@given(ANY | MIXED, st.integers(2, 30))
def test_lines_hold_every_character_once_and_fit(text, width):
    found = lines(text, width)
    assert [cell.position for cell in chain(*found)] == sorted({cell.position for cell in chain(*found)})
    shown = "".join(cell.text for cell in chain(*found)).replace("◌", "")
    assert shown == "".join(map(glyph, text)).replace("◌", "")
    for line in found:
        assert sum(cell.width for cell in line) <= width
        assert not [cell for cell in line[:-1] if text[cell.position] == "\n"]


@given(MIXED, st.integers(2, 30))
def test_rows_are_as_wide_as_their_line(text, width):
    for rows in rows_of(text, Look(64, 256, width)):
        assert len(rows) == 3
        assert len({width_of(row) for row in rows}) == 1
        assert set(rows[1]) | set(rows[2]) <= set(BLOCKS)


def test_a_wide_character_has_two_blocks_and_a_mark_none():
    assert rows_of("a漢e\u0301b", Look(64)) == [["a漢e\u0301b", "▁▃▃▅█", "███▅▁"]]


def test_a_line_break_is_shown_and_has_a_block():
    assert rows_of("ab\n\nc", Look(64, 0, 3)) == [["ab↵", "▁▃▅", "██▅"], ["↵", "█", "▃"], ["c", "█", "▁"]]


def test_undefined_metrics_have_no_block_and_no_colour():
    surprisal = np.array([np.nan, 5.0], np.float32)
    assert coloured("ab", surprisal, LOOK) == "a\x1b[38;5;196mb\x1b[0m"
    (line,) = lines("ab", 9)
    assert SGR.sub("", sublined(line, surprisal, surprisal, LOOK)) == "ab\n █\n █\n"


def test_prompt_is_bold_where_there_are_colours():
    surprisal = np.array([np.nan, 0.0, 2.0], np.float32)
    assert coloured("abc", surprisal, LOOK, 2) == "\x1b[1mab\x1b[0m\x1b[38;5;98mc\x1b[0m"
    assert coloured("abc", surprisal, Look(64, 0), 2) == "abc"


@given(st.floats(0, 20), st.floats(0, 20))
def test_more_surprisal_is_never_a_lower_block_or_step(one, two):
    low, high = sorted((one, two))
    assert BLOCKS.index(LOOK.block(low)) <= BLOCKS.index(LOOK.block(high))
    steps = COLOURS[256]
    assert steps.index(LOOK.colour(low)) <= steps.index(LOOK.colour(high))


def luminance(code):
    """Return the relative luminance (WCAG 2) of a colour of the 6 x 6 x 6 cube of 256 colours."""
    levels = (0, 95, 135, 175, 215, 255)
    cube = code - 16
    channels = (levels[cube // 36] / 255, levels[cube // 6 % 6] / 255, levels[cube % 6] / 255)
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


@pytest.mark.parametrize("style", [*COLOURS[256][1:], GREY[256]])
def test_colours_can_be_read_on_white_and_on_black(style):
    found = luminance(int(style.removeprefix("38;5;")))
    assert 1.05 / (found + 0.05) > 3.5
    assert (found + 0.05) / 0.05 > 4


def test_legend_names_the_bounds_in_their_colours():
    text = legend(LOOK, rows=True)
    plain = "colour: surprisal in nats, 0 to 0.8, 0.8 to 1.7, 1.7 to 2.5, 2.5 to 3.3, over 3.3"
    assert SGR.sub("", text).split("\n") == [plain, "rows: surprisal, entropy, from ▁ 0 to █ 4.2 nats"]
    for style, label in zip(COLOURS[256][1:], plain.split(", ")[2:], strict=True):
        assert f"\x1b[{style}m{label}\x1b[0m" in text
    assert legend(Look(64, 0), rows=False, prompt=True) == ""


@pytest.mark.parametrize("colours", [16, 256])
def test_every_step_looks_different_in_a_prompt_and_after_it(colours):
    look = Look(64, colours)
    surprisal = np.linspace(0, 5, 100, dtype=np.float32)
    seen = {coloured("a", surprisal[i : i + 1], look, n) for n in (0, 1) for i in range(100)}
    assert len(seen) == 2 * len(COLOURS[colours])
    assert SGR.sub("", legend(look, rows=False, prompt=True)).endswith(", over 3.3; bold: prompt")
    assert "\x1b[1mbold\x1b[0m" in legend(look, rows=False, prompt=True)
