"""Our own promises about a run, checked on the user's machine and disk.

A small training is killed at random moments, in processes of its own that run the real command, and begun again until
it ends: it must come to the bits, and to the log, of one that was never stopped. Then its checkpoints are damaged in
random ways: going on from them must be refused, or fall back to a step that is whole, but never be silently wrong.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import jax

from chargpt_jax.config import Config, DataConfig
from chargpt_jax.config_io import from_dict, to_json
from chargpt_jax.data.corpus import load_corpus
from chargpt_jax.errors import NoCheckpoint, UserError
from chargpt_jax.storage.state_arrays import Arrays, on_host
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training import optimizer
from chargpt_jax.training.setup import Setup
from chargpt_jax.training.stages import restored
from chargpt_jax.training.step import TrainState

STEPS, INTERVAL = 40, 4
"""Updates of a training, and between two of its checkpoints."""

HANG = 120.0
"""Seconds after which a process, or a restore, counts as hung."""

WORKERS = 2
"""Trainings at the same time."""

CHARACTERS = 12_000
"""Of the text that is trained on."""

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows knows one way to end a process
ASKING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


@dataclasses.dataclass
class Kills:
    """What became of trainings that were stopped; a run is stopped several times before it ends."""

    tried: int = 0
    bit_identical: int = 0
    """Kills whose run came to the arrays and the log of an uninterrupted one."""
    most_steps_lost: int = 0
    """Updates made again, at most, after one kill."""
    hangs: int = 0


@dataclasses.dataclass
class Signals:
    """What became of signals that ask for an end: SIGTERM, SIGINT, SIGHUP."""

    tried: int = 0
    right_exit_code: int = 0
    verified_saves: int = 0
    """Where training went on from the very last update that had been made."""
    seconds: list[float] = dataclasses.field(default_factory=list)
    """From the signal to the end of the process."""


@dataclasses.dataclass
class Corruptions:
    """What became of damaged checkpoints."""

    tried: int = 0
    bit_identical: int = 0
    """The newest step was restored, and right: the damage was of no consequence."""
    fallbacks: int = 0
    """An older step was restored, and right."""
    refused: int = 0
    """A clear sentence, and no restore."""
    unclear: int = 0
    """An error of another kind."""
    silent_wrong: int = 0
    hangs: int = 0


@dataclasses.dataclass
class Result:
    """What was tried, and what became of it."""

    kills: Kills = dataclasses.field(default_factory=Kills)
    signals: Signals = dataclasses.field(default_factory=Signals)
    corruptions: Corruptions = dataclasses.field(default_factory=Corruptions)
    broken: list[str] = dataclasses.field(default_factory=list)
    """A sentence for every promise that was not kept."""
    seconds: float = 0.0

    def table(self) -> str:
        """Write the figures in lines, and whether all promises were kept."""
        kills, signals, damage = self.kills, self.signals, self.corruptions
        times = sorted(signals.seconds) or [0.0]
        rows = [
            ("kills and signals", kills.tried, "at random moments"),
            ("  bit-identical ends", kills.bit_identical, f"of {kills.tried}"),
            ("  most steps lost by one", kills.most_steps_lost, f"of at most {INTERVAL}"),
            ("  hangs", kills.hangs, "must be 0"),
            ("signals", signals.tried, f"ended in {statistics.median(times):.2f} s, at most {times[-1]:.2f} s"),
            ("  right exit codes", signals.right_exit_code, f"of {signals.tried}"),
            ("  verified saves", signals.verified_saves, f"of {signals.tried}"),
            ("corruptions", damage.tried, ""),
            ("  bit-identical", damage.bit_identical, "the damage was of no consequence"),
            ("  fallbacks", damage.fallbacks, "to an older step, bit-identical"),
            ("  refused", damage.refused, "in a sentence"),
            ("  unclear errors", damage.unclear, "must be 0"),
            ("  silent wrong restores", damage.silent_wrong, "must be 0"),
            ("  hangs", damage.hangs, "must be 0"),
        ]
        lines = [f"{name:<26}{count:>6}  {note}".rstrip() for name, count, note in rows]
        ends = [f"BROKEN: {sentence}" for sentence in self.broken] or [f"All promises kept, in {self.seconds:.0f} s."]
        return "\n".join([*lines, "", *ends])

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON can hold them."""
        return dataclasses.asdict(self)


