"""Samples of a run: generated from the prompts of its config, saved in its folder, read again."""

import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chargpt_jax.config import Config
from chargpt_jax.config.values import shown
from chargpt_jax.data.given_text import without_unknown
from chargpt_jax.data.tokenizer import CharTokenizer, named
from chargpt_jax.errors import ExpectedError, excused
from chargpt_jax.events import Sampled
from chargpt_jax.generation.loading import load
from chargpt_jax.generation.sample import Sample, Samples
from chargpt_jax.generation.sampler import Sampler
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training.dispatch.run_length import Clock
from chargpt_jax.training.run import Warn

FIRST_SAMPLES = 10.0
"""Assumed time of the first samples, which compiles the programs of generation, seconds."""

FIRST_SAMPLES_UNITS, RESULTS_UNITS = 1.2, 2.0
"""Time of the first samples, in units of the time that tracing and compiling the training takes. And that of the last
samples, the scores of the validation set, the report and the end of the process, in units of the tracing alone."""

MAX_SAMPLES_JSON = 512 << 20
"""Maximum size of a file of samples that a report includes, bytes; a character needs about a hundred."""


def write_samples(workdir: str | Path | Workdir, warn: Warn = print, step: str | int = "best") -> Samples:
    """Continue the config's sample prompts, and write the samples to the workdir as JSON and as sublines (SVG).

    Characters that are not in the vocabulary are dropped from the prompts, with a warning.

    Args:
        workdir: of the run.
        warn: called with a message for each damaged checkpoint and each prompt that is changed.
        step: 'best' by validation loss, 'latest', or a checkpoint's step.
    """
    return _written(Workdir(workdir), step, warn)[1]


def _written(folder: Workdir, step: str | int, warn: Warn) -> tuple[int, Samples]:
    """Write the samples of a checkpoint; return its step and the samples."""
    model = load(folder, step, warn)
    how = folder.load_config().sample
    samples = model.generate(
        known_prompts(how.prompts, model.tokenizer, model.repairs, warn),
        how.max_new_tokens,
        sampler=Sampler.of(how).samplers,
        stop=known_stops(how.stop, model.tokenizer, model.repairs, warn),
        seed=model.config.seed,
        skip_unknown=True,
    )
    save_samples(folder, samples, f"step-{model.step}")
    return model.step, samples


def sampled(folder: Workdir, step: str | int, warn: Warn) -> list[Sampled]:
    """Write the samples of a checkpoint, as `write_samples` does, and return them; [] if the disk refuses them."""
    with excused(f"the samples in {folder.samples}", warn):
        at, samples = _written(folder, step, warn)
        return [Sampled(at, tuple(sample.text for sample in samples), tuple(map(Sample.svg, samples)))]
    return []


class TimeForSamples:
    """Samples along a training, for which a time limit may leave no time."""

    def __init__(self, max_minutes: float | None) -> None:
        """Start the clock; None: no limit."""
        self._end = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._needed = FIRST_SAMPLES

    def sampled(self, folder: Workdir, step: int, warn: Warn) -> list[Sampled]:
        """Return the samples of a checkpoint; [], with a warning if that is not expected, if there are none."""
        began = time.monotonic()
        if self._end - began < 3 * self._needed:
            return []
        try:
            return sampled(folder, step, warn)
        except ExpectedError as error:
            warn(f"{str(error).rstrip('.')}; the run continues without samples of this checkpoint.")
            return []
        finally:
            self._needed = time.monotonic() - began


def clock_of_results(config: Config, began: float) -> Clock:
    """Return the clock of a `run` that began at a time, with what its samples and its report are expected to take."""
    along = not isinstance(config, Config) or config.sample.at_validation
    return Clock(began, FIRST_SAMPLES_UNITS, RESULTS_UNITS, along)


def known_prompts(
    prompts: Sequence[str], tokenizer: CharTokenizer, repairs: Sequence[Sequence[str]], warn: Warn
) -> list[str]:
    """Return prompts without the characters that are not in the vocabulary; warn of each prompt that this changes.

    A config's prompts may be its defaults, and the text of another script: this is no reason to refuse the text.
    """
    if tokenizer.unit == "byte":
        return list(prompts)
    known = []
    for prompt in prompts:
        rest, dropped = without_unknown(prompt, tokenizer, repairs)
        if dropped:
            use = f"the sample continues {shown(rest)}" if rest else "there is no sample of it"
            warn(f"The prompt {shown(prompt)} of sample.prompts has {named(dropped)}, not in the vocabulary: {use}.")
        known += [rest] if rest else []
    if not known:
        known = ["\n" if "\n" in tokenizer.vocabulary else tokenizer.vocabulary[1]]
        warn(f"No prompt of sample.prompts is left, so the sample continues {known[0]!r}.")
    return known


def known_stops(
    stops: Sequence[str], tokenizer: CharTokenizer, repairs: Sequence[Sequence[str]], warn: Warn
) -> list[str]:
    """Return the stop strings that a text can end with; warn of each that has characters outside of the vocabulary."""
    known = []
    for stop in stops:
        if dropped := [] if tokenizer.unit == "byte" else without_unknown(stop, tokenizer, repairs)[1]:
            warn(f"{shown(stop)} of sample.stop has {named(dropped)}, not in the vocabulary: no sample ends there.")
        else:
            known.append(stop)
    return known


def save_samples(folder: Workdir, samples: Samples, name: str, content: dict[str, Any] | None = None) -> list[Path]:
    """Write samples as one JSON file, and as one SVG file per sample; return the paths of the SVG files.

    SVG files of more samples, which an earlier call has written under this name, are removed.

    `content` is what the JSON file holds; None: the samples.
    """
    folder.write(folder.samples / f"{name}.json", json.dumps(content or samples.to_dict()) + "\n")
    paths = [folder.samples / f"{name}-{i}.svg" for i in range(len(samples))]
    for path, sample in zip(paths, samples, strict=True):
        folder.write(path, sample.svg())
    for path in _further_pictures(folder, name, len(samples)):
        path.unlink(missing_ok=True)
    return paths


def _further_pictures(folder: Workdir, name: str, count: int) -> list[Path]:
    """Return the regular files NAME-<n>.svg among the samples, with n from `count` on."""
    picture = re.compile(rf"{re.escape(name)}-(0|[1-9][0-9]{{0,8}})\.svg")
    found = ((path, picture.fullmatch(path.name)) for path in folder.samples.iterdir())
    further = [path for path, match in found if match and int(match[1]) >= count]
    return [path for path in further if path.is_file() and not path.is_symlink()]


def sample_files(folder: Workdir) -> dict[int, Path]:
    """Return the files of samples that `write_samples` has written, by the step of their checkpoint."""
    found = {path.stem.removeprefix("step-"): path for path in folder.samples.glob("step-*.json")}
    return {int(step): path for step, path in found.items() if step.isdecimal() and len(step) < 19}


def load_samples(workdir: str | Path | Workdir, path: Path) -> Samples:
    """Read a file of samples that `run` has written.

    Raises:
        ValueError: if it cannot be read, or is malformed.
    """
    return Samples.from_dict(Workdir(workdir).load_json(path, MAX_SAMPLES_JSON, "remove it"))
