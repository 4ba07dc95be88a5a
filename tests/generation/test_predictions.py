"""Ranks, the likeliest tokens and the sampler's probabilities, against the same in NumPy."""

import jax
import numpy as np
import pytest

from chargpt_jax.generation.generate import bucket, decode, decoding_program, inside_context, prefill
from chargpt_jax.generation.metrics import Predictions, largest, predictions, token_predictions
from chargpt_jax.generation.sampler import Sampler
from chargpt_jax.generation.score import score_pieces, score_tokens
from tests.generation.test_generate import CONFIG, GRAPHDEF, KEY, PARAMS, prompts

RNG = np.random.default_rng(0)
LOGITS, TOKENS = RNG.normal(size=(200, 64)).astype(np.float32), RNG.integers(0, 64, 200).astype(np.int32)
SAMPLERS = [{}, {"temperature": 0.5}, {"temperature": 0.0}, {"top_k": 5}, {"temperature": 2.0, "top_p": 0.7}]


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def sampled_from(logits: np.ndarray, temperature: float = 1.0, top_k: int = 64, top_p: float = 1.0) -> np.ndarray:
    """Return the distribution that a sampler samples from."""
    order = np.argsort(-logits, axis=-1)
    if temperature == 0:
        return np.eye(logits.shape[-1])[order[:, 0]]
    p = np.take_along_axis(softmax(logits / temperature), order, axis=-1)
    p[:, top_k:] = 0
    p /= p.sum(axis=-1, keepdims=True)
    p[np.cumsum(p, axis=-1) - p >= top_p] = 0
    back = np.zeros_like(p)
    np.put_along_axis(back, order, p / p.sum(axis=-1, keepdims=True), axis=-1)
    return back


@pytest.mark.parametrize("k", [1, 5, 64])
def test_ranks_and_the_likeliest_tokens(k: int) -> None:
    found = predictions(LOGITS, TOKENS, k)
    order = np.argsort(-LOGITS, axis=-1)
    np.testing.assert_array_equal(found.likeliest, order[:, :k])
    np.testing.assert_array_equal(found.rank, 1 + np.argmax(order == TOKENS[:, None], axis=-1))
    p = np.take_along_axis(softmax(LOGITS), order, axis=-1)[:, :k]
    np.testing.assert_allclose(np.exp(found.log_p), p, rtol=1e-5)
    assert np.isnan(found.sampled).all()


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_the_samplers_probability_is_of_the_distribution_it_samples_from(sampler: dict) -> None:
    state = Sampler(**sampler).with_key(KEY)
    ones = np.ones(len(LOGITS), np.int32)
    states = state.states(ones, ones[:, None], ones)
    _, tokens, p = state.sample(states, LOGITS, jax.random.gumbel(KEY, LOGITS.shape))
    expected = sampled_from(LOGITS, **sampler)[np.arange(200), tokens]
    np.testing.assert_allclose(p, expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(predictions(LOGITS, tokens, 3, p).sampled, p)


def test_the_largest_are_those_of_top_k() -> None:
    values = RNG.integers(0, 9, (7, 5, 30)).astype(np.float32)  # with ties
    values[0] = -np.inf
    for k in (1, 4, 30):
        for ours, theirs in zip(largest(values[1:], k), jax.lax.top_k(values[1:], k), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_first_token_of_a_sequence_has_no_predictions() -> None:
    found = token_predictions(LOGITS.reshape(4, 50, 64), TOKENS.reshape(4, 50), 3)
    assert not np.asarray(found.rank)[:, 0].any()
    assert np.isnan(np.asarray(found.log_p)[:, 0]).all()
    rest = predictions(LOGITS.reshape(4, 50, 64)[:, :-1], TOKENS.reshape(4, 50)[:, 1:], 3)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(rest), strict=True):
        np.testing.assert_array_equal(np.asarray(ours)[:, 1:], theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "text_after_text"),
    [(SAMPLERS[0], False), (SAMPLERS[0], True), (SAMPLERS[2], False), (SAMPLERS[4], True)],
)
def test_generation_keeps_its_text_and_gives_the_predictions_of_scoring(
    monkeypatch: pytest.MonkeyPatch, sampler: dict, text_after_text: bool
) -> None:
    """Within the context and beyond it, in one call or in pieces."""
    monkeypatch.setattr("chargpt_jax.ops.cpu_decode.generates_one_by_one", lambda *_: text_after_text)
    jax.clear_caches()
    rows, counts = prompts(6, 3), (10, 30)
    buffers = np.zeros((2, bucket(6 + sum(counts))), np.int32)
    for buffer, row in zip(buffers, rows, strict=True):
        buffer[: len(row)] = row
    states = []
    for k in (0, 4):
        state = prefill(PARAMS, buffers, np.int32([6, 3]), graphdef=GRAPHDEF, width=CONFIG.block_size, alternatives=k)
        for count in counts:
            state = decode(PARAMS, state, count, Sampler(**sampler).with_key(KEY), graphdef=GRAPHDEF)
        states.append(state)
    plain, kept = states
    program = decoding_program(inside_context, GRAPHDEF, None, type(kept.cache).generate, False)
    assert not getattr(program, "refused", False)  # XLA can still compile it as one kernel
    np.testing.assert_array_equal(plain.tokens, kept.tokens)
    assert plain.predictions is None
    for i, row in enumerate(rows):
        end = len(row) + sum(counts)
        ids = np.asarray(kept.tokens[i, :end])
        scored = score_tokens(PARAMS, ids, graphdef=GRAPHDEF, block_size=24, stride=1, alternatives=4)
        ours: Predictions = jax.tree.map(lambda x, i=i, end=end: np.asarray(x)[i, :end], kept.predictions)
        theirs = scored.predictions
        assert theirs is not None
        np.testing.assert_array_equal(ours.rank, theirs.rank)
        np.testing.assert_array_equal(ours.likeliest[1:], theirs.likeliest[1:])
        np.testing.assert_allclose(ours.log_p, theirs.log_p, atol=1e-4)
        assert np.isnan(ours.sampled[: len(row)]).all()
        assert (ours.sampled[len(row) :] > 0).all()
        if not sampler:
            np.testing.assert_allclose(ours.sampled[len(row) :], np.exp(-scored.surprisal[len(row) :]), rtol=1e-3)
    jax.clear_caches()


def test_a_text_in_pieces_has_the_predictions_of_the_text_at_once() -> None:
    (row,) = prompts(100)
    how = {"graphdef": GRAPHDEF, "block_size": 24, "alternatives": 3}
    whole = score_tokens(PARAMS, row, **how).predictions
    parts = [part.predictions for part in score_pieces(PARAMS, np.split(row, [1, 40, 41]), **how)]
    for ours, theirs in zip(jax.tree.leaves(whole), zip(*map(jax.tree.leaves, parts), strict=True), strict=True):
        np.testing.assert_array_equal(ours, np.concatenate(theirs))
