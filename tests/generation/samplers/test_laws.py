"""What holds for every sampler, or every filter, at any logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt_jax.generation.samplers.chain import SAMPLERS, Chain, chain_of, written
from chargpt_jax.generation.samplers.chain import settings as settings_of
from tests.generation.samplers import in_numpy
from tests.generation.samplers.calls import state_of

V, CHARACTERS, TEXT = 8, ("", *"abc d'"), [1, 2, 3, 4, 1, 2]
KEEP_LIKELIEST = ("top_k=3", "top_p=0.7", "min_p=0.2", "eta=0.3", "top_n_sigma=0.7", "p_less")
FILTERS = (*KEEP_LIKELIEST, "typical=0.6", "xtc=1.0:threshold=0.15")
TEMPERATURES = ("temperature=0.6", "dynatemp=0.3:high=2.0:exponent=1.5", "edt=1.2:theta=0.7", "budget", "word_start")
PENALTIES = ("repetition=1.3", "presence=0.7", "frequency=0.4", "dry=0.9:allowed_length=1")
OTHERS = ("mirostat=1.2", "adaptive_p=0.3")
ALL = (*FILTERS, *TEMPERATURES, *PENALTIES, *OTHERS)
FORMS = {
    "temperature=0.6": lambda p: in_numpy.temperature(p, 0.6),
    "top_k=3": lambda p: in_numpy.top_k(p, 3),
    "top_p=0.7": lambda p: in_numpy.top_p(p, 0.7),
    "min_p=0.2": lambda p: in_numpy.min_p(p, 0.2),
    "eta=0.3": lambda p: in_numpy.eta(p, 0.3),
    "top_n_sigma=0.7": lambda p: in_numpy.top_n_sigma(p, 0.7),
    "p_less": in_numpy.p_less,
    "typical=0.6": lambda p: in_numpy.typical(p, 0.6),
    "xtc=1.0:threshold=0.15": lambda p: in_numpy.xtc(p, 0.15),
    "dynatemp=0.3:high=2.0:exponent=1.5": lambda p: in_numpy.dynatemp(p, 0.3, 2.0, 1.5),
    "edt=1.2:theta=0.7": lambda p: in_numpy.edt(p, 1.2, 0.7),
    "budget": lambda p: in_numpy.temperature(p, 1.3),
    "word_start": lambda p: in_numpy.temperature(p, 0.5),
    "presence=0.7": lambda p: in_numpy.presence(p, TEXT, 0.7),
    "frequency=0.4": lambda p: in_numpy.frequency(p, TEXT, 0.4),
    "dry=0.9:allowed_length=1": lambda p: in_numpy.dry(p, TEXT, 0.9, 1.2, 1),
    "mirostat=1.2": lambda p: in_numpy.Mirostat(1.2, 0.1)(p, np.argmax),
    "adaptive_p=0.3": lambda p: in_numpy.AdaptiveP(0.3, 0.9)(p, np.argmax),
}
"""The distribution of each sampler behind TEXT, in NumPy, from that before it."""

seeds, scales = st.integers(0, 2**31), st.sampled_from([0.3, 1.0, 4.0])
laws = settings(max_examples=20, deadline=None)


@st.composite
def logits(draw):
    """Return logits, of which some are excluded: 0, that of padding, always is."""
    rng = np.random.default_rng(draw(seeds))
    values = rng.normal(0, draw(scales), V).astype(np.float32)
    excluded = rng.permutation(np.arange(1, V))[: draw(st.integers(0, V - 2))]
    values[[0, *excluded]] = -np.inf
    return values


@functools.cache
def compiled(name):
    chain = chain_of(name).bound(CHARACTERS, V)
    return jax.jit(lambda x: chain(state_of(chain, TEXT, V), x)[1])


def call(name, values):
    return np.asarray(compiled(name)(values))


def test_every_sampler_is_tested():
    assert {chain_of(name).samplers[0].name for name in ALL} == set(SAMPLERS)
    assert set(FORMS) == set(ALL) - {"repetition=1.3"}


@pytest.mark.parametrize("name", ALL)
@laws
@given(values=logits())
def test_excluded_tokens_stay_excluded_and_one_is_left(name, values):
    out = call(name, values)
    assert not np.isnan(out).any()
    assert not np.isfinite(out[~np.isfinite(values)]).any()
    assert np.isfinite(out).any()


@pytest.mark.parametrize("name", FORMS)
@laws
@given(values=logits())
def test_distribution_equals_that_of_numpy(name, values):
    expected = FORMS[name](in_numpy.softmax(values.astype(np.float64)))
    np.testing.assert_allclose(in_numpy.softmax(call(name, values).astype(np.float64)), expected, rtol=0, atol=2e-6)


@laws
@given(values=logits())
def test_repetition_equals_numpy_for_logits_of_both_signs(values):
    """It depends on the logits' signs, so a distribution is not enough."""
    seen = in_numpy.counts(TEXT, 64, V) > 0
    expected = np.where(seen, np.where(values > 0, values / 1.3, values * 1.3), values)
    np.testing.assert_allclose(call("repetition=1.3", values), expected, rtol=1e-6)


