"""20,000 draws of each sampler follow the distribution of its NumPy form, and its state follows the draws."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chargpt_jax.generation.sampler import Sampler
from chargpt_jax.generation.samplers.chain import SAMPLERS, chain_of, written
from chargpt_jax.generation.samplers.contract import State
from tests.generation.samplers import in_numpy
from tests.generation.samplers.test_laws import ALL, CHARACTERS, FORMS, TEXT, V

N = 20_000
LOGITS = np.array([-np.inf, 0.9, 0.2, -0.3, 1.4, -1.1, -np.inf, 0.6], np.float32)
P = in_numpy.softmax(LOGITS.astype(np.float64))


def expected(name):
    if name == "xtc=0.4:threshold=0.15":
        return 0.4 * in_numpy.xtc(P, 0.15) + 0.6 * P
    if name == "repetition=1.3":
        seen = in_numpy.counts(TEXT, 64, V) > 0
        return in_numpy.softmax(np.where(seen, np.where(LOGITS > 0, LOGITS / 1.3, LOGITS * 1.3), LOGITS))
    return FORMS[name](P)


@pytest.mark.parametrize("name", [*ALL, "xtc=0.4:threshold=0.15"])
def test_draws_follow_the_distribution(name):
    """Each count is within 5 standard deviations; the reported probability is that of the chain."""
    state = Sampler(chain=name).with_key(jax.random.key(5), CHARACTERS, V)
    indices, length = jnp.arange(N), jnp.full(N, len(TEXT))
    tokens = jnp.broadcast_to(jnp.array([*TEXT, 0, 0]), (N, len(TEXT) + 2))
    memory, _ = state.first(tokens, V)
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (N, V))
    states = state.states(indices, tokens, length, memory)
    _, drawn, p = jax.jit(type(state).sample)(state, states, logits, state.gumbel(indices, length[None], logits)[0])
    probability, counts = expected(name), np.bincount(drawn, minlength=V)
    sigma = np.sqrt(N * probability * (1 - probability))
    assert np.all(abs(counts - N * probability) <= 5 * sigma + 1e-3)
    if not name.startswith("xtc=0.4"):
        np.testing.assert_allclose(p, probability[np.asarray(drawn)], rtol=1e-4)


FEEDBACK = {
    "mirostat=1.5:eta=0.3": partial(in_numpy.Mirostat, 1.5, 0.3),
    "adaptive_p=0.4:decay=0.7": partial(in_numpy.AdaptiveP, 0.4, 0.7),
    "budget=2.0:low=0.3:high=1.6": partial(in_numpy.Budget, 2.0, 0.3, 1.6),
}


@pytest.mark.parametrize("name", FEEDBACK)
def test_states_follow_the_tokens_as_in_numpy(name):
    """60 tokens, chosen by another generator, each from other logits."""
    rng, form = np.random.default_rng(3), FEEDBACK[name]()
    chain = chain_of(name).bound(CHARACTERS, V)
    step = jax.jit(lambda state, logits: chain(state, logits))
    text, memory = [1], chain.first(V)
    for _ in range(60):
        logits = rng.normal(0, 1.5, V).astype(np.float32)
        tokens = np.pad(np.int32(text), (0, 64 - len(text)))
        state = State(jnp.asarray(tokens), jnp.int32(len(text)), jax.random.key(0), memory)
        state, out = step(state, logits)
        token = int(rng.choice(V, p=in_numpy.softmax(np.asarray(out, np.float64))))
        theirs = form(in_numpy.softmax(logits.astype(np.float64)), lambda _, token=token: token)
        np.testing.assert_allclose(in_numpy.softmax(np.asarray(out, np.float64)), theirs, rtol=0, atol=1e-5)
        text, memory = [*text, token], state.memory


def test_mirostat_reaches_its_surprisal():
    """From a fixed distribution whose entropy is above the target, the mean surprisal is the target within 2 %."""
    rng, form = np.random.default_rng(0), in_numpy.Mirostat(2.0, 0.05)
    p = in_numpy.softmax(rng.normal(0, 1.0, 64))
    seen = []

    def choose(out):
        token = int(rng.choice(64, p=out))
        seen.append(-np.log2(out[token]))
        return token

    for _ in range(20_000):
        form(p, choose)
    assert np.mean(seen[1000:]) == pytest.approx(2.0, rel=0.02)


def test_a_budget_settles_where_it_is_neither_spent_nor_refilled():
    """Its mean change is near 0, and its mean temperature between the lowest and the highest, near 1."""
    rng, form = np.random.default_rng(0), in_numpy.Budget(20.0, 0.4, 1.6)
    p, temperatures = in_numpy.softmax(rng.normal(0, 1.0, 32)), []
    for _ in range(20_000):
        temperatures.append(form.low + (form.high - form.low) * form.budget / form.capacity)
        form(p, lambda out: int(rng.choice(32, p=out)))
    assert np.mean(temperatures[1000:]) == pytest.approx(1.0, abs=0.05)


def test_word_start_distinguishes_letters_and_apostrophes():
    chain = chain_of("word_start=0.5:first_letter=1.5").bound(CHARACTERS, V)
    a, space, apostrophe = (CHARACTERS.index(character) for character in "a '")
    cases = {(space,): 1.5, (a,): 0.5, (space, a): 0.5, (a, apostrophe): 0.5, (space, apostrophe): 1.5, (a, space): 1.5}
    for text, temperature in cases.items():
        tokens = jnp.zeros(4, jnp.int32).at[: len(text)].set(jnp.array(text))
        state, _ = chain(State(tokens, jnp.int32(len(text)), jax.random.key(0)), jnp.asarray(LOGITS))
        assert float(state.shown["word_start"]) == pytest.approx(temperature)


def test_dry_equals_numpy_on_random_texts():
    rng, p = np.random.default_rng(1), np.full(V, 1 / V)
    chain = chain_of("dry=0.7:base=1.3:allowed_length=2:last_n=40:breakers=d").bound(CHARACTERS, V)
    step = jax.jit(lambda tokens, length: chain(State(tokens, length, jax.random.key(0)), jnp.zeros(V))[1])
    for length in (1, 2, 3, 10, 39, 40, 41, 59):
        for _ in range(4):
            text = rng.integers(1, 4, length)
            text[rng.random(length) < 0.05] = CHARACTERS.index("d")
            out = step(jnp.zeros(64, jnp.int32).at[:length].set(text), length)
            ours = in_numpy.softmax(np.asarray(out, np.float64))
            theirs = in_numpy.dry(p, text.tolist(), 0.7, 1.3, 2, 40, [CHARACTERS.index("d")])
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_the_samplers_of_the_page_have_their_defaults():
    """docs/samplers.md lists every sampler, written with its defaults."""
    page = (Path(__file__).parents[3] / "docs" / "samplers.md").read_text(encoding="utf-8")
    listed = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert listed == [written(chain_of(name)) for name in SAMPLERS]
