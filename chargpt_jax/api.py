"""What a user can do, as functions: `main` and the notebooks call these and nothing else.

for event in chargpt_jax.run(chargpt_jax.load_config("tiny"), "runs/tiny"):
    ...
model = chargpt_jax.load("runs/tiny")
model.generate("The ", max_new_tokens=200)      # shows itself as a subline in a notebook
model.score("A text of your own.")
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chargpt_jax.config import MAX_STEPS, MAX_TEXT, Config, shown
from chargpt_jax.config_io import from_dict
from chargpt_jax.data import batches
from chargpt_jax.data.tokenizer import CharTokenizer
from chargpt_jax.devices import sharding, startup
from chargpt_jax.devices.platform import compute_dtype
from chargpt_jax.errors import NoCheckpoint, UserError
from chargpt_jax.events import Ended, Event, LRFinderResult, bits_per_character, perplexity
from chargpt_jax.generation.generate import Progress, advance, begin, bucket, score_tokens
from chargpt_jax.generation.sample import Sample, Samples
from chargpt_jax.generation.sampler import Sampler
from chargpt_jax.interop import convert
from chargpt_jax.interop.convert import import_original
from chargpt_jax.model.flops import training_flops
from chargpt_jax.model.gpt import count_parameters, create
from chargpt_jax.pictures import plots, report
from chargpt_jax.storage.checkpoint import Checkpoints
from chargpt_jax.storage.workdir import Workdir, excused
from chargpt_jax.training import optimizer, stages
from chargpt_jax.training.lr_finder import result_from
from chargpt_jax.training.pacing import Stop
from chargpt_jax.training.run import Run, Warn
from chargpt_jax.training.setup import Setup, state_shapes
from chargpt_jax.training.stages import prepare

MOST_AT_ONCE = 32 * MAX_TEXT
"""Characters of all prompts and continuations together that are held in memory, at most."""

MOST_SAMPLES_JSON = 512 << 20
"""Bytes of a file of samples that is drawn into a report: some hundred for each character."""


class Model:
    """A trained model with its vocabulary; `load` makes one."""

    def __init__(self, config: Config, tokenizer: CharTokenizer, graphdef: nnx.GraphDef, params: Any, step: int):
        """Put together what a checkpoint holds."""
        self.config, self.tokenizer, self.graphdef, self.params, self.step = config, tokenizer, graphdef, params, step

    def generate(
        self,
        prompts: str | Sequence[str],
        max_new_tokens: int = 300,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        skip_unknown: bool = False,
        on_text: Callable[[int, str], None] | None = None,
    ) -> Samples:
        """Continue one or more prompts.

        Args:
            prompts: texts of at least one character each; of one longer than block_size the last block_size
                characters are read. All prompts and continuations together: at most `MOST_AT_ONCE` characters.
            max_new_tokens: characters to write, 1 to `MAX_TEXT`.
            temperature: 0 takes the likeliest character each time.
            top_k: draw among the k likeliest characters.
            top_p: draw among the likeliest that hold this mass.
            seed: the same seed and prompts give the same text; 0 or more, below 2**31.
            skip_unknown: drop characters that the model has never seen, instead of refusing them.
            on_text: called with (index of the prompt, new text) while the text grows.

        Raises:
            UserError: for an argument that makes no sense, in one sentence.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        sampler = Sampler(temperature, top_k, top_p)
        if not 1 <= max_new_tokens <= MAX_TEXT:
            raise UserError(
                f"max_new_tokens is {shown(max_new_tokens)}, but it must be between 1 and {MAX_TEXT:,}: try 500."
            )
        if not 0 <= seed < MAX_STEPS:
            raise UserError(f"seed is {shown(seed)}, but it must be at least 0 and below {MAX_STEPS:,}: try 0.")
        if not prompts:
            raise UserError("There is no prompt, but the model needs a character to go on from: try '\n'.")
        prompts = [self._readable(prompt, skip_unknown) for prompt in prompts]
        longest, block_size = max(map(len, prompts)), self.config.model.block_size
        if len(prompts) * (longest + max_new_tokens) > MOST_AT_ONCE:
            raise UserError(
                f"{len(prompts):,} texts of up to {longest + max_new_tokens:,} characters are too many at once, with "
                f"more than {MOST_AT_ONCE:,} in all: ask for fewer or shorter ones."
            )
        rows = [self.tokenizer.encode_text(prompt) for prompt in prompts]
        tokens = np.zeros((len(rows), bucket(longest + max_new_tokens)), np.int32)
        for buffer, row in zip(tokens, rows, strict=True):
            buffer[: len(row)] = row
        lengths = np.array([len(row) for row in rows], np.int32)
        width = min(block_size, bucket(longest), tokens.shape[1])
        mesh = sharding.data_mesh(len(rows), tell=False)
        params = jax.device_put(self.params, sharding.replicated(mesh))
        once = on_text is None
        progress = begin(params, tokens, lengths, graphdef=self.graphdef, width=width, mesh=mesh, once=once)
        piece, drawing = max_new_tokens if once else 16, sampler.with_key(jax.random.key(seed))
        for done in range(0, max_new_tokens, piece):
            count = min(piece, max_new_tokens - done)
            progress = advance(params, progress, count, drawing, graphdef=self.graphdef, mesh=mesh, once=once)
            if on_text is not None:
                for i, row in enumerate(np.asarray(progress.tokens)):
                    start = lengths[i] + done
                    on_text(i, self.tokenizer.decode([row[start : start + count]])[0])
        return self._samples(prompts, rows, progress, max_new_tokens)

    def _samples(self, prompts: list[str], rows: list[np.ndarray], progress: Progress, count: int) -> Samples:
        tokens, surprisal, entropy = (np.array(a) for a in (progress.tokens, progress.surprisal, progress.entropy))
        samples = Samples()
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            end = len(row) + count
            if len(row) > self.config.model.block_size:  # the prefill saw only its last window
                surprisal[i, : len(row)], entropy[i, : len(row)] = self._measure(row)
            names = tuple(self.tokenizer.decode_each([tokens[i, :end]])[0])
            samples.append(Sample(prompt, names, surprisal[i, :end], entropy[i, :end], self.config.model.vocab_size))
        return samples

    def score(self, text: str, *, stride: int | None = None, skip_unknown: bool = False) -> Sample:
        """Measure a given text.

        Args:
            text: at least two characters.
            stride: past block_size, each character is judged from at least block_size - stride characters before it;
                1 gives exactly what generation would see, at the cost of a window a character. None: half of it.
            skip_unknown: drop characters that the model has never seen, instead of refusing them.

        Raises:
            UserError: for a text or stride that makes no sense, in one sentence.
        """
        text = self._readable(text, skip_unknown)
        if len(text) < 2:
            raise UserError("The text has one character, but the first has nothing to be judged by: give two or more.")
        tokens = self.tokenizer.encode_text(text)
        surprisal, entropy = self._measure(tokens, stride)
        return Sample(text, tuple(text), surprisal, entropy, self.config.model.vocab_size)

    def _measure(self, tokens: np.ndarray, stride: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        block_size = self.config.model.block_size
        return score_tokens(self.params, tokens, graphdef=self.graphdef, block_size=block_size, stride=stride)

    def _readable(self, text: str, skip_unknown: bool) -> str:
        text = self.tokenizer.drop_unknown(text) if skip_unknown else text
        if not text:
            raise UserError("The text is empty, but the model needs a character to go on from: try '\\n'.")
        if len(text) > MAX_TEXT:
            raise UserError(f"The text has {len(text):,} characters, but {MAX_TEXT:,} are the most: give a part of it.")
        return text


def load(workdir: str | Path | Workdir, step: str | int = "best", warn: Warn = print) -> Model:
    """Load a trained model from a run's folder.

    Args:
        workdir: of the run.
        step: 'best' by validation, 'latest', or a step's number.
        warn: told which checkpoints are damaged; another is loaded instead, unless a number was asked for.

    Raises:
        UserError: where the folder is not a run.
        NoCheckpoint: where it holds no such checkpoint, or none that passes verification.
    """
    startup.use_every_core()
    folder = Workdir(workdir)
    folder.load_config()  # says so where this is no run
    if not folder.checkpoints.is_dir():
        raise NoCheckpoint(f"{folder.path} holds no checkpoint: train first.")

    made: dict[int, tuple[Config, nnx.GraphDef]] = {}

    def like_of(record: dict[str, Any]) -> Any:
        config = from_dict(record["config"])
        graphdef, like = _shapes(config, compute_dtype(config.amp))
        made[record["step"]] = config, graphdef
        return like

    store = Checkpoints(folder.checkpoints, warn=warn)
    try:
        chosen, record, state = store.load(step, like_of)
    finally:
        store.close()
    config, graphdef = made[chosen]
    return Model(config, _vocabulary(record, folder.checkpoints / str(chosen)), graphdef, state.params, chosen)


def _vocabulary(record: dict[str, Any], where: Path) -> CharTokenizer:
    try:
        return CharTokenizer.from_saved(record.get("vocabulary"))
    except ValueError as error:
        raise NoCheckpoint(f"{where} cannot be used: {error}.") from None


def _shapes(config: Config, dtype: Any) -> tuple[nnx.GraphDef, Any]:
    """Return a model's static half, and its training state with shapes in place of arrays, on one device."""
    tx = optimizer.empty(config.optimizer)
    graphdef, params = jax.eval_shape(lambda: create(config.model, 0, dtype))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return graphdef, sharding.with_sharding(here, state_shapes(params, tx, 0, dtype))


def evaluate(workdir: str | Path | Workdir, step: str | int = "best", warn: Warn = print) -> dict[str, Any]:
    """Measure a trained model on the whole held-out part of its corpus.

    Returns:
        loss (nats per character), bits_per_character, perplexity, tokens, split, step.

    Raises:
        UserError: where the workdir's vocabulary is not the one that the model was trained with.
    """
    folder = Workdir(workdir)
    model = load(folder, step, warn)
    run = Run.load(folder)
    if run.tokenizer.vocabulary != model.tokenizer.vocabulary:
        raise UserError(
            f"The vocabulary in {folder.path} differs from that of checkpoint {model.step}: restore the files in "
            "corpus/."
        )
    setup = Setup.of(run)
    loss = setup.validator(whole=True)(jax.device_put(model.params, sharding.replicated(setup.mesh)), model.step)
    assert loss is not None
    return {
        "loss": loss,
        "bits_per_character": bits_per_character(loss),
        "perplexity": perplexity(loss),
        "tokens": len(setup.tokens) - setup.n_train,
        "split": "validation",
        "step": model.step,
    }


def find_lr(config: Config, workdir: str | Path | Workdir, warn: Warn = print) -> Iterator[Event]:
    """Run the learning-rate range test; write its result, its plot, and the learning rate into the run's config."""
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
) -> Iterator[Event]:
    """Train to the end of the schedule, resuming from the newest checkpoint; see `stages.train` for the arguments.

    If the config has no learning rate, the range test runs first.
    """
    folder = Workdir(workdir)
    for event in stages.train(config, folder, warn, stop, max_minutes):
        _plot_range_test(event, folder, warn)
        yield event


