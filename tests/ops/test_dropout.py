"""Statistics of the dropout masks: bits of the counter hash must look independent, like those of JAX's generator.

Seeds are fixed; bounds are 5 sigma. Tests run with both sources of bits: a failure with one only is due to that source.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chargpt_jax.hash_rng import derive
from chargpt_jax.ops.dropout import Dropout, dropout, keep_mask, seeds_for
from chargpt_jax.training.step import dropout_key

SEEDS = seeds_for(jax.random.key(0), 64)
N = 8192
INDICES = jnp.arange(N, dtype=jnp.uint32)
RATES = [0.001, 0.1, 0.2, 0.5, 0.9]


@pytest.fixture(params=["hash", "jax"])
def mask_of(request):
    """Return the function (seeds, count, rate) -> mask of a source of random bits."""
    draw = jax.jit(keep_mask, static_argnums=2)
    return lambda seeds, place, rate: draw(seeds, place, Dropout(rate, request.param))


def coins(mask: jax.Array, rate: float) -> np.ndarray:
    """Return a mask as values of mean 0 and variance 1, if its rate is correct."""
    return (np.asarray(mask, dtype=np.float32) - (1 - rate)) / math.sqrt(rate * (1 - rate))


def assert_independent(one: np.ndarray, two: np.ndarray) -> None:
    assert abs(float(np.mean(one * two, dtype=np.float64))) < 5 / math.sqrt(one.size)


def assert_all_independent(rows: np.ndarray) -> None:
    """Check that the correlation of each pair of rows [K, N] is below 5 sigma."""
    products = rows.astype(np.float64) @ rows.T / rows.shape[1]
    pairs = products[np.triu_indices(len(rows), 1)]
    assert np.abs(pairs).max() < 5 / math.sqrt(rows.shape[1])


@pytest.mark.parametrize("rate", RATES)
def test_the_rate_is_the_nominal_one(mask_of, rate):
    values = coins(mask_of(SEEDS, INDICES, rate), rate)
    assert abs(values.mean(dtype=np.float64)) < 5 / math.sqrt(values.size)


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("lag", [1, 2, 3, 7, 8, 31, 32, 64, 128, 255, 256, 512, 1024, 4096])
def test_elements_are_independent_at_every_lag(mask_of, rate, lag):
    values = coins(mask_of(SEEDS, INDICES, rate), rate)
    assert_independent(values[:, lag:], values[:, :-lag])


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_neighbouring_triples_are_independent(mask_of, rate):
    values = coins(mask_of(SEEDS, INDICES, rate), rate)
    assert_independent(values[:, :-2] * values[:, 1:-1], values[:, 2:])


def test_heads_and_rows_of_attention_are_independent(mask_of):
    """A head has the seeds of a site of its layer's attention, as in causal_attention."""
    heads, length = 8, 64
    own = derive(SEEDS[:16, None], jnp.arange(heads)).reshape(-1, 2)
    values = coins(mask_of(own, jnp.arange(length**2, dtype=jnp.uint32), 0.2), 0.2)
    values = values.reshape(16, heads, length, length)
    assert_all_independent(values.swapaxes(0, 1).reshape(heads, -1))
    assert_all_independent(values.swapaxes(0, 2).reshape(length, -1))
    assert_all_independent(values.swapaxes(0, 3).reshape(length, -1))


def test_sequences_are_independent(mask_of):
    assert_all_independent(coins(mask_of(SEEDS, INDICES, 0.2), 0.2))


def test_steps_are_independent(mask_of):
    key = jax.random.key(1)
    seeds = jnp.concatenate([seeds_for(dropout_key(key, jnp.int32(step)), 2) for step in range(24)])
    assert len({tuple(pair) for pair in seeds.tolist()}) == 48
    assert_all_independent(coins(mask_of(seeds, INDICES, 0.2), 0.2))


def test_sites_and_layers_are_independent(mask_of):
    """As in the model: a layer is a site of the step, and its three dropouts are sites of the layer."""
    seeds = [derive(derive(SEEDS[:2], layer + 1), number) for layer in range(15) for number in range(3)]
    assert_all_independent(coins(mask_of(jnp.concatenate(seeds), INDICES, 0.2), 0.2))


