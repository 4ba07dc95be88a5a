"""A text with its metrics per character, and its forms: JSON, SVG, notebook output."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from chargpt_jax.config import argument, shown
from chargpt_jax.errors import UserError
from chargpt_jax.generation.metrics import surprise_surprise
from chargpt_jax.pictures import subline


@dataclass(frozen=True, repr=False, eq=False)
class Sample:
    """A text of N characters, prompt included, and the metrics of each character."""

    prompt: str
    tokens: tuple[str, ...]
    """One string per token."""
    surprisal: np.ndarray
    """float32 [N], nats; NaN where undefined."""
    entropy: np.ndarray
    """float32 [N], nats; NaN where undefined."""
    vocab_size: int

    def __eq__(self, other: object) -> bool:
        """Return whether texts and metrics are equal; NaN equals NaN."""
        if not isinstance(other, Sample):
            return NotImplemented
        names = (self.prompt, self.tokens, self.vocab_size) == (other.prompt, other.tokens, other.vocab_size)
        return names and all(
            np.array_equal(mine, theirs, equal_nan=True)
            for mine, theirs in ((self.surprisal, other.surprisal), (self.entropy, other.entropy))
        )

    def __hash__(self) -> int:
        return hash((self.prompt, self.tokens, self.vocab_size))

    @property
    def text(self) -> str:
        """The complete text, prompt included."""
        return "".join(self.tokens)

    @property
    def surprise_surprise(self) -> np.ndarray:
        """S2, float32 [N]: (surprisal - entropy) / log(vocab_size)."""
        return surprise_surprise(self.surprisal, self.entropy, self.vocab_size)

    @property
    def loss(self) -> float:
        """The mean surprisal, in nats per character."""
        return float(np.nanmean(self.surprisal)) if np.isfinite(self.surprisal).any() else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return the sample for JSON: lists, and None for NaN."""
        return {
            "prompt": self.prompt,
            "text": self.text,
            "tokens": list(self.tokens),
            "surprisal": _listed(self.surprisal),
            "entropy": _listed(self.entropy),
            "surprise_surprise": _listed(self.surprise_surprise),
            "vocab_size": self.vocab_size,
        }

    @classmethod
    def from_dict(cls, saved: Any) -> "Sample":
        """Return a sample from the result of `to_dict`.

        Raises:
            ValueError: if it is malformed: a sample file is untrusted input.
        """
        if not isinstance(saved, dict) or not isinstance(saved.get("prompt"), str):
            raise ValueError("a sample must have a prompt")
        tokens, size = saved.get("tokens"), saved.get("vocab_size")
        if not isinstance(tokens, list) or not all(isinstance(token, str) and len(token) < 2 for token in tokens):
            raise ValueError("the tokens of a sample must be characters")
        if type(size) is not int or not 2 <= size < 2**31:
            raise ValueError("the vocab_size of a sample must be an integer of at least 2")
        surprisal, entropy = (_array(saved.get(name), len(tokens)) for name in ("surprisal", "entropy"))
        return cls(saved["prompt"], tuple(tokens), surprisal, entropy, size)

    def __repr__(self) -> str:
        return f"Sample({self.text!r}, {self.loss:.3f} nats per character)"

    def svg(self, chars_per_line: int = 80) -> str:
        """Plot the text with its entropy, surprisal and S2 below it, as SVG.

        Raises:
            UserError: if the number of characters per line is not an integer of at least 1.
        """
        if argument("chars_per_line", chars_per_line, int, "try 80") < 1:
            raise UserError(f"chars_per_line is {shown(chars_per_line)}, but it must be at least 1: try 80.")
        series = subline.metric_series(self.surprisal, self.entropy, self.surprise_surprise, self.vocab_size)
        n_prompt = len(self.prompt) if len(self.prompt) < len(self.tokens) else 0  # a scored text has no prompt
        return subline.subline(self.tokens, series, chars_per_line=chars_per_line, n_prompt=n_prompt)

    def _repr_html_(self) -> str:
        return self.svg()


class Samples(list[Sample]):
    """A list of samples; a notebook shows them below each other."""

    def to_dict(self) -> dict[str, Any]:
        """Return {'samples': [...]} for JSON."""
        return {"samples": [sample.to_dict() for sample in self]}

    @classmethod
    def from_dict(cls, saved: Any) -> "Samples":
        """Return samples from the result of `to_dict`.

        Raises:
            ValueError: if it is malformed.
        """
        if not isinstance(saved, dict) or not isinstance(saved.get("samples"), list):
            raise ValueError("it has no list of samples")
        return cls(map(Sample.from_dict, saved["samples"]))

    def _repr_html_(self) -> str:
        return "\n".join(sample.svg() for sample in self)


def _array(saved: Any, count: int) -> np.ndarray:
    if not isinstance(saved, list) or len(saved) != count:
        raise ValueError("a sample must have one number per token")
    if not all(value is None or (type(value) in (int, float) and abs(value) < 1e30) for value in saved):
        raise ValueError("the surprisal and entropy of a sample must be numbers")
    return np.array([math.nan if value is None else value for value in saved], np.float32)


def _listed(values: np.ndarray) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in values]
