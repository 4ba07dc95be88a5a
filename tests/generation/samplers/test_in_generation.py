"""Chains inside the generation loop: the text is that of a loop in Python, however the batch is split."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chargpt_jax.errors import UserError
from chargpt_jax.generation.generate import bucket, decode, decoding_program, inside_context, prefill
from chargpt_jax.generation.sampler import Sampler
from chargpt_jax.generation.samplers.contract import State
from chargpt_jax.generation.samplers.custom import Custom
from tests.generation.test_generate import CONFIG, GRAPHDEF, KEY, ONE_BY_ONE, PARAMS, WHOLE, prompts

CHARACTERS = ("", *(chr(ord("a") + i) for i in range(26)), " ", ".", "'")
LONG = "dry=2.0:allowed_length=1,frequency=0.2,xtc=0.5:threshold=0.05,min_p=0.01,budget=2,mirostat=3"


def generated(rows, count, chain, *, pieces=None, stop=(), final=False, alternatives=0):
    tokens = np.zeros((len(rows), bucket(max(map(len, rows)) + count)), np.int32)
    for buffer, row in zip(tokens, rows, strict=True):
        buffer[: len(row)] = row
    lengths = np.array([len(row) for row in rows], np.int32)
    how = {"graphdef": GRAPHDEF, "final": final}
    state = prefill(PARAMS, tokens, lengths, width=min(24, bucket(int(max(lengths)))), alternatives=alternatives, **how)
    sampler = Sampler(**chain) if isinstance(chain, dict) else Sampler(chain=chain)
    sampling = sampler.with_key(KEY, CHARACTERS, CONFIG.vocab_size, stop)
    for piece in pieces or [count]:
        state = decode(PARAMS, state, piece, sampling, **how)
    return state


def texts(state, rows, count):
    return [np.asarray(state.tokens)[i, : len(row) + count].tolist() for i, row in enumerate(rows)]


def in_python(row, count, index, chain):
    """Generate without a cache, compiled loops or batches: the contract, called once per token."""
    chain = Sampler(chain=chain).samplers.bound(CHARACTERS, CONFIG.vocab_size)
    row, memory, shown = list(row), chain.first(CONFIG.vocab_size), []
    step = jax.jit(lambda chain, *state: chain(State(*state[:-1]), state[-1]))
    own = jax.random.fold_in(KEY, 2**32 - 1)
    for _ in range(count):
        window = row[-CONFIG.block_size :]
        logits = WHOLE(PARAMS, np.pad(np.int32(window), (0, CONFIG.block_size - len(window)))[None])[0, len(window) - 1]
        logits = logits.at[0].set(-jnp.inf).at[30:].set(-jnp.inf)  # ids without a character
        tokens = np.pad(np.int32(row), (0, 128 - len(row)))
        noise, key = (jax.random.fold_in(jax.random.fold_in(k, index), len(row)) for k in (KEY, own))
        state, adjusted = step(chain, tokens, jnp.int32(len(row)), key, memory, logits)
        memory, shown = state.memory, [*shown, {name: float(value) for name, value in state.shown.items()}]
        row.append(int(jax.random.categorical(noise, adjusted)))
    return row, shown


@pytest.fixture(scope="module", params=[pytest.param(False, id="in turn"), ONE_BY_ONE])
def order(request):
    """Use batched decoding, or generate one sequence at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chargpt_jax.ops.cpu_decode.generates_one_by_one", lambda *_: request.param)
        jax.clear_caches()
        yield
    jax.clear_caches()


