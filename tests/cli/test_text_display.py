"""Where texts get colours and rows: on which streams, in one piece or part by part, and what never gets there."""

import io
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chargpt_jax.cli import text_display
from chargpt_jax.cli.terminal import printable
from chargpt_jax.cli.text_display import TextDisplay, colours_of
from chargpt_jax.errors import UserError
from chargpt_jax.generation.sample import Sample
from tests.payloads import STEERING

SGR = re.compile("\x1b\\[[0-9;]+m")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("NO_COLOR", "COLORTERM", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "20")


def sample_of(text, prompt=""):
    values = np.linspace(0.0, 5.0, len(text), dtype=np.float32)
    return Sample(prompt, tuple(text), values, values[::-1], 64)


def printed(sample, rows=False, out=None):
    out = Terminal() if out is None else out
    display = TextDisplay(out, 64, rows)
    display.show(sample)
    display.print_legend()
    return out.getvalue()


@pytest.mark.parametrize(
    ("names", "colours"),
    [
        ({}, 256),
        ({"TERM": "xterm"}, 16),
        ({"TERM": "xterm", "COLORTERM": "truecolor"}, 256),
        ({"TERM": "dumb"}, 0),
        ({"TERM": "unknown"}, 0),
        ({"NO_COLOR": "1"}, 0),
        ({"NO_COLOR": "0"}, 0),
        ({"NO_COLOR": ""}, 256),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, 0),
    ],
)
def test_colours_of_a_terminal_follow_its_environment(monkeypatch, names, colours):
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert colours_of(Terminal()) == colours
    text = "ab cd\x1b[31m"
    assert (printed(sample_of(text)) == printable(text) + "\n") == (colours == 0)


def test_files_and_pipes_get_the_text_and_nothing_else(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    for text in ("ab\ncd", *STEERING.values()):
        assert printed(sample_of(text), out=io.StringIO()) == text + "\n"


@pytest.mark.parametrize("name", STEERING)
@pytest.mark.parametrize("rows", [False, True])
def test_text_that_steers_a_terminal_never_reaches_it(name, rows):
    seen = SGR.sub("", printed(sample_of(STEERING[name]), rows))
    assert printable(seen) == seen
    if not rows:
        assert seen.startswith(printable(STEERING[name]))


def test_rows_in_a_pipe_have_no_colours():
    seen = printed(sample_of("abc\nd"), rows=True, out=io.StringIO())
    assert seen == "abc↵\n▁▃▅█\n██▅▃\nd\n█\n▁\n\nrows: surprisal, entropy, from ▁ 0 to █ 4.2 nats\n"


def test_a_prompt_is_bold_and_a_scored_text_is_not():
    assert printed(sample_of("abc", "ab")).startswith("\x1b[1ma")
    assert printed(sample_of("abc", "ab")).endswith("\x1b[1mbold\x1b[0m: prompt\n")
    assert "\x1b[1m" not in printed(sample_of("abc", "abc"))
    assert "\x1b[1;" not in printed(sample_of("abc", "abc"))


PIECES = ["a", "b ", "\n", "漢", "\u0301", "\u0301" * 6, "👩\u200d💻", "\u200d", "\u200c", "می\u200cروم", "\x1b"]


@given(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=40), st.data(), st.sampled_from(["plain", "colours", "rows"])
)
def test_parts_print_what_the_whole_sample_prints(pieces, data, look):
    text = "".join(pieces)
    prompt = text[: data.draw(st.integers(0, len(text) - 1))]
    sample, out, rows = sample_of(text, prompt), Terminal(), look == "rows"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_COLOR", "1" if look == "plain" else "")
        display = TextDisplay(out, 64, rows)
        whole = printed(sample, rows)
    cuts = sorted(data.draw(st.lists(st.integers(len(prompt), len(text)), max_size=8)))
    for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
        display.add(sample[start:stop])
    display.end()
    display.print_legend()
    seen = out.getvalue() + ("\n" if look == "plain" else "")
    assert SGR.sub("", seen) == SGR.sub("", whole)
    if rows:
        assert seen == whole


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_final_joiner_is_printed_at_the_end(monkeypatch, no_color):
    monkeypatch.setenv("NO_COLOR", no_color)
    out = Terminal()
    display = TextDisplay(out, 64, rows=False)
    display.add(sample_of("ab👩\u200d"))
    assert SGR.sub("", out.getvalue()) == "ab👩"
    display.end()
    assert SGR.sub("", out.getvalue()).rstrip("\n") == printable("ab👩\u200d")


def test_rows_wait_until_their_line_is_complete():
    out = Terminal()
    display = TextDisplay(out, 64, rows=True)
    sample = sample_of("a" * 25)
    display.add(sample[:20])
    assert out.getvalue() == ""
    display.add(sample[20:22])
    assert SGR.sub("", out.getvalue()).startswith("a" * 20 + "\n▁")
    assert out.getvalue().count("\n") == 3
    display.end()
    assert SGR.sub("", out.getvalue()).split("\n")[3] == "aa"


def test_rows_are_refused_with_json_and_without_unicode():
    with pytest.raises(UserError, match="--subline draws rows for people, but --json prints JSON: give one of them"):
        text_display.check(io.StringIO(), as_json=True)
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with pytest.raises(UserError, match="but the encoding of the output is ascii: set PYTHONIOENCODING=utf-8"):
        text_display.check(ascii_only, as_json=False)
    text_display.check(io.StringIO(), as_json=False)
