"""The kind 'modern': its logits compared with the float64 reference, and its own laws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chargpt_jax.config import Config, ModelConfig, OptimizerConfig
from chargpt_jax.devices.platform import BFLOAT16_ON_CPU
from chargpt_jax.generation.generate import predict_last
from chargpt_jax.model.gpt import MASKED
from chargpt_jax.model.init import count_parameters
from chargpt_jax.ops.dropout import seeds_for
from chargpt_jax.ops.kv_cache import StackedKVCache
from chargpt_jax.training.optimizer import make_optimizer
from chargpt_jax.training.step import create_state, train_step
from tests import reference, reference_modern
from tests.pairing import built, from_reference, logits_of, x64

CONFIG = ModelConfig(
    kind="modern",
    **{"vocab_size": 64, "used_ids": 40, "block_size": 24, "n_embd": 20, "n_head": 3, "n_head_dim": 8},
    **{"n_ff": 36, "n_layer": 3, "attention_block": 10},
)
SIZES = {name: getattr(CONFIG, name) for name in ("n_layer", "n_head", "n_head_dim")}


@pytest.fixture(scope="module")
def theirs():
    """Random parameters of the reference, and a_1 and a_2 of each layer: a new model's layers change nothing."""
    rng = np.random.default_rng(7)
    shape = {name: getattr(CONFIG, name) for name in ("vocab_size", "n_embd", "n_ff")}
    return reference.random_parameters(rng, **shape, **SIZES), rng.uniform(0.3, 1.5, (CONFIG.n_layer, 2))


@pytest.fixture(scope="module")
def made(theirs):
    return built(CONFIG, 0)[0], converted(theirs, np.float32)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(1).integers(1, CONFIG.used_ids, (2, CONFIG.block_size)), jnp.int32)


def converted(theirs, dtype):
    params = from_reference(theirs[0], CONFIG.n_layer, dtype)
    params["blocks"]["mixture"] = theirs[1].astype(dtype)
    return params


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-10)])
def test_logits_are_those_of_the_float64_reference(theirs, dtype, tolerance):
    config = dataclasses.replace(CONFIG, mask_unused_ids=False)
    tokens = np.random.default_rng(8).integers(0, config.used_ids, (2, config.block_size)).astype(np.int32)
    expected = np.stack([reference_modern.logits(*theirs, row, **SIZES) for row in tokens])
    with x64(dtype == np.float64):
        params = converted(theirs, dtype)
        shapes = jax.tree.map(lambda x: x.shape, built(config, 0)[1])
        assert jax.tree.map(lambda x: x.shape, params) == shapes
        ours = np.asarray(logits_of(config, params, jnp.asarray(tokens), dtype=jnp.dtype(dtype)))
    assert ours.dtype == dtype
    np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance)


def test_model_that_ignores_the_first_values_is_a_gpt(theirs, tokens):
    gpt = dataclasses.replace(CONFIG, kind="gpt")
    expected = logits_of(gpt, from_reference(theirs[0], CONFIG.n_layer, np.float32), tokens)
    mixtures = np.tile([1.0, 0.0], (CONFIG.n_layer, 1))
    found = logits_of(CONFIG, converted((theirs[0], mixtures), np.float32), tokens)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_layers_of_a_new_model_change_nothing(tokens):
    graphdef, params = built(CONFIG, 0)
    embedded, features = jax.jit(lambda p: ((m := nnx.merge(graphdef, p)).embed(tokens), m.features(tokens)))(params)
    np.testing.assert_array_equal(features, embedded)
    np.testing.assert_array_equal(params["blocks"]["mixture"], 0.5)


def test_other_initial_parameters_are_those_of_a_gpt():
    own, gpt = built(CONFIG, 3)[1], built(dataclasses.replace(CONFIG, kind="gpt"), 3)[1]
    for part, name in (("attn", "proj"), ("mlp", "down")):
        own["blocks"][part].pop(name), gpt["blocks"][part].pop(name)
    own["blocks"].pop("mixture")
    jax.tree.map(np.testing.assert_array_equal, own, gpt)


def test_first_layer_attends_to_its_own_values_twice(made, tokens):
    """The values that `embed` puts into the stream are those that the first layer computes."""
    _, params = made
    mixture = params["blocks"]["mixture"]

    def logits(own, first):
        mixed = mixture.copy()
        mixed[0] = own, first
        return logits_of(CONFIG, {**params, "blocks": {**params["blocks"], "mixture": mixed}}, tokens)

    np.testing.assert_allclose(logits(0.75, 0), logits(0, 0.75), atol=2e-5)
    assert np.abs(np.asarray(logits(0.75, 0) - logits(0, 0.25)))[..., 1:40].max() > 0.1


def test_later_layers_read_the_first_values(made, tokens):
    graphdef, params = made
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p)(tokens)[..., 3] ** 2)))(params)
    assert np.all(np.abs(gradient["blocks"]["mixture"]) > 1e-6)


