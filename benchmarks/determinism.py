"""What changes a run's bits and what does not, as two tables.

    python -m benchmarks.determinism [--keep=FILE] [--against=FILE]

A small model is trained by `train`, with dropout and padding, in a fresh process for each change; then one of them
writes and judges. --keep saves the figures of the plain run (.npz); --against adds a line that compares them with kept
ones, of another machine or of other versions. tests/test_determinism.py holds bounds on what these functions return.
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
from chargpt_jax.training.setup import Setup
from tests.corpus_text import small_config

UPDATES = 40
PROMPTS = ("the cat", "a")
WRITTEN = 150
"""Characters of each text: they go past block_size, where the cache ends."""

Arrays = Mapping[str, np.ndarray]


# One run


def write_text(path: Path) -> None:
    """Write 6,000 words drawn from 300 random ones by Zipf's law: a short training leaves much of it uncertain."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list(string.ascii_lowercase), n)) for n in rng.integers(1, 8, 300)]
    chances = 1 / np.arange(1, 301)
    path.write_text(" ".join(rng.choice(words, 6000, p=chances / chances.sum())), encoding="utf-8")


def config(source: Path, fields: Mapping[str, Any]) -> Config:
    """Return the config of the plain run with some fields, given by their whole names, changed."""
    # Products of 64 queries and more are quick to compile.
    made = small_config(source, block_size=128, n_embd=32, n_head=4, n_ff=128, attention_block=64)
    made.data.padding_chance, made.data.train_split = 0.2, 0.9
    made.scheduler.max_steps, made.train.validate_every = UPDATES, 0.5
    for name, value in fields.items():
        section, _, item = name.rpartition(".")
        setattr(getattr(made, section) if section else made, item, value)
    return made


def train(source: Path, workdir: Path, fields: Mapping[str, Any], stop_after: int = 0) -> None:
    """Train on a text, from a checkpoint where there is one, until so many dispatches are made; 0: to the end."""
    dispatches = 0
    stop = lambda: signal.SIGTERM if dispatches and dispatches == stop_after else None  # noqa: E731
    for event in stages.train(config(source, fields), workdir, lambda text: None, stop):
        dispatches += isinstance(event, Steps)


def learned(workdir: Path) -> dict[str, np.ndarray]:
    """Return what a run came to, by name.

    'parameters ...' and 'optimizer ...' are the arrays of the last checkpoint. 'losses' and 'validation', float64
    [updates] in nats, have NaN where none was logged.
    """
    setup, log = Setup.of(Workdir(workdir)), Workdir(workdir).load_metrics()
    store = Checkpoints(Workdir(workdir).checkpoints)
    tx = optimizer.transform(setup.config.optimizer, lambda count: 0.0 * count)
    state = store.restore(store.choose("latest"), setup.fresh_state(tx))
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


def written(model: api.Model, prompts: Sequence[str] = PROMPTS, **how: Any) -> list[Sample]:
    """Let a model continue prompts."""
    return model.generate(prompts, WRITTEN, seed=1, **how)


