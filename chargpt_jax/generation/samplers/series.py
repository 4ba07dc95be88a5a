"""What samplers show under the characters of a sample, such as a temperature, and its form in JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from chargpt_jax.generation.alternatives import array_of, listed

MAX_LABEL = 80
"""Characters of a label in a file of samples."""


@dataclass(frozen=True, eq=False)
class Shown:
    """One number per character that a sampler shows."""

    label: str
    """What it is, with its unit."""
    top: float
    """The value at full height of a plot."""
    values: np.ndarray
    """float32 [N]; NaN for the prompt."""

    def __eq__(self, other: object) -> bool:
        """Return whether both are equal; NaN equals NaN."""
        if not isinstance(other, Shown):
            return NotImplemented
        same = np.array_equal(self.values, other.values, equal_nan=True)
        return same and (self.label, self.top) == (other.label, other.top)

    @property
    def height(self) -> np.ndarray:
        """The values as fractions of the full height, float32 [N]."""
        return self.values / np.float32(self.top)


Series = dict[str, Shown]
"""By the name of the sampler."""


def sliced(series: Mapping[str, Shown], part: slice) -> Series:
    """Return the series of a part of the text."""
    return {name: replace(own, values=own.values[part]) for name, own in series.items()}


def joined(first: Mapping[str, Shown], second: Mapping[str, Shown], lengths: tuple[int, int]) -> Series:
    """Return the series of two texts, one after the other; NaN where one of them has none."""
    names = dict.fromkeys([*first, *second])
    none = [np.full(length, np.nan, np.float32) for length in lengths]

    def both(name: str) -> Shown:
        parts = [own[name].values if name in own else nan for own, nan in zip((first, second), none, strict=True)]
        return replace(first.get(name) or second[name], values=np.concatenate(parts))

    return {name: both(name) for name in names}


def to_dict(series: Mapping[str, Shown]) -> dict[str, Any]:
    """Return series for JSON; None for NaN."""
    return {name: {"label": own.label, "top": own.top, "values": listed(own.values)} for name, own in series.items()}


def from_dict(saved: Any, count: int) -> Series:
    """Return series from the result of `to_dict`, for a number of characters.

    Raises:
        ValueError: if it is malformed.
    """
    if not isinstance(saved, dict):
        raise ValueError("the series of a sample must have names")
    found: Series = {}
    for name, content in saved.items():
        own: dict[str, Any] = content if isinstance(content, dict) else {}
        label, top = own.get("label"), own.get("top")
        if not isinstance(label, str) or len(label) > MAX_LABEL:
            raise ValueError("a series of a sample must have a label")
        if not isinstance(top, int | float) or isinstance(top, bool) or not 0 < top < 1e30:
            raise ValueError("a series of a sample must have a top above 0")
        found[name] = Shown(label, float(top), array_of(own.get("values"), count))
    return found
