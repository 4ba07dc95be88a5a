"""Gather what a run has for its report, and write the page."""

import contextlib
import functools
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from chargpt_jax.errors import UserError, excused
from chargpt_jax.events import bits_per_character
from chargpt_jax.generation.passages import RANKS, SURPRISALS, Counts
from chargpt_jax.generation.sample import Sample, Samples
from chargpt_jax.pictures import report
from chargpt_jax.pictures.plots.axes import WIDTH
from chargpt_jax.pictures.plots.curves import Curve, x_range
from chargpt_jax.pictures.plots.histograms import Shares, histogram
from chargpt_jax.pictures.plots.losses import loss_plot
from chargpt_jax.results.curves import range_test_plot, training_curves
from chargpt_jax.results.facts import facts_in_words
from chargpt_jax.results.info import all_facts
from chargpt_jax.results.samples import load_samples, sample_files
from chargpt_jax.results.validation import load_validation, path_of
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training.range_test.saved import result_from
from chargpt_jax.training.run import Warn
from chargpt_jax.training.stages import without_repeats

MAX_STAGES = 16
"""Number of checkpoints whose samples the report shows, evenly chosen."""

MAX_PROMPTS = 3
"""Number of prompts whose samples it shows along the training."""

PACKAGES = ("chargpt_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
"""Packages whose versions it gives."""


def write_report(workdir: str | Path | Workdir, warn: Warn = print) -> Path:
    """Write the report of a run (report.html) and its loss plot (loss.svg); return the path of the report.

    `warn` is told which files of the run are damaged, and left out, and if the loss plot cannot be written.
    """
    folder = Workdir(workdir)
    found, plot = content(folder, warn), folder.path / "loss.svg"
    with excused(str(plot), warn):
        folder.write(plot, found.losses(WIDTH) if found.losses else loss_plot([], []))
    folder.write(folder.report, report.report(found))
    return folder.report


def content(folder: Workdir, warn: Warn) -> report.Content:
    """Return what the report of a run shows; `warn` is told which files are damaged, and left out."""
    warn = without_repeats(warn)
    facts, config, log = all_facts(folder, warn), folder.load_config(), folder.load_metrics()
    curves = training_curves(log, config.data.batch_size * config.model.block_size)
    files = _chosen(folder)
    unit = facts["unit"]
    stages = list(_stages(folder, files, curves[1], facts, warn))
    step, final = _final(folder, facts["best_step"], warn)
    histograms, compared, passages = _compared(folder, step, final, unit, warn)
    losses = functools.partial(loss_plot, curves[0].points, curves[1].points, x_range=x_range(curves), unit=unit)
    return report.Content(
        title=f"chargpt_jax run: {folder.path.name}",
        lead=_lead(facts),
        facts=[group for group in facts_in_words(facts) if group[0] != "Files"],  # a page may travel
        search=_range_test(folder, unit, warn),
        losses=(lambda width: losses(width=width)) if log else None,
        curves=curves,
        epoch_steps=facts["steps_per_epoch"],
        samples=[
            _text(f"{_numbered(i, final)}{_quoted(sample.prompt)}, continued after step {step:,}", sample)
            for i, sample in enumerate(final)
        ],
        stages=stages,
        along=_along(files, len(sample_files(folder)), final),
        histograms=histograms,
        compared=compared,
        passages=passages,
        sources=[_source(source, unit) for source in folder.load_sources()],
        environment=_environment(facts),
    )


def _lead(facts: dict[str, Any]) -> str:
    """Return what a run is, in a sentence."""
    best, what = facts["best_loss"], f"A {facts['unit']}-level GPT with {facts['parameters']:,} parameters."
    bits = best and bits_per_character(best)
    return f"{what} Best validation loss: {best:.4f} nats = {bits:.4f} bits per {facts['unit']}." if best else what


def _range_test(folder: Workdir, unit: str, warn: Warn) -> report.Plot | None:
    """Return the plot of the range test from its numbers: an SVG file in the folder is untrusted input."""
    if os.path.lexists(folder.lr_finder):
        with _left_out(folder.lr_finder, warn):
            result = result_from(folder.load_json(folder.lr_finder, fix="remove it"))
            return functools.partial(range_test_plot, result, unit=unit)
    return None


def _final(folder: Workdir, best_step: int | None, warn: Warn) -> tuple[int, Samples]:
    """Return the samples of the best checkpoint, or else of the last one that has samples, with its step."""
    files = sample_files(folder)
    for step in sorted(files, key=lambda step: (step == best_step, step), reverse=True):
        with _left_out(files[step], warn):
            if samples := load_samples(folder, files[step]):
                return step, samples
    return 0, Samples()


def _along(shown: dict[int, Path], count: int, samples: Samples) -> str:
    """Say which samples along the training the report shows."""
    which = "after each validation" if len(shown) == count else f"after {len(shown)} of {count:,} validations"
    prompts = "The same prompts" if len(samples) <= MAX_PROMPTS else f"{MAX_PROMPTS} of {len(samples):,} prompts"
    return f"{prompts}, continued {which}."


def _numbered(i: int, samples: Samples) -> str:
    return f"Prompt {i + 1} of {len(samples)}: " if len(samples) > 1 else ""


def _chosen(folder: Workdir) -> dict[int, Path]:
    """Return at most MAX_STAGES of the files of samples, by step, with the first one and the last one."""
    files = sample_files(folder)
    steps = sorted(files)
    every = max(1, (len(steps) - 1) / (MAX_STAGES - 1))
    chosen = {steps[round(i * every)] for i in range(min(len(steps), MAX_STAGES))}
    return {step: files[step] for step in sorted(chosen)}


def _stages(
    folder: Workdir, files: dict[int, Path], validation: Curve, facts: dict[str, Any], warn: Warn
) -> Iterator[report.Stage]:
    """Read the samples along the training."""
    losses, epoch_steps = dict(validation.points), facts["steps_per_epoch"]
    for step, path in files.items():
        with _left_out(path, warn):
            texts = [_text(_quoted(sample.prompt), sample) for sample in load_samples(folder, path)[:MAX_PROMPTS]]
            loss = f", validation loss {losses[step]:.4f} nats per {facts['unit']}" if step in losses else ""
            if texts:
                yield report.Stage(step, f"Step {step:,}, epoch {step / epoch_steps:.4g}{loss}", texts)


def _compared(
    folder: Workdir, step: int, samples: Samples, unit: str, warn: Warn
) -> tuple[list[report.Plot], str, list[report.Text]]:
    """Return histograms of the validation set and the samples, a sentence about them, and surprising passages.

    Scores of another checkpoint than that of the samples, which is `step`, are left out.
    """
    with _left_out(path_of(folder), warn):
        validation = load_validation(folder)
        if validation is None:
            return [], "", []
        if validation.step != step:
            warn(
                f"The validation set was scored after step {validation.step:,}, but the samples are of step {step:,}: "
                "the report leaves the scores out until the run ends, which scores it again."
            )
            return [], "", []
        found = validation.passages
        own = Counts.of(map(_generated, samples))
        rank = _histogram("Rank", f"rank of the {unit}, 1 is the most likely", RANKS, found.counts.ranks, own.ranks)
        surprisal = _histogram("Surprisal", "nats", SURPRISALS, found.counts.surprisals, own.surprisals)
        sentence = (
            f"Ranks and surprisals of {found.characters:,} {unit}s of the validation set, and of "
            f"{sum(own.surprisals):,} {unit}s that the model generated. If the samples have more {unit}s of rank "
            "1 than the text, the sampling temperature is low for this model; if they have fewer, it is high."
        )
        passages = [
            _text(f"From {unit} {start:,} of the validation set: {sample.loss:.2f} nats per {unit}", sample)
            for start, sample in zip(found.starts[1:], found.samples[1:], strict=True)
        ]
        return [rank, surprisal], sentence, passages
    return [], "", []


def _generated(sample: Sample) -> Sample:
    """Return a sample without its prompt."""
    return sample[len(sample.prompt) :]


def _histogram(title: str, x_label: str, bins: Sequence[float], text: Sequence[int], own: Sequence[int]) -> report.Plot:
    texts = [_shares("validation set", text)] + ([_shares("samples", own)] if sum(own) else [])
    return functools.partial(histogram, title, x_label, _labels(bins), texts)


def _shares(name: str, counts: Sequence[int]) -> Shares:
    total = sum(counts) or 1
    return Shares(name, tuple(count / total for count in counts))


def _labels(bins: Sequence[float]) -> list[str]:
    """Return a label per bin, given by its lowest value: '1', '6–10', '21+'; of narrow bins the lowest value."""
    if any(value != int(value) for value in bins):
        return [f"{value:g}" if value == int(value) else "" for value in bins[:-1]] + [f"{bins[-1]:g}+"]
    ends = [int(after) - 1 for after in bins[1:]]
    labels = [f"{value:g}" if value == end else f"{value:g}–{end}" for value, end in zip(bins, ends, strict=False)]
    return [*labels, f"{bins[-1]:g}+"]


def _text(caption: str, sample: Sample) -> report.Text:
    return report.Text(caption, sample.svg(), sample.to_dict())


def _quoted(text: str) -> str:
    shown = text if len(text) <= 40 else f"{text[:39]}…"
    return f"“{shown}”".replace("\n", "↵")


def _source(source: dict[str, Any], unit: str) -> tuple[str, report.Facts]:
    """Return the title of a text, and where it comes from and what was changed in it, in words."""
    found = source.get("fixes")
    fixes = [" ".join(map(str, fix)) for fix in found if isinstance(fix, list)] if isinstance(found, list) else []
    rows = [
        ("from", source.get("url") or "not known"),
        ("in place of", source.get("stand_in_for") or ""),
        ("length", f"{source['characters']:,} {unit}s"),
        ("repairs enabled", ", ".join(source.get("repairs", [])).replace("_", " ") or "none"),
        ("repairs that changed the text", "; ".join(fixes).replace("_", " ") or "none"),
        ("notes", "; ".join(source.get("notes", []))),
        ("sha256", source.get("sha256") if isinstance(source.get("sha256"), str) else ""),
    ]
    return source["title"], [(name, value) for name, value in rows if value]


def _environment(facts: dict[str, Any]) -> report.Facts:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    machine = " ".join(filter(None, (platform.system(), platform.release(), platform.machine())))
    return [
        ("trained on", str(facts["trained_on"] or "not known")),
        ("report written with", ", ".join([f"Python {platform.python_version()}", *versions])),
        ("report written on", f"{machine}, {facts['devices']}, computing in {facts['dtype']}"),
    ]


@contextlib.contextmanager
def _left_out(path: Path, warn: Warn) -> Iterator[None]:
    """Turn a ValueError of the block, which reads a file for the report, into a warning."""
    try:
        yield
    except ValueError as error:
        text = f"{path} cannot be used ({error}): remove it"
        warn(f"{(str(error) if isinstance(error, UserError) else text).rstrip('.')}; the report leaves it out.")