@pytest.mark.parametrize("optimizer", [{}, {"kind": "muon"}])
def test_training_moves_every_array_and_learns(tokens, optimizer):
    graphdef, params = built(CONFIG, 0)
    tx = make_optimizer(Config(model=CONFIG, optimizer=OptimizerConfig(**optimizer)), 3e-3)
    state = create_state(params, tx, 0)
    step = jax.jit(lambda state: train_step(state, (tokens[:, :-1], tokens[:, 1:]), graphdef=graphdef, tx=tx))
    losses = []
    for _ in range(20):
        state, scalars = step(state)
        losses.append(float(scalars["loss"]))
    assert losses[-1] < losses[0] - 0.3
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), state.params, params)
    assert all(jax.tree.leaves(moved)), moved


def test_two_parameters_per_layer_more_than_a_gpt(made):
    c, (_, params) = CONFIG, made
    gpt = count_parameters(built(dataclasses.replace(c, kind="gpt"), 0)[1])
    assert count_parameters(params) == gpt + 2 * c.n_layer


def test_no_gradient_reaches_later_tokens(made, tokens):
    _, params = made
    changed = tokens.at[:, 12].set((tokens[:, 12] % 38) + 1)
    before, after = (logits_of(CONFIG, params, each) for each in (tokens, changed))
    np.testing.assert_array_equal(before[:, :12], after[:, :12])
    assert np.all(np.any(np.asarray(before[:, 12:] != after[:, 12:]), axis=-1))


def test_unused_ids_have_no_probability(made, tokens):
    probability = np.asarray(jax.nn.softmax(logits_of(CONFIG, made[1], tokens)))
    assert np.all(probability[..., 0] == 0)
    assert np.all(probability[..., CONFIG.used_ids :] == 0)
    free = logits_of(dataclasses.replace(CONFIG, mask_unused_ids=False), made[1], tokens)
    assert np.all(np.asarray(free) > MASKED / 2)


def test_dropout_needs_seeds(tokens, made):
    config = dataclasses.replace(CONFIG, dropout=0.3)
    np.testing.assert_array_equal(logits_of(config, made[1], tokens), logits_of(CONFIG, made[1], tokens))
    twice = jnp.stack([tokens[0], tokens[0]])
    dropped = logits_of(config, made[1], twice, seeds=seeds_for(jax.random.key(5), 2))
    assert np.abs(np.asarray(dropped[0] - dropped[1]))[..., 1:40].max() > 0.01


@pytest.mark.parametrize("rows", [1, 2])
def test_prefill_and_decode_equal_the_full_model(made, tokens, rows):
    graphdef, params = made
    tokens = tokens[:rows]
    whole = logits_of(CONFIG, params, tokens)
    prefill = jax.jit(lambda p, t: nnx.merge(graphdef, p).prefill(t))
    decode = jax.jit(lambda p, t, at, cache: nnx.merge(graphdef, p).decode(t, at, cache))
    _, kept = prefill(params, tokens.at[:, 9:].set(0))
    cache = StackedKVCache.of(*kept).enlarged(CONFIG.block_size)
    for t in range(9, CONFIG.block_size):
        logits, cache = decode(params, tokens[:, t], jnp.full(rows, t), cache)
        np.testing.assert_allclose(logits, whole[:, t], atol=2e-5)


def test_prediction_at_one_position_equals_the_full_call(made, tokens):
    graphdef, params = made
    whole = logits_of(CONFIG, params, tokens)
    predict = jax.jit(lambda p, t, last: predict_last(nnx.merge(graphdef, p), t, last))
    for last in ([0, CONFIG.block_size - 1], [7, 3]):
        np.testing.assert_allclose(
            predict(params, tokens, jnp.array(last)), whole[jnp.arange(2), jnp.array(last)], atol=2e-5
        )


def test_operations_of_a_gpu_give_the_same_logits_and_gradients(made, tokens):
    def loss(params, graphdef):
        return jnp.sum(jax.nn.log_softmax(nnx.merge(graphdef, params)(tokens))[..., 1 : CONFIG.used_ids] ** 2)

    (graphdef, params), (of_gpu, _) = made, built(CONFIG, 0, jnp.float32, "cuda")
    expected, found = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, one) for one in (graphdef, of_gpu))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.skipif(jax.__version_info__ < BFLOAT16_ON_CPU, reason="this JAX cannot multiply bfloat16 on a CPU")
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_bfloat16_logits_are_float32_and_near(made, tokens, platform):
    graphdef, _ = built(CONFIG, 0, jnp.bfloat16, platform)
    rough = jax.jit(lambda p, t: nnx.merge(graphdef, p)(t))(made[1], tokens)
    assert rough.dtype == jnp.float32
    error = np.asarray(rough - logits_of(CONFIG, made[1], tokens))[..., 1 : CONFIG.used_ids]
    assert 0 < np.sqrt(np.mean(error**2)) < 0.1
