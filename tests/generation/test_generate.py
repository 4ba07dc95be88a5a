"""Generation with a KV cache equals the model without one: tokens and metrics, within and beyond the context."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chargpt_jax.config import ModelConfig
from chargpt_jax.errors import UserError
from chargpt_jax.generation import generate as generation
from chargpt_jax.generation.generate import beyond_context, bucket, decode, decoding_program, inside_context, prefill
from chargpt_jax.generation.metrics import surprisal_and_entropy
from chargpt_jax.generation.sampler import Sampler
from chargpt_jax.generation.score import score_pieces, score_tokens
from chargpt_jax.ops.cpu_kv_cache import BlockedKVCache, CpuKVCache
from chargpt_jax.ops.kv_cache import StackedKVCache
from tests import reference
from tests.pairing import built, from_reference

CONFIG = ModelConfig(
    vocab_size=64, used_ids=30, block_size=24, n_embd=16, n_head=2, n_head_dim=8, n_ff=32, n_layer=2, attention_block=9
)
GRAPHDEF, _ = built(CONFIG, 0)
SIZES = {"vocab_size": 64, "n_embd": 16, "n_head": 2, "n_head_dim": 8, "n_ff": 32, "n_layer": 2}
THEIRS = reference.random_parameters(np.random.default_rng(0), **SIZES)
PARAMS = from_reference(THEIRS, 2, np.float32)
WHOLE = jax.jit(lambda params, tokens: nnx.merge(GRAPHDEF, params)(tokens))
KEY = jax.random.key(3)


def prompts(*lengths: int, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 30, n).astype(np.int32) for n in lengths]


def generate(rows, count, *, pieces=None, key=KEY, final=False, **sampler):
    longest = max(map(len, rows))
    tokens = np.zeros((len(rows), bucket(longest + count)), np.int32)
    for buffer, row in zip(tokens, rows, strict=True):
        buffer[: len(row)] = row
    lengths = np.array([len(row) for row in rows], np.int32)
    width = min(CONFIG.block_size, bucket(longest))
    p = prefill(PARAMS, tokens, lengths, graphdef=GRAPHDEF, width=width, final=final)
    for piece in pieces or [count]:
        p = decode(PARAMS, p, piece, Sampler(**sampler).with_key(key), graphdef=GRAPHDEF, final=final)
    return p


def uncached(row, count, number, temperature=1.0):
    """Generate without a cache: the model runs on the last block_size tokens, and sampling uses the documented key."""
    row, surprisal, entropy = list(row), [], []
    for _ in range(count):
        window = row[-CONFIG.block_size :]
        padded = np.zeros((1, CONFIG.block_size), np.int32)
        padded[0, : len(window)] = window
        logits = WHOLE(PARAMS, padded)[0, len(window) - 1]
        key = jax.random.fold_in(jax.random.fold_in(KEY, number), len(row))
        token = jax.random.categorical(key, logits / temperature) if temperature else jnp.argmax(logits)
        i, h = surprisal_and_entropy(logits, token)
        row.append(int(token))
        surprisal.append(float(i))
        entropy.append(float(h))
    return row, surprisal, entropy


ONE_BY_ONE = pytest.param(True, id="text after text", marks=pytest.mark.slow)
"""Its programs take the longest to compile."""


@pytest.fixture(scope="module", params=[pytest.param(False, id="in turn"), ONE_BY_ONE])
def order(request):
    """Use batched decoding, or generate one sequence at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chargpt_jax.ops.cpu_decode.generates_one_by_one", lambda *_: request.param)
        jax.clear_caches()
        yield
    jax.clear_caches()


@pytest.mark.parametrize("temperature", [1.0, pytest.param(0.5, marks=pytest.mark.slow), 0.0])
def test_batched_generation_equals_the_uncached_model(temperature, order):
    rows = prompts(3, 11, 23, 30)  # the last one is longer than the context
    p = generate(rows, 20, temperature=temperature)
    for i, row in enumerate(rows):
        tokens, surprisal, entropy = uncached(row, 20, i, temperature)
        assert np.asarray(p.tokens[i, : len(tokens)]).tolist() == tokens
        np.testing.assert_allclose(p.surprisal[i, len(row) : len(tokens)], surprisal, atol=1e-4)
        np.testing.assert_allclose(p.entropy[i, len(row) : len(tokens)], entropy, atol=1e-4)


def test_greedy_generation_equals_the_reference():
    (row,) = prompts(10, seed=5)
    tokens, surprisal, entropy = reference.generate_greedy(THEIRS, row, 25, 24, 2, 8, used_ids=30)
    p = generate([row], 25, temperature=0.0)
    assert np.asarray(p.tokens[0, :35]).tolist() == np.asarray(tokens).tolist()
    np.testing.assert_allclose(p.surprisal[0, 10:35], surprisal, atol=1e-4)
    np.testing.assert_allclose(p.entropy[0, 10:35], entropy, atol=1e-4)