def test_a_batch_equals_a_loop_in_python_within_and_beyond_the_context(order):
    rows = prompts(3, 11, 30)
    state = generated(rows, 30, LONG)
    in_pieces = generated(rows, 30, LONG, pieces=[1, 13, 16])
    np.testing.assert_array_equal(in_pieces.tokens, state.tokens)
    for name, series in state.series.items():
        np.testing.assert_array_equal(in_pieces.series[name], series)
    for i, row in enumerate(rows):
        text, shown = in_python(row, 30, i, LONG)
        assert texts(state, rows, 30)[i] == text
        assert set(state.series) == {"dry", "frequency", "xtc", "budget", "mirostat"}
        for name, series in state.series.items():
            assert np.isnan(np.asarray(series)[i, : len(row)]).all()
            ours = np.asarray(series)[i, len(row) : len(row) + 30]
            np.testing.assert_allclose(ours, [one[name] for one in shown], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_temperature_in_a_chain_is_the_temperature():
    rows = prompts(3, 30)
    for temperature in (0.6, 0.0):
        one, other = (generated(rows, 30, how) for how in ({"temperature": temperature}, f"temperature={temperature}"))
        assert jax.tree.structure(one) == jax.tree.structure(other)  # so they are one compiled program
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.surprisal, other.surprisal)
    one, other = (generated(rows, 30, how) for how in ({"top_k": 4, "top_p": 0.8}, "temperature=1,top_k=4,top_p=0.8"))
    np.testing.assert_array_equal(one.tokens, other.tokens)


@pytest.mark.slow
def test_greedy_chooses_the_most_likely_of_the_whole_chain():
    rows = prompts(6)
    plain, filtered = (generated(rows, 12, chain) for chain in ("temperature=0", "min_p=0.3,temperature=0,top_k=3"))
    np.testing.assert_array_equal(plain.tokens, filtered.tokens)
    state = generated(rows, 12, "presence=100.0,temperature=0", alternatives=3)
    (text,) = texts(state, rows, 12)
    assert len(set(text[6:])) == 12  # no token twice, as long as others are left
    np.testing.assert_array_equal(np.asarray(state.predictions.sampled)[0, 6:18], 1)