def check(
    place: str | Path,
    config: Config | None = None,
    *,
    kills: int = 20,
    signals: int = 6,
    corruptions: int = 200,
    seed: int = 0,
    tell: Callable[[str], None] = print,
) -> Result:
    """Stop trainings, damage checkpoints, and see what becomes of them.

    Args:
        place: a folder on the disk to check; a new folder is made in it, and removed where all promises are kept.
        config: whose ways (dropout, accumulation, ...) the training takes, with a model of the smallest size.
        kills: SIGKILLs and SIGTERMs at random moments.
        signals: SIGTERMs, SIGINTs and SIGHUPs besides.
        corruptions: of checkpoints.
        seed: of what is drawn at random; moments are never the same twice all the same.
        tell: told how far it is.

    Raises:
        UserError: where the place cannot be written.
    """
    Workdir(place).check_writable()
    began = time.monotonic()
    base = Workdir(place).path
    base.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="chargpt-selftest-", dir=base))
    bench = _Bench(folder, config or everything(), random.Random(seed), tell)
    try:
        whole = _uninterrupted(bench)
        _stop_trainings(bench, whole, _plan(kills, signals, bench.draw))
        if corruptions:
            _damage(bench, whole, corruptions)
    finally:
        bench.close()
    result = bench.result
    result.seconds = time.monotonic() - began
    if result.broken:
        result.broken.append(f"What was left is in {folder}.")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return result


def everything() -> Config:
    """Return a config that does all that a resumed training could do otherwise than one that was never stopped."""
    config = Config()
    config.model.dropout, config.data.padding_chance = 0.1, 0.1
    config.optimizer.accumulation_steps, config.optimizer.clip_norm = 2, 1.0
    return config


def shrunk(config: Config, source: Path) -> Config:
    """Return a config with the ways of another and a model that trains in milliseconds."""
    small = from_dict(json.loads(to_json(config)))
    sizes = {"vocab_size": 0, "used_ids": 0, "block_size": 16, "n_embd": 8, "n_head": 2, "n_head_dim": 4, "n_ff": 16}
    for name, value in {**sizes, "n_layer": 2, "attention_block": 8}.items():
        setattr(small.model, name, value)
    small.data.source, small.data.start_at, small.data.train_split = str(source), "", 0.9
    small.optimizer.accumulation_steps = min(2, small.optimizer.accumulation_steps)
    small.data.batch_size = 4
    small.optimizer.learning_rate = small.optimizer.learning_rate or 1e-2
    small.scheduler.max_steps = STEPS
    small.train.log_every, small.train.steps_per_dispatch, small.train.keep_last = 1, 0, 2
    windows = int(0.9 * CHARACTERS) // 16 - 1
    small.train.validate_every = INTERVAL / (windows * small.data.oversample / 4)
    return small


@dataclasses.dataclass
class _Whole:
    """What an uninterrupted training came to."""

    arrays: Arrays
    log: list[dict[str, Any]]
    seconds: float
    """From the start of the command to its end, once everything is compiled."""


