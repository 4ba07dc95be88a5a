"""How sure a model is of the letters of words: metrics by the position of a letter in its word.

A word is a run of letters and digits with their combining marks; an apostrophe between two of them belongs to it.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from chargpt_jax.errors import UserError
from chargpt_jax.generation.sample import Sample
from chargpt_jax.pictures.plots.letters import letters_plot

LAST = 10
"""Later letters of a word are counted with this one."""

APOSTROPHES = "'\u2019"


def letters_of_words(tokens: Sequence[str]) -> np.ndarray:
    """Return the position of each character in its word, int32 [N]: 1 for its first letter, 0 outside of words."""
    inside = [bool(token) and unicodedata.category(token[0])[0] in "LNM" for token in tokens]
    found = np.zeros(len(tokens), np.int32)
    for i, token in enumerate(tokens):
        before = found[i - 1] if i else 0
        joined = token in APOSTROPHES and before and i + 1 < len(tokens) and inside[i + 1]
        if token and (inside[i] or joined):
            found[i] = before + 1
    return found


@dataclass(frozen=True, repr=False, eq=False)
class LettersOfWords:
    """Metrics by the position in a word: index 0 is a word's first letter, index LAST - 1 its tenth and later ones."""

    entropy: np.ndarray
    """float64 [LAST], nats: the mean; NaN where the text has no such letter."""
    surprisal: np.ndarray
    """float64 [LAST], nats: the mean."""
    characters: np.ndarray
    """int64 [LAST]: how many characters have the position."""
    outside: int
    """Number of characters outside of words: spaces, punctuation."""
    outside_entropy: float
    """Their mean entropy, nats."""
    outside_surprisal: float
    """Their mean surprisal, nats."""

    @property
    def first_letters(self) -> float:
        """The part of the text's surprisal that first letters of words have, 0 to 1; 0 if nothing is surprising."""
        inside = np.nan_to_num(self.surprisal) * self.characters
        total = inside.sum() + np.nan_to_num(self.outside_surprisal) * self.outside
        return float(inside[0] / total) if total else 0.0

    def __repr__(self) -> str:
        found = ", ".join(f"{h:.2f}" for h in self.entropy)
        return (
            f"LettersOfWords(entropy by letter {found} nats; first letters: {self.first_letters:.0%} of the surprisal)"
        )

    def svg(self) -> str:
        """Plot the means, as SVG."""
        names = [*map(str, range(1, LAST)), f"{LAST} or later"]
        return letters_plot(self.entropy, self.surprisal, names)

    def _repr_html_(self) -> str:
        return self.svg()


def by_letter(samples: Sample | Iterable[Sample]) -> LettersOfWords:
    """Return the metrics of texts by the position of a letter in its word.

    Args:
        samples: scored or generated texts; characters without metrics, such as the first one, are left out.

    Raises:
        UserError: if the texts have no word with metrics.
    """
    found = [samples] if isinstance(samples, Sample) else list(samples) if isinstance(samples, Iterable) else []
    if not found or not all(isinstance(sample, Sample) for sample in found):
        raise UserError("by_letter needs a Sample, or several: give what score or generate returned.")
    position = np.concatenate([np.minimum(letters_of_words(sample.tokens), LAST) for sample in found])
    metrics = np.stack(
        [np.concatenate([getattr(sample, name) for sample in found]) for name in ("entropy", "surprisal")]
    )
    position[~np.isfinite(metrics).all(axis=0)] = -1
    if not (position > 0).any():
        raise UserError("The text has no word with metrics: give a text of several words.")
    count = np.array([(position == p).sum() for p in range(LAST + 1)])
    mean = [[float(values[position == p].mean()) if n else np.nan for p, n in enumerate(count)] for values in metrics]
    entropy, surprisal = np.array(mean)
    return LettersOfWords(entropy[1:], surprisal[1:], count[1:], int(count[0]), float(entropy[0]), float(surprisal[0]))