def run(
    config: Config,
    workdir: str | Path | Workdir,
    warn: Warn = print,
    stop: Stop = lambda: None,
    max_minutes: float | None = None,
) -> Iterator[Event]:
    """Run all stages: prepare, find_lr if no learning rate is set, train, generate samples, write the report.

    The arguments are those of `stages.train`. If `stop` or `max_minutes` ends training, samples and report are left
    to the next call.
    """
    complete, folder = True, Workdir(workdir)  # its path is absolute, whatever folder the caller changes to
    for event in stages.train(config, folder, warn, stop, max_minutes):
        _plot_range_test(event, folder, warn)
        complete = not isinstance(event, Ended) or event.complete
        yield event
    if complete:
        with excused("The samples", warn):
            write_samples(folder, warn)
        with excused("The report", warn):
            write_report(folder)


def _plot_range_test(event: Event, folder: Workdir, warn: Warn) -> None:
    """Write lr_finder.svg if an event is the result of the range test."""
    if isinstance(event, LRFinderResult):
        path = folder.lr_finder.with_suffix(".svg")
        with excused(str(path), warn):
            folder.write(path, _range_test_plot(event))


def _range_test_plot(result: LRFinderResult) -> str:
    zooms = [(zoom.lrs, zoom.losses) for zoom in result.zooms]
    steepest = [zoom.steepest for zoom in result.zooms]
    return plots.lr_finder_plot(zooms, steepest, result.learning_rate, result.method)


