"""The likeliest characters at every position of a text, as a sample holds them, and their form in JSON."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np


@dataclass(frozen=True, repr=False, eq=False)
class Alternatives:
    """What a model predicted in place of each of N characters."""

    rank: np.ndarray
    """int32 [N]: 1 if the character was the likeliest, 2 if it was the next one; 0 where undefined."""
    characters: np.ndarray
    """str [N, k]: the likeliest characters, in descending order."""
    probability: np.ndarray
    """float32 [N, k], of these characters at temperature 1; NaN where undefined."""
    sampled_probability: np.ndarray
    """float32 [N]: the probability that the sampler gave the character; NaN where no sampler chose it."""

    def __eq__(self, other: object) -> bool:
        """Return whether all values are equal; NaN equals NaN."""
        if not isinstance(other, Alternatives):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    def __getitem__(self, part: slice) -> "Alternatives":
        """Return those of consecutive characters."""
        return Alternatives(*(getattr(self, f.name)[part] for f in fields(self)))

    def __add__(self, other: "Alternatives") -> "Alternatives":
        """Return those of two texts, one after the other; k is the smaller of both."""
        k = min(self.characters.shape[1], other.characters.shape[1])
        mine, theirs = self.most(k), other.most(k)
        return Alternatives(*(np.concatenate([getattr(mine, f.name), getattr(theirs, f.name)]) for f in fields(self)))

    def most(self, k: int) -> "Alternatives":
        """Return the k likeliest characters only."""
        return replace(self, characters=self.characters[:, :k], probability=self.probability[:, :k])

    def at(self, position: int) -> list[tuple[str, float]]:
        """Return the likeliest characters at a position, with their probabilities; [] where undefined."""
        if not self.rank[position]:
            return []
        return list(zip(self.characters[position].tolist(), self.probability[position].tolist(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Return lists for JSON, with one item per character; None where undefined."""
        return {
            "rank": [rank or None for rank in self.rank.tolist()],
            "alternatives": [[list(pair) for pair in self.at(i)] or None for i in range(len(self.rank))],
            "sampled_probability": listed(self.sampled_probability),
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any], count: int) -> "Alternatives":
        """Return alternatives from the result of `to_dict`, for a number of characters.

        Raises:
            ValueError: if it is malformed.
        """
        lists = saved.get("alternatives")
        if not isinstance(lists, list) or len(lists) != count:
            raise ValueError("a sample must have one list of alternatives per token")
        k = max((len(pairs) for pairs in lists if isinstance(pairs, list)), default=0)
        characters, probability = np.full((count, k), "", "<U1"), np.full((count, k), math.nan, np.float32)
        for i, pairs in enumerate(lists):
            if pairs is None:
                continue
            if not isinstance(pairs, list) or len(pairs) != k or not all(map(_is_alternative, pairs)):
                raise ValueError("the alternatives of a sample must be pairs of a character and a probability")
            characters[i], probability[i] = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        ranks = saved.get("rank")
        if not isinstance(ranks, list) or not all(_is_rank(*pair) for pair in zip(ranks, lists, strict=False)):
            raise ValueError("the ranks of a sample must be integers of at least 1 where it has alternatives")
        rank = np.nan_to_num(array_of(ranks, count)).astype(np.int32)
        return cls(rank, characters, probability, array_of(saved.get("sampled_probability"), count))


def array_of(saved: Any, count: int) -> np.ndarray:
    """Return a list of JSON with `count` numbers as an array, float32 [count]; None becomes NaN.

    Raises:
        ValueError: if it is something else.
    """
    if not isinstance(saved, list) or len(saved) != count:
        raise ValueError("a sample must have one number per token")
    if not all(value is None or (type(value) in (int, float) and abs(value) < 1e30) for value in saved):
        raise ValueError("the metrics of a sample must be numbers")
    return np.array([math.nan if value is None else value for value in saved], np.float32)


def listed(values: np.ndarray) -> list[float | None]:
    """Return an array as a list for JSON; NaN becomes None."""
    return [float(v) if np.isfinite(v) else None for v in values]


def _is_rank(rank: object, alternatives: object) -> bool:
    """Return whether a rank fits the alternatives of the same character: both are defined, or neither is."""
    return rank is None if alternatives is None else type(rank) is int and 1 <= rank < 2**31


def _is_alternative(pair: object) -> bool:
    if not isinstance(pair, list) or len(pair) != 2:
        return False
    character, p = pair
    return isinstance(character, str) and len(character) < 2 and type(p) in (int, float) and 0 <= p <= 1


def _same(mine: np.ndarray, theirs: np.ndarray) -> bool:
    return np.array_equal(mine, theirs, equal_nan=mine.dtype.kind == "f" == theirs.dtype.kind)
