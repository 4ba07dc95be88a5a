"""The kind 'modern': its logits compared with the float64 reference, and its own laws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chargpt_jax.config import Config, ModelConfig, OptimizerConfig
from chargpt_jax.model.init import count_parameters
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


@pytest.mark.parametrize("optimizer", [pytest.param({}, marks=pytest.mark.slow), {"kind": "muon"}])
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
