"""Sampling from a distribution: filters, Gumbel noise, valid settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chargpt_jax.config.sections import SampleConfig
from chargpt_jax.errors import UserError
from chargpt_jax.generation.sampler import Sampler

LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))
ONE = jnp.ones(1, jnp.int32)


@pytest.mark.parametrize(
    ("top_k", "top_p", "n_kept"),
    [
        *[(1, None, 1), (2, None, 2), (4, None, 4), (9, None, 4), (None, 0.4, 1), (None, 0.5, 1), (None, 0.6, 2)],
        *[(None, 0.76, 3), (None, 1.0, 4), (None, 1e-6, 1), (2, 0.7, 2), (2, 0.6, 1), (3, 0.99, 3)],
    ],
)
def test_filters_keep_the_most_likely(top_k, top_p, n_kept):
    """Probabilities are normalised again after top_k: of 0.5 and 0.25, the first alone has 2/3."""
    state = Sampler(top_k=top_k, top_p=top_p).with_key(jax.random.key(0))
    _, out = jax.vmap(state.chain)(state.states(ONE, ONE[:, None], ONE), LOGITS)
    assert np.isfinite(out[0]).tolist() == [True] * n_kept + [False] * (4 - n_kept)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_samples_equal_those_of_jax_random_categorical(temperature):
    key, logits = jax.random.key(1), jax.random.normal(jax.random.key(2), (3, 40))
    drawing, numbers, places = (
        Sampler(temperature).with_key(key),
        jnp.array([0, 5, 2]),
        jnp.array([[7, 7, 9], [8, 8, 10]]),
    )
    for noise, at in zip(drawing.gumbel(numbers, places, logits), places, strict=True):
        _, tokens, _ = drawing.sample(drawing.states(numbers, numbers[:, None], at), logits, noise)
        for row, (number, place) in enumerate(zip(numbers, at, strict=True)):
            own = jax.random.fold_in(jax.random.fold_in(key, number), place)
            assert tokens[row] == jax.random.categorical(own, logits[row] / temperature)


@pytest.mark.parametrize("temperature", [0.0, 1e-9])
def test_temperature_0_ignores_the_noise(temperature):
    logits, noise = jnp.array([[0.0, 1e-3, -1.0]]), jnp.array([[9.0, 0.0, 99.0]])
    state = Sampler(temperature, top_k=3).with_key(jax.random.key(0))
    assert state.sample(state.states(ONE, ONE[:, None], ONE), logits, noise)[1].tolist() == [1]


@pytest.mark.parametrize(
    "bad", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_invalid_sampler_settings_are_rejected(bad):
    (name,) = bad
    with pytest.raises(UserError, match=f"^{name} is .*, but it must be"):
        Sampler(**bad)


def test_settings_of_a_config_are_its_chain_or_the_three():
    assert Sampler.of(SampleConfig(temperature=0.5, top_k=3)) == Sampler(0.5, top_k=3)
    assert Sampler.of(SampleConfig(sampler="min_p=0.1,budget")) == Sampler(chain="min_p=0.1,budget")


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ("budge", "^sample.sampler is 'budge', but the samplers are temperature, .*: choose from these"),
        ("min_p=0.1,mirostat=-1", "^In sample.sampler, tau of mirostat is -1.0, but it must be above 0"),
    ],
)
def test_invalid_chain_of_a_config_is_named_by_its_field(chain, message):
    with pytest.raises(UserError, match=message):
        Sampler.of(SampleConfig(sampler=chain))


def test_chain_that_shows_nothing_is_not_traced_before_a_text(monkeypatch):
    tokens, shown = jnp.zeros((2, 8), jnp.int32), Sampler(chain="budget").with_key(jax.random.key(0))
    assert list(shown.first(tokens, 5)[1]) == ["budget"]
    monkeypatch.setattr(jax, "eval_shape", pytest.fail)
    assert Sampler(0.8, top_k=3).with_key(jax.random.key(0)).first(tokens, 5) == ((), {})