class _Bench:
    """A folder with a text and a config, and processes to train in."""

    def __init__(self, folder: Path, config: Config, draw: random.Random, tell: Callable[[str], None]):
        self.folder, self.draw, self.tell, self.result = folder, draw, tell, Result()
        self.guard, self.processes = threading.RLock(), set[Any]()
        methods = multiprocessing.get_all_start_methods()
        # A server that has imported JAX, but not started it, forks in milliseconds; importing takes seconds.
        self.context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            preloaded = ["chargpt_jax.api", "chargpt_jax.cli.progress", "chargpt_jax.cli.profiler"]
            self.context.set_forkserver_preload(preloaded)
        text, _ = load_corpus(DataConfig(source="stdlib"))
        (folder / "text.txt").write_text(text[:CHARACTERS], encoding="utf-8")
        (folder / "config.json").write_text(to_json(shrunk(config, folder / "text.txt")), encoding="utf-8")

    def train(self, name: str) -> "_Child":
        """Begin a training, or go on with one."""
        argv = ["--mode=train", f"--config={self.folder / 'config.json'}", f"--workdir={self.folder / name}"]
        return _Child(self, argv, self.folder / f"{name}.txt")

    def state(self, name: str) -> Arrays:
        """Return, by path, the arrays that a training would go on from."""
        return on_host(restored(self.setup, self.fresh, self.folder / name / "checkpoints", lambda text: None))

    def log(self, name: str) -> list[dict[str, Any]]:
        """Return metrics.jsonl but for times of the clock."""
        lines = (self.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    @cached_property
    def setup(self) -> Setup:
        """The model that all trainings have."""
        return Setup.of(Workdir(self.folder / "whole-0"))

    @cached_property
    def fresh(self) -> TrainState:
        """Its state before the first update."""
        return self.setup.fresh_state(optimizer.transform(self.setup.config.optimizer, lambda count: 0.0 * count))

    def break_promise(self, sentence: str) -> None:
        """Note a promise that was not kept."""
        with self.guard:
            self.result.broken.append(sentence)
            self.tell(f"BROKEN: {sentence}")

    def close(self) -> None:
        """End what may still run."""
        for process in self.processes:
            process.kill()
            process.join()


class _Child:
    """The command, in a process of its own."""

    def __init__(self, bench: _Bench, argv: list[str], output: Path):
        self._bench, self.output = bench, output
        output.unlink(missing_ok=True)
        arguments = (argv, str(output), str(bench.folder / "programs"))
        self._process = bench.context.Process(target=_command, args=arguments)
        with bench.guard:  # a start looks after all processes, those of other threads too
            self._process.start()
            bench.processes.add(self._process)

    def ended(self, seconds: float) -> bool:
        """Wait up to so many seconds for the end."""
        return bool(wait([self._process.sentinel], seconds))

    def send(self, number: int) -> None:
        """Send a signal, if there is still somebody to have it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def said(self) -> str:
        """Return what it has printed so far, if it has come to that."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def code(self) -> int | None:
        """Wait for the exit code, -9 after a SIGKILL; None where the process hung and had to be killed."""
        hung = not self.ended(HANG)
        if hung:
            self.send(KILL)
        with self._bench.guard:
            self._process.join()
            self._bench.processes.discard(self._process)
        return None if hung else self._process.exitcode


def _command(argv: list[str], output: str, programs: str) -> None:
    """Be a process that runs the command, as `python -m chargpt_jax.main` does."""
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    jax.config.update("jax_compilation_cache_dir", programs)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    sys.argv = ["chargpt", *argv]
    runpy.run_module("chargpt_jax.main", run_name="__main__")


# Stopping


def _uninterrupted(bench: _Bench) -> _Whole:
    """Train twice without a stop: first to fill the cache of compiled programs, then as quickly as all others."""
    for name in ("whole-0", "whole-1"):
        began = time.monotonic()
        child = bench.train(name)
        if (code := child.code()) != 0:
            said = (child.said().splitlines() or [""])[-1]
            raise UserError(f"The self-test's training ends with exit code {code} ({said[:300]}): see {child.output}.")
        seconds = time.monotonic() - began
    whole = _Whole(bench.state("whole-0"), bench.log("whole-0"), seconds)
    if not _same(bench.state("whole-1"), whole.arrays) or bench.log("whole-1") != whole.log:
        bench.break_promise("Two uninterrupted trainings came to different bits, or logs.")
    bench.tell(f"an uninterrupted training takes {seconds:.1f} s here")
    return whole


def _plan(kills: int, signals: int, draw: random.Random) -> list[int]:
    """Return the signals to send, in random order."""
    plan = [draw.choice((KILL, signal.SIGTERM)) for _ in range(kills)]
    plan += [ASKING[i % len(ASKING)] for i in range(signals)]
    draw.shuffle(plan)
    return plan


def _stop_trainings(bench: _Bench, whole: _Whole, plan: list[int]) -> None:
    """Send every signal of a plan to some training, and see how each ends."""
    total, kills, names = len(plan), bench.result.kills, (f"stopped-{i}" for i in range(10**9))

    def work(seed: int) -> None:
        draw = random.Random(seed)
        while plan and not bench.result.broken:
            with bench.guard:
                name = next(names)
            stops = _stopped(bench, whole, name, plan, draw)
            same = _same(bench.state(name), whole.arrays) and bench.log(name) == whole.log
            with bench.guard:
                kills.tried += stops
                kills.bit_identical += stops * same
            if same:
                shutil.rmtree(bench.folder / name)
            else:
                bench.break_promise(f"The training {name} was stopped {stops} times and came to other bits, or lines.")
            bench.tell(f"{kills.tried} of {total} kills and signals sent")

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(work, [bench.draw.getrandbits(32) for _ in range(WORKERS)]))


def _stopped(bench: _Bench, whole: _Whole, name: str, plan: list[int], draw: random.Random) -> int:
    """Train to the end, with stops at random moments; return their number."""
    stops, place, over = 0, (0, 0), False
    while not over:
        child = bench.train(name)
        number = None
        if plan and not child.ended(draw.uniform(0.0, whole.seconds)):
            with bench.guard:
                number = plan.pop() if plan else None
        stops += number is not None
        over, place = _ends(bench, name, child, number, place)
    return stops


