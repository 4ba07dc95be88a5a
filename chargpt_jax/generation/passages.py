"""A long text that was scored: its loss, how its ranks and surprisals are distributed, its most surprising passages.

Memory does not depend on the length of the text.
"""

import heapq
import itertools
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from chargpt_jax.events import bits_per_character
from chargpt_jax.generation.sample import Sample, Samples

LENGTH = 400
"""Characters of a passage."""

MOST_SURPRISING = 5
"""Number of the most surprising passages that are kept."""

RANKS = (1, 2, 3, 4, 5, 6, 11, 21)
"""The lowest rank of each bin in which ranks are counted."""

SURPRISALS = tuple(i / 2 for i in range(17))
"""The lowest surprisal of each bin in which surprisals are counted, nats."""


@dataclass(frozen=True)
class Counts:
    """How many characters of a text have a rank, and a surprisal, in each bin."""

    ranks: tuple[int, ...] = (0,) * len(RANKS)
    surprisals: tuple[int, ...] = (0,) * len(SURPRISALS)

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> "Counts":
        """Count the characters of samples for which these values are defined."""
        counting = Counting()
        for sample in samples:
            counting.add(sample)
        return counting.counts()

    @classmethod
    def from_dict(cls, saved: Any) -> "Counts":
        """Return counts from JSON.

        Raises:
            ValueError: if they are malformed.
        """
        lists = [saved.get(name) if isinstance(saved, dict) else None for name in ("ranks", "surprisals")]
        for found, bins in zip(lists, (RANKS, SURPRISALS), strict=True):
            if not isinstance(found, list) or len(found) != len(bins):
                raise ValueError("the counts of a text must have one number per bin")
            if not all(type(count) is int and 0 <= count < 2**62 for count in found):
                raise ValueError("the counts of a text must be integers")
        return cls(*(tuple(found or ()) for found in lists))


class Counting:
    """Counts of a text that arrives in pieces."""

    def __init__(self) -> None:
        """Begin with no character."""
        self._ranks, self._surprisals = np.zeros(len(RANKS), np.int64), np.zeros(len(SURPRISALS), np.int64)

    def add(self, sample: Sample) -> None:
        """Add the characters of a sample."""
        if sample.rank is not None:
            self._ranks += _counted(sample.rank[sample.rank > 0], RANKS)
        self._surprisals += _counted(sample.surprisal[np.isfinite(sample.surprisal)], SURPRISALS)

    def counts(self) -> Counts:
        """Return the counts so far."""
        return Counts(tuple(self._ranks.tolist()), tuple(self._surprisals.tolist()))


def _counted(values: np.ndarray, bins: tuple[float, ...]) -> np.ndarray:
    """Count the values of each bin, given by its lowest value; the last bin has no upper end."""
    index = np.searchsorted(bins, np.maximum(values, bins[0]), side="right") - 1
    return np.bincount(index, minlength=len(bins))


@dataclass(frozen=True)
class Passages:
    """The loss of a long text, its first passage, and its most surprising ones."""

    characters: int
    loss: float
    """Mean surprisal of all characters but the first, nats."""
    starts: tuple[int, ...]
    """Where each passage starts, in characters: first 0, then the most surprising passages, in descending order."""
    samples: Samples
    """The passages, with the metrics that their characters have in the whole text."""
    counts: Counts = Counts()
    """Of all characters."""

    def to_dict(self) -> dict[str, Any]:
        """Return the passages for JSON."""
        found = [{"start": start, **sample.to_dict()} for start, sample in zip(self.starts, self.samples, strict=True)]
        facts = {"characters": self.characters, "loss": self.loss, "bits_per_character": bits_per_character(self.loss)}
        return {**facts, "counts": asdict(self.counts), "samples": found}

    @classmethod
    def from_dict(cls, saved: Any) -> "Passages":
        """Return passages from the result of `to_dict`.

        Raises:
            ValueError: if they are malformed: a file is untrusted input.
        """
        samples = Samples.from_dict(saved)
        starts = tuple(found.get("start") for found in saved["samples"])
        if not all(type(start) is int and start >= 0 for start in starts):
            raise ValueError("a passage must have a start")
        characters, loss = saved.get("characters"), saved.get("loss")
        if type(characters) is not int or characters < 0 or type(loss) not in (int, float):
            raise ValueError("a text must have a number of characters and a loss")
        return cls(characters, float(loss), starts, samples, Counts.from_dict(saved.get("counts")))


def passages(scored: Iterable[Sample]) -> Passages:
    """Collect a text that arrives in pieces, which are samples of any length."""
    total, count, characters = 0.0, 0, 0
    order = itertools.count()
    found: list[tuple[float, int, int, Sample]] = []  # a heap: the least surprising passage is at index 0
    counting = Counting()
    first: Sample | None = None
    left: Sample | None = None
    for piece in itertools.chain(scored, [None]):
        if piece is not None:
            left = piece if left is None else left + piece
        while left and (len(left) >= LENGTH or piece is None):
            passage, left = left[:LENGTH], left[LENGTH:]
            known = np.isfinite(passage.surprisal)
            total += float(passage.surprisal[known].sum(dtype=np.float64))
            count += int(known.sum())
            counting.add(passage)
            if first is None:
                first = passage
            elif len(passage) == LENGTH:
                push = heapq.heappush if len(found) < MOST_SURPRISING else heapq.heappushpop
                push(found, (passage.loss, -next(order), characters, passage))
            characters += len(passage)
    ranked = sorted(found, reverse=True)
    samples = Samples([*([first] if first else []), *(sample for *_, sample in ranked)])
    starts = (0,) * bool(first) + tuple(start for _, _, start, _ in ranked)
    return Passages(characters, total / count if count else math.nan, starts, samples, counting.counts())
