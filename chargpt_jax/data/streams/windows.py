"""The windows of training steps, cut on the host from a training set that is too large for the device.

`StepWindows` is a sequence: item i has the windows of step i, which are those of `batches.batch_at` on the device. So a
resumed run starts to read at its step, and reading ahead changes no bit. Grain reads ahead in several threads if it is
installed (`pip install "chargpt_jax[stream]"`); without it, the caller's thread reads.
"""

import contextlib
import itertools
import math
from collections.abc import Generator

import numpy as np

from chargpt_jax.config.sections import MAX_STEPS
from chargpt_jax.data.batches import windows_per_pass

READERS = 4
"""Threads of Grain: each waits for the disk by itself."""

STEPS_AHEAD = 32
"""Steps that Grain reads ahead."""

GOLDEN, FIRST, SECOND = (np.uint32(x) for x in (0x9E3779B9, 0x7FEB352D, 0x846CA68B))
"""The constants of hash_rng.py."""


class StepWindows:
    """The windows of every training step: item i is those of step i, integers [B, T + 1] of the text's width."""

    def __init__(
        self, tokens: np.ndarray, seeds: np.ndarray, block_size: int, batch_size: int, rows: slice = slice(None)
    ) -> None:
        """Describe the windows; none is read yet.

        Args:
            tokens: integers [n], the training set: usually a map of a file.
            seeds: uint32 [2], those of the run's data key (`hash_rng.seeds_of`).
            block_size: T.
            batch_size: B of the whole batch.
            rows: the sequences of each batch that are read; [B, T + 1] then has so many.
        """
        self.n_tokens, self.rows = len(tokens), rows
        self._seeds, self._block_size, self._batch_size = seeds, block_size, batch_size
        # A view: item i is the window that starts at character i.
        self._windows = np.lib.stride_tricks.sliding_window_view(tokens, block_size + 1)

    def __len__(self) -> int:
        return MAX_STEPS

    def __getitem__(self, step: int) -> np.ndarray:
        starts = starts_at(self.n_tokens, self._seeds, int(step), self._block_size, self._batch_size)
        return np.asarray(self._windows[starts[self.rows]])  # a copy; NumPy lets other threads run meanwhile


def starts_at(n_tokens: int, seeds: np.ndarray, step: int, block_size: int, batch_size: int) -> np.ndarray:
    """Return the first characters of a step's windows in the training set, int64 [B]: the law of `batches.batch_at`.

    The positions are not limited to an int32.
    """
    count = windows_per_pass(n_tokens, block_size)
    slack = n_tokens - 1 - count * block_size
    numbers = (step * batch_size + np.arange(batch_size)).astype(np.int32)  # wraps around, as on the device
    of_pass = _derive(np.broadcast_to(seeds, (batch_size, 2)), numbers // np.int32(count))
    phases = _random_bits(of_pass, 0) % np.uint32(slack + 1)
    positions = _shuffled(numbers % np.int32(count), count, _derive(of_pass, 1))
    return phases.astype(np.int64) + positions.astype(np.int64) * block_size


def read_ahead(windows: StepWindows, first: int) -> Generator[np.ndarray, None, None]:
    """Yield the windows of a step and of all later ones."""
    try:
        import grain
    except ImportError:
        yield from map(windows.__getitem__, itertools.count(first))
        return
    options = grain.ReadOptions(num_threads=READERS, prefetch_buffer_size=STEPS_AHEAD)
    with contextlib.closing(iter(grain.MapDataset.source(windows)[first:].to_iter_dataset(options))) as steps:
        yield from steps


def _shuffled(index: np.ndarray, size: int, seeds: np.ndarray) -> np.ndarray:
    """Return `batches.shuffled` of each index, int32 [B], with its own seeds, uint32 [B, 2]; uint32 [B]."""
    half = max(1, math.ceil(math.log2(max(size, 2)) / 2))
    mask, rounds = np.uint32(2**half - 1), [_derive(seeds, i) for i in range(4)]
    x, outside = index.astype(np.uint32), np.ones(len(index), bool)
    while outside.any():
        left, right = x >> np.uint32(half), x & mask
        for own in rounds:
            left, right = right, left ^ (_random_bits(own, right) & mask)
        x = np.where(outside, (left << np.uint32(half)) | right, x)
        outside = x >= size
    return x


def _derive(seeds: np.ndarray, number: np.ndarray | int) -> np.ndarray:
    """Return `hash_rng.derive` of seeds, uint32 [B, 2]."""
    first, second, salt = seeds[:, 0], seeds[:, 1], _uint32(number) * GOLDEN
    return np.stack([_rounds(first ^ salt, second), _rounds(second + salt, first)], axis=-1)


def _random_bits(seeds: np.ndarray, number: np.ndarray | int) -> np.ndarray:
    """Return `hash_rng.random_bits` of seeds, uint32 [B, 2]; uint32 [B]."""
    return _rounds(_uint32(number) * GOLDEN + seeds[:, 0], seeds[:, 1])


def _uint32(number: np.ndarray | int) -> np.ndarray:
    return np.atleast_1d(number).astype(np.uint32)  # NumPy warns of an overflow of a scalar, but not of an array


def _rounds(x: np.ndarray, second: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint32(16))) * FIRST + second
    x = (x ^ (x >> np.uint32(15))) * SECOND
    return np.asarray(x ^ (x >> np.uint32(16)))
