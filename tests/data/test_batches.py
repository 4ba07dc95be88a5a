"""Properties of the batches: which characters are targets, how often, in which order; and padding."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt_jax.config import DataConfig
from chargpt_jax.data.batches import (
    batch_at,
    shuffled,
    sizes,
    split,
    steps_per_epoch,
    validation_batches,
    validation_crops,
    windows_per_pass,
)
from chargpt_jax.errors import UserError
from chargpt_jax.hash_rng import derive, seeds_of

KEY = jax.random.key(3)


@cache
def run(n: int, block_size: int, batch_size: int, steps: int, padding: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs and targets of the first steps, [steps * B, T] each, of a text whose token i is i + 1."""
    data = DataConfig(batch_size=batch_size, padding_chance=padding)
    batch = partial(batch_at, jnp.arange(1, n + 1), KEY, block_size=block_size, data=data)
    inputs, targets = jax.jit(jax.vmap(batch))(jnp.arange(steps))
    assert inputs.dtype == targets.dtype == jnp.int32
    assert inputs.shape == targets.shape == (steps, batch_size, block_size)
    return np.asarray(inputs).reshape(-1, block_size), np.asarray(targets).reshape(-1, block_size)


# Split and validation


@settings(max_examples=60, deadline=None)
@given(st.integers(20, 400), st.floats(0.05, 0.95), st.integers(1, 10))
def test_the_split_is_contiguous_and_complete(n, share, block_size):
    tokens = np.arange(n)
    cut = int(share * n)
    if min(cut, n - cut) < block_size + 1:
        with pytest.raises(UserError):
            split(tokens, DataConfig(train_split=share), block_size)
        return
    train, validation_set = split(tokens, DataConfig(train_split=share), block_size)
    assert len(train) == cut
    assert np.concatenate([train, validation_set]).tolist() == tokens.tolist()


@pytest.mark.parametrize(("share", "name", "length"), [(0.05, "training", 5), (0.95, "validation", 5)])
def test_split_shorter_than_a_window_is_rejected(share, name, length):
    with pytest.raises(UserError) as error:
        split(np.arange(100), DataConfig(train_split=share), 5)
    for words in (f"The {name} part has {length} characters", "block_size 5", "at least 6", str(share)):
        assert words in str(error.value)
    split(np.arange(100), DataConfig(train_split=share), 4)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 90), st.integers(1, 12), st.integers(1, 5))
def test_each_validation_token_is_a_target_once(n_train, n_validation, block_size, batch_size):
    tokens = np.arange(1, n_train + n_validation + 1, dtype=np.int32)
    inputs, targets = np.stack(list(validation_batches(tokens, n_train, block_size, batch_size)), axis=1)
    assert inputs.shape == targets.shape == (len(targets), batch_size, block_size)
    assert inputs.dtype == targets.dtype == np.int32
    assert targets[targets != 0].tolist() == tokens[n_train:].tolist()
    assert (inputs[targets != 0] == targets[targets != 0] - 1).all()
    assert (inputs[targets == 0] == 0).all()
    assert (targets != 0).any(axis=(1, 2)).all()


@settings(deadline=None)
@given(st.integers(60, 500), st.floats(0.3, 0.6), st.floats(0.0, 0.3))
def test_split_leaves_the_end_for_a_test(n, share, test):
    data = DataConfig(train_split=share, test_split=test)
    train, validation_set = split(np.arange(n), data, 2)
    assert (len(train), len(validation_set)) == sizes(n, data)
    assert np.concatenate([train, validation_set]).tolist() == list(range(n - int(test * n)))


# Training


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("padding", [0.0, 0.7])
def test_batches_are_equal_for_every_width_of_tokens(dtype, padding):
    tokens, data = np.arange(1, 200, dtype=np.int32), DataConfig(batch_size=4, padding_chance=padding)
    for of in (partial(batch_at, step=3), validation_crops):
        wide, narrow = (of(jnp.asarray(x), key=KEY, block_size=7, data=data) for x in (tokens, tokens.astype(dtype)))
        for one, other in zip(wide, narrow, strict=True):
            assert one.dtype == other.dtype == jnp.int32
            assert np.array_equal(one, other)


@pytest.mark.parametrize(("n", "block_size", "batch_size"), [(100, 8, 1), (97, 8, 3), (17, 16, 1), (33, 16, 2)])
def test_pass_covers_each_character_once_but_for_the_ends(n, block_size, batch_size):
    count = windows_per_pass(n, block_size)
    inputs, targets = run(n, block_size, batch_size, math.ceil(3 * count / batch_size))
    assert (targets == inputs + 1).all()
    assert (np.diff(inputs, axis=1) == 1).all()
    assert inputs.min() >= 1
    assert targets.max() <= n
    for number in range(3):
        seen = np.sort(targets[number * count : (number + 1) * count].ravel())
        assert (np.diff(seen) == 1).all()
        assert n - 1 - len(seen) < 2 * block_size