def test_every_element_is_kept_equally_often(mask_of):
    """Chi-square over the elements: how many of 4096 sequences keep each."""
    n_seeds, count, rate = 4096, 512, 0.2
    mask = mask_of(seeds_for(jax.random.key(2), n_seeds), INDICES[:count], rate)
    kept = np.asarray(mask).sum(axis=0)
    chi_square = ((kept - n_seeds * (1 - rate)) ** 2).sum() / (n_seeds * rate * (1 - rate))
    assert abs(chi_square - count) < 5 * math.sqrt(2 * count)


def test_number_of_kept_elements_varies_as_expected(mask_of):
    """Chi-square over the sequences, with a lower bound: bits that are spread too evenly fail too."""
    n_seeds, count, rate = 2048, 1024, 0.2
    mask = mask_of(seeds_for(jax.random.key(3), n_seeds), INDICES[:count], rate)
    kept = np.asarray(mask).sum(axis=1)
    chi_square = ((kept - count * (1 - rate)) ** 2).sum() / (count * rate * (1 - rate))
    assert abs(chi_square - n_seeds) < 5 * math.sqrt(2 * n_seeds)


def test_sequences_that_share_half_of_their_seed_are_independent(mask_of):
    """If the first halves differ by a multiple of the hash's stride, only the second halves distinguish the masks."""
    for half in (0, 1):
        assert_all_independent(coins(mask_of(SEEDS.at[:, half].set(7), INDICES, 0.2), 0.2))


def test_flipping_a_seed_bit_gives_an_independent_mask(mask_of):
    seeds = jnp.stack([SEEDS[0]] + [SEEDS[0] ^ jnp.uint32([1 << bit, 0]) for bit in range(32)])
    values = coins(mask_of(seeds, INDICES, 0.5), 0.5)
    for flipped in values[1:]:
        assert_independent(values[0], flipped)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_scaling_keeps_the_mean(rate):
    values = np.asarray(dropout(jnp.ones((64, 8, 512)), SEEDS, Dropout(rate)))
    assert set(np.unique(values).tolist()) == {0.0, float(np.float32(1 / (1 - rate)))}
    sigma = math.sqrt(rate / (1 - rate) / values.size)
    assert abs(values.mean(dtype=np.float64) - 1) < 5 * sigma


def test_without_seeds_or_rate_nothing_is_dropped():
    x = jnp.arange(12.0).reshape(2, 6)
    assert dropout(x, None, Dropout(0.5)) is x
    assert dropout(x, SEEDS[:2], Dropout()) is x
    assert bool(keep_mask(SEEDS, INDICES, Dropout()).all())


def test_dropout_keeps_the_dtype_and_drops_where_the_mask_says():
    x = jnp.arange(1, 2 * 3 * 5 + 1, dtype=jnp.bfloat16).reshape(2, 3, 5)
    y = dropout(x, SEEDS[:2], Dropout(0.5))
    mask = keep_mask(SEEDS[:2], jnp.arange(15, dtype=jnp.uint32), Dropout(0.5)).reshape(2, 3, 5)
    assert y.dtype == x.dtype
    assert ((y != 0) == mask).all()


def test_mask_of_a_part_is_part_of_the_mask(mask_of):
    place = INDICES[:4096].reshape(64, 64)
    whole = mask_of(SEEDS, place, 0.3)
    assert (mask_of(SEEDS, place[16:32, :32], 0.3) == whole[:, 16:32, :32]).all()
    assert (mask_of(SEEDS[5:9], place, 0.3) == whole[5:9]).all()


def test_higher_rate_drops_a_superset(mask_of):
    low, high = (np.asarray(mask_of(SEEDS, INDICES, rate)) for rate in (0.1, 0.2))
    assert not (high & ~low).any()
    assert (low & ~high).any()


def test_jaxs_own_bits_are_threefry_in_counter_mode():
    """The bits of element i are the first word of fold_in(key of the sequence, i)."""
    mask = keep_mask(SEEDS[:2], INDICES[:50], Dropout(0.4, "jax"))
    for row in range(2):
        key = jax.random.wrap_key_data(SEEDS[row], impl="threefry2x32")
        for place in range(50):
            bits = int(jax.random.key_data(jax.random.fold_in(key, place))[0])
            assert bool(mask[row, place]) == (bits >= round(0.4 * 2**32))


def test_the_two_sources_are_independent():
    one, two = (coins(keep_mask(SEEDS, INDICES, Dropout(0.2, bits)), 0.2) for bits in ("hash", "jax"))
    assert_independent(one, two)
