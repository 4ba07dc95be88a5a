"""Which changes keep a run bit-identical and which do not, as two tables.

    python -m benchmarks.determinism [--keep=FILE] [--against=FILE]

Each change is tested in a new process: `train` trains a small model with dropout and padding. Then one of the models
generates and scores text. --keep saves the results of the unchanged run (.npz). --against adds a row that compares them
with saved results, from another machine or other versions. tests/test_determinism.py holds bounds on these functions.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from chargpt_jax import api
from chargpt_jax.config import Config
from chargpt_jax.events import Steps
from chargpt_jax.generation.sample import Sample
from chargpt_jax.storage.checkpoint import Checkpoints
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training import optimizer, stages
from chargpt_jax.training.run import Run
from chargpt_jax.training.setup import Setup
from tests.corpus_text import small_config

STEPS = 40
PROMPTS = ("the cat", "a")
GENERATED = 150
"""Characters per sample: they go beyond block_size, where the KV cache ends."""

Arrays = Mapping[str, np.ndarray]


# One run


def write_text(path: Path) -> None:
    """Write 6,000 words, sampled from 300 random ones by Zipf's law; a short training cannot predict most of them."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list(string.ascii_lowercase), n)) for n in rng.integers(1, 8, 300)]
    chances = 1 / np.arange(1, 301)
    path.write_text(" ".join(rng.choice(words, 6000, p=chances / chances.sum())), encoding="utf-8")


def config(source: Path, fields: Mapping[str, Any]) -> Config:
    """Return the config of the unchanged run with some fields ({'section.field': value}) changed."""
    # Attention blocks of at least 64 queries compile fast.
    made = small_config(source, block_size=128, n_embd=32, n_head=4, n_ff=128, attention_block=64)
    made.data.padding_chance, made.data.train_split = 0.2, 0.9
    made.scheduler.max_steps, made.train.validate_every = STEPS, 0.5
    for name, value in fields.items():
        section, _, item = name.rpartition(".")
        setattr(getattr(made, section) if section else made, item, value)
    return made


def train(source: Path, workdir: Path, fields: Mapping[str, Any], stop_after: int = 0) -> None:
    """Train or resume on a text; stop after so many dispatches (0: train to the end)."""
    dispatches = 0

    def stop() -> int | None:
        return signal.SIGTERM if dispatches and dispatches == stop_after else None

    for event in stages.train(config(source, fields), workdir, lambda text: None, stop):
        dispatches += isinstance(event, Steps)