@pytest.mark.parametrize("name", FILTERS)
@laws
@given(values=logits())
def test_filters_change_no_logit_that_they_keep(name, values):
    out = call(name, values)
    kept = np.isfinite(out)
    np.testing.assert_array_equal(out[kept], values[kept])
    if name in KEEP_LIKELIEST:
        assert values[kept].min() >= values[~kept].max(initial=-np.inf)


@pytest.mark.parametrize("name", [*FILTERS, *TEMPERATURES, *OTHERS])
@laws
@given(values=logits(), seed=seeds)
def test_tokens_are_treated_alike(name, values, seed):
    """A permutation of the logits permutes the result."""
    order = np.random.default_rng(seed).permutation(V)
    np.testing.assert_allclose(call(name, values[order]), call(name, values)[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["top_k=3", "min_p=0.2"])
@laws
@given(values=logits())
def test_filters_by_rank_or_ratio_are_idempotent(name, values):
    once = call(name, values)
    np.testing.assert_array_equal(call(name, once), once)


@pytest.mark.parametrize("name", TEMPERATURES)
@laws
@given(values=logits())
def test_temperatures_keep_the_order(name, values):
    assert np.argsort(call(name, values)).tolist() == np.argsort(values).tolist()


@laws
@given(values=logits(), first=st.sampled_from(ALL), second=st.sampled_from(ALL))
def test_a_chain_is_the_composition_of_its_samplers(values, first, second):
    # The probability of XTC is 1, so its result does not depend on its key, which is another one in a chain.
    chain = chain_of(f"{first},{second}").bound(CHARACTERS, V)
    _, both = chain(state_of(chain, TEXT, V), jnp.asarray(values))
    np.testing.assert_allclose(both, call(second, call(first, values)), rtol=1e-5, atol=1e-6)


@st.composite
def chains(draw):
    """Return a chain of samplers with any valid settings."""
    found = []
    for name in draw(st.lists(st.sampled_from(list(SAMPLERS)), min_size=1, max_size=4)):
        values = {}
        for item in settings_of(SAMPLERS[name]):
            low = item.metadata.get("least", item.metadata.get("above", -10))
            high = item.metadata.get("most", item.metadata.get("below", low + 10))
            if isinstance(item.default, str):
                values[item.name] = draw(st.text(max_size=5))
            elif isinstance(item.default, int):
                values[item.name] = draw(st.integers(low, high))
            else:
                values[item.name] = draw(
                    st.floats(low, high, exclude_min="above" in item.metadata, exclude_max="below" in item.metadata)
                )
        found.append(SAMPLERS[name](**values))
    return Chain(tuple(found))


@laws
@given(chain=chains())
def test_the_text_of_a_chain_gives_the_chain(chain):
    assert chain_of(written(chain)) == chain
    assert chain_of([written(dataclasses.replace(chain, samplers=(one,))) for one in chain.samplers]) == chain
