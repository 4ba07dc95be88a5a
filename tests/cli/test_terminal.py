"""Terminal output: control characters are replaced, all other text is kept, and no encoding fails."""

import io
import logging
import sys
import unicodedata
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chargpt_jax.cli.terminal import MAX_MARKS, MAX_MESSAGE, REPLACEMENT, guard, one_line, printable, shown
from tests.payloads import MARKUP, PAYLOADS, STEERING

ANY_TEXT = st.text(st.characters(exclude_categories=()))


@given(ANY_TEXT)
def test_printable_text_has_no_control_characters(text):
    seen = printable(text)
    assert len(seen) == len(text)
    assert all(c.isprintable() or c in "\n\t\u200c\u200d" or unicodedata.category(c) in ("Zs", "Cn") for c in seen)
    assert printable(seen) == seen
    seen.encode()


@given(ANY_TEXT)
def test_a_message_is_one_line_of_bounded_length(text):
    line = one_line(text)
    assert len(line) <= MAX_MESSAGE
    assert len(line.splitlines()) <= 1
    assert not set("\n\t\r\x1b") & set(line)


@pytest.mark.parametrize("name", STEERING)
def test_what_steers_or_hides_is_replaced(name):
    text = STEERING[name]
    assert REPLACEMENT in printable(text)
    assert REPLACEMENT in printable(text, keep="") or text.split() != [text]
    seen = [c for c in text if c.isascii() and c.isprintable()]
    assert [c for c in printable(text) if c.isascii()] == seen, "what is seen stays"


@pytest.mark.parametrize("name", MARKUP)
def test_markup_is_unchanged(name):
    assert printable(MARKUP[name]) == MARKUP[name]


@pytest.mark.parametrize(
    "text", ["naïve ça va", "漢字\u3000かな", "Ærø\xa0og", "e\u0301e\u0308", "a\n\tb", "\u2009x", "😀"]
)
def test_letters_of_every_script_and_spaces_of_every_width_stay(text):
    assert printable(text) == text


@pytest.mark.parametrize(
    "text", ["می\u200cخواهم", "क्\u200dष", "👩\u200d💻", "👨🏽\u200d🚀", "❤\ufe0f\u200d🔥", "\U0001fae9\U00011f60"]
)
def test_joiners_within_words_and_emoji_and_new_code_points_stay(text):
    assert printable(text) == text


@pytest.mark.parametrize(
    "text", ["\u200ca", "a\u200d", "a\u200d b", "1\u200c2", "a\u200c\u200db", "\ufdd0", "\U0001ffff", "\u2065"]
)
def test_joiners_elsewhere_and_noncharacters_are_replaced(text):
    assert REPLACEMENT in printable(text)


def test_text_is_changed_on_a_terminal_only(monkeypatch):
    out, text = io.StringIO(), "a\x1b[31m"
    assert shown(text, out) == text
    monkeypatch.setattr(out, "isatty", lambda: True)
    assert shown(text, out) == printable(text) != text


def test_a_character_keeps_so_many_marks_and_no_more():
    seen = printable("a" + "\u0301" * 100 + "b\u0301")
    assert seen.startswith("a" + "\u0301" * MAX_MARKS + REPLACEMENT)
    assert seen.endswith("b\u0301")


def test_long_message_is_truncated_with_an_ellipsis():
    line = one_line("x" * 10**7)
    assert len(line) == MAX_MESSAGE
    assert line.endswith("x…")


@pytest.fixture
def guarded(monkeypatch):
    """Return a function that guards two ASCII standard streams, and returns their byte buffers."""
    factory = logging.getLogRecordFactory()

    def start() -> list[io.BytesIO]:  # called in the test, because pytest replaces the streams before it
        raw = [io.BytesIO(), io.BytesIO()]
        for name, buffer in zip(("stdout", "stderr"), raw, strict=True):
            stream = io.TextIOWrapper(buffer, encoding="ascii", errors="strict", write_through=True)
            monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
        guard()
        return raw

    yield start
    logging.setLogRecordFactory(factory)


def test_guarded_stream_accepts_every_payload(guarded):
    out, err = guarded()
    for text in PAYLOADS.values():
        print(text)
        print(printable("é漢😀" + text), file=sys.stderr)
    assert b"\\xe9\\u6f22\\U0001f600" in err.getvalue()
    assert b"\\udfff" in out.getvalue()


def test_what_libraries_log_or_warn_of_is_one_harmless_line(guarded):
    _, err = guarded()
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("chargpt tests")
    logger.addHandler(handler)
    logger.propagate = False
    for text in STEERING.values():
        logger.warning("a name of a file: %s\nand more", text)
        line = warnings.formatwarning(UserWarning(text), UserWarning, "x.py", 1)
        assert line.startswith("UserWarning: ")
        assert printable(line) == line
    logger.removeHandler(handler)
    written = err.getvalue().decode()
    assert len(written.splitlines()) == len(STEERING)
    assert printable(written) == written


@pytest.mark.filterwarnings("default")
def test_a_cache_of_programs_that_fails_is_not_reported(guarded):
    with warnings.catch_warnings(record=True) as found:
        guarded()
        warnings.warn("Error reading persistent compilation cache entry for 'jit_x': [Errno 13]", stacklevel=1)
        warnings.warn("another warning", stacklevel=1)
    assert [str(warning.message) for warning in found] == ["another warning"]


def test_guard_accepts_streams_that_are_not_files(monkeypatch):
    factory, before = logging.getLogRecordFactory(), warnings.formatwarning
    memory = io.StringIO()
    monkeypatch.setattr(sys, "stdout", memory)
    monkeypatch.setattr(sys, "stderr", None)
    guard()
    assert logging.getLogRecordFactory() is not factory
    logging.setLogRecordFactory(factory)
    warnings.formatwarning = before
    print("é")
    assert memory.getvalue() == "é\n"
    assert sys.stderr is None
