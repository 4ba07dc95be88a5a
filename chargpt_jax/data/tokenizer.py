"""Convert characters, or bytes, to token ids and back, without JAX.

The vocabulary is the sorted set of a text's characters, after '' (padding, id 0). Sorting by code point gives each
character the id that it has in the original.

A token of a byte model is a byte. Inside the package it is written as the character of the same number, U+0000 to
U+00FF: in vocabularies, samples and files. `from_reader` and `for_reader` convert texts from and to UTF-8.
"""

import codecs
import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from chargpt_jax.config.rules import VOCAB_MULTIPLE
from chargpt_jax.errors import UserError

PADDING = 0
"""Token id of the padding, '': it precedes short sequences, is never a target, and decodes to ''."""

BYTES = tuple(map(chr, range(256)))
"""The characters that stand for bytes. A text has no U+0000, so no vocabulary of a text has exactly these."""

MAX_NAMED = 10
"""Number of characters that a message names."""


class CharTokenizer:
    """A bijection between the characters of one vocabulary and the ids 1 to len(vocabulary) - 1."""

    unit = "character"
    """What a token is: 'character' or 'byte'."""

    def __init__(self, vocabulary: Iterable[str]):
        """Create a tokenizer for some characters; their order and repetitions do not matter, and '' is added."""
        self.vocabulary: tuple[str, ...] = tuple(sorted({"", *vocabulary}))
        codes = np.array([ord(c) for c in self.vocabulary[1:]], dtype=np.int64)
        self._ids = np.zeros(codes.max(initial=0) + 2, np.int32)
        """The id of each code point up to the highest one, and of all others; 0: it has none."""
        self._ids[codes] = np.arange(1, self.n_ids)

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """Return the tokenizer for the characters of a text."""
        return cls(set(text))

    @classmethod
    def from_saved(cls, names: object) -> "CharTokenizer":
        """Return the tokenizer of a saved vocabulary: '', then the characters, sorted by code point.

        Raises:
            ValueError: if it is not a list of that form. In another order, the ids would stand for other characters.
        """
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("a vocabulary must be a list of characters")
        if names[:1] != [""] or any(len(name) != 1 for name in names[1:]):
            raise ValueError("a vocabulary must be '' and then single characters")
        if any(one >= other for one, other in itertools.pairwise(names)):
            raise ValueError("its characters are not sorted and distinct")
        return ByteTokenizer() if tuple(names[1:]) == BYTES else cls(names)

    def reader(self, missing: str = "") -> Callable[[Iterable[int], bool], str]:
        """Return a function (ids, whether they are the last ones) -> text, for a sequence that comes in parts.

        `missing` as for `decode_each`.
        """
        return lambda tokens, last: self.decode([tokens], missing)[0]

    def text_of(self, tokens: Iterable[int]) -> str:
        """Return the text of a sequence of ids, from which the same ids can be made."""
        return self.decode([tokens])[0]

    @property
    def n_ids(self) -> int:
        """Number of used token ids: the characters and the padding."""
        return len(self.vocabulary)

    @property
    def vocab_size(self) -> int:
        """Size of the embedding table: `n_ids` rounded up to a multiple of 64."""
        return -(-self.n_ids // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def dtype(self) -> np.dtype:
        """The narrowest dtype that holds all token ids: uint8, uint16 or uint32."""
        return np.min_scalar_type(self.n_ids - 1)

    def unknown(self, text: str) -> list[str]:
        """Return the distinct characters of a text that have no id, in the order of their first appearance."""
        known = set(self.vocabulary)
        return [c for c in dict.fromkeys(text) if c not in known]

    def drop_unknown(self, text: str) -> str:
        """Return the text without the characters that have no id."""
        known = set(self.vocabulary)
        return "".join(c for c in text if c in known)

    def encode_text(self, text: str) -> np.ndarray:
        """Encode one text.

        Returns:
            int32 [N], one id per character.

        Raises:
            UserError: naming a character without an id, and its code point.
        """
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        ids = self._ids.take(codes, mode="clip")
        if not ids.all():
            at = int(np.argmin(ids))
            raise UserError(
                f"The text has {text[at]!r} (U+{ord(text[at]):04X}) at character {at}, which is not in the vocabulary "
                "of this model: remove it, or drop such characters with --skip_unknown (in Python, skip_unknown=True)."
            )
        return ids

    def encode(self, texts: Sequence[str], block_size: int | None = None) -> np.ndarray:
        """Encode texts into one array, padded on the left with 0.

        Args:
            texts: any number of texts.
            block_size: length of the result; longer texts lose their end. None: the length of the longest text.

        Returns:
            int32 [B, T].
        """
        sequences = [self.encode_text(t)[:block_size] for t in texts]
        width = max(map(len, sequences), default=0) if block_size is None else block_size
        padded = np.full((len(sequences), width), PADDING, dtype=np.int32)
        for target, ids in zip(padded, sequences, strict=True):
            target[width - len(ids) :] = ids
        return padded

    def decode_each(self, tokens: Iterable[Iterable[int]], missing: str = "") -> list[list[str]]:
        """Return a list of strings per sequence, one per token; padding and unused ids give `missing`."""
        names = dict(enumerate(self.vocabulary)) | {PADDING: missing}
        return [[names.get(int(i), missing) for i in sequence] for sequence in tokens]

    def decode(self, tokens: Iterable[Iterable[int]], missing: str = "") -> list[str]:
        """Return one text per sequence of ids; `missing` as for `decode_each`."""
        return ["".join(strings) for strings in self.decode_each(tokens, missing)]


class ByteTokenizer(CharTokenizer):
    """The tokenizer of all bytes: byte b has the id b + 1."""

    unit = "byte"

    def __init__(self) -> None:
        """Create the tokenizer; all of them are equal."""
        super().__init__(BYTES)

    def reader(self, missing: str = "") -> Callable[[Iterable[int], bool], str]:
        """Return the function of `CharTokenizer.reader`; an incomplete character waits for the rest of its bytes."""
        read = part_reader()
        return lambda tokens, last: read(self.decode([tokens], missing)[0], last)

    def text_of(self, tokens: Iterable[int]) -> str:
        """Return the text of a sequence of ids; a byte that is not UTF-8 is a lone surrogate, as in paths."""
        return super().text_of(tokens).encode("latin-1").decode("utf-8", "surrogateescape")


def from_reader(text: str) -> str:
    """Return the bytes of a text in UTF-8, as characters; a lone surrogate U+DC80 to U+DCFF stands for its last byte.

    Raises:
        UserError: if it has another lone surrogate.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("latin-1")
    except UnicodeEncodeError as error:
        raise UserError(
            f"The text has {named(text[error.start])} at character {error.start}, which is half of a surrogate pair "
            "and not a character: remove it."
        ) from None


def part_reader() -> Callable[[str, bool], str]:
    """Return a function (bytes, whether they are the last ones) -> text like `for_reader`, for parts of a text."""
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    return lambda characters, last: decoder.decode(characters.encode("latin-1", "backslashreplace"), last)


def for_reader(characters: str) -> str:
    """Return the text of bytes, given as characters; bytes that are not UTF-8 are written as backslash escapes."""
    return characters.encode("latin-1", "backslashreplace").decode("utf-8", "backslashreplace")


def named(characters: Sequence[str]) -> str:
    """Return characters and their code points for a message, at most MAX_NAMED of them."""
    names = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in characters[:MAX_NAMED])
    return names + (f" and {len(characters) - MAX_NAMED} more" if len(characters) > MAX_NAMED else "")
