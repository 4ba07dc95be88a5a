"""A small store of checkpoints to damage, and ways to make the system refuse or to die in the middle of a save."""

import dataclasses
import errno
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chargpt_jax.checkpoint import Checkpoints
from chargpt_jax.config import Config, ModelConfig, OptimizerConfig
from chargpt_jax.model import create
from chargpt_jax.optimizer import adamw
from chargpt_jax.step import TrainState, create_state

MODEL = ModelConfig(vocab_size=64, used_ids=4, block_size=12, n_embd=8, n_head=2, n_head_dim=4, n_ff=16, n_layer=2)
CONFIG = json.loads(json.dumps(dataclasses.asdict(Config(model=MODEL))))
RECORD = {"config": CONFIG, "vocabulary": ["", "\n", "é", "😀"], "corpus_sha256": "0" * 64}


@functools.cache
def _fresh(dtype: Any) -> TrainState:
    _, params = create(MODEL, 0)
    return create_state(params, adamw(OptimizerConfig(), 1e-2), seed=7, dtype=dtype)


def state_at(step: int, dtype: Any = jnp.float32) -> TrainState:
    """Return a state whose every array is another at every step."""
    fresh = _fresh(dtype)
    other = jax.tree.map(lambda x: x + np.asarray(step / 8, x.dtype), (fresh.params, fresh.opt_state))
    return dataclasses.replace(fresh, step=jnp.int32(step), params=other[0], opt_state=other[1])


def bits(state: TrainState) -> list[bytes]:
    """Return all that a state holds."""
    leaves = jax.tree.leaves(dataclasses.replace(state, key=jax.random.key_data(state.key)))
    return [f"{x.dtype} {x.shape} ".encode() + np.asarray(x).tobytes() for x in leaves]


def filled(folder: Path, losses: tuple[float, ...] = (3.0, 1.0, 2.0)) -> Checkpoints:
    """Return a store with a step for each loss: 1, 2, 3; the warnings are kept in `heard`."""
    store = opened(folder, keep_last=len(losses))
    for step, loss in enumerate(losses, start=1):
        store.save(state_at(step), RECORD, loss)
    return store


def opened(folder: Path, keep_last: int = 3) -> Any:
    """Return a store that keeps its warnings in `heard`."""
    heard: list[str] = []
    store: Any = Checkpoints(folder, keep_last=keep_last, warn=heard.append)
    store.heard = heard
    return store


class Faults:
    """Counts what Python asks of the file system in a folder, and fails or ends at the one that is chosen.

    Opening, making, renaming, listing and removing are seen by an audit hook, whoever calls them; writing and waiting
    for the disk are seen where the code calls `os.write` and `os.fsync`. What orbax's C++ does is not seen here.
    """

    EVENTS = ("open", "os.mkdir", "os.rename", "os.listdir", "os.scandir", "os.remove", "os.rmdir", "os.truncate")

    def __init__(self) -> None:
        self.folder, self.at, self.count, self.seen = "", -1, 0, list[str]()
        self.act: Callable[[], None] = lambda: None
        self.for_good = False
        sys.addaudithook(self._hook)  # it cannot be taken away again, so there is one for all tests
        self._write, self._fsync = os.write, os.fsync

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder and event in self.EVENTS and isinstance(args[0], str | bytes | os.PathLike):
            where = os.fsdecode(args[0])
            if where.startswith(self.folder):
                self._happen(f"{event} {where.removeprefix(self.folder)}")

    def _happen(self, what: str) -> None:
        number = self.count
        self.count += 1
        self.seen.append(what)
        if number == self.at or (self.for_good and 0 <= self.at <= number):
            self.act()

    @contextmanager
    def within(
        self, folder: Path, at: int = -1, act: Callable[[], None] = lambda: None, for_good: bool = False
    ) -> Iterator["Faults"]:
        """Act at one operation in a folder, or from there on; without `at` only count."""
        self.folder, self.at, self.act, self.for_good = str(folder), at, act, for_good
        self.count, self.seen = 0, []
        os.write = lambda *args: (self._happen("os.write"), self._write(*args))[1]
        os.fsync = lambda *args: (self._happen("os.fsync"), self._fsync(*args))[1]
        try:
            yield self
        finally:
            self.folder, os.write, os.fsync = "", self._write, self._fsync


@functools.cache
def faults() -> Faults:
    """Return the one that there is."""
    return Faults()


def refuse(number: int) -> Callable[[], None]:
    """Return what fails as the system does."""

    def act() -> None:
        raise OSError(number, os.strerror(number))

    return act


class Killed(BaseException):
    """Stands for the end of the process where nothing more reaches the disk."""


def killed() -> None:
    """End, as far as the disk can tell."""
    raise Killed


SIGKILL = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


def in_child(code: str, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, from the root of the repository."""
    root = Path(__file__).parents[1]
    return subprocess.run([sys.executable, "-c", code, *words], cwd=root, capture_output=True, text=True, **more)


ERRORS = {name: getattr(errno, name) for name in ("ENOSPC", "EIO", "EROFS", "EDQUOT", "EACCES")}