def _ends(
    bench: _Bench, name: str, child: _Child, number: int | None, before: tuple[int, int]
) -> tuple[bool, tuple[int, int]]:
    """Send a signal, if any, and judge what comes of it.

    Returns:
        Whether the training is over, and the last step that was logged and the last that was saved, as in `before`.
    """
    began = time.monotonic()
    if number is not None:
        child.send(number)
    code, seconds = child.code(), time.monotonic() - began
    # A process that has just begun does not listen yet: there a request to end is a kill.
    deaf = number is not None and code == -number and not child.said()
    asked = number is not None and number != KILL and not deaf
    right = {0, 130 if number == signal.SIGINT else 143} if asked else {0} if number is None else {0, -number}
    made = max((line["step"] for line in Workdir(bench.folder / name).load_metrics()), default=0)
    place = made, int(bench.state(name)["step"])
    # A process that ended before it began to train has lost nothing; what is missing then, an earlier one lost.
    lost = 0 if place == before else place[0] - place[1]
    with bench.guard:
        kills, signals = bench.result.kills, bench.result.signals
        kills.most_steps_lost = max(kills.most_steps_lost, lost)
        kills.hangs += code is None
        if asked:
            signals.tried += 1
            signals.right_exit_code += code in right
            signals.verified_saves += lost == 0
            signals.seconds.append(seconds)
    if code not in right:
        bench.break_promise(f"After signal {number}, {name} ended with exit code {code}: see {child.output}.")
    if lost > (0 if asked else INTERVAL):
        bench.break_promise(f"Signal {number} cost {name} {lost} steps: see {child.output}.")
    return code == 0 or code not in right, place


# Damaging


def _damage(bench: _Bench, whole: _Whole, corruptions: int) -> None:
    """Damage copies of a run's checkpoints, and go on from each."""
    found, checkpoints = bench.result.corruptions, bench.folder / "whole-0" / "checkpoints"
    steps = sorted((path for path in checkpoints.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
    right: dict[int, Arrays] = {0: on_host(bench.fresh)}
    for i in range(len(steps)):  # each is the newest once the later ones are gone
        place = bench.folder / "older"
        for path in steps[: i + 1]:
            shutil.copytree(path, place / path.name)
        state = on_host(restored(bench.setup, bench.fresh, place, lambda text: None))
        right[int(state["step"])] = state
        shutil.rmtree(place)
    for i in range(corruptions):
        place = bench.folder / f"damaged-{i}"
        shutil.copytree(checkpoints, place)
        what = _mutate(place, steps, bench.draw)
        outcome = _outcome(bench, place, right, max(right))
        found.tried += 1
        setattr(found, outcome, getattr(found, outcome) + 1)
        if outcome in ("silent_wrong", "unclear", "hangs"):
            bench.break_promise(f"Corruption {i} ({what}) gave: {outcome.replace('_', ' ')}.")
        else:
            shutil.rmtree(place)
        if (i + 1) % 100 == 0:
            bench.tell(f"{i + 1} of {corruptions} corruptions tried")


def _outcome(bench: _Bench, place: Path, right: dict[int, Arrays], newest: int) -> str:
    """Restore in a thread, which can be left alone where it hangs, and name what comes of it, as `Corruptions` does."""
    outcome = "hangs"

    def restore() -> None:
        nonlocal outcome
        try:
            state = on_host(restored(bench.setup, bench.fresh, place, lambda text: None))
        except (NoCheckpoint, UserError):
            outcome = "refused"
        except Exception:
            outcome = "unclear"
        else:
            step = int(state["step"])
            wrong = step not in right or not _same(state, right[step])
            outcome = "silent_wrong" if wrong else "bit_identical" if step == newest else "fallbacks"

    thread = threading.Thread(target=restore, daemon=True)
    thread.start()
    thread.join(HANG)
    return outcome


def _mutate(checkpoints: Path, steps: list[Path], draw: random.Random) -> str:
    """Damage one thing, mostly of the newest step; say what."""
    step = checkpoints / (steps[-1] if draw.random() < 0.8 else draw.choice(steps)).name
    files = sorted(path for path in step.rglob("*") if path.is_file())
    path = draw.choice(files)
    kind = draw.choice(("flip", "flip", "truncate", "delete", "zero", "rename", "swap", "delete folder", "rename step"))
    data = bytearray(path.read_bytes())
    if kind in ("flip", "truncate", "zero") and not data:
        kind = "delete"
    if kind == "flip":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
    elif kind == "truncate":
        path.write_bytes(data[: draw.randrange(len(data))])
    elif kind == "zero":
        start, end = sorted((draw.randrange(len(data)), len(data)))
        path.write_bytes(data[:start] + bytes(end - start))
    elif kind == "delete":
        path.unlink()
    elif kind == "rename":
        path.rename(path.with_name(path.name + " (1)"))
    elif kind == "swap":
        other = draw.choice(files)
        other_data = other.read_bytes()
        other.write_bytes(data)
        path.write_bytes(other_data)
    elif kind == "delete folder":
        shutil.rmtree(draw.choice([step, *(p for p in step.rglob("*") if p.is_dir())]))
    else:
        step.rename(checkpoints / draw.choice((f"{step.name} (1)", str(int(step.name) + 1), f"0{step.name}")))
    return f"{kind} of {path.relative_to(checkpoints)}"


def _same(one: Arrays, other: Arrays) -> bool:
    """Say whether all arrays are the same, bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].tobytes() == other[name].tobytes() for name in one
    )
