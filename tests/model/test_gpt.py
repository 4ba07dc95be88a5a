"""Properties of the model, and its logits compared with the float64 reference."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chargpt_jax.config import ModelConfig
from chargpt_jax.devices.platform import BFLOAT16_ON_CPU, compiler_options
from chargpt_jax.devices.sharding import data_mesh
from chargpt_jax.generation.generate import predict_last
from chargpt_jax.generation.metrics import surprisal_and_entropy
from chargpt_jax.model.gpt import MASKED
from chargpt_jax.model.init import count_parameters, create, keys_of, plan
from chargpt_jax.ops.blockwise_attention import causal_attention
from chargpt_jax.ops.choose import ops_for
from chargpt_jax.ops.cpu_decode import layers_in_place
from chargpt_jax.ops.cpu_kv_cache import BlockedKVCache, CpuKVCache
from chargpt_jax.ops.dropout import Dropout, seeds_for
from chargpt_jax.ops.kv_cache import StackedKVCache
from chargpt_jax.ops.plain import Ops, rotary, rotate
from chargpt_jax.training.step import cross_entropy_sum
from tests import reference
from tests.pairing import built, from_reference, logits_of, x64

CONFIG = ModelConfig(
    vocab_size=64, used_ids=40, block_size=24, n_embd=20, n_head=3, n_head_dim=8, n_ff=36, n_layer=3, attention_block=10
)


@pytest.fixture(scope="module")
def made():
    return built(CONFIG, 0)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(1).integers(1, CONFIG.used_ids, (2, CONFIG.block_size)), jnp.int32)


@pytest.mark.parametrize("as_an_update_is_compiled", [False, True])
def test_planned_model_equals_created_model(made, tokens, as_an_update_is_compiled):
    options = compiler_options(data_mesh(1)) if as_an_update_is_compiled else None
    graphdef, shapes, draw = plan(CONFIG, 0, ops_for(query_block=CONFIG.attention_block), options)
    params = draw()
    planned, created = (jax.jit(nnx.merge(half, params).__call__)(tokens) for half in (graphdef, made[0]))
    np.testing.assert_array_equal(planned, created)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    jax.tree.map(np.testing.assert_array_equal, params, made[1])


def test_keys_equal_those_of_flax():
    key = jax.random.key(7)
    ours, theirs = keys_of(key, 3), nnx.Rngs(params=key)
    for own in ours:
        assert own == theirs.params()


def test_no_gradient_reaches_later_tokens(made, tokens):
    graphdef, params = made
    table = params["wte"]["embedding"]

    def at(embedded, position):
        model = nnx.merge(graphdef, params)
        rope = rotary(jnp.arange(embedded.shape[1]), CONFIG.n_head_dim)
        attend = lambda q, k, v: (causal_attention(q, k, v, None, Dropout(), 10, True), None)  # noqa: E731
        x, _ = model.ops.layers(lambda block, x, _: block(x, rope, attend), model.blocks, embedded)
        return jnp.sum(model.logits(x)[0, position, 1:30] ** 2)

    gradient = jax.jit(jax.grad(at))
    for position in (0, 7, 22):
        g = np.asarray(gradient(table[tokens], position))
        assert np.all(g[0, position + 1 :] == 0)
        assert np.all(np.abs(g[0, : position + 1]).sum(axis=-1) > 0)
        assert np.all(g[1] == 0)


def test_rotary_scores_depend_only_on_the_distance():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=8), jnp.float32) for _ in range(2))

    def score(t, s):
        return float(jnp.dot(rotate(q, *rotary(jnp.int32(t), 8)), rotate(k, *rotary(jnp.int32(s), 8))))

    for distance in (0, 1, 5, 100):
        expected = score(distance, 0)
        for s in (1, 17, 400):
            assert score(s + distance, s) == pytest.approx(expected, abs=2e-5)
    assert abs(score(3, 0) - score(0, 3)) > 1e-2  # and it is not blind to direction


def test_untrained_model_predicts_nearly_uniformly(made, tokens):
    _, params = made
    surprisal, entropy = surprisal_and_entropy(logits_of(CONFIG, params, tokens)[:, :-1], tokens[:, 1:])
    characters = math.log(CONFIG.used_ids - 1)
    assert float(surprisal.mean()) == pytest.approx(characters, abs=0.4)
    assert float(entropy.max()) <= characters + 1e-5


def test_parameters_are_initialised_as_pytorch_does():
    config = dataclasses.replace(CONFIG, n_embd=64, n_ff=200, n_head_dim=16)
    _, params = built(config, 3)
    heads = config.n_head * config.n_head_dim
    fans = {("attn", "qkv"): 64, ("attn", "proj"): heads, ("mlp", "up"): 64, ("mlp", "down"): 200}
    for (part, layer), fan_in in fans.items():
        for kind in ("kernel", "bias"):
            values = np.asarray(params["blocks"][part][layer][kind])
            bound = fan_in**-0.5
            assert np.abs(values).max() <= bound
            assert np.abs(values).max() > 0.95 * bound
            assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.15)
            assert not np.array_equal(values[0], values[1])  # every layer has its own random values
    assert np.abs(np.asarray(params["wte"]["embedding"])).max() <= 64**-0.5
    assert np.all(np.asarray(params["blocks"]["ln_1"]["scale"]) == 1)


def test_number_of_parameters_equals_the_formula(made):
    c, (_, params) = CONFIG, made
    width = c.n_head * c.n_head_dim
    layer = 4 * c.n_embd + 3 * width * (c.n_embd + 1) + c.n_embd * (width + 1)
    layer += c.n_ff * (c.n_embd + 1) + c.n_embd * (c.n_ff + 1)
    assert count_parameters(params) == c.vocab_size * c.n_embd + c.n_layer * layer + 2 * c.n_embd


def test_unused_ids_have_no_probability(made, tokens):
    _, params = made
    probability = np.asarray(jax.nn.softmax(logits_of(CONFIG, params, tokens)))
    assert np.all(probability[..., 0] == 0)
    assert np.all(probability[..., CONFIG.used_ids :] == 0)
    assert np.all(probability[..., 1 : CONFIG.used_ids] > 0)
    free = logits_of(dataclasses.replace(CONFIG, mask_unused_ids=False), params, tokens)
    assert np.all(np.asarray(free) > MASKED / 2)


@pytest.mark.slow
def test_remat_and_block_size_of_attention_change_nothing(tokens):
    config = dataclasses.replace(CONFIG, dropout=0.2)
    _, params = built(config, 0)
    seeds = seeds_for(jax.random.key(5), 2)
    expected = logits_of(config, params, tokens, seeds=seeds)
    for change in ({"remat": False}, {"attention_block": 24}, {"attention_block": 1}):
        other = logits_of(dataclasses.replace(config, **change), params, tokens, seeds=seeds)
        np.testing.assert_allclose(other, expected, atol=2e-6)


def test_dropout_needs_seeds_and_differs_between_sequences(tokens):
    config = dataclasses.replace(CONFIG, dropout=0.3)
    _, params = built(config, 0)
    np.testing.assert_array_equal(logits_of(config, params, tokens), logits_of(CONFIG, params, tokens))
    twice = jnp.stack([tokens[0], tokens[0]])
    dropped = logits_of(config, params, twice, seeds=seeds_for(jax.random.key(5), 2))
    assert np.abs(np.asarray(dropped[0] - dropped[1]))[..., 1:40].max() > 0.01


def test_prefill_and_decode_equal_the_full_model(made, tokens):
    graphdef, params = made
    whole = logits_of(CONFIG, params, tokens)
    prefill = jax.jit(lambda p, t: nnx.merge(graphdef, p).prefill(t))
    decode = jax.jit(lambda p, t, at, cache: nnx.merge(graphdef, p).decode(t, at, cache))
    _, kept = prefill(params, tokens.at[:, 9:].set(0))  # tokens to the right of a prompt must not matter
    cache = StackedKVCache.of(*kept).enlarged(CONFIG.block_size)
    for t in range(9, CONFIG.block_size):
        logits, cache = decode(params, tokens[:, t], jnp.array([t, t]), cache)
        np.testing.assert_allclose(logits, whole[:, t], atol=3e-6)


@pytest.mark.parametrize(
    ("dtype", "exact"),
    [
        (jnp.float32, 3e-6),
        pytest.param(jnp.float64, 1e-13, marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, 2e-2, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("kind", [StackedKVCache, CpuKVCache, BlockedKVCache])
def test_batch_size_1_decodes_like_a_batch(kind, dtype, exact, platform, tokens):
    """With batch size 1 matrices are read from their stack, otherwise sliced; both equal the full model."""
    if kind != StackedKVCache and platform != "cpu":
        pytest.skip("for a CPU")
    if dtype == jnp.bfloat16 and jax.__version_info__ < BFLOAT16_ON_CPU:
        pytest.skip("this JAX cannot multiply bfloat16 on a CPU")
    with x64(dtype == jnp.float64):
        graphdef, params = built(CONFIG, 0, dtype, platform)
        params = jax.tree.map(lambda x: x.astype(jnp.promote_types(dtype, jnp.float32)), params)
        whole = logits_of(CONFIG, params, tokens, dtype=dtype)
        _, kept = jax.jit(lambda p, t: nnx.merge(graphdef, p).prefill(t))(params, tokens)
        batch_kind = StackedKVCache if kind is BlockedKVCache else kind
        cache, one = batch_kind.of(*kept).enlarged(CONFIG.block_size), kind.of(*kept).enlarged(CONFIG.block_size)
        in_place = (
            partial(layers_in_place, fused_kernel=True) if kind is BlockedKVCache and dtype != jnp.bfloat16 else None
        )
        decode = jax.jit(lambda p, t, at, cache: nnx.merge(graphdef, p).decode(t, at, cache)[0])
        decode_one = jax.jit(lambda p, t, at, cache: nnx.merge(graphdef, p).decode(t, at, cache, in_place)[0])
        for t in (0, 9, CONFIG.block_size - 1):
            both = decode(params, tokens[:, t], jnp.array([t, t], jnp.int32), cache)
            for row in range(2):
                own = slice(row, row + 1)
                at = jnp.array([t], jnp.int32)
                mine = jax.tree.map(lambda x: x[:, row] if kind == BlockedKVCache else x[:, own], one)  # noqa: B023
                alone = decode_one(params, tokens[own, t], at, mine)
                np.testing.assert_allclose(alone, both[own], rtol=exact, atol=exact)
                np.testing.assert_allclose(alone, whole[own, t], rtol=exact, atol=exact)


@pytest.mark.parametrize("n_layer", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_prediction_at_one_position_equals_the_full_call(n_layer, tokens):
    config = dataclasses.replace(CONFIG, n_layer=n_layer)
    graphdef, params = built(config, 0)
    whole = logits_of(config, params, tokens)
    predict = jax.jit(lambda p, t, last: predict_last(nnx.merge(graphdef, p), t, last))
    for last in ([0, CONFIG.block_size - 1], [7, 7], [CONFIG.block_size - 1, 3]):
        logits = predict(params, tokens, jnp.array(last))
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, whole[jnp.arange(2), jnp.array(last)], atol=3e-6)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-10)])
def test_logits_are_those_of_the_float64_reference(dtype, tolerance, masked):
    c = dataclasses.replace(CONFIG, mask_unused_ids=masked)
    sizes = {"vocab_size": c.vocab_size, "n_embd": c.n_embd, "n_head": c.n_head, "n_head_dim": c.n_head_dim}
    theirs = reference.random_parameters(np.random.default_rng(7), **sizes, n_ff=c.n_ff, n_layer=c.n_layer)
    tokens = np.random.default_rng(8).integers(0, c.used_ids, (2, c.block_size)).astype(np.int32)
    used = c.used_ids if masked else None
    expected = np.stack([reference.logits(theirs, row, c.n_head, c.n_head_dim, used) for row in tokens])
    with x64(dtype == np.float64):
        params = from_reference(theirs, c.n_layer, dtype)
        ours = np.asarray(logits_of(c, params, jnp.asarray(tokens), dtype=jnp.dtype(dtype)))
    assert ours.dtype == dtype
    counts = slice(1, c.used_ids) if masked else slice(None)
    np.testing.assert_allclose(ours[..., counts], expected[..., counts], rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(jax.__version_info__ < BFLOAT16_ON_CPU, reason="this JAX cannot multiply bfloat16 on a CPU")
def test_bfloat16_logits_are_float32_and_near():
    _, params = built(CONFIG, 0)
    tokens = jnp.asarray(np.random.default_rng(1).integers(1, 40, (2, 24)), jnp.int32)
    exact, rough = (logits_of(CONFIG, params, tokens, dtype=d) for d in (jnp.float32, jnp.bfloat16))
    assert rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, exact, atol=0.05)


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < BFLOAT16_ON_CPU, reason="this JAX cannot multiply bfloat16 on a CPU")
def test_bias_gradients_are_summed_in_float32():
    """A bfloat16 sum over 4,096 positions stops growing: the gradient of the qkv bias would be wrong by 25 %."""
    config = dataclasses.replace(CONFIG, block_size=128, n_layer=1, mask_unused_ids=False, attention_block=64)
    tokens = jnp.asarray(np.random.default_rng(1).integers(1, 40, (32, 128)), jnp.int32)

    def gradients(dtype):
        graphdef, params = built(config, 0, dtype)
        targets = jnp.roll(tokens, -1, 1)
        loss = lambda p: cross_entropy_sum(nnx.merge(graphdef, p)(tokens), targets) / tokens.size  # noqa: E731
        blocks = jax.jit(jax.grad(loss))(params)["blocks"]
        layers = (blocks["attn"]["qkv"], blocks["attn"]["proj"], blocks["mlp"]["up"], blocks["mlp"]["down"])
        return [np.asarray(layer["bias"]) for layer in layers]

    for exact, rough in zip(gradients(jnp.float32), gradients(jnp.bfloat16), strict=True):
        assert np.linalg.norm(rough - exact) <= 0.01 * np.linalg.norm(exact)


INTERPRETED = pytest.param("cpu", "kernel", marks=pytest.mark.slow)
"""The attention kernel, which a CPU interprets: its programs take long to compile."""


@pytest.mark.parametrize(
    ("platform", "attention"), [("cpu", "blocks"), ("tpu", "blocks"), ("cuda", "blocks"), INTERPRETED]
)
@pytest.mark.parametrize("length", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 7)), 24])
@pytest.mark.parametrize("rate", [pytest.param(0.0, marks=pytest.mark.slow), 0.2])
def test_fast_operations_give_the_plain_loss_and_gradients(platform, attention, length, rate):
    """Within 1e-6 of the largest value; the plain model is built with `Ops()`, the mathematics of ops/plain.py."""
    config = dataclasses.replace(CONFIG, dropout=rate)
    tokens = jnp.asarray(np.random.default_rng(2).integers(1, CONFIG.used_ids, (2, length)), jnp.int32)
    seeds = seeds_for(jax.random.key(5), 2) if rate or attention == "kernel" else None

    def loss_and_gradients(ops):
        graphdef, params = create(config, 0, ops)

        def loss(params):
            return jnp.mean(jnp.sin(nnx.merge(graphdef, params)(tokens, seeds)[..., 1 : CONFIG.used_ids]))

        return jax.jit(jax.value_and_grad(loss))(params)

    plain = loss_and_gradients(Ops())
    ops = ops_for(query_block=config.attention_block, platform=platform, attention=attention)
    fast = loss_and_gradients(ops)
    for ours, theirs in zip(jax.tree.leaves(fast), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * max(1e-2, float(np.abs(theirs).max())))


@pytest.mark.skipif(jax.__version_info__ < BFLOAT16_ON_CPU, reason="this JAX cannot multiply bfloat16 on a CPU")
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize("rate", [pytest.param(0.0, marks=pytest.mark.slow), 0.2])
def test_fast_bfloat16_operations_are_near_the_plain_ones(platform, rate, tokens):
    """Within 2 % of the largest logit of the plain model with the same dtypes."""
    config = dataclasses.replace(CONFIG, dropout=rate, mask_unused_ids=False)
    seeds = seeds_for(jax.random.key(5), 2) if rate else None
    bfloat16 = Ops(activations=jnp.bfloat16)
    logits = []
    for ops in (bfloat16, ops_for(jnp.bfloat16, config.attention_block, platform)):
        graphdef, params = create(config, 0, ops)
        logits.append(np.asarray(jax.jit(lambda p: nnx.merge(graphdef, p)(tokens, seeds))(params)))  # noqa: B023
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=0.02 * np.abs(logits[0]).max())
