"""A small store of checkpoints to damage, and ways to make the system refuse, or to die, in the middle of a save.

python -m benchmarks.stored FOLDER NUMBER ... saves into copies of FOLDER/store in processes that kill themselves, each
at the file operation of that number, and prints what became of them: {number: exit status}.
"""

import dataclasses
import functools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chargpt_jax.config import Config, ModelConfig, OptimizerConfig
from chargpt_jax.model.gpt import create
from chargpt_jax.storage.checkpoint import Checkpoints
from chargpt_jax.training.optimizer import adamw
from chargpt_jax.training.step import TrainState, create_state

MODEL = ModelConfig(vocab_size=64, used_ids=4, block_size=12, n_embd=8, n_head=2, n_head_dim=4, n_ff=16, n_layer=2)
RECORD = {
    "config": json.loads(json.dumps(dataclasses.asdict(Config(model=MODEL)))),
    "vocabulary": ["", "\n", "é", "😀"],
    "corpus_sha256": "0" * 64,
}
HANGS = 120.0
"""Seconds after which a process counts as hanging."""


@functools.cache
def _shapes(model: ModelConfig, dtype: Any) -> TrainState:
    _, params = jax.eval_shape(lambda: create(model, 0))
    return jax.eval_shape(lambda p: create_state(p, adamw(OptimizerConfig(), 1e-2), 7, dtype), params)


def state_at(step: int, dtype: Any = jnp.float32, model: ModelConfig = MODEL) -> TrainState:
    """Return a state whose every array is another at every step; nothing is compiled for it."""
    rng, shapes = np.random.default_rng(step), _shapes(model, dtype)
    arrays = jax.tree.map(lambda x: (9 * rng.standard_normal(x.shape)).astype(x.dtype), shapes.replace(key=None))
    return jax.device_put(arrays.replace(step=np.int32(step), key=jax.random.key(7)), jax.devices()[0])


def bits(state: TrainState) -> list[bytes]:
    """Return all that a state holds."""
    leaves = jax.tree.leaves(dataclasses.replace(state, key=jax.random.key_data(state.key)))
    return [f"{x.dtype} {x.shape} ".encode() + np.asarray(x).tobytes() for x in leaves]


class Store(Checkpoints):
    """A store that keeps its warnings."""

    def __init__(self, folder: Path, keep_last: int = 3):
        """Open a folder."""
        self.heard: list[str] = []
        super().__init__(folder, keep_last=keep_last, warn=self.heard.append)


def filled(folder: Path, losses: Sequence[float] = (3.0, 1.0, 2.0)) -> Store:
    """Return a store with a step for each loss: 1, 2, 3."""
    store = Store(folder, keep_last=len(losses))
    for step, loss in enumerate(losses, start=1):
        store.save(state_at(step), RECORD, loss)
    return store


class Faults:
    """Counts what Python asks of the file system in a folder, and acts at the operation that is chosen.

    Opening, making, renaming, listing and removing are seen by an audit hook, whoever calls them; writing and waiting
    for the disk are seen where the code calls `os.write` and `os.fsync`. What orbax's C++ does is not seen here.
    """

    EVENTS = ("open", "os.mkdir", "os.rename", "os.listdir", "os.scandir", "os.remove", "os.rmdir", "shutil.rmtree")

    def __init__(self) -> None:
        """Begin to listen; a hook cannot be taken away again."""
        self._folder, self._at, self._act = "", -1, refuse(0)
        self._write, self._fsync = os.write, os.fsync
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self._folder and event in self.EVENTS and isinstance(args[0], str | bytes | os.PathLike):
            where = os.fsdecode(args[0])
            if where.startswith(self._folder):
                self._happen(f"{event} {where.removeprefix(self._folder)}")

    def _happen(self, what: str) -> None:
        self.seen.append(what)
        if len(self.seen) - 1 == self._at:
            self._act()

    @contextmanager
    def within(self, folder: Path, at: int = -1, act: Callable[[], None] | None = None) -> Iterator[None]:
        """Act at one operation in a folder; without `at` only see."""
        self._folder, self._at, self._act, self.seen = str(folder), at, act or refuse(0), []
        os.write = lambda *args: (self._happen("os.write"), self._write(*args))[1]
        os.fsync = lambda *args: (self._happen("os.fsync"), self._fsync(*args))[1]
        try:
            yield
        finally:
            self._folder, os.write, os.fsync = "", self._write, self._fsync


@functools.cache
def faults() -> Faults:
    """Return the one that there is."""
    return Faults()


def refuse(number: int) -> Callable[[], None]:
    """Return what fails as the system does."""

    def act() -> None:
        raise OSError(number, os.strerror(number))

    return act


def kill() -> None:
    """Die at once, as kill -9 has it."""
    os.kill(os.getpid(), signal.SIGKILL)


def main(words: Sequence[str]) -> None:
    """Fork for every number: the modules are loaded once, but JAX begins to work in the children only."""
    folder, numbers = Path(words[0]), [int(word) for word in words[1:]]
    _shapes(MODEL, jnp.float32)
    statuses = {}
    for number in numbers:
        copy = folder / f"killed-{number}"
        shutil.copytree(folder / "store", copy)
        child = os.fork()
        if not child:
            try:
                state, store = state_at(4), Store(copy)
                with faults().within(copy, number, kill):
                    store.save(state, RECORD, 0.5)
            finally:
                os._exit(0)
        statuses[number] = _status(child)
    print(json.dumps(statuses))


def _status(child: int) -> int | str:
    """Wait for a process; return its signal, negative, or its exit code, or 'hang'."""
    began = time.monotonic()
    while time.monotonic() < began + HANGS:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hang"


if __name__ == "__main__":
    main(sys.argv[1:])