def test_passes_have_different_orders_and_offsets():
    count = windows_per_pass(160, 8)
    starts = run(160, 8, 1, 6 * count)[0][:, 0].reshape(6, count)
    phases = starts.min(axis=1, keepdims=True)
    orders = {tuple(order) for order in (starts - phases) // 8}
    assert len(orders) == 6
    assert len(set(phases.ravel().tolist())) > 2
    assert tuple(range(count)) not in orders


def test_every_character_but_the_first_becomes_a_target():
    targets = run(33, 16, 2, 100)[1]
    assert set(targets.ravel().tolist()) == set(range(2, 34))


def test_batch_is_a_function_of_key_and_step():
    tokens, data = jnp.arange(1, 60), DataConfig(batch_size=3, padding_chance=0.5)
    plain = partial(batch_at, tokens, block_size=6, data=data)
    compiled = jax.jit(plain)
    for step in (0, 1, 17):
        for one, two in zip(plain(key=KEY, step=jnp.int32(step)), compiled(key=KEY, step=step), strict=True):
            assert one.tolist() == two.tolist()
    first, again, other = compiled(key=KEY, step=5), compiled(key=KEY, step=5), compiled(key=KEY, step=6)
    assert first[0].tolist() == again[0].tolist() != other[0].tolist()
    assert first[0].tolist() != compiled(key=jax.random.key(4), step=5)[0].tolist()


@pytest.mark.parametrize(("n", "mean"), [(65, 0.5), (72, 0.28)])
def test_ends_are_targets_less_often(n, mean):
    """The training set is 8 blocks and a character long, or 7 more: the shortest and the longest ends."""
    block_size, passes = 8, 1000
    count = windows_per_pass(n, block_size)
    slack = n - 1 - count * block_size
    targets = run(n, block_size, count, passes)[1]
    often = np.bincount(targets.ravel(), minlength=n + 1)[2:] / passes
    assert (often[slack:-slack] == 1).all()
    rising = np.arange(1, slack + 1) / (slack + 1)
    for end in (often[:slack], often[: -slack - 1 : -1]):
        np.testing.assert_allclose(end, rising, atol=0.08)
        assert end[:block_size].mean() == pytest.approx(mean, abs=0.04)


# Order


def test_shuffled_is_a_bijection():
    sizes = [*range(1, 19), 31, 32, 33, 63, 64, 65, 70, 1000]
    images = jax.jit(lambda: [jax.vmap(partial(shuffled, size=n, seeds=seeds_of(KEY)))(jnp.arange(n)) for n in sizes])()
    for size, image in zip(sizes, images, strict=True):
        assert image.dtype == jnp.int32
        assert sorted(image.tolist()) == list(range(size))


def test_order_of_windows_is_uniform():
    """Chi-square over tenths of 100 windows, to 5 sigma. (Orders of about ten windows are less uniform.)"""
    n_keys, size = 2000, 100
    seeds = derive(seeds_of(KEY), jnp.arange(n_keys))
    order = jax.jit(jax.vmap(lambda own: jax.vmap(partial(shuffled, size=size, seeds=own))(jnp.arange(size))))(seeds)
    assert (np.sort(order, axis=1) == np.arange(size)).all()
    places = np.broadcast_to(np.arange(size) // 10, order.shape)
    counts = np.bincount((10 * places + np.asarray(order) // 10).ravel(), minlength=100)
    expected = n_keys * size / 100
    assert ((counts - expected) ** 2 / expected).sum() < 81 + 5 * math.sqrt(2 * 81)


def test_orders_of_four_windows_are_nearly_uniform():
    n_keys = 48_000
    seeds = derive(seeds_of(KEY), jnp.arange(n_keys))
    order = jax.jit(jax.vmap(lambda own: jax.vmap(partial(shuffled, size=4, seeds=own))(jnp.arange(4))))(seeds)
    _, counts = np.unique(np.asarray(order), axis=0, return_counts=True)
    assert len(counts) == 24
    assert counts.min() * 24 / n_keys > 0.7
    assert counts.max() * 24 / n_keys < 1.25


# Epochs


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 10**6), st.integers(1, 512), st.integers(1, 64), st.floats(0.01, 4))
def test_epoch_covers_the_windows_oversample_times(n, block_size, batch_size, oversample):
    data = DataConfig(batch_size=batch_size, oversample=oversample)
    steps, wanted = steps_per_epoch(n, block_size, data), windows_per_pass(n, block_size) * oversample
    assert steps >= 1
    assert steps * batch_size >= wanted * (1 - 1e-12)
    assert (steps - 1) * batch_size < max(wanted, 1)


@pytest.mark.parametrize(("n", "ratio"), [(100_000, 1.065), (240_000, 1.024)])
def test_epoch_is_rounded_up_to_full_batches(n, ratio):
    steps = steps_per_epoch(n, 512, DataConfig(batch_size=16))
    assert steps * 16 * 512 / n == pytest.approx(ratio, abs=5e-4)
    assert (steps - 1) * 16 < windows_per_pass(n, 512) <= steps * 16


def test_oversample_scales_an_epoch():
    lengths = [steps_per_epoch(100_001, 100, DataConfig(batch_size=9, oversample=x)) for x in (0.5, 1.0, 2.0)]
    assert lengths == [56, 111, 222]


def test_a_short_epoch_is_the_batch_size_times_shorter():
    """386,813 characters in windows of 512, batch size 16: 95 crops per epoch instead of 1,509 windows."""
    data = DataConfig(batch_size=16, oversample=2.0)
    assert steps_per_epoch(386_813, 512, data) == 95
    assert [steps_per_epoch(n, 512, data, short_epochs=True) for n in (386_813, 514, 513)] == [6, 1, 1]


# Validation like the original's


@pytest.mark.parametrize(
    ("more", "block", "batch", "chance"),
    [(0, 5, 2, 0.0), (1, 3, 1, 0.5), (90, 4, 3, 0.5), (900, 12, 4, 0.0), (900, 30, 5, 0.5)],
)
def test_validation_crops_are_pieces_of_the_validation_set(more, block, batch, chance):
    n = block + 1 + more
    data = DataConfig(batch_size=batch, padding_chance=chance)
    draw = jax.jit(partial(validation_crops, block_size=block, data=data))
    inputs, targets = (np.asarray(a) for a in draw(jnp.arange(1, n + 1), KEY))
    assert inputs.shape == targets.shape == (len(inputs), batch, block)
    inputs, targets = inputs.reshape(-1, block), targets.reshape(-1, block)
    count = (targets[:, -1] != 0).sum()
    assert (targets[:count, -1] != 0).all()
    assert (inputs[count:] == 0).all()
    assert count == max(1, math.ceil(more / batch / block))
    hidden = (inputs[:count] == 0).sum(axis=1)
    assert hidden.max() <= (max(1, block // 3 - 1) if chance else 0)
    place, starts = np.arange(block), targets[:count, -1:] - block
    assert starts.min() >= 1
    assert (inputs[:count] == np.where(place < hidden[:, None], 0, starts + place)).all()
    assert (targets[:count] == np.where(place < hidden[:, None] - 1, 0, starts + place + 1)).all()


def test_validation_crops_are_uniform_and_depend_on_the_step():
    data, tokens = DataConfig(batch_size=2), jnp.arange(1, 1001)
    draw = jax.jit(lambda step: validation_crops(tokens, jax.random.fold_in(KEY, step), 8, data)[0][..., 0])
    starts = np.stack([np.asarray(draw(step)).ravel() for step in range(30)])
    assert np.array_equal(starts[3], np.asarray(draw(3)).ravel())
    assert len({tuple(row) for row in starts.tolist()}) == 30
    drawn = starts[:, : math.ceil(991 / 2 / 8)]
    assert drawn.min() < 20
    assert drawn.max() > 970
    assert abs(drawn.mean() - 496) < 5 * 287 / math.sqrt(drawn.size)


# Padding


@pytest.mark.parametrize("block_size", [12, 30])
def test_padding_is_a_prefix_of_less_than_a_third(block_size):
    n, rows = 200, 1200
    text, following = run(n, block_size, 4, rows // 4)
    inputs, targets = run(n, block_size, 4, rows // 4, padding=0.5)
    lengths = (inputs == 0).sum(axis=1)
    place = np.arange(block_size)
    assert (inputs == np.where(place < lengths[:, None], 0, text)).all()
    assert (targets == np.where(place < lengths[:, None] - 1, 0, following)).all()
    assert set(lengths.tolist()) == set(range(block_size // 3))


def test_a_block_too_short_for_a_third_is_padded_by_one():
    inputs, targets = run(60, 5, 4, 50, padding=1.0)
    assert ((inputs == 0).sum(axis=1) == 1).all()
    assert (inputs[:, 0] == 0).all()
    assert (targets != 0).all()


@pytest.mark.parametrize("chance", [0.1, 0.5])
def test_padding_has_the_configured_probability(chance):
    inputs, _ = run(200, 12, 64, 64, padding=chance)
    padded, rows = int((inputs[:, 0] == 0).sum()), len(inputs)
    assert abs(padded - rows * chance) < 5 * math.sqrt(rows * chance * (1 - chance))


def test_padding_chance_0_means_no_padding():
    inputs, targets = run(200, 12, 4, 300)
    assert (inputs != 0).all()
    assert (targets != 0).all()


def test_padding_does_not_change_the_corpus():
    corpus = np.arange(1, 61, dtype=np.int32)
    on_device = jnp.asarray(corpus)
    data = DataConfig(batch_size=windows_per_pass(60, 12), padding_chance=1.0)
    inputs, targets = jax.jit(partial(batch_at, block_size=12, data=data))(on_device, jax.random.key(0), 0)
    assert (inputs[:, 0] == 0).all()
    assert len(set(targets[:, -1].tolist())) == data.batch_size
    assert corpus.tolist() == on_device.tolist() == list(range(1, 61))
