"""Samples side by side in a notebook, each with a name and its mean metrics."""

from collections.abc import Mapping

import numpy as np

from chargpt_jax.config.values import shown
from chargpt_jax.errors import UserError
from chargpt_jax.generation.sample import Sample
from chargpt_jax.pictures.page_assets import beside

COLUMNS = 44
"""Characters per line of a sample, where scripts may not run."""


EXAMPLE = 'give {"greedy": model.generate(...)[0], ...}.'


class Comparison(dict[str, Sample]):
    """Samples by name; a notebook shows them side by side.

    Raises:
        UserError: if a name is not a string, or a value is not a Sample.
    """

    def __init__(self, samples: Mapping[str, Sample]):
        """Take samples by name."""
        super().__init__()
        if not isinstance(samples, Mapping):
            raise UserError(f"samples is {shown(samples)}, but it must be samples by name: {EXAMPLE}")
        for name, sample in samples.items():
            self[name] = sample

    def __setitem__(self, name: str, sample: Sample) -> None:
        """Add a sample, or replace one."""
        if not isinstance(name, str) or not name.strip() or not isinstance(sample, Sample):
            raise UserError(
                f"A comparison holds {shown(name)}: {shown(sample)}, but it must hold names with samples: {EXAMPLE}"
            )
        super().__setitem__(name, sample)

    def captions(self) -> list[str]:
        """Return a line per sample: its name, and the means of surprisal and entropy of what was generated."""
        return [_caption(name, sample) for name, sample in self.items()]

    def __repr__(self) -> str:
        return "\n\n".join(
            f"{caption}\n{sample.text}" for caption, sample in zip(self.captions(), self.values(), strict=True)
        )

    def _repr_html_(self) -> str:
        samples = list(self.values())
        return beside(self.captions(), [s.svg(COLUMNS) for s in samples], [s.to_dict() for s in samples])


def _caption(name: str, sample: Sample) -> str:
    start = len(sample.prompt) if len(sample.prompt) < len(sample) else 0
    new = sample[start:]
    if not np.isfinite(new.surprisal).any():
        return name
    return f"{name}: surprisal {new.loss:.2f}, entropy {float(np.nanmean(new.entropy)):.2f} nats"
