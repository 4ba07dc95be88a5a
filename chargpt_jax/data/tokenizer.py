"""Convert characters to token ids and back, without JAX.

The vocabulary is the sorted set of a text's characters, after '' (padding, id 0). Sorting by code point gives each
character the id that it has in the original.
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from chargpt_jax.config import VOCAB_MULTIPLE
from chargpt_jax.errors import UserError

PADDING = 0
"""The id of '': it precedes short sequences, is never a target, and decodes to ''."""


class CharTokenizer:
    """A bijection between the characters of one vocabulary and the ids 1 to len(vocabulary) - 1."""

    def __init__(self, vocabulary: Iterable[str]):
        """Take any iterable of single characters; order and repetitions do not matter, '' is added."""
        self.vocabulary: tuple[str, ...] = tuple(sorted({"", *vocabulary}))
        self._codes = np.array([ord(c) for c in self.vocabulary[1:]], dtype=np.int64)

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """Make the tokenizer whose vocabulary is the text's characters."""
        return cls(set(text))

    @classmethod
    def from_saved(cls, names: object) -> "CharTokenizer":
        """Make the tokenizer whose vocabulary was saved, '' first and the rest in order, as it stands in a file.

        Raises:
            ValueError: where it is anything else, or in another order: the ids of the corpus would then mean others.
        """
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("a vocabulary is a list of characters")
        if names[:1] != [""] or any(len(name) != 1 for name in names[1:]):
            raise ValueError("a vocabulary is '' and then single characters")
        if any(one >= other for one, other in itertools.pairwise(names)):
            raise ValueError("its characters are not in order, each once")
        return cls(names)

    @property
    def n_ids(self) -> int:
        """Number of token ids in use: the characters and the padding."""
        return len(self.vocabulary)

    @property
    def vocab_size(self) -> int:
        """Size of the embedding table: `n_ids` rounded up to a multiple of 64."""
        return -(-self.n_ids // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

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
            int32 [N], one id a character.

        Raises:
            UserError: naming a character without an id, and its code point.
        """
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.int64)
        positions = np.searchsorted(self._codes, codes)
        known = positions < len(self._codes)
        known[known] = self._codes[positions[known]] == codes[known]
        if not known.all():
            at = int(np.argmin(known))
            raise UserError(
                f"The text has {text[at]!r} (U+{ord(text[at]):04X}) at character {at}, which is not in the vocabulary "
                "of this model: leave it out, or pass --skip_unknown to drop such characters."
            )
        return (positions + 1).astype(np.int32)

    def encode(self, texts: Sequence[str], block_size: int | None = None) -> np.ndarray:
        """Encode texts into one array, padded on the left with 0.

        Args:
            texts: any number of texts.
            block_size: the length of the result; longer texts lose their end. None: the length of the longest text.

        Returns:
            int32 [B, T].
        """
        rows = [self.encode_text(t)[:block_size] for t in texts]
        width = max((len(r) for r in rows), default=0) if block_size is None else block_size
        out = np.full((len(rows), width), PADDING, dtype=np.int32)
        for row, ids in zip(out, rows, strict=True):
            row[width - len(ids) :] = ids
        return out

    def decode_each(self, tokens: Iterable[Iterable[int]]) -> list[list[str]]:
        """Give one string a token, for each sequence; padding and ids without a character give ''."""
        names = dict(enumerate(self.vocabulary))
        return [[names.get(int(i), "") for i in row] for row in tokens]

    def decode(self, tokens: Iterable[Iterable[int]]) -> list[str]:
        """Give one text a sequence of ids."""
        return ["".join(row) for row in self.decode_each(tokens)]