def joined(model: api.Model, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Return the 'text', int32 [N], and the 'surprisal', float32 [N] in nats, of samples one behind the other."""
    text = np.concatenate([model.tokenizer.encode_text(sample.text) for sample in samples])
    return {"text": text, "surprisal": np.concatenate([sample.surprisal for sample in samples])}


# Comparing two


def same_bits(one: Arrays, other: Arrays, part: str = "") -> bool:
    """Say whether the arrays whose names begin with `part` are equal, but for what only one side logged."""
    names = [name for name in one if name.startswith(part)]
    assert names
    assert one.keys() == other.keys()
    pairs = (_shared(one[name], other[name]) for name in names)
    return all(a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)


def difference(one: Arrays, other: Arrays, part: str) -> float:
    """Return the largest difference as a part of the largest number of its array, over arrays as in `same_bits`."""
    largest = 0.0
    for a, b in (_shared(one[name], other[name]) for name in one if name.startswith(part)):
        largest = max(largest, float(np.max(np.abs(a - b)) / max(np.max(np.abs(a)), 1e-300)))
    return largest


def _shared(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Leave out the places at which one of two arrays has NaN; return float64, which holds every bit."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    there = ~(np.isnan(one) | np.isnan(other))
    return one[there], other[there]


# Training, in a process for each change


@dataclass(frozen=True, eq=False)
class Case:
    """A run that differs from another in one thing."""

    what: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Of the config."""
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_after: int = 0
    """Dispatches after which the process is stopped, and a second one goes on; 0: it is not stopped."""
    cold: bool = False
    """Begin with an empty compilation cache, not with the one that the others share."""
    like: str | None = "nothing"
    """What it is compared with, by its `what`; None: it is there for others to be compared with."""


def virtual_devices(count: int) -> dict[str, str]:
    """Return the environment in which a CPU counts as so many devices."""
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}


PLAIN = Case("nothing")
COLD = Case("nothing: a second process, which compiles anew", cold=True)
WARM = Case("nothing: a second process, with programs from the compilation cache")
CADENCE = Case(
    "a log line every 7 updates, validation twice as often", {"train.log_every": 7, "train.validate_every": 0.25}
)
ONE_THREAD = Case("1 thread (NPROC=1)", environment={"NPROC": "1"})
LONG = Case(f"{25 * UPDATES:,} updates", {"scheduler.max_steps": 25 * UPDATES, "train.validate_every": 5.0}, like=None)
SEED = Case("seed=1", {"seed": 1})
BFLOAT16 = Case("dtype='bfloat16'", {"amp.dtype": "bfloat16"})
EIGHT_DEVICES = Case("8 devices", environment=virtual_devices(8))
CASES = (
    COLD,
    WARM,
    Case("1 update a dispatch", {"train.steps_per_dispatch": 1}),
    Case("7 updates a dispatch", {"train.steps_per_dispatch": 7}),
    Case("stopped after 15 updates, resumed by another process", {"train.steps_per_dispatch": 5}, stop_after=3),
    CADENCE,
    SEED,
    ONE_THREAD,
    replace(ONE_THREAD, what="1 thread, compiled with 1 thread", cold=True, like=ONE_THREAD.what),
    Case("8 threads (NPROC=8)", environment={"NPROC": "8"}),
    LONG,
    replace(LONG, what=f"1 thread, after {LONG.what}", environment=ONE_THREAD.environment, like=LONG.what),
    Case("2 devices", environment=virtual_devices(2)),
    EIGHT_DEVICES,
    replace(EIGHT_DEVICES, what="8 devices, a second time", like=EIGHT_DEVICES.what),
    Case("accumulation_steps=4", {"optimizer.accumulation_steps": 4}),
    Case("attention_block=128", {"model.attention_block": 128}),
    Case("remat=False", {"model.remat": False}),
    BFLOAT16,
)
"""In the plain run dispatches are as long as time allows, attention_block is 64 and the dtype float32."""


