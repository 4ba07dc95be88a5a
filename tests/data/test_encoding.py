"""Decoding: byte order marks, declarations, a given encoding, and what is said about a text that has none of them."""

import codecs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt_jax.data import encoding as encodings
from chargpt_jax.data.encoding import UndecodableText, decode, decode_in_pieces, decode_pieces, several
from chargpt_jax.data.streams.text_file import NeedsWhole
from chargpt_jax.errors import UserError

GERMAN = "Der Käse ist größer als süß, sagte die müde Bäuerin.\n" * 5


@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\ufeff")),
    st.sampled_from(["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]),
)
def test_a_byte_order_mark_gives_the_encoding(text: str, encoding: str) -> None:
    mark = "\ufeff".encode(encoding)
    assert decode(mark + text.encode(encoding), "a", encoding="latin-1", declared="ascii") == text


@pytest.mark.parametrize(
    "head",
    [
        "The Project Gutenberg EBook of X\n\nTitle: X\n\nCharacter set encoding: ISO-8859-1\n\n",
        '<html><head><meta http-equiv="Content-Type" content="text/html; charset=iso-8859-1"></head>\n',
        "<html><meta charset='latin1'>\n",
        '<?xml version="1.0" encoding="ISO-8859-1"?>\n',
    ],
)
def test_a_declaration_in_the_text_counts_unless_the_text_is_utf_8(head: str) -> None:
    assert decode((head + GERMAN).encode("latin-1"), "a") == head + GERMAN
    assert decode((head + GERMAN).encode("utf-8"), "a") == head + GERMAN


def test_a_given_encoding_goes_before_declarations() -> None:
    head = "Character set encoding: UTF-8\n"
    assert decode((head + "Łódź").encode("cp1250"), "a", encoding="cp1250", declared="utf-8") == head + "Łódź"
    assert decode("Łódź".encode("utf-16-le"), "a", encoding="utf-16-le") == "Łódź"


def test_a_charset_of_the_server_counts() -> None:
    assert decode("Łódź".encode("cp1250"), "a", declared="cp1250") == "Łódź"


def test_an_unreadable_text_is_refused_with_its_likely_encoding() -> None:
    with pytest.raises(UndecodableText) as caught:
        decode(GERMAN.encode("latin-1"), "de.txt")
    assert str(caught.value) == (
        "de.txt cannot be read as utf-8 at byte 5, probably cp1252: save it in UTF-8, or pass "
        "--config.data.encoding=cp1252 and check the result."
    )


@pytest.mark.parametrize(
    ("data", "likely"),
    [
        ("Il a été à l'école, là-bas, déjà.\n".encode("latin-1") * 20, "cp1252"),  # few different letters
        ("Café naïve texte. ".encode("latin-1"), "cp1252"),
        (GERMAN.encode("utf-16-le"), "utf-16-le"),
        (GERMAN.encode("utf-16-be"), "utf-16-be"),
        ("Привет, мир. ".encode("utf-32-be") * 9, "utf-32-be"),
        (b"It is UTF-8 but for \xed\xa0\xbd\xed\xb8\x80, which CESU-8 writes for an emoji.", None),
        (b"It is UTF-8 but for \xed\xa0\xbd.", None),
    ],
)
def test_likely_encodings(data: bytes, likely: str | None) -> None:
    with pytest.raises(UndecodableText) as caught:
        decode(data, "a.txt")
    assert caught.value.likely == likely


def test_another_encoding_cannot_be_chosen_against_a_byte_order_mark() -> None:
    with pytest.raises(UndecodableText, match=r"at byte 4: save it in UTF-8\.$"):
        decode(codecs.BOM_UTF16_LE + b"a\0b", "a.txt")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"%PDF-1.4\nplain", "is in PDF format"),
        (b"PK\x03\x04..", "is in ZIP, EPUB or DOCX format"),
        (b"\x1f\x8b\x08", "is in gzip format"),
        (b"{\\rtf1 text}", "is in RTF format"),
    ],
)
def test_a_text_in_another_form_is_named(data: bytes, said: str) -> None:
    with pytest.raises(UserError, match=said):
        decode(data, "a")


