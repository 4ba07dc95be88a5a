"""A small checkpoint store for tests, and faults during a save: OS errors or SIGKILL at a chosen file operation.

python -m benchmarks.stored FOLDER NUMBER ... saves into copies of FOLDER/store in processes that kill themselves at the
file operation of the given index. It prints {index: exit status}.
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
from chargpt_jax.model.init import create
from chargpt_jax.storage.checkpoint import Checkpoints
from chargpt_jax.training.optimizer import adamw
from chargpt_jax.training.step import TrainState, create_state

MODEL = ModelConfig(vocab_size=64, used_ids=4, block_size=12, n_embd=8, n_head=2, n_head_dim=4, n_ff=16, n_layer=2)
RECORD = {
    "config": json.loads(json.dumps(dataclasses.asdict(Config(model=MODEL)))),
    "vocabulary": ["", "\n", "é", "😀"],
    "corpus_sha256": "0" * 64,
}
HANG_SECONDS = 120.0
"""A process that takes longer counts as hanging."""


@functools.cache
def _shapes(model: ModelConfig, dtype: Any) -> TrainState:
    _, params = jax.eval_shape(lambda: create(model, 0))
    return jax.eval_shape(lambda p: create_state(p, adamw(OptimizerConfig(), 1e-2), 7, dtype), params)


def state_at(step: int, dtype: Any = jnp.float32, model: ModelConfig = MODEL) -> TrainState:
    """Return a state whose arrays differ for each step, without compiling anything."""
    rng, shapes = np.random.default_rng(step), _shapes(model, dtype)
    arrays = jax.tree.map(lambda x: (9 * rng.standard_normal(x.shape)).astype(x.dtype), shapes.replace(key=None))
    return jax.device_put(arrays.replace(step=np.int32(step), key=jax.random.key(7)), jax.devices()[0])


def bits(state: TrainState) -> list[bytes]:
    """Return dtype, shape and bytes of every array of a state."""
    leaves = jax.tree.leaves(dataclasses.replace(state, key=jax.random.key_data(state.key)))
    return [f"{x.dtype} {x.shape} ".encode() + np.asarray(x).tobytes() for x in leaves]


class Store(Checkpoints):
    """A checkpoint store that records its warnings in `heard`."""

    def __init__(self, folder: Path, keep_last: int = 3):
        """Open a folder."""
        self.heard: list[str] = []
        super().__init__(folder, keep_last=keep_last, warn=self.heard.append)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Return the state of a checkpoint, with the shapes, dtypes and sharding of `like`."""
        return self.load(step, lambda record: like)[2]

    def choose(self, which: str | int = "best") -> int:
        """Return the training step of the checkpoint that is loaded for 'latest', 'best' or a step."""
        return self.load(which, lambda record: state_at(1))[0]

    def record(self, step: int) -> dict[str, Any]:
        """Return the record of a checkpoint."""
        return self.load(step, lambda record: state_at(1))[1]


def filled(folder: Path, losses: Sequence[float] = (3.0, 1.0, 2.0)) -> Store:
    """Return a store with one checkpoint per loss, at steps 1, 2, 3."""
    store = Store(folder, keep_last=len(losses))
    for step, loss in enumerate(losses, start=1):
        store.save(state_at(step), RECORD, loss)
    return store


class Faults:
    """Counts Python's file operations in a folder, and calls a function at a chosen one.

    An audit hook sees opening, creating, renaming, listing and removing, whoever calls them. Writes and fsyncs are seen
    only if the code calls `os.write` and `os.fsync`. File operations in orbax's C++ code are not seen.
    """

    EVENTS = ("open", "os.mkdir", "os.rename", "os.listdir", "os.scandir", "os.remove", "os.rmdir", "shutil.rmtree")

    def __init__(self) -> None:
        """Install the audit hook, which cannot be removed."""
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
        """Call `act` at operation `at` in a folder; without `at`, only count."""
        self._folder, self._at, self._act, self.seen = str(folder), at, act or refuse(0), []
        os.write = lambda *args: (self._happen("os.write"), self._write(*args))[1]
        os.fsync = lambda *args: (self._happen("os.fsync"), self._fsync(*args))[1]
        try:
            yield
        finally:
            self._folder, os.write, os.fsync = "", self._write, self._fsync


@functools.cache
def faults() -> Faults:
    """Return the only instance."""
    return Faults()


def refuse(number: int) -> Callable[[], None]:
    """Return a function that raises the OSError of an errno."""

    def act() -> None:
        raise OSError(number, os.strerror(number))

    return act


def kill() -> None:
    """Kill this process with SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


def main(words: Sequence[str]) -> None:
    """Fork for every index: modules are imported once, but JAX starts only in the children."""
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
    """Wait for a process; return its exit code, its signal as a negative number, or 'hang'."""
    began = time.monotonic()
    while time.monotonic() < began + HANG_SECONDS:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hang"


if __name__ == "__main__":
    main(sys.argv[1:])
