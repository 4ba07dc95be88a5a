"""Properties of the tokenizer, over all of Unicode."""

import contextlib
import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chargpt_jax.data.tokenizer import PADDING, ByteTokenizer, CharTokenizer, for_reader, from_reader
from chargpt_jax.errors import UserError

ODD = st.sampled_from("\0\ud800\udfff\ud83d\ude00\U0001f600\U0010ffff\r\né")
EVERY = st.characters() | ODD | st.integers(0, 0x10FFFF).map(chr)
# Not st.text: it omits surrogates with any alphabet.
TEXTS = st.lists(EVERY, min_size=1, max_size=60).map("".join)
few = settings(max_examples=60, deadline=None)


def original_ids(corpus: str, texts: list[str], block_size: int | None = None) -> list[list[int]]:
    """Encode like the original: sorted characters after '', padding on the left, truncation on the right."""
    vocabulary = sorted({"", *corpus})
    rank = {character: i for i, character in enumerate(vocabulary)}
    width = max(map(len, texts)) if block_size is None else block_size
    rows = []
    for text in texts:
        ids = [rank[character] for character in text][:width]
        rows.append([rank[""]] * (width - len(ids)) + ids)
    return rows


@few
@given(TEXTS)
def test_decoding_inverts_encoding(text):
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode_text(text)
    assert ids.dtype == np.int32
    assert ids.shape == (len(text),)
    assert (ids > PADDING).all()
    assert tokenizer.decode([ids]) == [text]
    assert tokenizer.decode_each([ids]) == [list(text)]


@few
@given(st.lists(TEXTS, min_size=1, max_size=4), st.none() | st.integers(1, 70))
def test_encoding_equals_the_originals(texts, block_size):
    corpus = "".join(texts)
    ids = CharTokenizer.from_text(corpus).encode(texts, block_size)
    assert ids.dtype == np.int32
    assert ids.tolist() == original_ids(corpus, texts, block_size)


@few
@given(TEXTS, TEXTS)
def test_the_order_of_the_vocabulary_given_does_not_matter(first, second):
    one, two = CharTokenizer(first + second), CharTokenizer([*second, *first, "", first[0]])
    assert one.vocabulary == two.vocabulary
    assert one.vocabulary[PADDING] == ""
    assert one.n_ids == len(set(first + second)) + 1


@few
@given(TEXTS, TEXTS)
def test_a_character_without_an_id_is_named_with_its_code_point(corpus, text):
    foreign = [c for c in text if c not in corpus]
    assume(foreign)
    tokenizer = CharTokenizer.from_text(corpus)
    with pytest.raises(UserError) as error:
        tokenizer.encode_text(text)
    assert repr(foreign[0]) in str(error.value)
    assert f"(U+{ord(foreign[0]):04X}) at character {text.index(foreign[0])}," in str(error.value)
    assert tokenizer.unknown(text) == list(dict.fromkeys(foreign))
    assert tokenizer.drop_unknown(text) == "".join(c for c in text if c in corpus)
    assert tokenizer.decode([tokenizer.encode_text(tokenizer.drop_unknown(text))]) == [tokenizer.drop_unknown(text)]


def test_combined_emoji_is_one_token_per_code_point():
    family = "👩‍👩‍👧"
    tokenizer = CharTokenizer.from_text(family)
    assert len(tokenizer.encode_text(family)) == 5
    assert tokenizer.n_ids == 4


def test_padding_is_on_the_left_and_truncation_on_the_right():
    tokenizer = CharTokenizer("abc")
    assert tokenizer.encode(["abc", "c", ""]).tolist() == [[1, 2, 3], [0, 0, 3], [0, 0, 0]]
    assert tokenizer.encode(["abc", "c"], 2).tolist() == [[1, 2], [0, 3]]
    assert tokenizer.encode(["abc"], 5).tolist() == [[0, 0, 1, 2, 3]]
    assert tokenizer.encode([]).shape == (0, 0)
    assert tokenizer.encode([], 3).shape == (0, 3)


def test_padding_and_unused_ids_decode_to_empty_strings():
    tokenizer = CharTokenizer("ab")
    assert tokenizer.decode_each([[0, 1, 3, 63, -1, 10**6, 2]]) == [["", "a", "", "", "", "", "b"]]
    assert tokenizer.decode(np.array([[0, 1, 2], [0, 0, 2]], dtype=np.int32)) == ["ab", "b"]


@pytest.mark.parametrize(("characters", "rows"), [(1, 64), (62, 64), (63, 64), (64, 128), (127, 128), (128, 192)])
def test_vocab_size_is_a_multiple_of_64(characters, rows):
    tokenizer = CharTokenizer(map(chr, range(1000, 1000 + characters)))
    assert tokenizer.n_ids == characters + 1
    assert tokenizer.vocab_size == rows


# Bytes


@few
@given(st.binary(min_size=1))
def test_bytes_survive_the_way_to_a_reader_and_back(data):
    tokenizer, characters = ByteTokenizer(), data.decode("latin-1")
    ids = tokenizer.encode_text(characters)
    assert ids.tolist() == [byte + 1 for byte in data]
    assert from_reader(tokenizer.text_of(ids)) == characters
    with contextlib.suppress(UnicodeDecodeError):
        assert for_reader(characters) == tokenizer.text_of(ids) == data.decode()


@few
@given(st.binary(), st.lists(st.integers(0, 40)))
def test_bytes_in_parts_read_like_the_whole(data, borders):
    characters = data.decode("latin-1")
    read, at = ByteTokenizer().reader(), [0, *sorted(min(border, len(data)) for border in borders), len(data)]
    parts = [ByteTokenizer().encode_text(characters[i:j]) for i, j in itertools.pairwise(at)]
    assert "".join(read(part, number == len(parts) - 1) for number, part in enumerate(parts)) == for_reader(characters)


def test_bytes_that_are_not_utf8_are_read_as_escapes():
    assert for_reader("caf\xe9 \xc3\xa9 \xe2\x82") == r"caf\xe9 é \xe2\x82"
    assert "\ufffd" not in for_reader("".join(map(chr, range(256))))


def test_saved_vocabulary_of_all_bytes_is_that_of_bytes():
    assert CharTokenizer.from_saved(["", *map(chr, range(256))]).unit == "byte"
    assert CharTokenizer.from_saved(["", *map(chr, range(1, 257))]).unit == "character"
    assert ByteTokenizer().vocabulary == CharTokenizer(map(chr, range(256))).vocabulary


def test_a_lone_surrogate_that_is_no_byte_is_refused():
    assert from_reader("a\udcff") == "a\xff"
    with pytest.raises(UserError, match=r"U\+D800.* at character 1, .* remove it"):
        from_reader("a\ud800")
