"""The unrolled layers of a GPU against the loop of plain.py, on any device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chargpt_jax.compile.least_bytes import saved_activations
from chargpt_jax.config import ModelConfig
from chargpt_jax.model.init import abstract_model, create
from chargpt_jax.ops.choose import ops_for
from chargpt_jax.ops.gpu import layers
from chargpt_jax.ops.kernels.attention import attention_in_kernels
from chargpt_jax.ops.plain import Ops
from chargpt_jax.training.step import cross_entropy_sum

CONFIG = ModelConfig(
    vocab_size=64, used_ids=40, block_size=20, n_embd=12, n_head=3, n_head_dim=4, n_ff=28, n_layer=3, dropout=0.2
)
SEEDS = jnp.array([[1, 2], [3, 4]], jnp.uint32)


def gpu(dtype=jnp.float32, interpreted=False) -> Ops:
    ops = ops_for(dtype, 16, "cuda")
    return dataclasses.replace(ops, attention=attention_in_kernels("interpret")) if interpreted else ops


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(1).integers(1, CONFIG.used_ids, (2, CONFIG.block_size)), jnp.int32)


@pytest.fixture(scope="module")
def params():
    """Parameters with scales and biases of LayerNorm that are not 1 and 0."""
    _, drawn = create(CONFIG, 0)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), drawn)


def loss_and_gradient(ops, params, tokens, **changes):
    graphdef, _ = abstract_model(dataclasses.replace(CONFIG, **changes), ops)

    def loss(params):
        return cross_entropy_sum(nnx.merge(graphdef, params)(tokens, SEEDS), tokens)

    return jax.jit(jax.value_and_grad(loss))(params)


def assert_close(found, expected, tolerance):
    def check(path, one, other):
        assert np.abs(one - other).max() <= tolerance * np.abs(other).max(), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(check, found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "interpreted"), [(False, False), (True, True)])
def test_loss_and_gradients_are_those_of_the_plain_model(tokens, params, remat, interpreted):
    expected = loss_and_gradient(Ops(), params, tokens, remat=False)
    found = loss_and_gradient(gpu(interpreted=interpreted), params, tokens, remat=remat)
    assert_close(found, expected, 2e-5)


@pytest.mark.slow
def test_more_layers_than_are_unrolled_run_in_a_loop(tokens, params, monkeypatch):
    unrolled = loss_and_gradient(gpu(), params, tokens)
    monkeypatch.setattr(layers, "MAX_UNROLLED", 2)
    assert_close(loss_and_gradient(gpu(), params, tokens, mask_unused_ids=True), unrolled, 2e-5)


@pytest.mark.parametrize(("most", "loops"), [(3, 0), (2, 1)])
def test_only_unrolled_layers_have_no_loop(tokens, params, monkeypatch, most, loops):
    monkeypatch.setattr(layers, "MAX_UNROLLED", most)
    model = nnx.merge(abstract_model(CONFIG, gpu())[0], params)
    assert str(jax.make_jaxpr(model.features)(tokens)).count(" scan[") == loops


@pytest.mark.slow
def test_first_layers_alone_and_prefill_are_those_of_the_plain_model(tokens, params):
    ours, plain = (nnx.merge(abstract_model(CONFIG, ops)[0], params) for ops in (gpu(), Ops()))
    for count in (1, 2):
        assert_close(ours.features(tokens, None, count), plain.features(tokens, None, count), 2e-5)
    assert_close(ours.prefill(tokens), plain.prefill(tokens), 2e-5)


def test_gradient_of_the_layers_that_do_not_run_is_zero():
    stacked = {"a": jnp.arange(12.0).reshape(3, 4)}
    gradient = jax.grad(lambda x: jnp.sum(layers.unstacked(x, 2)[1]["a"] ** 2))(stacked)
    np.testing.assert_array_equal(gradient["a"], [[0] * 4, [8, 10, 12, 14], [0] * 4])


@pytest.mark.parametrize("remat", [False, True])
def test_backward_pass_saves_no_more_than_it_reads(remat):
    """bfloat16: both normalised inputs, queries, keys, values and outputs; without `remat` also the MLP's hidden units.

    float32: two factors of LayerNorm and the softmax's logarithms; with `remat` each sequence's copy of the hidden
    units' bias; uint32: three pairs of seeds per sequence.
    """
    config = dataclasses.replace(CONFIG, remat=remat)
    width, T = config.n_head * config.n_head_dim, config.block_size
    character = 2 * (2 * config.n_embd + 4 * width + (0 if remat else config.n_ff)) + 4 * (2 + config.n_head)
    graphdef, params = abstract_model(config, gpu(jnp.bfloat16, interpreted=False))
    sequence = T * character + 4 * (6 + (config.n_ff if remat else 0))
    assert saved_activations(graphdef, params, 2, T, config.n_layer) <= 2 * config.n_layer * sequence


@pytest.mark.slow
def test_lower_precision_rounds_no_more_than_the_loop(tokens, params):
    exact = loss_and_gradient(Ops(), params, tokens)
    ours, loop = (
        loss_and_gradient(ops, params, tokens) for ops in (gpu(jnp.bfloat16), ops_for(jnp.bfloat16, 16, "tpu"))
    )

    def error(found):
        squares = jax.tree.map(lambda one, other: jnp.sum((one - other) ** 2) / jnp.sum(other**2), found, exact)
        return max(float(x) for x in jax.tree.leaves(squares)) ** 0.5

    assert error(ours) <= 1.5 * error(loop)