@pytest.mark.slow
def test_first_sequence_does_not_depend_on_the_others(order):
    first, second = prompts(5, 19)
    alone, together = generate([first], 12), generate([first, second], 12)
    assert np.asarray(alone.tokens[0, :17]).tolist() == np.asarray(together.tokens[0, :17]).tolist()


def test_generation_in_pieces_equals_generation_at_once(order):
    rows = prompts(4, 9)
    once, pieces = generate(rows, 30), generate(rows, 30, pieces=[1, 7, 10, 12])
    for ours, theirs in ((pieces.tokens, once.tokens), (pieces.surprisal, once.surprisal)):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [{}, {"top_k": 5, "top_p": 0.9}], ids=["all", "filtered"])
def test_final_generation_equals_one_that_can_continue(order, sampler):
    rows = prompts(4, 9, 30)
    more, once = generate(rows, 30, **sampler), generate(rows, 30, **sampler, final=True)
    for ours, theirs in ((once.tokens, more.tokens), (once.surprisal, more.surprisal), (once.entropy, more.entropy)):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "shape"),  # of a model: L, H, D, C, block_size, vocab_size
    [(1, (1, 1, 2, 2, 8, 8)), (2, (1, 2, 4, 8, 100, 64)), (1, (2, 1, 8, 8, 64, 16)), (2, (3, 2, 4, 1, 70, 2000))],
    ids=str,
)
def test_sequential_generation_equals_batched_generation(rows, shape, monkeypatch):
    """XLA aborts the process if a fused kernel has an argument that it does not use because of its shape."""
    L, H, D, C, block_size, V = shape
    sizes = {"n_layer": L, "n_head": H, "n_head_dim": D, "n_embd": C, "n_ff": 2 * C}
    config = ModelConfig(vocab_size=V, used_ids=V - 1, block_size=block_size, **sizes)
    graphdef, params = built(config, 0)
    tokens = np.random.default_rng(0).integers(1, V - 1, (rows, 128)).astype(np.int32)
    results = []
    for alone in (True, False):
        monkeypatch.setattr("chargpt_jax.ops.cpu_decode.generates_one_by_one", lambda *_: alone)  # noqa: B023
        jax.clear_caches()
        p = prefill(params, tokens, np.full(rows, 5, np.int32), graphdef=graphdef, width=5)
        results.append(decode(params, p, 110, Sampler().with_key(KEY), graphdef=graphdef))
    jax.clear_caches()
    np.testing.assert_array_equal(results[0].tokens, results[1].tokens)
    np.testing.assert_allclose(results[0].surprisal, results[1].surprisal, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_sequential_generation_does_not_copy_the_cache(monkeypatch):
    monkeypatch.setattr("chargpt_jax.ops.cpu_decode.generates_one_by_one", lambda *_: True)
    jax.clear_caches()
    tokens = np.zeros((50, 64), np.int32)
    p = prefill(PARAMS, tokens, np.full(50, 5, np.int32), graphdef=GRAPHDEF, width=5)
    args = PARAMS, (np.full(50, 3, np.int32), replace(p, cache=None)), p.cache, Sampler().with_key(KEY)
    with jax.default_device(jax.devices("cpu")[0]):  # which there is beside any accelerator
        program = decoding_program(inside_context, GRAPHDEF, None, type(p.cache).generate, False)
        lowered = program.fused.lower(*args)
        memory = lowered.compile().memory_analysis()
    jax.clear_caches()
    assert memory.temp_size_in_bytes < p.cache.keys.nbytes / 8
    assert memory.alias_size_in_bytes >= 2 * p.cache.keys.nbytes


@pytest.mark.slow
def test_text_does_not_depend_on_the_noise_buffer(monkeypatch):
    texts = []
    for most in (2**20, 3 * 2 * CONFIG.vocab_size):
        monkeypatch.setattr(generation, "MAX_GUMBEL", most)
        jax.clear_caches()
        texts.append(np.asarray(generate(prompts(3, 9), 40).tokens))
    np.testing.assert_array_equal(*texts)


def test_the_same_seed_repeats_and_another_differs():
    rows = prompts(6)
    first, again, other = (generate(rows, 15, key=jax.random.key(k)).tokens for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_prompt_metrics_equal_the_full_model():
    rows = prompts(7, 20)
    p = generate(rows, 1)
    for i, row in enumerate(rows):
        surprisal, entropy = reference.token_metrics(reference.logits(THEIRS, row, 2, 8, 30), row, 64)[:2]
        np.testing.assert_allclose(p.surprisal[i, : len(row)], surprisal, atol=1e-4)
        np.testing.assert_allclose(p.entropy[i, : len(row)], entropy, atol=1e-4)


@pytest.mark.slow
def test_one_compilation_serves_a_bucket_of_lengths():
    kinds = (StackedKVCache, CpuKVCache, BlockedKVCache)

    def compiled() -> list[int]:
        """Return the number of compilations inside the context and beyond it."""
        return [
            sum(
                getattr(program, "fused", program)._cache_size()
                for program in (decoding_program(loop, GRAPHDEF, None, kind.generate, False) for kind in kinds)
            )
            for loop in (inside_context, beyond_context)
        ]

    generate(prompts(6), 9)
    before = compiled()
    for length, count, temperature in ((3, 4, 0.3), (9, 15, 1.0), (12, 1, 0.0)):
        generate(prompts(length), count, temperature=temperature)
    assert compiled() == before
    for lengths in ((3, 4, 5, 6, 7), (9, 8, 7, 6, 5)):  # of five rows there was none before
        generate(prompts(*lengths), 9)
    assert compiled() == [before[0] + 1, before[1]]  # what ends inside the window needs no other program
    for count in (20, 30, 40):
        generate(prompts(3, 4, 5, 6, 7), count)
    assert sum(compiled()) == sum(before) + 2


def test_padding_and_unused_ids_are_never_sampled():
    tokens = np.asarray(generate(prompts(4, 8, 15), 40, temperature=3.0).tokens)
    written = np.concatenate([tokens[0, 4:44], tokens[1, 8:48], tokens[2, 15:55]])
    assert written.min() > 0
    assert written.max() < 30


def test_top_k_of_one_is_greedy():
    rows = prompts(6)
    ours = generate(rows, 12, top_k=1)
    np.testing.assert_array_equal(ours.tokens, generate(rows, 12, temperature=0.0).tokens)


def test_samples_follow_the_models_distribution():
    """4,096 samples of one prompt: counts within 5 sigma of the model's probabilities."""
    (row,) = prompts(5)
    n = 4096
    p = generate([row] * n, 1)
    padded = np.zeros((1, 24), np.int32)
    padded[0, :5] = row
    probability = np.asarray(jax.nn.softmax(WHOLE(PARAMS, padded)[0, 4]), np.float64)
    counts = np.bincount(np.asarray(p.tokens[:, 5]), minlength=64)
    sigma = np.sqrt(n * probability * (1 - probability))
    assert np.all(np.abs(counts - n * probability) <= 5 * sigma + 1e-9)


def test_scores_within_the_context_equal_the_full_model():
    (row,) = prompts(21)
    surprisal, entropy, _ = score_tokens(PARAMS, row, graphdef=GRAPHDEF, block_size=24)
    expected = reference.token_metrics(reference.logits(THEIRS, row, 2, 8, 30), row, 64)
    np.testing.assert_allclose(surprisal, expected[0], atol=1e-4)
    np.testing.assert_allclose(entropy, expected[1], atol=1e-4)


@pytest.mark.parametrize("length", [24, 25, 26, 49, 60])
def test_scores_beyond_the_context_at_stride_1_equal_generation(length):
    (row,) = prompts(length)
    exact = score_tokens(PARAMS, row, graphdef=GRAPHDEF, block_size=24, stride=1)
    for t in range(1, length):
        window = row[max(0, t - 24) : t]
        padded = np.zeros((1, 24), np.int32)
        padded[0, : len(window)] = window
        pair = surprisal_and_entropy(WHOLE(PARAMS, padded)[0, len(window) - 1], jnp.int32(row[t]))
        np.testing.assert_allclose([exact[0][t], exact[1][t]], pair, atol=1e-4)
    rough = score_tokens(PARAMS, row, graphdef=GRAPHDEF, block_size=24, stride=7)
    assert np.isnan(rough[0][0])
    assert np.isfinite(rough[0][1:]).all()
    np.testing.assert_allclose(rough[0][1:25], exact[0][1:25], atol=1e-4)


@pytest.mark.parametrize("stride", [1, 7, *(pytest.param(n, marks=pytest.mark.slow) for n in (12, 24))])
def test_a_text_in_pieces_has_the_scores_of_the_text_at_once(stride):
    (row,) = prompts(700)
    how = {"graphdef": GRAPHDEF, "block_size": 24, "stride": stride}
    for length in (1, 2, 24, 25, 26, 50, 24 + 8 * stride, 25 + 8 * stride, 26 + 8 * stride, 699):
        whole = np.stack(score_tokens(PARAMS, row[:length], **how)[:2])
        cuts = np.sort(np.random.default_rng(length).integers(0, length + 1, 5))
        parts = list(score_pieces(PARAMS, np.split(row[:length], cuts), **how))
        np.testing.assert_array_equal(np.concatenate([np.stack(part[:2]) for part in parts], axis=1), whole)
        assert whole.shape == (2, length)
        assert np.isnan(whole[:, 0]).all()
        assert np.isfinite(whole[:, 1:]).all()


def test_stride_out_of_range_is_rejected():
    with pytest.raises(UserError, match="between 1 and the block size 24"):
        score_tokens(PARAMS, prompts(30)[0], graphdef=GRAPHDEF, block_size=24, stride=25)