def export(
    workdir: str | Path | Workdir,
    out: str | Path,
    form: str = "hf",
    step: str | int = "best",
    warn: Warn = print,
) -> Path:
    """Write a trained model to a new folder, for others to load.

    Args:
        workdir: of the run.
        out: the folder, which must not exist or be empty.
        form: 'hf' for Hugging Face's transformers, 'original' for the PyTorch ancestor.
        step: as in `load`.
        warn: told what the other side may stumble over.

    Raises:
        UserError: where the form or the place will not do, in one sentence; nothing has been written then.
    """
    convert.export_place(form, out)
    model = load(workdir, step, warn)
    return convert.export(form, model.config, model.tokenizer, model.params, out, warn)


def write_samples(workdir: str | Path | Workdir, warn: Warn = print) -> Samples:
    """Continue the config's sample prompts and keep the texts, as JSON and as sublines, in the workdir."""
    folder = Workdir(workdir)
    model = load(folder, warn=warn)
    how = folder.load_config().sample
    # A text may lack every character of a prompt, as the newline: its own first character will do then.
    prompts = [prompt for prompt in how.prompts if model.tokenizer.drop_unknown(prompt)]
    samples = model.generate(
        prompts or model.tokenizer.vocabulary[1],
        how.max_new_tokens,
        temperature=how.temperature,
        top_k=how.top_k,
        top_p=how.top_p,
        seed=model.config.seed,
        skip_unknown=True,
    )
    save_samples(folder, samples, f"step-{model.step}")
    return samples


