"""The public functions, for Python code, notebooks and the command line.

for event in chargpt_jax.run(chargpt_jax.load_config("tiny"), "runs/tiny"):
    ...
model = chargpt_jax.load("runs/tiny")
model.generate("The ", max_new_tokens=200)      # a notebook shows the result as a subline
model.score("A text of your own.")
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chargpt_jax import fine_tuning
from chargpt_jax.analysis.comparison import Comparison
from chargpt_jax.analysis.inspection import Inspection, inspect
from chargpt_jax.analysis.words import LettersOfWords, by_letter
from chargpt_jax.backups import backed_up
from chargpt_jax.config import Config, validate
from chargpt_jax.config.values import shown
from chargpt_jax.data import batches
from chargpt_jax.devices import processes, sharding
from chargpt_jax.errors import UserError, excused
from chargpt_jax.events import (
    Ended,
    Event,
    LRFinderResult,
    Prepared,
    Saved,
    Validated,
    bits_per_character,
    perplexity,
)
from chargpt_jax.generation.loading import load, load_with_record, repairs_of
from chargpt_jax.generation.sample import Sample, Samples
from chargpt_jax.generation.sampler import Sampler
from chargpt_jax.generation.trained_model import Model
from chargpt_jax.interop import convert
from chargpt_jax.interop.convert import import_original
from chargpt_jax.interop.html_page import About
from chargpt_jax.lab.extract import extract
from chargpt_jax.lab.sweep import sweep
from chargpt_jax.results.curves import range_test_plot
from chargpt_jax.results.info import info
from chargpt_jax.results.report import write_report
from chargpt_jax.results.samples import (
    TimeForSamples,
    clock_of_results,
    known_prompts,
    known_stops,
    sampled,
    write_samples,
)
from chargpt_jax.results.validation import write_validation
from chargpt_jax.storage.checkpoint import UNVALIDATED
from chargpt_jax.storage.copies import copy_run
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training import stages
from chargpt_jax.training.dispatch.pacing import Stop
from chargpt_jax.training.dispatch.run_length import Clock
from chargpt_jax.training.run import Run, Warn, check_record
from chargpt_jax.training.setup import Setup


def evaluate(
    workdir: str | Path | Workdir, step: str | int = "best", warn: Warn = print, split: str = "validation"
) -> dict[str, Any]:
    """Compute the loss of a trained model on the full validation set, or on the test set.

    Each character is a target once. Windows do not overlap, so the first characters of a window have a short context.

    Args:
        workdir: of the run.
        step: as in `load`.
        warn: receives messages for the user.
        split: 'validation', or 'test': the last `data.test_split` of the corpus.

    Returns:
        loss (nats per character), bits_per_character, bits_per_char (the same number), perplexity, tokens, split, step;
        if the unit is the byte, bits_per_byte as well.

    Raises:
        UserError: if the workdir's config, vocabulary or corpus differs from that of the checkpoint, or the run has no
            such set.
    """
    if split not in ("validation", "test"):
        raise UserError(f"split is {shown(split)}, but it must be 'validation' or 'test': choose one.")
    folder = Workdir(workdir)
    processes.check()
    found = processes.on_first(lambda: load_with_record(folder, step, warn))
    chosen = processes.agreed(found and found[0].step)
    model, record = found or load_with_record(folder, chosen or step, warn)
    run = Run.load(folder)
    if run.tokenizer.vocabulary != model.tokenizer.vocabulary:
        raise UserError(
            f"The vocabulary in {folder.path} differs from that of checkpoint {model.step}: restore the files in "
            "corpus/."
        )
    setup = Setup.of(run)
    check_record(record, setup.record(), folder.checkpoints)
    if split == "test" and not setup.n_test:
        raise UserError(
            f"The run in {folder.path} has no test set, because data.test_split is {run.config.data.test_split:g}: "
            "increase it in a new run."
        )
    loss = setup.validator(whole=True, split=split)(
        sharding.put(model.params, sharding.replicated(setup.mesh)), model.step
    )
    assert loss is not None
    return {
        "loss": loss,
        "bits_per_character": bits_per_character(loss),
        "bits_per_char": bits_per_character(loss),
        "perplexity": perplexity(loss),
        **({"bits_per_byte": bits_per_character(loss)} if run.config.data.unit == "byte" else {}),
        "tokens": setup.n_test if split == "test" else setup.n_validation,
        "split": split,
        "step": model.step,
    }


def prepare(config: Config, workdir: str | Path | Workdir, warn: Warn = print) -> Iterator[Event]:
    """Load, repair and encode the text; write it and the config to the workdir; see `stages.prepare`."""
    _check_samples(config)
    yield from stages.prepare(config, workdir, warn)


def _check_samples(config: Config) -> None:
    """Check a config with its chain of samplers.

    Raises:
        UserError: if it is invalid.
    """
    Sampler.of(validate(config).sample)


def find_lr(config: Config, workdir: str | Path | Workdir, warn: Warn = print) -> Iterator[Event]:
    """Run the learning-rate range test; write its result, its plot, and the learning rate into the run's config.

    A learning rate that the config sets is kept.
    """
    _check_samples(config)
    folder = Workdir(workdir)
    for event in stages.find_lr(config, folder, warn):
        _plot_range_test(event, folder, warn)
        yield event


def train(
    config: Config,
    workdir: str | Path | Workdir,
    warn: Warn = print,
    stop: Stop = lambda: None,
    max_minutes: float | None = None,
    start_from: str | Path | None = None,
    began: float | None = None,
) -> Iterator[Event]:
    """Train to the end of the schedule, resuming from the newest checkpoint; see `stages.train` for the arguments.

    If the config has no learning rate, the range test runs first. `start_from` is the folder of another run, whose
    parameters a new run starts from (fine-tuning); see `fine_tuning.start_from`. If the config sets scheduler.minutes,
    they count from `began`, a value of `time.monotonic`; None: from now.
    """
    _check_samples(config)
    clock, folder = Clock() if began is None else Clock(began), Workdir(workdir)
    if start_from is not None:
        fine_tuning.start_from(start_from, config, folder, warn)
    for event in stages.train(config, folder, warn, stop, max_minutes, clock):
        _plot_range_test(event, folder, warn)
        yield event


def run(
    config: Config,
    workdir: str | Path | Workdir,
    warn: Warn = print,
    stop: Stop = lambda: None,
    max_minutes: float | None = None,
    start_from: str | Path | None = None,
    began: float | None = None,
) -> Iterator[Event]:
    """Run all stages: prepare, find_lr if no learning rate is set, train, generate samples, write the report.

    The arguments are those of `train`. Samples are generated after each validation too, unless the config turns
    this off. scheduler.minutes includes the samples and the report. If `stop` or `max_minutes` ends training, the last
    samples and the report are left to the next call. With several processes, process 0 alone generates samples and
    writes the report.
    """
    _check_samples(config)
    clock = clock_of_results(config, time.monotonic() if began is None else began)
    complete, folder = True, Workdir(workdir)  # its path is absolute, whatever folder the caller changes to
    warn = stages.without_repeats(warn)
    time_for, validated = TimeForSamples(max_minutes), 0
    if start_from is not None:
        fine_tuning.start_from(start_from, config, folder, warn)
    for event in stages.train(config, folder, warn, stop, max_minutes, clock):
        if isinstance(event, Prepared) and processes.is_first():
            tokenizer, repairs = folder.load_tokenizer(), repairs_of(folder)
            known_prompts(config.sample.prompts, tokenizer, repairs, warn)
            known_stops(config.sample.stop, tokenizer, repairs, warn)
        _plot_range_test(event, folder, warn)
        complete = not isinstance(event, Ended) or event.complete
        yield event
        validated = event.step if isinstance(event, Validated) else validated
        due = isinstance(event, Saved) and event.step == validated and config.sample.at_validation
        if due and processes.is_first() and stop() is None:
            yield from time_for.sampled(folder, validated, warn)
    if complete and processes.is_first():
        yield from sampled(folder, "best", warn)
        with excused(f"the scores of the validation set in {folder.samples}", warn):
            write_validation(folder, warn)
        with excused(str(folder.report), warn):
            write_report(folder, warn)


def _plot_range_test(event: Event, folder: Workdir, warn: Warn) -> None:
    """Write lr_finder.svg if an event is the result of the range test."""
    if isinstance(event, LRFinderResult) and processes.is_first():
        path = folder.lr_finder.with_suffix(".svg")
        with excused(str(path), warn):
            folder.write(path, range_test_plot(event, unit=folder.load_config().data.unit))


def export(
    workdir: str | Path | Workdir,
    out: str | Path,
    form: str = "hf",
    step: str | int = "best",
    warn: Warn = print,
) -> Path:
    """Write a trained model to a new folder, in the format of another library, or to a page that runs it.

    Args:
        workdir: of the run.
        out: the folder, which must not exist or be empty; or the page, a new file.
        form: 'hf' for Hugging Face's transformers, 'original' for the original, in PyTorch, 'html' for one HTML file
            that runs the model in a browser.
        step: as in `load`.
        warn: called with warnings about the target format.

    Raises:
        UserError: if the form or the path is invalid; no file has been written then.
    """
    convert.export_place(form, out)
    folder = Workdir(workdir)
    model, record = load_with_record(folder, step, warn)
    titles: list[str] = []
    with contextlib.suppress(UserError):  # an imported model, or a model without its corpus
        titles = [source["title"] for source in folder.load_sources()]
    loss = record["loss"] if record["loss"] < UNVALIDATED else None
    about = About(folder.path.name, model.step, loss, titles)
    return convert.export(form, model.config, model.tokenizer, model.params, out, warn, about)


def corpus_text(workdir: str | Path | Workdir, part: str = "all") -> str:
    """Return the text of a run, or a part of it.

    Args:
        workdir: of the run.
        part: 'all', 'training', 'validation' or 'test'.

    Raises:
        UserError: if there is no such part, or the run has no text.
    """
    folder = Workdir(workdir)
    tokens = folder.load_tokens()
    if part not in ("all", "training", "validation", "test"):
        raise UserError(f"part is {shown(part)}, but it must be 'all', 'training', 'validation' or 'test': choose one.")
    if part != "all":
        config = folder.load_config()
        training, validation = batches.split(tokens, config.data, config.model.block_size)
        test = tokens[len(training) + len(validation) :]
        tokens = {"training": training, "validation": validation, "test": test}[part]
    return folder.load_tokenizer().text_of(tokens)


__all__ = [
    "Comparison",
    "Inspection",
    "LettersOfWords",
    "Model",
    "Sample",
    "Samples",
    "backed_up",
    "by_letter",
    "copy_run",
    "corpus_text",
    "evaluate",
    "export",
    "extract",
    "find_lr",
    "import_original",
    "info",
    "inspect",
    "load",
    "prepare",
    "run",
    "sweep",
    "train",
    "write_report",
    "write_samples",
]
