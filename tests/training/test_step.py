"""One training step: gradients, accumulation, loss scaling, determinism."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from chargpt_jax.config import Config, ModelConfig, OptimizerConfig
from chargpt_jax.training.optimizer import adamw, make_optimizer
from chargpt_jax.training.step import create_state, cross_entropy_sum, eval_step, train_step
from tests import reference
from tests.pairing import built

CONFIG = ModelConfig(
    vocab_size=64, used_ids=30, block_size=12, n_embd=8, n_head=2, n_head_dim=4, n_ff=16, n_layer=2, dropout=0.2
)
GRAPHDEF, PARAMS = built(CONFIG, 0)
TX = adamw(OptimizerConfig(), 1e-2)


def batch(seed: int = 0):
    rng = np.random.default_rng(seed)
    text = rng.integers(1, 30, (4, 13)).astype(np.int32)
    targets = text[:, 1:].copy()
    targets[0, :5] = 0  # padding: the sequences have different numbers of targets
    return jnp.asarray(text[:, :-1]), jnp.asarray(targets)


def step_of(microbatches: int = 1, tx=TX, graphdef=GRAPHDEF):
    return jax.jit(partial(train_step, graphdef=graphdef, tx=tx, microbatches=microbatches))


STEP = step_of()


def test_loss_is_the_mean_over_targets_that_are_not_padding():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(3, 5, 64)), rng.integers(0, 4, (3, 5))
    expected = [reference.loss(row, target) for row, target in zip(logits, targets, strict=True)]
    ours = cross_entropy_sum(jnp.asarray(logits, jnp.float32), jnp.asarray(targets))
    np.testing.assert_allclose(ours, sum(total for total, _ in expected), rtol=1e-5)


def test_step_lowers_the_loss_on_its_batch():
    state, first = STEP(create_state(PARAMS, TX, 0), batch())
    for _ in range(20):
        state, scalars = STEP(state, batch())
    assert float(scalars["loss"]) < 0.8 * float(first["loss"])
    assert int(state.step) == 21


@pytest.mark.parametrize("microbatches", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_accumulation_equals_the_large_batch(microbatches):
    """With dropout, and with sequences that have different numbers of characters."""
    whole, one = STEP(create_state(PARAMS, TX, 0), batch())
    split, other = step_of(microbatches)(create_state(PARAMS, TX, 0), batch())
    np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-6)
    np.testing.assert_allclose(one["grad_norm"], other["grad_norm"], rtol=1e-5)
    moments = lambda state: jax.tree.leaves(state.opt_state)  # noqa: E731
    for ours, theirs in zip(moments(split), moments(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)


def test_dropout_is_a_function_of_the_step():
    # A learning rate of 0 leaves the parameters unchanged, so only dropout can change the loss.
    frozen = step_of(tx=adamw(OptimizerConfig(), 0.0))
    state = create_state(PARAMS, TX, 0)
    after, first = frozen(state, batch())
    _, again = frozen(state, batch())
    _, second = frozen(after, batch())
    assert float(first["loss"]) == float(again["loss"])
    assert float(first["loss"]) != float(second["loss"])


def test_many_steps_trace_once():
    traces = []

    def counted(state, batch):
        traces.append(1)
        return train_step(state, batch, graphdef=GRAPHDEF, tx=TX)

    step, state = jax.jit(counted), create_state(PARAMS, TX, 0)
    for i in range(12):
        state, _ = step(state, batch(i))
    assert len(traces) == 1


def test_float16_overflow_skips_the_update_and_halves_the_scale():
    graphdef, params = built(CONFIG, 0, jnp.float16)
    step = step_of(graphdef=graphdef)
    state = create_state(params, TX, 0, jnp.float16)
    huge = state.replace(loss_scale=state.loss_scale.replace(scale=jnp.float32(2.0**40)))
    after, scalars = step(huge, batch())
    assert np.isfinite(scalars["loss"])
    assert float(after.loss_scale.scale) == 2.0**39
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (after.params, params)), strict=True))
    fine, _ = step(state, batch())
    assert not np.array_equal(fine.params["wte"]["embedding"], params["wte"]["embedding"])


def test_float16_gradients_are_near_those_of_float32():
    graphdef, _ = built(CONFIG, 0, jnp.float16)
    _, exact = STEP(create_state(PARAMS, TX, 0), batch())
    _, rough = step_of(graphdef=graphdef)(create_state(PARAMS, TX, 0, jnp.float16), batch())
    np.testing.assert_allclose(rough["loss"], exact["loss"], rtol=2e-3)
    np.testing.assert_allclose(rough["grad_norm"], exact["grad_norm"], rtol=2e-2)


def test_evaluation_has_no_dropout_and_counts_characters():
    inputs, targets = batch()
    total, count = jax.jit(partial(eval_step, graphdef=GRAPHDEF))(PARAMS, (inputs, targets))
    assert int(count) == 4 * 12 - 5
    clean, _ = built(dataclasses.replace(CONFIG, dropout=0.0), 0)
    logits = jax.jit(lambda p: nnx.merge(clean, p)(inputs))(PARAMS)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    np.testing.assert_allclose(total, jnp.sum(losses * (targets != 0)), rtol=1e-6)


def lines(graph):
    """Yield the equations of a jaxpr and of all jaxprs inside it."""
    for line in graph.eqns:
        yield line
        for value in jax.tree.leaves(line.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from lines(inner)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_step_is_exact_and_sums_in_a_fixed_order(kind, platform):
    """All float32 products have full precision, also backward and in the optimizer; no scatter has several indices."""
    config = dataclasses.replace(CONFIG, attention_block=5)
    graphdef, params = built(config, 0, jnp.float32, platform)
    tx = make_optimizer(Config(optimizer=OptimizerConfig(kind=kind)), 1e-3)
    step = partial(train_step, graphdef=graphdef, tx=tx)
    found = list(lines(jax.make_jaxpr(step)(create_state(params, tx, 0), batch()).jaxpr))
    dots = [line for line in found if line.primitive.name == "dot_general"]
    assert len(dots) > 20
    assert {line.params["precision"] for line in dots} == {(jax.lax.Precision.HIGHEST,) * 2}
    scatters = [line for line in found if line.primitive.name.startswith("scatter")]
    assert all(math.prod(line.invars[1].aval.shape[:-1]) == 1 for line in scatters)
