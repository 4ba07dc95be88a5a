"""A long text that was scored: its loss, and its most surprising passages. Memory does not depend on its length."""

import heapq
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from chargpt_jax.events import bits_per_character
from chargpt_jax.generation.sample import Sample, Samples

LENGTH = 400
"""Characters of a passage."""

MOST_SURPRISING = 5
"""Number of the most surprising passages that are kept."""


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

    def to_dict(self) -> dict[str, Any]:
        """Return the passages for JSON."""
        found = [{"start": start, **sample.to_dict()} for start, sample in zip(self.starts, self.samples, strict=True)]
        facts = {"characters": self.characters, "loss": self.loss, "bits_per_character": bits_per_character(self.loss)}
        return {**facts, "samples": found}


def passages(scored: Iterable[Sample]) -> Passages:
    """Collect a text that arrives in pieces, which are samples of any length."""
    total, count, characters = 0.0, 0, 0
    order = itertools.count()
    found: list[tuple[float, int, int, Sample]] = []  # a heap: the least surprising passage is at index 0
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
            if first is None:
                first = passage
            elif len(passage) == LENGTH:
                push = heapq.heappush if len(found) < MOST_SURPRISING else heapq.heappushpop
                push(found, (passage.loss, -next(order), characters, passage))
            characters += len(passage)
    ranked = sorted(found, reverse=True)
    samples = Samples([*([first] if first else []), *(sample for *_, sample in ranked)])
    starts = (0,) * bool(first) + tuple(start for _, _, start, _ in ranked)
    return Passages(characters, total / count if count else math.nan, starts, samples)
