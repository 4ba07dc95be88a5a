"""The windows of the steps of each dispatch, cut from the training set on the device, or read from the file.

Training runs the same program on both, so the trained parameters are bit-identical. Streaming reads the windows of the
next dispatch, and moves them to the devices, while the current one runs. Its memory is constant: MAX_BYTES on each
device for the current dispatch, and as much for the next one.
"""

import collections
import dataclasses
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from chargpt_jax.config import Config
from chargpt_jax.data import batches
from chargpt_jax.data.streams.windows import StepWindows, read_ahead
from chargpt_jax.devices import processes, sharding
from chargpt_jax.devices.memory import free_bytes
from chargpt_jax.devices.platform import compiler_options
from chargpt_jax.hash_rng import seeds_of
from chargpt_jax.training.dispatch.pacing import MAX_DISPATCH_STEPS
from chargpt_jax.training.run import Warn
from chargpt_jax.training.setup import Setup
from chargpt_jax.training.step import data_key

FRACTION = 0.25
"""A training set is streamed if it takes more than this fraction of the free memory of a device."""

MAX_BYTES = 2**23
"""Bytes of the windows of one dispatch, at most, if a step has fewer."""


class Feed:
    """Gives every dispatch the windows of its steps."""

    def __init__(self, n_tokens: int, dtype: np.dtype, config: Config, mesh: Mesh) -> None:
        """Describe the windows of a training set with `n_tokens` characters."""
        B, T = config.data.batch_size, config.model.block_size
        self.max_steps = max(1, min(MAX_DISPATCH_STEPS, MAX_BYTES // (B * (T + 1) * dtype.itemsize)))
        """Training steps in one dispatch, at most."""
        self.replicated = sharding.replicated(mesh)
        self.shape = sharding.with_sharding(self.replicated, windows_shape(n_tokens, dtype, config, self.max_steps))
        """What `text_for` returns, as shapes with shardings."""

    def text_for(self, step: int, count: int) -> batches.Windows:
        """Return the windows of `count` steps from `step` on."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop reading."""


def feed_of(setup: Setup, warn: Warn) -> Feed:
    """Return the feed of a run: as its config says, or streamed if the training set is too large for the devices."""
    asked = setup.config.train.stream
    if asked == "never" or (asked == "auto" and fits(setup, warn)):
        return OnDevice(setup.on_device, setup.config, setup.mesh)
    return Streamed(setup.tokens[: setup.n_train], setup.config, setup.mesh)


def fits(setup: Setup, warn: Warn) -> bool:
    """Return whether the devices of all processes have room for the training set; if not, `warn` is told."""
    size, free = setup.n_train * setup.tokens.itemsize, free_bytes(setup.mesh)
    if all(processes.gathered(size <= FRACTION * free and setup.n_train <= batches.MAX_ON_DEVICE)):
        return True
    if processes.is_first():
        warn(
            f"The training set has {size / 1e9:,.2f} GB, and a device has {free / 1e9:,.2f} GB of free memory: batches "
            "are read from the file during training (train.stream)."
        )
    return False


class OnDevice(Feed):
    """Cuts windows from the training set, which every device holds."""

    def __init__(self, tokens: jax.Array, config: Config, mesh: Mesh) -> None:
        """Use a training set, integers [n] on the devices; its program is compiled in a thread."""
        super().__init__(tokens.shape[0], tokens.dtype, config, mesh)
        T, B = config.model.block_size, config.data.batch_size
        cut = jax.jit(
            partial(batches.windows_of_steps, block_size=T, batch_size=B, most=self.max_steps),
            out_shardings=self.replicated,
            compiler_options=compiler_options(mesh),
        )
        self._args = tokens, sharding.put(data_key(jax.random.key(config.seed)), self.replicated)
        thread = ThreadPoolExecutor(1)
        self._cut = thread.submit(lambda: cut.lower(*self._args, np.int32(0), np.int32(1)).compile())
        thread.shutdown(wait=False)

    def text_for(self, step: int, count: int) -> batches.Windows:
        """Return the windows of `count` steps from `step` on."""
        windows: batches.Windows = self._cut.result()(*self._args, np.int32(step), np.int32(count))
        return jax.block_until_ready(windows)  # with several CPU devices, two dispatches in flight can deadlock


class Streamed(Feed):
    """Reads windows from a training set on the host, ahead of the steps."""

    def __init__(self, tokens: np.ndarray, config: Config, mesh: Mesh) -> None:
        """Use a training set, integers [n]; nothing is read yet."""
        super().__init__(len(tokens), tokens.dtype, config, mesh)
        # With several processes, each one reads its own sequences, which are gathered before the dispatch.
        self._sharding = sharding.batches_of_steps(mesh) if processes.several() else self.replicated
        self._gather = jax.jit(lambda ids: ids, out_shardings=self.replicated)
        self._dims = self.shape.ids.shape
        seeds = np.asarray(seeds_of(data_key(jax.random.key(config.seed))))
        rows = sharding.own_part(self._sharding, self._dims)[1]
        self._windows = StepWindows(tokens, seeds, config.model.block_size, config.data.batch_size, rows)
        self._reader: Generator[np.ndarray, None, None] | None = None
        self._read, self._first = collections.deque[np.ndarray](), 0
        self._thread = ThreadPoolExecutor(1, "feed")
        self._next: tuple[int, Future[batches.Windows]] | None = None

    def text_for(self, step: int, count: int) -> batches.Windows:
        """Return the windows of `count` steps or more from `step` on, and begin to read those that follow them."""
        if self._next and self._next[0] == step:
            windows = self._next[1].result()
        else:  # the first dispatch, or a jump to another step
            windows = self._thread.submit(self._prepared, step, count).result()
        self._next = step + count, self._thread.submit(self._prepared, step + count, self.max_steps)
        if self._sharding.is_fully_replicated:
            return windows
        return dataclasses.replace(windows, ids=jax.block_until_ready(self._gather(windows.ids)))

    def close(self) -> None:
        """Stop reading, and end the thread."""
        self._thread.submit(self._stop_reading)
        self._thread.shutdown()

    def _prepared(self, step: int, count: int) -> batches.Windows:
        """Read the windows of some steps, and put them on the devices; runs in the thread."""
        if self._reader is None or not self._first <= step <= self._first + len(self._read):
            self._stop_reading()
            self._reader, self._first = read_ahead(self._windows, step), step
        while self._first < step:
            self._read.popleft()
            self._first += 1
        while len(self._read) < count:
            self._read.append(next(self._reader))
        # A new array for each dispatch: a CPU device may use its memory.
        ids = np.zeros((self.max_steps, *self._read[0].shape), self._read[0].dtype)
        for i, windows in zip(range(count), self._read, strict=False):
            ids[i] = windows
        on_devices = jax.make_array_from_process_local_data(self._sharding, ids, self._dims)
        first = sharding.put(np.int32(step), self.replicated)
        return batches.Windows(jax.block_until_ready(on_devices), first, self._windows.n_tokens)

    def _stop_reading(self) -> None:
        self._read.clear()
        if self._reader is not None:
            self._reader.close()
        self._reader = None


def windows_shape(n_tokens: int, dtype: np.dtype, config: Config, steps: int) -> batches.Windows:
    """Return the windows of some steps, as shapes."""
    dims = steps, config.data.batch_size, config.model.block_size + 1
    ids, first = jax.ShapeDtypeStruct(dims, dtype), jax.ShapeDtypeStruct((), np.int32)
    return batches.Windows(ids, first, n_tokens)  # type: ignore[arg-type]
