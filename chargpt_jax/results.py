"""What a run leaves for people to read: samples, plots, facts and the report."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from chargpt_jax.config import shown
from chargpt_jax.data import batches
from chargpt_jax.data.given_text import without_unknown
from chargpt_jax.data.tokenizer import CharTokenizer, named
from chargpt_jax.devices import sharding
from chargpt_jax.devices.platform import compute_dtype
from chargpt_jax.errors import UserError, excused
from chargpt_jax.events import LRFinderResult, bits_per_character
from chargpt_jax.generation.loading import load
from chargpt_jax.generation.sample import Samples
from chargpt_jax.generation.trained_model import state_shapes_of
from chargpt_jax.model.flops import training_flops
from chargpt_jax.model.init import count_parameters
from chargpt_jax.pictures import plots, report
from chargpt_jax.storage.checkpoint import UNVALIDATED, Checkpoints
from chargpt_jax.storage.metrics_log import Expected, seconds_at
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training import optimizer
from chargpt_jax.training.lr_finder import result_from
from chargpt_jax.training.run import Warn
from chargpt_jax.training.setup import training_mesh

MAX_SAMPLES_JSON = 512 << 20
"""Maximum size of a file of samples that a report includes, bytes; a character needs about a hundred."""


def write_samples(workdir: str | Path | Workdir, warn: Warn = print) -> Samples:
    """Continue the config's sample prompts, and write the samples to the workdir as JSON and as sublines (SVG).

    Characters that are not in the vocabulary are dropped from the prompts, with a warning.
    """
    folder = Workdir(workdir)
    model = load(folder, warn=warn)
    how = folder.load_config().sample
    samples = model.generate(
        known_prompts(how.prompts, model.tokenizer, model.repairs, warn),
        how.max_new_tokens,
        temperature=how.temperature,
        top_k=how.top_k,
        top_p=how.top_p,
        seed=model.config.seed,
        skip_unknown=True,
    )
    save_samples(folder, samples, f"step-{model.step}")
    return samples


def known_prompts(
    prompts: Sequence[str], tokenizer: CharTokenizer, repairs: Sequence[Sequence[str]], warn: Warn
) -> list[str]:
    """Return prompts without the characters that are not in the vocabulary; warn of each prompt that this changes.

    A config's prompts may be its defaults, and the text of another script: this is no reason to refuse the text.
    """
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


def save_samples(folder: Workdir, samples: Samples, name: str, content: dict[str, Any] | None = None) -> list[Path]:
    """Write samples as one JSON file, and as one SVG file per sample; return the paths of the SVG files.

    `content` is what the JSON file holds; None: the samples.
    """
    folder.write(folder.samples / f"{name}.json", json.dumps(content or samples.to_dict()) + "\n")
    paths = [folder.samples / f"{name}-{i}.svg" for i in range(len(samples))]
    for path, sample in zip(paths, samples, strict=True):
        folder.write(path, sample.svg())
    return paths


def loss_curve(workdir: str | Path | Workdir) -> str:
    """Plot the losses of a run so far, as SVG."""
    log = Workdir(workdir).load_metrics()
    points = {kind: [(x["step"], x["loss"]) for x in log if x["event"] == kind] for kind in ("step", "validation")}
    return plots.loss_plot(points["step"], points["validation"])


def write_report(workdir: str | Path | Workdir, warn: Warn = print) -> Path:
    """Write the report of a run (report.html) and its loss plot (loss.svg); return the path of the report.

    `warn` is told which files of the run are damaged, and left out, and if the loss plot cannot be written.
    """
    folder = Workdir(workdir)
    curve, plot = loss_curve(folder), folder.path / "loss.svg"
    with excused(str(plot), warn):
        folder.write(plot, curve)
    figures = [("Loss on the training batches and on the full validation set.", curve)]
    figures += [("Learning-rate range test, one curve per zoom.", svg) for svg in _range_tests(folder, warn)]
    figures += [("Generated sample with its entropy, surprisal and S₂.", svg) for svg in _sublines(folder, warn)]
    facts = [(name, _shown(value)) for name, value in info(folder, warn).items()]
    folder.write(folder.report, report.report(f"chargpt_jax run: {folder.path.name}", facts, figures))
    return folder.report


def _range_tests(folder: Workdir, warn: Warn) -> Iterator[str]:
    """Plot the range test from its numbers, if there was one: an SVG file in the folder is untrusted input."""
    if os.path.lexists(folder.lr_finder):
        with _left_out(folder.lr_finder, warn):
            yield range_test_plot(result_from(folder.load_json(folder.lr_finder, fix="remove it")))


def _sublines(folder: Workdir, warn: Warn) -> Iterator[str]:
    """Plot the samples of `run` from their JSON files, one file per checkpoint."""
    for path in sorted(folder.samples.glob("step-*.json")):
        with _left_out(path, warn):
            yield from [sample.svg() for sample in load_samples(folder, path)]


@contextlib.contextmanager
def _left_out(path: Path, warn: Warn) -> Iterator[None]:
    """Turn a ValueError of the block, which reads a file for the report, into a warning."""
    try:
        yield
    except ValueError as error:
        text = f"{path} cannot be used ({error}): remove it"
        warn(f"{(str(error) if isinstance(error, UserError) else text).rstrip('.')}; the report leaves it out.")


def load_samples(workdir: str | Path | Workdir, path: Path) -> Samples:
    """Read a file of samples that `run` has written.

    Raises:
        ValueError: if it cannot be read, or is malformed.
    """
    return Samples.from_dict(Workdir(workdir).load_json(path, MAX_SAMPLES_JSON, "remove it"))


INFO = (
    *("sources", "characters", "vocabulary", "parameters", "block_size", "steps_per_epoch", "total_steps"),
    *("learning_rate", "step", "seconds", "best_step", "best_loss", "best_bits_per_character"),
    *("devices", "dtype", "trained_on", "compile_seconds", "seconds_per_step"),
    *("flops_per_step", "flops_per_second", "mfu"),
)
"""The facts of `info`, in this order."""


def info(workdir: str | Path | Workdir, warn: Warn = print) -> dict[str, Any]:
    """Return the facts of a run, as JSON can hold them: corpus, model, progress, devices and training speed.

    model/flops.py defines flops_per_step. mfu is flops_per_second as a fraction of the devices' peak; None if the peak
    is not known. None before the first validation: compile_seconds, seconds_per_step, flops_per_second and mfu.
    seconds is None if the last lines of metrics.jsonl are missing. `warn` is told which files could not be used.
    """
    facts = all_facts(workdir, warn)
    return {name: facts[name] for name in INFO}


def all_facts(workdir: str | Path | Workdir, warn: Warn = print) -> dict[str, Any]:
    """Return the facts of `info`, and further ones for `facts_in_words`."""
    folder = Workdir(workdir)
    config, sources, speed = folder.load_config(), folder.load_sources(), folder.load_speed(warn)
    mesh = training_mesh(config, tell=False)  # first: it also decides how many CPU devices there are
    _, like = state_shapes_of(config, compute_dtype(config.amp))
    n = int(sum(source["characters"] for source in sources))
    n_train = int(config.data.train_split * n)
    epoch_steps = batches.steps_per_epoch(n_train, config.model.block_size, config.data, config.ancestor.short_epochs)
    with contextlib.closing(Checkpoints(folder.checkpoints, warn=warn)) as store:
        checkpoints, best = store.valid_steps(), store.best()
        step = max(checkpoints, default=0)
        validated = step > 0 and store.loss_of(step) < UNVALIDATED
    return {
        "sources": [source["title"] for source in sources],
        "source_notes": [source.get("notes", []) for source in sources],
        "characters": n,
        "n_train": n_train,
        "vocabulary": config.model.used_ids - 1,
        "parameters": count_parameters(like.params),
        **{name: getattr(config.model, name) for name in ("block_size", "n_layer", "n_embd", "n_head", "n_head_dim")},
        "characters_per_step": config.data.batch_size * config.model.block_size,
        "steps_per_epoch": epoch_steps,
        "total_steps": optimizer.total_steps(config.scheduler, epoch_steps),
        "learning_rate": config.optimizer.learning_rate,
        "learning_rate_method": _learning_rate_method(folder, config.optimizer.learning_rate),
        "checkpoints": checkpoints,
        "step": step,
        "seconds": seconds_at(folder.load_metrics(), Expected(step, validated, config.train.log_every)),
        "best_step": best and best[0],
        "best_loss": best and best[1],
        "best_bits_per_character": best and bits_per_character(best[1]),
        "devices": sharding.describe(mesh, jax.local_device_count()),
        "dtype": jnp.dtype(compute_dtype(config.amp)).name,
        "trained_on": speed.get("device"),
        "compile_seconds": speed.get("compile_seconds"),
        "seconds_per_step": speed.get("seconds_per_step"),
        "flops_per_step": training_flops(config.model, config.data.batch_size),
        "flops_per_second": speed.get("flops_per_second"),
        "mfu": speed.get("mfu"),
        "report": str(folder.report) if folder.report.is_file() else None,
    }


def _learning_rate_method(folder: Workdir, learning_rate: float | None) -> str | None:
    """Return the method of the range test that found a learning rate; None if none did; '' if it cannot be read."""
    if not os.path.lexists(folder.lr_finder):
        return None
    try:
        found = result_from(folder.load_json(folder.lr_finder))
    except ValueError:
        return ""
    return found.method if found.learning_rate == learning_rate else None


def _shown(value: Any) -> str:
    if value is None:
        return "not known"
    if isinstance(value, float):
        return f"{value:,.4g}"
    return (
        ", ".join(map(str, value))
        if isinstance(value, list)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def range_test_plot(result: LRFinderResult) -> str:
    """Plot the result of a range test, as SVG."""
    zooms = [(zoom.lrs, zoom.losses) for zoom in result.zooms]
    steepest = [zoom.steepest for zoom in result.zooms]
    return plots.lr_finder_plot(zooms, steepest, result.learning_rate, result.method)