def save_samples(folder: Workdir, samples: Samples, name: str) -> list[Path]:
    """Write samples under a name: one JSON file, and one SVG each; return the SVGs' paths."""
    folder.write(folder.samples / f"{name}.json", json.dumps(samples.to_dict(), indent=1) + "\n")
    paths = [folder.samples / f"{name}-{i}.svg" for i in range(len(samples))]
    for path, sample in zip(paths, samples, strict=True):
        folder.write(path, sample.svg())
    return paths


def corpus_text(workdir: str | Path | Workdir) -> str:
    """Return the text that a run learns from, training and held-out part."""
    folder = Workdir(workdir)
    return folder.load_tokenizer().decode([folder.load_tokens()])[0]


def loss_curve(workdir: str | Path | Workdir) -> str:
    """Draw the losses of a run so far, as SVG."""
    log = Workdir(workdir).load_metrics()
    points = {kind: [(x["step"], x["loss"]) for x in log if x["event"] == kind] for kind in ("step", "validation")}
    return plots.loss_plot(points["step"], points["validation"])


def write_report(workdir: str | Path | Workdir) -> Path:
    """Draw a run as one HTML page (report.html) and its loss curve as loss.svg; return the page's path."""
    folder = Workdir(workdir)
    curve = loss_curve(folder)
    folder.write(folder.path / "loss.svg", curve)
    figures = [("Loss on the training batches and on the whole held-out text.", curve)]
    figures += [("The learning-rate range test, zoom by zoom.", svg) for svg in _range_tests(folder)]
    figures += [("Written by the model: how unsure it was, and how surprised.", svg) for svg in _sublines(folder)]
    facts = [(name, _shown(value)) for name, value in info(folder).items()]
    folder.write(folder.report, report.report(f"A run of chargpt_jax: {folder.path.name}", facts, figures))
    return folder.report


def _range_tests(folder: Workdir) -> Iterator[str]:
    """Plot the range test from its numbers, if there was one: an SVG file in the folder is untrusted input."""
    with contextlib.suppress(ValueError):
        yield _range_test_plot(result_from(folder.load_json(folder.lr_finder)))


def _sublines(folder: Workdir) -> Iterator[str]:
    """Draw the texts that `run` wrote anew, step by step; a file that does not hold such texts is left out."""
    for path in sorted(folder.samples.glob("step-*.json")):
        with contextlib.suppress(ValueError):
            yield from [sample.svg() for sample in Samples.from_dict(folder.load_json(path, MOST_SAMPLES_JSON))]


def info(workdir: str | Path | Workdir) -> dict[str, Any]:
    """Say what a run is, as JSON can hold it: its corpus, model, progress, the devices here, and how fast it trained.

    flops_per_step is as flops.py counts. None before the first validation: compile_seconds, seconds_per_step,
    flops_per_second, and mfu, the part of the devices' peak that this is (None where the peak is not known, too).
    """
    folder = Workdir(workdir)
    config, sources, speed = folder.load_config(), folder.load_sources(), folder.load_speed()
    log = [line for line in folder.load_metrics() if line["event"] == "validation"]
    _, like = _shapes(config, compute_dtype(config.amp))
    n = int(sum(source["characters"] for source in sources))
    epoch_steps = batches.steps_per_epoch(
        int(config.data.train_split * n), config.model.block_size, config.data, config.ancestor.short_epochs
    )
    best = min(log, key=lambda line: line["loss"], default=None)
    return {
        "sources": [source["title"] for source in sources],
        "characters": n,
        "vocabulary": config.model.used_ids - 1,
        "parameters": count_parameters(like.params),
        "block_size": config.model.block_size,
        "steps_per_epoch": epoch_steps,
        "total_steps": optimizer.total_steps(config.scheduler, epoch_steps),
        "learning_rate": config.optimizer.learning_rate,
        "step": log[-1]["step"] if log else 0,
        "seconds": log[-1]["seconds"] if log else 0.0,
        "best_step": best and best["step"],
        "best_loss": best and best["loss"],
        "best_bits_per_character": best and best["bits_per_character"],
        "devices": sharding.describe(sharding.data_mesh(config.data.batch_size)),
        "dtype": jnp.dtype(compute_dtype(config.amp)).name,
        "trained_on": speed.get("device"),
        "compile_seconds": speed.get("compile_seconds"),
        "seconds_per_step": speed.get("seconds_per_step"),
        "flops_per_step": training_flops(config.model, config.data.batch_size),
        "flops_per_second": speed.get("flops_per_second"),
        "mfu": speed.get("mfu"),
    }


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


__all__ = [
    "Model",
    "Sample",
    "Samples",
    "corpus_text",
    "evaluate",
    "export",
    "find_lr",
    "import_original",
    "info",
    "load",
    "prepare",
    "run",
    "train",
    "write_report",
    "write_samples",
]
