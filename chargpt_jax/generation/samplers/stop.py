"""Stop strings: a sequence ends as soon as its text ends with one of them."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class StopStrings:
    """Stop strings as token ids, for the generation loop."""

    ids: jax.Array
    """int32 [S, M], right-aligned."""
    lengths: jax.Array
    """int32 [S]; an unused row has more than any text."""

    @classmethod
    def of(cls, strings: Sequence[np.ndarray]) -> "StopStrings":
        """Return stop strings from their token ids, int32 [M_i] each; few shapes need their own compilation."""
        S = 1 << (len(strings) - 1).bit_length()
        M = max(8, 1 << (max(map(len, strings)) - 1).bit_length())
        ids, lengths = np.zeros((S, M), np.int32), np.full(S, np.iinfo(np.int32).max, np.int32)
        for i, own in enumerate(strings):
            ids[i, M - len(own) :], lengths[i] = own, len(own)
        return cls(ids, lengths)  # type: ignore[arg-type]

    def end(self, tokens: jax.Array, length: jax.Array) -> jax.Array:
        """Return for each sequence whether its text ends with a stop string, bool [B].

        Args:
            tokens: int32 [B, N].
            length: int32 [B].
        """
        M = self.ids.shape[1]
        index = length[:, None] - M + jnp.arange(M)
        last = jnp.take_along_axis(tokens, jnp.maximum(index, 0), axis=1)
        unused = jnp.arange(M) < M - self.lengths[:, None]  # [S, M]
        equal = (last[:, None] == self.ids) | unused
        return jnp.any(jnp.all(equal, axis=-1) & (length[:, None] >= self.lengths), axis=-1)


class Ends:
    """Where the texts of a batch end: at a given length, or before it behind a stop string."""

    def __init__(self, lengths: Sequence[int], strings: Sequence[np.ndarray]):
        """Start behind the prompts.

        Args:
            lengths: of the prompts.
            strings: token ids of the stop strings, int32 [M] each.
        """
        self._lengths, self._strings = list(lengths), strings
        self._found: dict[int, int] = {}

    def update(self, tokens: np.ndarray, done: int) -> None:
        """Look for stop strings in the first `done` new tokens of each text, int32 [B, N]."""
        for i, length in enumerate(self._lengths):
            if self._strings and i not in self._found:
                end = stopped_at(tokens[i], length, length + done, self._strings)
                self._found |= {} if end is None else {i: end}

    def part(self, i: int, start: int, stop: int) -> tuple[int, int]:
        """Return the range of text i from `start` to `stop` new tokens, up to its end; empty behind the end."""
        first, last = self._lengths[i] + start, self._lengths[i] + stop
        end = self._found.get(i, last)
        return min(first, end), min(last, end)

    @property
    def found(self) -> list[int]:
        """The texts that have a stop string."""
        return list(self._found)


def stopped_at(tokens: np.ndarray, start: int, stop: int, strings: Sequence[np.ndarray]) -> int | None:
    """Return the shortest length above `start`, up to `stop`, at which a text ends with a stop string; None: none.

    Args:
        tokens: int32 [N], of the text.
        start: length of the text before the first token that can end it.
        stop: length of the text.
        strings: token ids of the stop strings.
    """
    text, ends = _characters(tokens[:stop]), []
    for own in map(_characters, strings):
        found = text.find(own, max(0, start + 1 - len(own)))
        ends += [found + len(own)] if found >= 0 else []
    return min(ends, default=None)


def _characters(ids: np.ndarray) -> str:
    """Return token ids as characters of a private plane each, which a string can be searched for."""
    return "".join(map(chr, ids.tolist()))
