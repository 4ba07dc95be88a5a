"""The counter hash: what it gives depends on seed and number alone, and looks random (see test_dropout.py, too)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chargpt_jax.hash_rng import derive, random_bits, seeds_of, unit
from chargpt_jax.model.init import uniform

SEEDS = derive(seeds_of(jax.random.key(1)), jnp.arange(64))


def test_a_number_gives_the_same_bits_alone_and_among_others():
    many = random_bits(SEEDS[:, None], jnp.arange(100))
    assert many.dtype == jnp.uint32
    assert int(random_bits(SEEDS[7], 42)) == int(many[7, 42])
    assert derive(SEEDS[7], 3).tolist() == derive(SEEDS, 3)[7].tolist() == derive(SEEDS[7], jnp.arange(5))[3].tolist()


def test_seeds_of_a_run_differ_with_its_seed():
    assert len({tuple(seeds_of(jax.random.key(seed)).tolist()) for seed in range(50)}) == 50


def test_derived_seeds_do_not_meet():
    seeds = derive(SEEDS[:, None], jnp.arange(1000)).reshape(-1, 2)
    assert len({tuple(pair) for pair in seeds.tolist()}) == 64_000


def test_every_bit_is_one_half_of_the_time():
    bits = np.asarray(random_bits(SEEDS[:, None], jnp.arange(2048))).ravel()
    ones = (bits[:, None] >> np.arange(32, dtype=np.uint32) & 1).sum(axis=0)
    assert np.abs(ones - bits.size / 2).max() < 5 * math.sqrt(bits.size) / 2


def test_units_fill_the_interval_evenly():
    """Chi-square over 100 equal intervals, to 5 sigma."""
    numbers = np.asarray(unit(random_bits(SEEDS[:, None], jnp.arange(2048)))).ravel()
    assert 0 <= numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    counts = np.bincount((numbers * 100).astype(int), minlength=100)
    expected = numbers.size / 100
    assert abs(((counts - expected) ** 2 / expected).sum() - 99) < 5 * math.sqrt(2 * 99)


@pytest.mark.parametrize("fan_in", [1, 32, 384])
def test_initial_weights_are_uniform_within_the_bound(fan_in):
    weights = np.asarray(uniform(jax.random.key(5), (64, 1024), fan_in)) * math.sqrt(fan_in)
    assert -1 <= weights.min() < -0.999
    assert 0.999 < weights.max() < 1
    assert abs(weights.mean()) < 5 * math.sqrt(1 / 3 / weights.size)
    assert abs((weights**2).mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / weights.size)
    rows = weights @ weights.T / weights.shape[1] * 3
    assert np.abs(rows[np.triu_indices(64, 1)]).max() < 5 / math.sqrt(weights.shape[1])