def learned(workdir: Path) -> dict[str, np.ndarray]:
    """Return the results of a run, by name.

    'parameters ...' and 'optimizer ...' are the arrays of the last checkpoint. 'losses' and 'validation', float64
    [steps] in nats, are NaN at steps without a logged value.
    """
    setup, log = Setup.of(Run.load(workdir)), Workdir(workdir).load_metrics()
    store = Checkpoints(Workdir(workdir).checkpoints)
    fresh = setup.initial_state(optimizer.empty(setup.config))
    _, _, state = store.load("latest", lambda record: fresh)
    store.close()
    found = {
        f"{part} {jax.tree_util.keystr(path)}": np.asarray(x)
        for part, tree in (("parameters", state.params), ("optimizer", state.opt_state))
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    for name, kind in (("losses", "step"), ("validation", "validation")):
        found[name] = np.full(setup.config.scheduler.max_steps or 0, np.nan)
        for line in log:
            if line["event"] == kind:
                found[name][line["step"] - 1] = line["loss"]
    return found


def generated(model: api.Model, prompts: Sequence[str] = PROMPTS, **how: Any) -> list[Sample]:
    """Continue prompts with a model."""
    return model.generate(prompts, GENERATED, seed=1, **how)


def joined(model: api.Model, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Return the 'text', int32 [N], and the 'surprisal', float32 [N] in nats, of concatenated samples."""
    text = np.concatenate([model.tokenizer.encode_text(sample.text) for sample in samples])
    return {"text": text, "surprisal": np.concatenate([sample.surprisal for sample in samples])}


# Comparing two


def same_bits(one: Arrays, other: Arrays, part: str = "") -> bool:
    """Return whether arrays whose names begin with `part` are equal, except for values that only one side logged."""
    names = [name for name in one if name.startswith(part)]
    assert names
    assert one.keys() == other.keys()
    pairs = (_shared(one[name], other[name]) for name in names)
    return all(a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)


def difference(one: Arrays, other: Arrays, part: str) -> float:
    """Return the largest difference as a fraction of the largest value of its array, over arrays as in `same_bits`."""
    largest = 0.0
    for a, b in (_shared(one[name], other[name]) for name in one if name.startswith(part)):
        largest = max(largest, float(np.max(np.abs(a - b)) / max(np.max(np.abs(a)), 1e-300)))
    return largest


def _shared(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop the indices at which one of two arrays is NaN; return float64, which represents every value exactly."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    there = ~(np.isnan(one) | np.isnan(other))
    return one[there], other[there]


# Training, one process per change


@dataclass(frozen=True, eq=False)
class Case:
    """A run with one change."""

    what: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Changed config fields."""
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_after: int = 0
    """Dispatches after which the process is stopped and a second one resumes; 0: no stop."""
    cold: bool = False
    """Use a cold compilation cache instead of the shared one."""
    like: str | None = "nothing"
    """The `what` of the case it is compared with; None: other cases are compared with this one."""


def virtual_devices(count: int) -> dict[str, str]:
    """Return the environment variables with which a CPU counts as `count` devices."""
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}


PLAIN = Case("nothing")
COLD = Case("nothing: a second process, cold compilation cache", cold=True)
WARM = Case("nothing: a second process, warm compilation cache")
CADENCE = Case(
    "a log line every 7 steps, validation twice as often", {"train.log_every": 7, "train.validate_every": 0.25}
)
ONE_THREAD = Case("1 thread (NPROC=1)", environment={"NPROC": "1"})
LONG = Case(f"{25 * STEPS:,} steps", {"scheduler.max_steps": 25 * STEPS, "train.validate_every": 5.0}, like=None)
SEED = Case("seed=1", {"seed": 1})
BFLOAT16 = Case("dtype='bfloat16'", {"amp.dtype": "bfloat16"})
EIGHT_DEVICES = Case("8 devices", environment=virtual_devices(8))
CASES = (
    COLD,
    WARM,
    Case("1 step per dispatch", {"train.steps_per_dispatch": 1}),
    Case("7 steps per dispatch", {"train.steps_per_dispatch": 7}),
    Case("stopped after 15 steps, resumed by another process", {"train.steps_per_dispatch": 5}, stop_after=3),
    CADENCE,
    SEED,
    ONE_THREAD,
    replace(ONE_THREAD, what="1 thread, compiled with 1 thread", cold=True, like=ONE_THREAD.what),
    Case("8 threads (NPROC=8)", environment={"NPROC": "8"}),
    LONG,
    replace(LONG, what=f"1 thread, after {LONG.what}", environment=ONE_THREAD.environment, like=LONG.what),
    Case("2 devices", environment=virtual_devices(2)),
    EIGHT_DEVICES,
    replace(EIGHT_DEVICES, what="8 devices, repeated", like=EIGHT_DEVICES.what),
    Case("accumulation_steps=4", {"optimizer.accumulation_steps": 4}),
    Case("attention_block=128", {"model.attention_block": 128}),
    Case("remat=False", {"model.remat": False}),
    BFLOAT16,
)
"""The unchanged run: steps per dispatch chosen by time, attention_block 64, float32."""


def in_child(case: Case, folder: Path, cache: Path) -> dict[str, np.ndarray]:
    """Train and generate in a new process, or in two; return the arrays of `learned` and of `joined`.

    Args:
        case: the change.
        folder: for the run and its text; existing content is removed.
        cache: folder of the shared compilation cache.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_text(folder / "text.txt")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs" if case.cold else cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        **case.environment,
    }
    for stop_after in (case.stop_after, 0) if case.stop_after else (0,):
        task = json.dumps([str(folder), dict(case.fields), stop_after])
        command = [sys.executable, "-m", "benchmarks.determinism", "--child", task]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    with np.load(folder / "figures.npz") as found:
        return dict(found)


def child(folder: str, fields: Mapping[str, Any], stop_after: int) -> None:
    """Run a case in this process."""
    workdir = Path(folder, "run")
    train(Path(folder, "text.txt"), workdir, fields, stop_after)
    if not stop_after:
        model = api.load(workdir, "latest")
        save(Path(folder, "figures.npz"), learned(workdir) | joined(model, generated(model)))


def save(path: Path, figures: Mapping[str, Any]) -> None:
    """Write arrays by name (.npz)."""
    np.savez(path, **figures)


PARTS = ("parameters", "optimizer", "losses", "validation", "text")
SIZES = PARTS[:1] + PARTS[2:4]


def training_rows(folder: Path, cache: Path, plain: Arrays, kept: Arrays | None) -> Iterator[str]:
    """Yield the lines of the table on training."""
    yield "| change | " + " | ".join(PARTS) + " | " + " | ".join(f"{part}: difference" for part in SIZES) + " |"
    yield "|---|" + "---|" * len(PARTS) + "---:|" * len(SIZES)
    if kept is not None:
        yield training_row("saved results", kept, plain)
    known = {PLAIN.what: plain}
    # An accelerator serves one process at a time.
    with ThreadPoolExecutor(2 if os.environ["JAX_PLATFORMS"] == "cpu" else 1) as pool:
        found = pool.map(lambda case: in_child(case, folder / str(CASES.index(case)), cache), CASES)
        for case, figures in zip(CASES, found, strict=True):
            known[case.what] = figures
            if case.like is not None:
                yield training_row(case.what, known[case.like], figures)


def training_row(what: str, one: Arrays, other: Arrays) -> str:
    """Compare two runs in one table row."""
    same = ["same" if same_bits(one, other, part) else "other" for part in PARTS]
    sizes = [difference(one, other, part) for part in SIZES]
    return f"| {' | '.join([what, *same, *map(shown, sizes)])} |"


def shown(size: float) -> str:
    """Format a difference with one digit, and zero as 0."""
    return f"{size:.0e}" if size else "0"


# Generation and scoring, with one model


def uncached(model: api.Model) -> Sample:
    """Continue the first prompt by one character per call, which recomputes the context each time."""
    sample = model.generate(PROMPTS[0], 1, seed=1)[0]
    surprisal = sample.surprisal
    for _ in range(GENERATED - 1):
        sample = model.generate(sample.text, 1, seed=1)[0]
        surprisal = np.append(surprisal, sample.surprisal[-1])
    return replace(sample, surprisal=surprisal)


GENERATION: Mapping[str, Callable[[api.Model], Sample]] = {
    "nothing: repeated": lambda model: generated(model)[0],
    "in pieces, as with --stream": lambda model: generated(model, on_text=lambda number, text: None)[0],
    "without the other prompt": lambda model: generated(model, PROMPTS[:1])[0],
    "with a prompt longer than block_size": lambda model: generated(model, [PROMPTS[0], "a long text " * 20])[0],
    "one character per call, without the KV cache": uncached,
    "scored instead of generated": lambda model: model.score(generated(model)[0].text, stride=1),
    "its index among the prompts": lambda model: generated(model, PROMPTS[::-1])[1],
}
"""The change to the generation from the first of two prompts -> its sample with this change."""


def generation_rows(model: api.Model) -> Iterator[str]:
    """Yield the lines of the table on generation."""
    yield "| change | text | surprisal | surprisal: difference |"
    yield "|---|---|---|---:|"
    plain = joined(model, generated(model)[:1])
    for what, change in GENERATION.items():
        other = joined(model, [change(model)])
        same = ["same" if same_bits(plain, other, part) else "other" for part in ("text", "surprisal")]
        yield f"| {' | '.join([what, *same, shown(difference(plain, other, 'surprisal'))])} |"


def circumstances() -> str:
    """Return devices and versions in one line."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    kinds = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    return f"{kinds}, {platform.machine()}; Python {platform.python_version()}, {versions}."


def report(folder: Path, keep: Path | None, against: Path | None) -> Iterator[str]:
    """Measure all cases; yield the lines of the report as results arrive."""
    cache = folder / "programs"
    kept = None if against is None else dict(np.load(against))
    plain = in_child(PLAIN, folder / "plain", cache)
    if keep is not None:
        save(keep, plain)
    yield from training_rows(folder, cache, plain, kept)
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    workdir = folder / "plain" / "run"
    yield ""
    yield from generation_rows(api.load(workdir, "latest"))
    judged = api.evaluate(workdir, "latest")["loss"]
    yield ""
    difference = shown(abs(judged - plain["validation"][-1]))
    yield f"The loss of the last checkpoint, evaluated separately, differs by {difference} nats."
    yield circumstances()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.determinism")
    parser.add_argument("--keep", type=Path, help="save the results of the unchanged run to this file (.npz)")
    parser.add_argument("--against", type=Path, help="saved results to compare with (.npz)")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if given.child:
        child(*given.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        for line in report(Path(folder), given.keep, given.against):
            print(line, flush=True)


if __name__ == "__main__":
    main()
