"""A text with its metrics per character, and its forms: JSON, SVG, notebook output."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from chargpt_jax.config.values import argument, shown
from chargpt_jax.data.tokenizer import for_reader
from chargpt_jax.errors import UserError
from chargpt_jax.generation.alternatives import Alternatives, array_of, listed
from chargpt_jax.generation.metrics import surprise_surprise
from chargpt_jax.generation.samplers import series as samplers
from chargpt_jax.pictures import subline
from chargpt_jax.pictures.page_assets import live


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
    alternatives: Alternatives | None = None
    """What the model predicted in place of each character; None: not asked for."""
    unit: str = "character"
    """What a token is: 'character' or 'byte'. A byte is written as the character of the same number."""
    series: samplers.Series = field(default_factory=dict)
    """What the samplers showed at each character, by their names; empty for a sampler without a state."""

    def __eq__(self, other: object) -> bool:
        """Return whether texts, metrics and alternatives are equal; NaN equals NaN."""
        if not isinstance(other, Sample):
            return NotImplemented
        names = (self.prompt, self.tokens, self.vocab_size) == (other.prompt, other.tokens, other.vocab_size)
        metrics = ((self.surprisal, other.surprisal), (self.entropy, other.entropy))
        same = names and all(np.array_equal(mine, theirs, equal_nan=True) for mine, theirs in metrics)
        return same and self.alternatives == other.alternatives and self.series == other.series

    def __hash__(self) -> int:
        return hash((self.prompt, self.tokens, self.vocab_size))

    def __len__(self) -> int:
        """Return the number of characters."""
        return len(self.tokens)

    def __getitem__(self, part: slice) -> "Sample":
        """Return consecutive characters of this sample, sample[start:stop], with their metrics."""
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise UserError(f"A sample has no part {shown(part)}: give a range of characters, as in sample[10:20].")
        part = slice(*part.indices(len(self)))  # a negative index counts from the end of the text, not of the prompt
        return replace(
            self,
            prompt=self.prompt[part],
            tokens=self.tokens[part],
            surprisal=self.surprisal[part],
            entropy=self.entropy[part],
            alternatives=self.alternatives and self.alternatives[part],
            series=samplers.sliced(self.series, part),
        )

    def __add__(self, other: "Sample") -> "Sample":
        """Return this sample followed by another one. A prompt of the second one is a part of the text."""
        if not isinstance(other, Sample):
            return NotImplemented
        both = self.alternatives and other.alternatives and self.alternatives + other.alternatives
        return replace(
            self,
            prompt=self.prompt + other.prompt if len(self.prompt) == len(self) else self.prompt,
            tokens=self.tokens + other.tokens,
            surprisal=np.concatenate([self.surprisal, other.surprisal]),
            entropy=np.concatenate([self.entropy, other.entropy]),
            alternatives=both or None,
            series=samplers.joined(self.series, other.series, (len(self), len(other))),
        )

    def __sub__(self, other: "Sample") -> "Difference":
        """Return the difference of two models on one text: the metrics of this sample minus those of the other."""
        if not isinstance(other, Sample):
            return NotImplemented
        if self.tokens != other.tokens:
            raise UserError("The samples have different texts, but a difference is of two models on one text.")
        return Difference(
            self.shown,
            self.surprisal - other.surprisal,
            self.entropy - other.entropy,
            self.surprise_surprise - other.surprise_surprise,
        )

    @property
    def rank(self) -> np.ndarray | None:
        """The rank of each character among all of the vocabulary, int32 [N]: 1 for the likeliest, 0 if undefined."""
        return None if self.alternatives is None else self.alternatives.rank

    @property
    def sampled_probability(self) -> np.ndarray | None:
        """The probability that the sampler gave each character, float32 [N]; NaN for the prompt and scored texts."""
        return None if self.alternatives is None else self.alternatives.sampled_probability

    @property
    def text(self) -> str:
        """The complete text, prompt included; bytes that are not UTF-8 are written as backslash escapes."""
        text = "".join(self.tokens)
        return for_reader(text) if self.unit == "byte" else text

    @property
    def shown(self) -> tuple[str, ...]:
        """The tokens for a picture: bytes above ASCII are written as backslash escapes."""
        if self.unit == "character":
            return self.tokens
        return tuple(token if token.isascii() else f"\\x{ord(token):02x}" for token in self.tokens)

    def spelled_out(self) -> "Sample":
        """Return a sample of bytes as one of characters, in which each character of `shown` has its byte's metrics."""
        counts = list(map(len, self.shown))
        return replace(
            self,
            prompt="".join(self.shown[: len(self.prompt)]),
            tokens=tuple("".join(self.shown)),
            surprisal=np.repeat(self.surprisal, counts),
            entropy=np.repeat(self.entropy, counts),
            alternatives=None,
            unit="character",
            series={k: replace(own, values=np.repeat(own.values, counts)) for k, own in self.series.items()},
        )

    @property
    def surprise_surprise(self) -> np.ndarray:
        """S2, float32 [N]: (surprisal - entropy) / log(vocab_size)."""
        return surprise_surprise(self.surprisal, self.entropy, self.vocab_size)

    @property
    def loss(self) -> float:
        """The mean surprisal, in nats per character."""
        return float(np.nanmean(self.surprisal)) if np.isfinite(self.surprisal).any() else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return the sample for JSON: lists, and None for what is undefined."""
        return {
            "prompt": self.prompt,
            "text": self.text,
            "tokens": list(self.tokens),
            "surprisal": listed(self.surprisal),
            "entropy": listed(self.entropy),
            "surprise_surprise": listed(self.surprise_surprise),
            "vocab_size": self.vocab_size,
            **({"unit": self.unit} if self.unit != "character" else {}),
            **(self.alternatives.to_dict() if self.alternatives else {}),
            **({"series": samplers.to_dict(self.series)} if self.series else {}),
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
        surprisal, entropy = (array_of(saved.get(name), len(tokens)) for name in ("surprisal", "entropy"))
        kept = Alternatives.from_dict(saved, len(tokens)) if "rank" in saved else None
        unit = saved.get("unit", "character")
        if unit not in ("character", "byte"):
            raise ValueError("the unit of a sample must be 'character' or 'byte'")
        series = samplers.from_dict(saved.get("series", {}), len(tokens))
        return cls(saved["prompt"], tuple(tokens), surprisal, entropy, size, kept, unit, series)

    def __repr__(self) -> str:
        return f"Sample({self.text!r}, {self.loss:.3f} nats per {self.unit})"

    def svg(self, chars_per_line: int = 80) -> str:
        """Plot the text with its entropy, surprisal and S2 below it, as SVG.

        Raises:
            UserError: if the number of characters per line is not an integer of at least 1.
        """
        columns = checked_columns(chars_per_line)
        series = subline.metric_series(self.surprisal, self.entropy, self.surprise_surprise, self.vocab_size)
        series += [subline.Series(f"{own.label} (height: {own.top:.3g})", own.height) for own in self.series.values()]
        n_prompt = len(self.prompt) if len(self.prompt) < len(self.tokens) else 0  # a scored text has no prompt
        return subline.subline(self.shown, series, chars_per_line=columns, n_prompt=n_prompt)

    def _repr_html_(self) -> str:
        return live([self.svg()], [self.to_dict()])


@dataclass(frozen=True, repr=False, eq=False)
class Difference:
    """The metrics of one model minus those of another one, on a text of N characters."""

    tokens: tuple[str, ...]
    surprisal: np.ndarray
    """float32 [N], nats: above 0 where the first model was more surprised; NaN where undefined."""
    entropy: np.ndarray
    """float32 [N], nats."""
    surprise_surprise: np.ndarray
    """float32 [N]."""

    @property
    def text(self) -> str:
        """The text."""
        return "".join(self.tokens)

    @property
    def loss(self) -> float:
        """The difference of the losses, nats per character."""
        return float(np.nanmean(self.surprisal)) if np.isfinite(self.surprisal).any() else math.nan

    def __repr__(self) -> str:
        return f"Difference({self.text!r}, {self.loss:+.3f} nats per character)"

    def svg(self, chars_per_line: int = 80) -> str:
        """Plot the text with the differences below it, as SVG. The legend gives the nats of the full height."""
        both = np.nan_to_num([self.entropy, self.surprisal])
        top = float(max(both.max(initial=0), -subline.RISE / subline.FALL * both.min(initial=0))) or 1.0
        series = [
            subline.Series("Difference of entropy", np.asarray(self.entropy, float) / top, filled=True),
            subline.Series(
                f"Difference of surprisal (height: {top:.3g} nats)", np.asarray(self.surprisal, float) / top
            ),
        ]
        return subline.subline(self.tokens, series, chars_per_line=checked_columns(chars_per_line))

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
        return live([sample.svg() for sample in self], [sample.to_dict() for sample in self])


def branched(sample: Sample, at: int, alternative: str) -> str:
    """Return the text of a sample up to index `at`, followed by another character.

    Raises:
        UserError: if an argument is invalid.
    """
    if not isinstance(sample, Sample):
        raise UserError(f"sample is {shown(sample)}, but it must be a Sample: give one that generate returned.")
    at = argument("at", at, int, "give the index of a character")
    if not 0 <= at < len(sample):
        raise UserError(
            f"at is {shown(at)}, but the sample has {len(sample):,} characters: give an index of at least 0 and below "
            f"{len(sample):,}."
        )
    alternative = argument("alternative", alternative, str, "give one character")
    if len(alternative) != 1:
        raise UserError(f"alternative is {shown(alternative)}, but it must be one character: give one.")
    return "".join(sample.tokens[:at]) + alternative


def with_metrics(branch: Sample, sample: Sample, at: int) -> Sample:
    """Return a branch with the metrics that its sample has before index `at`, where both have the same text.

    The ranks and likeliest characters are replaced if the sample has as many of them per position as the branch.
    """
    new, own = branch.alternatives, sample.alternatives
    if new and own and own.characters.shape[1] >= new.characters.shape[1]:
        new = replace(own[:at], sampled_probability=new.sampled_probability[:at]) + new[at:]
    return replace(
        branch,
        surprisal=np.concatenate([sample.surprisal[:at], branch.surprisal[at:]]),
        entropy=np.concatenate([sample.entropy[:at], branch.entropy[at:]]),
        alternatives=new,
    )


def checked_columns(chars_per_line: int) -> int:
    """Return a number of characters per line.

    Raises:
        UserError: if it is not an integer of at least 1.
    """
    columns: int = argument("chars_per_line", chars_per_line, int, "try 80")
    if columns < 1:
        raise UserError(f"chars_per_line is {shown(columns)}, but it must be at least 1: try 80.")
    return columns
