"""The trainings of the self-test: their folder, their config, and their processes."""

import contextlib
import json
import multiprocessing
import os
import random
import runpy
import signal
import sys
import threading
from collections.abc import Callable
from functools import cached_property
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import jax

from chargpt_jax.config import Config, DataConfig
from chargpt_jax.config.saved import from_dict, to_json
from chargpt_jax.data.corpus import load_corpus
from chargpt_jax.selftest.damage import HANG
from chargpt_jax.selftest.result import INTERVAL, Result
from chargpt_jax.storage.arrays.state_arrays import Arrays, on_host
from chargpt_jax.training import optimizer
from chargpt_jax.training.run import Run
from chargpt_jax.training.setup import Setup
from chargpt_jax.training.stages import restored
from chargpt_jax.training.step import TrainState

STEPS = 40
"""Training steps of a training."""

CHARACTERS = 12_000
"""Length of the training text."""

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has only one way to kill a process


def everything() -> Config:
    """Return a config with every feature that could make a resumed training differ from an uninterrupted one."""
    config = Config()
    config.model.dropout, config.data.padding_chance = 0.1, 0.1
    config.optimizer.accumulation_steps, config.optimizer.clip_norm = 2, 1.0
    return config


def shrunk(config: Config, source: Path) -> Config:
    """Return a config with the settings of another one and a model that trains in milliseconds."""
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


class Bench:
    """A folder with a text and a config, and the processes that train in it."""

    def __init__(self, folder: Path, config: Config, rng: random.Random, tell: Callable[[str], None]):
        self.folder, self.rng, self.tell, self.result = folder, rng, tell, Result()
        self.guard, self.processes = threading.RLock(), set[Any]()
        methods = multiprocessing.get_all_start_methods()
        # A fork server with JAX imported, but not initialised, forks in milliseconds; an import takes seconds.
        self.context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            preloaded = ["chargpt_jax.api", "chargpt_jax.cli.progress", "chargpt_jax.cli.profiler"]
            self.context.set_forkserver_preload(preloaded)
        text, _ = load_corpus(DataConfig(source="stdlib"))
        (folder / "text.txt").write_text(text[:CHARACTERS], encoding="utf-8")
        (folder / "config.json").write_text(to_json(shrunk(config, folder / "text.txt")), encoding="utf-8")

    def train(self, name: str) -> "Child":
        """Start or resume a training."""
        argv = ["--mode=train", f"--config={self.folder / 'config.json'}", f"--workdir={self.folder / name}"]
        return Child(self, argv, self.folder / f"{name}.txt")

    def state(self, name: str) -> Arrays:
        """Return the arrays that a training would resume from, by name."""
        return on_host(restored(self.setup, self.fresh, self.folder / name / "checkpoints", lambda text: None))

    def log(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl without their times."""
        lines = (self.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    @cached_property
    def setup(self) -> Setup:
        """The setup of all trainings."""
        return Setup.of(Run.load(self.folder / "whole-0"))

    @cached_property
    def fresh(self) -> TrainState:
        """Its state before the first update."""
        return self.setup.initial_state(optimizer.empty(self.setup.config))

    def fail(self, sentence: str) -> None:
        """Record a failed check."""
        with self.guard:
            self.result.broken.append(sentence)
            self.tell(f"FAILED: {sentence}")

    def close(self) -> None:
        """Kill processes that still run."""
        for process in self.processes:
            process.kill()
            process.join()


class Child:
    """The command in a process of its own."""

    def __init__(self, bench: Bench, argv: list[str], output: Path):
        self._bench, self.output = bench, output
        output.unlink(missing_ok=True)
        arguments = (argv, str(output), str(bench.folder / "programs"))
        self._process = bench.context.Process(target=_command, args=arguments)
        with bench.guard:  # a start also joins processes of other threads
            self._process.start()
            bench.processes.add(self._process)

    def ended(self, seconds: float) -> bool:
        """Return whether the process ends within some seconds."""
        return bool(wait([self._process.sentinel], seconds))

    def send(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def said(self) -> str:
        """Return its output so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def code(self) -> int | None:
        """Wait for the exit code, -9 after a SIGKILL; None if the process hung and was killed."""
        hung = not self.ended(HANG)
        if hung:
            self.send(KILL)
        with self._bench.guard:
            self._process.join()
            self._bench.processes.discard(self._process)
        return None if hung else self._process.exitcode


def _command(argv: list[str], output: str, programs: str) -> None:
    """Run the command in this process, like `python -m chargpt_jax.main`."""
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    jax.config.update("jax_compilation_cache_dir", programs)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    sys.argv = ["chargpt", *argv]
    runpy.run_module("chargpt_jax.main", run_name="__main__")
