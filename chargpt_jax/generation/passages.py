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


def passages(scored: Iterable[tuple[str, np.ndarray, np.ndarray]], vocab_size: int) -> Passages:
    """Collect a text that arrives in pieces.

    Args:
        scored: the pieces: n characters, their surprisal and their entropy, [n] each, nats; NaN where undefined.
        vocab_size: of the model.
    """
    total, count, characters = 0.0, 0, 0
    order = itertools.count()
    found: list[tuple[float, int, int, Sample]] = []  # a heap: the least surprising passage is at index 0
    first: Sample | None = None
    text, metrics = "", np.zeros((2, 0), np.float32)
    for piece, *values in itertools.chain(scored, [("", np.zeros(0), np.zeros(0))]):
        last = not piece
        text, metrics = text + piece, np.concatenate([metrics, np.stack(values).astype(np.float32)], axis=1)
        while len(text) >= LENGTH or (last and text):
            part, numbers = text[:LENGTH], metrics[:, :LENGTH]
            sample = Sample(part, tuple(part), numbers[0], numbers[1], vocab_size)
            known = np.isfinite(numbers[0])
            total, count = total + float(numbers[0][known].sum(dtype=np.float64)), count + int(known.sum())
            if first is None:
                first = sample
            elif len(part) == LENGTH:
                push = heapq.heappush if len(found) < MOST_SURPRISING else heapq.heappushpop
                push(found, (sample.loss, -next(order), characters, sample))
            characters += len(part)
            text, metrics = text[LENGTH:], metrics[:, LENGTH:]
    ranked = sorted(found, reverse=True)
    samples = Samples([*([first] if first else []), *(sample for *_, sample in ranked)])
    starts = (0,) * bool(first) + tuple(start for _, _, start, _ in ranked)
    return Passages(characters, total / count if count else math.nan, starts, samples)