def test_nel_is_a_line_end_in_ebcdic() -> None:
    assert decode("café\x85thé\x85".encode("cp1140"), "a", encoding="cp1140") == "café\nthé\n"
    assert "".join(decode_pieces([b"\x81\x15", b"\x81"], "a", encoding="cp037")) == "a\na"
    assert decode(b"wait\x85", "a", encoding="latin-1") == "wait\x85"  # an ellipsis of cp1252


@pytest.mark.parametrize("name", ["no-such", "rot13", "hex", "\0", "a" * 100])
def test_an_unknown_encoding_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="data.encoding is"):
        decode(b"abc", "a", encoding=name)


@pytest.mark.parametrize("data", [b"abc\0def", codecs.BOM_UTF16_LE + b"a\0\0\0", b"\xff\xd8\0\xff"])
def test_a_binary_file_is_refused(data: bytes) -> None:
    with pytest.raises(UserError, match="binary"):
        decode(data, "a")


def test_several_errors_are_one() -> None:
    errors = [UndecodableText(f"{n}.txt", "utf-8 at byte 3", "cp1252") for n in range(12)]
    message = str(several(errors))
    assert "12 texts" in message
    assert "9.txt" in message
    assert "and 2 more" in message
    assert "--config.data.encoding=cp1252" in message
    other = UndecodableText("x.txt", "utf-8 at byte 0", None)
    assert "encoding=NAME" in str(several([errors[0], other]))
    assert several([other]) is other


@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=40),
    st.sampled_from(["utf-8", "utf-16-le", "utf-32-be"]),
    st.integers(1, 7),
    st.booleans(),
)
def test_pieces_of_a_text_decode_to_the_text(text: str, encoding: str, size: int, marked: bool) -> None:
    data = ("\ufeff" if marked else "").encode(encoding) + text.encode(encoding)
    given_encoding = "" if marked else encoding
    blocks = [data[i : i + max(size, 4)] for i in range(0, len(data), max(size, 4))]
    assert "".join(decode_pieces(blocks, "a", given_encoding)) == decode(data, "a", given_encoding)


@pytest.mark.parametrize(("blocks", "said"), [([b"abc", b"d\xff"], "utf-8 after byte 3"), ([b"ab", b"c\0"], "binary")])
def test_a_bad_piece_is_refused(blocks: list[bytes], said: str) -> None:
    with pytest.raises(UserError, match=said):
        list(decode_pieces(blocks, "a"))


# Pieces of a text of any length


@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(
        st.sampled_from(["a b\n", "é", "日", "😀", "\r", "\n", "\r\n", "\x85", "charset encoding: ", "\0", "“"]),
        max_size=30,
    ),
    start=st.sampled_from(["", "\ufeff", "Character set encoding: ISO-8859-1\r\n", "Character set encoding: UTF-8\n"]),
    stored=st.sampled_from(
        ["utf-8", "latin-1", "cp1252", "utf-16", "utf-16-le", "utf-32", "cp037", "gb18030", "shift_jis"]
    ),
    encoding=st.sampled_from(["", "latin-1", "cp037", "utf-8", "utf-7", "nonsense"]),
    declared=st.sampled_from([None, "utf-8", "latin-1", "nonsense"]),
    size=st.integers(1, 9),
)
def test_decode_in_pieces_equals_the_whole(text, start, stored, encoding, declared, size):
    data = (start + "".join(text)).encode(stored, "ignore")
    blocks = [data[:64], *(data[i : i + size] for i in range(64, len(data), size))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encodings, "DECLARED_WITHIN", 64)
        try:
            found = "".join(decode_in_pieces(lambda: filter(None, blocks), encoding, declared))
        except NeedsWhole:
            return
        assert found == decode(data, "a.txt", encoding, declared)


@pytest.mark.parametrize("ending", ["é", "\r", "\r\n", "日"])
def test_decode_in_pieces_keeps_characters_at_borders_whole(ending):
    data = ("x" * 63 + ending + "y").encode()
    for size in (64, 65):
        assert "".join(decode_in_pieces(lambda size=size: [data[:size], data[size:]])) == decode(data, "a.txt")


@pytest.mark.parametrize("data", [b"\xff\xfe\xfa", b"a\0b", b"%PDF-1", b"caf\xe9 " * 20])
def test_decode_in_pieces_leaves_errors_to_decode(data):
    with pytest.raises(NeedsWhole):
        list(decode_in_pieces(lambda: [data]))
    with pytest.raises(UserError):
        decode(data, "a.txt")