def test_mirostat_follows_the_sampled_probabilities():
    (row,) = prompts(6)
    state = generated([row], 18, "temperature=1.2,mirostat=2:eta=0.3", alternatives=2)
    mu, sampled = (np.asarray(x)[0, 6:24] for x in (state.series["mirostat"], state.predictions.sampled))
    assert mu[0] == 4
    np.testing.assert_allclose(np.diff(mu), -0.3 * (-np.log2(sampled[:-1]) - 2), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("chain", ["min_p=0.01,budget=3", pytest.param("temperature=1", marks=pytest.mark.slow)])
def test_a_text_ends_at_a_stop_string(chain, order):
    """The text before it is that without stop strings, and a sequence in a batch ends by itself."""
    rows = prompts(5, 30)
    free = generated(rows, 40, chain)
    full = texts(free, rows, 40)
    stop = [np.int32(full[0][9:12]), np.int32([29] * 11), np.int32(full[0][9:12])]
    state = generated(rows, 40, chain, stop=stop)
    alone = generated(rows[:1], 40, chain, stop=stop)
    assert texts(state, rows, 40)[1] == full[1]
    for found in (state, alone):
        assert np.asarray(found.tokens)[0, :12].tolist() == full[0][:12]
    assert int(alone.length[0]) == 12
    program = decoding_program(inside_context, GRAPHDEF, None, type(alone.cache).generate, False)
    assert not getattr(program, "refused", False)  # XLA can compile it as one kernel


def test_a_stop_string_may_begin_in_the_prompt_but_not_end_there():
    (row,) = prompts(5)
    text = texts(generated([row], 10, "temperature=1"), [row], 10)[0]
    assert int(generated([row], 10, "temperature=1", stop=[np.int32(text[3:6])]).length[0]) == 6
    assert int(generated([row], 10, "temperature=1", stop=[np.int32(text[2:5])]).length[0]) > 5
    assert int(generated([row], 10, "temperature=1", stop=[np.int32([1, *text[:6]])]).length[0]) == 15


def colder(state, logits):
    temperature = state.memory
    return replace(state, memory=0.9 * temperature, shown=temperature), logits / temperature


def test_a_function_with_a_memory_is_compiled_into_the_loop(order):
    rows, traced = prompts(4, 9), itertools.count()

    def counted(state, logits):
        next(traced)
        return colder(state, logits)

    state = generated(rows, 12, [Custom(counted, memory=2.0), "min_p=0.01"])
    for i, row in enumerate(rows):
        shown = np.asarray(state.series["counted"])[i, len(row) : len(row) + 12]
        np.testing.assert_allclose(shown, 2 * 0.9 ** np.arange(12), rtol=1e-5)
    assert next(traced) <= 4  # for its shapes, and in one program, however many tokens


@pytest.mark.slow
def test_a_function_cannot_bring_back_or_exclude_everything():
    rows = prompts(6)
    flat = generated(rows, 18, lambda state, logits: (state, jnp.zeros_like(logits)))
    assert set(texts(flat, rows, 18)[0]) <= set(range(1, 30))
    none = generated(rows, 18, lambda state, logits: (state, jnp.full_like(logits, -jnp.inf)))
    np.testing.assert_array_equal(none.tokens, generated(rows, 18, "temperature=1").tokens)


@pytest.mark.slow
@pytest.mark.parametrize("chain", ["adaptive_p=0.0", "top_n_sigma=0.5", "dynatemp=2:high=9"])
def test_unused_ids_are_excluded_and_not_counted(chain):
    """The model gives them a finite logit, which is no part of a standard deviation or of a number of candidates."""
    (row,) = prompts(6)
    text = texts(generated([row], 18, chain), [row], 18)[0]
    assert text == in_python(row, 18, 0, chain)[0]
    assert set(text) <= set(range(1, 30))


WRONG = {
    "must return the state and the logits": lambda state, logits: logits,
    r"logits float32\[63\], but it must return logits float32\[64\]": lambda state, logits: (state, logits[1:]),
    r"logits bool\[64\]": lambda state, logits: (state, logits > 0),
    r"a memory of float32\[2\], but it must return one of no array": lambda state, logits: (
        replace(state, memory=jnp.zeros(2)),
        logits,
    ),
    r"state.shown float32\[64\]": lambda state, logits: (replace(state, shown=logits), logits),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_function_with_a_wrong_result_is_answered_by_a_sentence(message):
    with pytest.raises(UserError, match=message):
        generated(prompts(6), 3, WRONG[message])


def test_a_function_without_a_mistake_needs_no_memory():
    (row,) = prompts(6)
    state = generated([row], 18, [lambda state, logits: (state, logits.at[state.last].set(-jnp.inf)), "temperature=1"])
    text = texts(state, [row], 18)[0]
    assert all(one != other for one, other in itertools.pairwise(text[5:]))


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ("min_q=0.1", r"^sampler is 'min_q=0.1', but the samplers are temperature, top_k"),
        ("min_p=2", r"^p of min_p is 2.0, but it must be at least 0 and at most 1: try 0.05\.$"),
        ("min_p=nan", "^p of min_p is nan"),
        ("top_k=2.5", "^k of top_k is '2.5', but it must be an integer"),
        ("p_less=1", "p_less has no settings: write p_less"),
        ("xtc=0.5:limit=1", "xtc has the settings probability, threshold: write xtc=0.5:threshold=0.1"),
        ("xtc=0.5:probability=1", "probability is given twice"),
        ("min_p=0.1,", "^sampler is ''"),
        ([], "^sampler is empty"),
        (3, "^sampler is 3, but it must be a text"),
        ([3], "^sampler is 3, but it must be a text"),
        (",".join(["top_k=1"] * 33), "^sampler has 33 samplers"),
        ({"chain": "min_p=0.1", "temperature": 0.5}, "^sampler and temperature are both given"),
    ],
)
def test_invalid_chains_are_rejected(chain, message):
    with pytest.raises(UserError, match=message):
        Sampler(**chain) if isinstance(chain, dict) else Sampler(chain=chain)