def in_child(case: Case, folder: Path, cache: Path) -> dict[str, np.ndarray]:
    """Train and write in a fresh process, or in two; return the arrays of `learned` and of `joined`.

    Args:
        case: what is changed.
        folder: for the run and its text; what was there is removed.
        cache: of compiled programs.
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
    """Be such a process."""
    workdir = Path(folder, "run")
    train(Path(folder, "text.txt"), workdir, fields, stop_after)
    if not stop_after:
        model = api.load(workdir, "latest")
        save(Path(folder, "figures.npz"), learned(workdir) | joined(model, written(model)))


def save(path: Path, figures: Mapping[str, Any]) -> None:
    """Write arrays by name (.npz)."""
    np.savez(path, **figures)


PARTS = ("parameters", "optimizer", "losses", "validation", "text")
SIZES = PARTS[:1] + PARTS[2:4]


def training_rows(folder: Path, cache: Path, plain: Arrays, kept: Arrays | None) -> Iterator[str]:
    """Yield the lines of the table on training."""
    yield "| what is changed | " + " | ".join(PARTS) + " | " + " | ".join(f"{part} differ by" for part in SIZES) + " |"
    yield "|---|" + "---|" * len(PARTS) + "---:|" * len(SIZES)
    if kept is not None:
        yield training_row("kept figures", kept, plain)
    known = {PLAIN.what: plain}
    # An accelerator serves one process at a time.
    with ThreadPoolExecutor(2 if os.environ["JAX_PLATFORMS"] == "cpu" else 1) as pool:
        found = pool.map(lambda case: in_child(case, folder / str(CASES.index(case)), cache), CASES)
        for case, figures in zip(CASES, found, strict=True):
            known[case.what] = figures
            if case.like is not None:
                yield training_row(case.what, known[case.like], figures)


def training_row(what: str, one: Arrays, other: Arrays) -> str:
    """Compare two runs in a line."""
    same = ["same" if same_bits(one, other, part) else "other" for part in PARTS]
    sizes = [difference(one, other, part) for part in SIZES]
    return f"| {' | '.join([what, *same, *map(shown, sizes)])} |"


def shown(size: float) -> str:
    """Write a difference with one digit, and none as such."""
    return f"{size:.0e}" if size else "0"


# Writing and judging, with one model


def uncached(model: api.Model) -> Sample:
    """Continue the first prompt a character a call, so that the text is read anew each time."""
    sample = model.generate(PROMPTS[0], 1, seed=1)[0]
    surprisal = sample.surprisal
    for _ in range(WRITTEN - 1):
        sample = model.generate(sample.text, 1, seed=1)[0]
        surprisal = np.append(surprisal, sample.surprisal[-1])
    return replace(sample, surprisal=surprisal)


WRITING: Mapping[str, Callable[[api.Model], Sample]] = {
    "nothing: a second time": lambda model: written(model)[0],
    "in pieces, as --stream writes": lambda model: written(model, on_text=lambda number, text: None)[0],
    "no other prompt beside it": lambda model: written(model, PROMPTS[:1])[0],
    "a prompt longer than block_size beside it": lambda model: written(model, [PROMPTS[0], "a long text " * 20])[0],
    "a character a call, without the cache": uncached,
    "scored, not written": lambda model: model.score(written(model)[0].text, stride=1),
    "its place among the prompts": lambda model: written(model, PROMPTS[::-1])[1],
}
"""What is changed about the first of two prompts -> its text with that."""


def writing_rows(model: api.Model) -> Iterator[str]:
    """Yield the lines of the table on writing."""
    yield "| what is changed | text | surprisal | surprisal differs by |"
    yield "|---|---|---|---:|"
    plain = joined(model, written(model)[:1])
    for what, change in WRITING.items():
        other = joined(model, [change(model)])
        same = ["same" if same_bits(plain, other, part) else "other" for part in ("text", "surprisal")]
        yield f"| {' | '.join([what, *same, shown(difference(plain, other, 'surprisal'))])} |"


def circumstances() -> str:
    """Say in a line what this was measured with."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    kinds = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    return f"{kinds}, {platform.machine()}; Python {platform.python_version()}, {versions}."


def report(folder: Path, keep: Path | None, against: Path | None) -> Iterator[str]:
    """Measure all; yield the lines of the report as they come in."""
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
    yield from writing_rows(api.load(workdir, "latest"))
    judged = api.evaluate(workdir, "latest")["loss"]
    yield ""
    yield f"Evaluated alone, the last checkpoint's loss differs by {shown(abs(judged - plain['validation'][-1]))} nats."
    yield circumstances()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.determinism")
    parser.add_argument("--keep", type=Path, help="where to save the plain run's figures (.npz)")
    parser.add_argument("--against", type=Path, help="figures kept elsewhere, to compare with")
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
