"""Windows that are cut on the host are those of the batches on the device, with Grain and without it."""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt_jax.config import DataConfig
from chargpt_jax.data import batches
from chargpt_jax.data.streams.windows import StepWindows, read_ahead, starts_at
from chargpt_jax.hash_rng import seeds_of


def seeds(seed: int) -> np.ndarray:
    return np.asarray(seeds_of(jax.random.key(seed)))


SHAPES = ((12, 10, 1), (300, 7, 9), (65, 1, 4), (4000, 10, 5), (4097, 16, 3))
"""Lengths of the text, T and B: among others, texts of one window and of a power of two of them."""


@functools.cache
def on_device(n: int, block_size: int, batch_size: int):
    data = DataConfig(batch_size=batch_size)
    return jax.jit(functools.partial(batches.batch_at, jnp.arange(1, n + 1), block_size=block_size, data=data))


@settings(deadline=None, max_examples=100)
@given(
    shape=st.sampled_from(SHAPES),
    step=st.one_of(st.integers(0, 50), st.integers(0, 2**31 - 1)),
    seed=st.integers(0, 2**31 - 1),
)
def test_host_windows_are_those_of_the_device(shape, step, seed):
    n, block_size, batch_size = shape
    inputs, targets = on_device(*shape)(jax.random.key(seed), jnp.int32(step))
    windows = StepWindows(np.arange(1, n + 1, dtype=np.uint16), seeds(seed), block_size, batch_size)[step]
    assert windows.dtype == np.uint16
    assert np.array_equal(windows[:, :-1], inputs)
    assert np.array_equal(windows[:, 1:], targets)


@pytest.mark.parametrize("padding", [0.0, 0.6])
def test_batches_of_windows_are_those_of_the_text(padding):
    tokens, data = np.arange(1, 300, dtype=np.uint16), DataConfig(batch_size=4, padding_chance=padding)
    source, key = StepWindows(tokens, seeds(3), 9, 4), jax.random.key(3)
    windows = batches.Windows(jnp.stack([jnp.asarray(source[i]) for i in range(20, 30)]), jnp.int32(20), len(tokens))
    for step in (20, 24, 29):
        for one, other in zip(
            batches.batch_at(jnp.asarray(tokens), key, jnp.int32(step), 9, data),
            batches.batch_at(windows, key, jnp.int32(step), 9, data),
            strict=True,
        ):
            assert one.dtype == other.dtype == jnp.int32
            assert np.array_equal(one, other)


def test_rows_are_a_part_of_the_batch():
    tokens = np.arange(1, 300, dtype=np.uint8)
    whole, part = (StepWindows(tokens, seeds(0), 9, 6, rows) for rows in (slice(None), slice(2, 5)))
    assert np.array_equal(whole[7][2:5], part[7])


def test_pass_over_a_text_of_more_than_an_int32_visits_each_window_once():
    n, block_size, batch_size = 2**32, 2**22, 31
    per_pass = batches.windows_per_pass(n, block_size)
    assert per_pass == 1022 == 2 * 511
    starts = np.concatenate([starts_at(n, seeds(1), step, block_size, 511) for step in range(2)])
    assert starts.min() >= 0
    assert starts.max() > 2**31
    assert starts.max() + block_size + 1 <= n
    assert np.array_equal(np.diff(np.sort(starts)), np.full(per_pass - 1, block_size))
    assert len(set(starts_at(n, seeds(1), 5, block_size, batch_size))) == batch_size


@pytest.fixture(params=["grain", "without"])
def reader(request, monkeypatch):
    if request.param == "without":
        monkeypatch.setitem(sys.modules, "grain", None)
    else:
        pytest.importorskip("grain")
    return read_ahead


@pytest.mark.parametrize("first", [0, 1234])
def test_reading_ahead_yields_the_steps_in_order(reader, first):
    source = StepWindows(np.arange(1, 3000, dtype=np.uint16), seeds(0), 16, 4)
    steps = reader(source, first)
    for step, windows in enumerate(itertools.islice(steps, 100), first):
        assert np.array_equal(windows, source[step])
    steps.close()
    assert next(steps, None) is None
