"""nGPT: its logits compared with the float64 reference, and the norms that it must keep."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from chargpt_jax.config import Config, ModelConfig, OptimizerConfig
from chargpt_jax.model.init import count_parameters, plan
from chargpt_jax.model.ngpt import STEP_SIZE, UNIT_AXES, name, norm, unit_norm
from chargpt_jax.training.optimizer import make_optimizer
from chargpt_jax.training.step import create_state, train_step
from tests import reference_ngpt
from tests.pairing import built, logits_of, x64

CONFIG = ModelConfig(
    kind="ngpt",
    **{"vocab_size": 64, "used_ids": 40, "block_size": 24, "n_embd": 20, "n_head": 3, "n_head_dim": 8},
    **{"n_ff": 36, "n_layer": 3, "attention_block": 10},
)
SIZES = {name: getattr(CONFIG, name) for name in ("n_layer", "n_head", "n_head_dim")}


@pytest.fixture(scope="module")
def made():
    return built(CONFIG, 0)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(1).integers(1, CONFIG.used_ids, (2, CONFIG.block_size)), jnp.int32)


def from_reference(theirs, dtype):
    """Convert the reference's parameters; stored scales are multiples of their initial values."""
    small = CONFIG.n_embd**-0.5

    def layers(part):
        return np.stack([theirs[f"{n}.{part}"] for n in range(CONFIG.n_layer)])

    def kernel(*parts):
        return {"kernel": np.concatenate([layers(part) for part in parts], axis=1).swapaxes(1, 2)}

    tree = {
        "wte": {"embedding": theirs["embed"]},
        "head": {"embedding": theirs["head"]},
        "logit_scale": {"scale": theirs["s_z"] * small},
        "blocks": {
            "attn": {
                "qkv": kernel("q", "k", "v"),
                "proj": {"kernel": layers("o")},
                "lengths": {"scale": layers("s_qk") * small},
            },
            "attn_step": {"scale": layers("a_1") / STEP_SIZE * small},
            "mlp": {
                "up": kernel("up"),
                "gate": kernel("gate"),
                "down": {"kernel": layers("down")},
                "up_scale": {"scale": layers("s_u")},
                "gate_scale": {"scale": layers("s_g")},
            },
            "mlp_step": {"scale": layers("a_2") / STEP_SIZE * small},
        },
    }
    return jax.tree.map(lambda x: np.ascontiguousarray(x, dtype), tree)


def lengths(params):
    """Return the lengths of all vectors that must have length 1."""
    by_name = {name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    assert set(UNIT_AXES) <= set(by_name)
    return np.concatenate(
        [np.linalg.norm(np.asarray(by_name[one], np.float64), axis=axis).ravel() for one, axis in UNIT_AXES.items()]
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-10)])
def test_logits_are_those_of_the_float64_reference(dtype, tolerance):
    config = dataclasses.replace(CONFIG, mask_unused_ids=False)
    shape = {name: getattr(config, name) for name in ("vocab_size", "n_embd", "n_ff")}
    theirs = reference_ngpt.random_parameters(np.random.default_rng(7), **shape, **SIZES)
    tokens = np.random.default_rng(8).integers(0, config.used_ids, (2, config.block_size)).astype(np.int32)
    expected = np.stack([reference_ngpt.logits(theirs, row, **SIZES) for row in tokens])
    with x64(dtype == np.float64):
        params = from_reference(theirs, dtype)
        shapes = jax.tree.map(lambda x: x.shape, built(config, 0)[1])
        assert jax.tree.map(lambda x: x.shape, params) == shapes
        ours = np.asarray(logits_of(config, params, jnp.asarray(tokens), dtype=jnp.dtype(dtype)))
    assert ours.dtype == dtype
    np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance)


def test_norm_of_zero_is_zero_and_its_gradient_is_finite():
    x = jnp.stack([jnp.zeros(4), jnp.arange(4.0)])
    np.testing.assert_allclose(np.linalg.norm(norm(x), axis=-1), [0, 1], atol=1e-7)
    assert np.all(np.isfinite(jax.grad(lambda x: norm(x).sum())(x)))


def test_hidden_states_and_initial_matrices_have_length_1(made, tokens):
    graphdef, params = made
    np.testing.assert_allclose(lengths(params), 1, atol=1e-6)
    for layers in range(CONFIG.n_layer + 1):
        states = jax.jit(lambda p, t, n=layers: nnx.merge(graphdef, p).features(t, layers=n))(params, tokens)
        np.testing.assert_allclose(np.linalg.norm(states, axis=-1), 1, atol=1e-6)


def test_initial_parameters_do_not_depend_on_how_they_are_compiled(made):
    _, shapes, draw = plan(CONFIG, 0)
    params = draw()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    jax.tree.map(np.testing.assert_array_equal, params, made[1])
    other = plan(CONFIG, 1)[2]()
    assert not np.array_equal(params["wte"]["embedding"], other["wte"]["embedding"])
    assert np.all(params["blocks"]["attn_step"]["scale"] == other["blocks"]["attn_step"]["scale"])


ADAMW = pytest.param({"clip_norm": 0.1, "weight_decay": 0.5}, marks=pytest.mark.slow)


@pytest.mark.parametrize("optimizer", [{"kind": "muon"}, ADAMW])
def test_training_keeps_the_norms_and_learns(made, tokens, optimizer):
    graphdef, params = made
    tx = make_optimizer(Config(model=CONFIG, optimizer=OptimizerConfig(**optimizer)), 3e-3)
    state = create_state(params, tx, 0)
    step = jax.jit(lambda state: train_step(state, (tokens[:, :-1], tokens[:, 1:]), graphdef=graphdef, tx=tx))
    losses = []
    for _ in range(20):
        state, scalars = step(state)
        losses.append(float(scalars["loss"]))
        np.testing.assert_allclose(lengths(state.params), 1, atol=1e-6)
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.slow
def test_an_update_is_that_of_the_optimizer_and_then_normalised(made):
    _, params = made
    gradients = jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)

    def moved(config):
        tx = make_optimizer(Config(model=config), 0.1)
        return optax.apply_updates(params, tx.update(gradients, tx.init(params), params)[0])

    plain = moved(dataclasses.replace(CONFIG, kind="gpt"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), moved(CONFIG), unit_norm(plain))
    assert abs(lengths(plain) - 1).max() > 0.01


def test_number_of_parameters_equals_the_formula(made):
    c, (_, params) = CONFIG, made
    width = c.n_head * c.n_head_dim
    layer = 4 * c.n_embd * width + width + 3 * c.n_embd * c.n_ff + 2 * c.n_ff + 2 * c.n_embd
    assert count_parameters(params) == c.vocab_size * (2 * c.n_embd + 1) + c.n_layer * layer
