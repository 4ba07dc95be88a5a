"""A text in a file: what was written in pieces is read back, whole or in part."""

from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt_jax.data.streams import text_file
from chargpt_jax.data.streams.text_file import TextFile, by_lines, joined

TEXTS = st.text(st.sampled_from("ab é\n\n \ud800日😀\t"), max_size=60)


def written(pieces: list[str]) -> TextFile:
    file = TextFile()
    for piece in pieces:
        file.append(piece)
    return file


@settings(deadline=None)
@given(st.lists(TEXTS, max_size=6), st.integers(0, 200), st.integers(0, 200))
def test_text_file_gives_any_part_of_its_text(pieces, start, stop):
    text, file = "".join(pieces), written(pieces)
    assert len(file) == len(text)
    assert file.text() == text
    assert file.text(start, stop) == text[start:stop]
    assert file.text(start) == text[start:]
    assert file.ends_with_line() == text.endswith("\n")
    position = min(start, len(text))
    assert file.line_ends_before(position) == text[:position].count("\n")


@settings(deadline=None)
@given(st.lists(TEXTS, max_size=6), st.lists(st.integers(0, 60), min_size=2, max_size=6))
def test_joined_strips_the_parts_of_a_text(pieces, borders):
    text, file = "".join(pieces), written(pieces)
    borders = sorted(min(border, len(text)) for border in borders)
    spans = list(zip(borders[::2], borders[1::2], strict=False))
    parts = [text[start:stop].strip() for start, stop in spans]
    assert "".join(joined(file, spans)) == "\n\n".join(part for part in parts if part)


def test_stripped_part_can_have_much_white_space(monkeypatch):
    monkeypatch.setattr(text_file, "END", 2)
    text = "x" + " \n" * 9 + "a b" + "\t \n" * 7 + "y"
    file = written([text])
    start, stop = file.stripped((1, len(text) - 1))
    assert text[start:stop] == "a b"
    assert file.stripped((1, 5)) == (5, 5)


@settings(deadline=None)
@given(st.lists(TEXTS, max_size=8), st.integers(1, 20))
def test_by_lines_keeps_the_text_and_its_lines(pieces, size):
    found = list(by_lines(pieces, size))
    assert "".join(found) == "".join(pieces)
    assert all(piece.endswith("\n") for piece in found[:-1])
    assert not any(piece[0].isspace() for piece in found[1:])
