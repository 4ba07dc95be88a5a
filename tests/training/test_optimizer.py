"""The schedule, the decay mask and AdamW compared with the float64 reference."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from chargpt_jax.config import Config, ModelConfig, OptimizerConfig, SchedulerConfig
from chargpt_jax.training.optimizer import adamw, decay_mask, make_optimizer, total_steps, warmup_cosine
from tests import reference
from tests.pairing import built, x64

N_LAYER = 3
RATES = [3e-3, 1e-2, 2e-3, 5e-3, 1e-3]


# Schedule

SHAPES = [  # epochs, warmup_epochs, steps per epoch, min_lr_factor
    (10.0, 1.0, 13, 0.1),
    (100.0, 1.0, 52, 0.1),
    (3.0, 0.5, 8, 0.25),
    (4.0, 0.0, 25, 0.1),
    (2.0, 1.7, 10, 0.5),
    (5.0, 1.0, 20, 1.0),
]


@pytest.mark.parametrize(("epochs", "warmup", "epoch_steps", "low"), SHAPES)
@pytest.mark.parametrize("peak", [1e-3, 0.3])
def test_schedule_equals_the_reference_at_every_step(epochs, warmup, epoch_steps, low, peak):
    config = SchedulerConfig(epochs=epochs, warmup_epochs=warmup, min_lr_factor=low)
    total, warmup_steps = total_steps(config, epoch_steps), round(warmup * epoch_steps)
    rates = warmup_cosine(config, peak, epoch_steps)(jnp.arange(total + 3))
    expected = [reference.warmup_cosine(step, peak, warmup_steps, total, low) for step in range(total + 3)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


@pytest.mark.parametrize(("epochs", "warmup", "epoch_steps", "low"), SHAPES)
def test_schedule_peaks_after_the_warm_up(epochs, warmup, epoch_steps, low):
    config = SchedulerConfig(epochs=epochs, warmup_epochs=warmup, min_lr_factor=low)
    rate = warmup_cosine(config, 0.01, epoch_steps)
    steps = round(warmup * epoch_steps)
    assert float(rate(0)) == pytest.approx(0.01 * (low if steps else 1), rel=1e-6)
    assert float(rate(steps)) == pytest.approx(0.01, rel=1e-6)
    assert float(rate(total_steps(config, epoch_steps) - 1)) == pytest.approx(0.01 * low, rel=1e-6)


def test_a_factor_of_0_ends_at_0():
    config = SchedulerConfig(epochs=2, warmup_epochs=0.5, min_lr_factor=0.0)
    rates = np.asarray(warmup_cosine(config, 0.01, 10)(jnp.arange(20)))
    expected = [reference.warmup_cosine(step, 0.01, 5, 20, 0.0) for step in range(20)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=1e-9)
    assert rates[0] == rates[-1] == 0


@pytest.mark.parametrize(("epochs", "warmup", "epoch_steps", "low"), SHAPES)
def test_under_x64_the_schedule_is_computed_in_float64(epochs, warmup, epoch_steps, low):
    config = SchedulerConfig(epochs=epochs, warmup_epochs=warmup, min_lr_factor=low)
    total, warmup_steps = total_steps(config, epoch_steps), round(warmup * epoch_steps)
    with x64(True):
        rates = warmup_cosine(config, 0.3, epoch_steps)(jnp.arange(total, dtype=jnp.int32))
    expected = [reference.warmup_cosine(step, 0.3, warmup_steps, total, low) for step in range(total)]
    np.testing.assert_allclose(rates, expected, rtol=1e-13)


@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0, 30.0])
def test_decay_none_stays_at_the_peak(warmup):
    """A warm-up that is longer than the run is truncated, not shortened."""
    config = SchedulerConfig(max_steps=40, warmup_epochs=warmup, min_lr_factor=0.1)
    rates = np.asarray(warmup_cosine(config, 0.01, 10, "none")(jnp.arange(50)))
    line = np.minimum(np.arange(50) / max(1, 10 * warmup), 1) if warmup else np.ones(50)
    np.testing.assert_allclose(rates, 0.001 + 0.009 * line, rtol=1e-6)


@pytest.mark.parametrize("total", [1, 2, 5, 10])
def test_a_run_within_its_warm_up_stays_finite_and_rises(total):
    config = SchedulerConfig(max_steps=total, warmup_epochs=1.0, min_lr_factor=0.1)
    rates = np.asarray([float(warmup_cosine(config, 0.01, 10)(step)) for step in range(total)])
    assert np.isfinite(rates).all()
    assert (np.diff(rates) > 0).all()
    assert (rates > 0).all()
    assert (rates <= 0.01 * (1 + 1e-6)).all()


@pytest.mark.parametrize(
    ("settings", "epoch_steps", "steps"),
    [
        ({"epochs": 3.0}, 10, 30),
        ({"epochs": 0.26}, 10, 3),
        ({"epochs": 0.01}, 10, 1),
        ({"epochs": 0.29}, 100, 29),
        ({"epochs": 3.0, "max_steps": 7}, 10, 7),
        ({"epochs": 3.0, "max_steps": 700}, 10, 700),
    ],
)
def test_total_steps_are_epochs_or_max_steps(settings, epoch_steps, steps):
    assert total_steps(SchedulerConfig(**settings), epoch_steps) == steps


def test_warm_up_epochs_are_rounded_to_steps():
    """0.29 epochs of 100 steps: 0.29 * 100 is 28.999999999999996 in binary, but means 29."""
    rate = warmup_cosine(SchedulerConfig(epochs=10, warmup_epochs=0.29), 1.0, 100)
    assert float(rate(28)) < 1
    assert float(rate(29)) == pytest.approx(1, rel=1e-6)
    assert float(rate(30)) < 1


# Decay mask


def test_weight_decay_applies_to_kernels_and_embedding():
    config = ModelConfig(64, 10, block_size=8, n_embd=8, n_head=2, n_head_dim=4, n_ff=12, n_layer=2)
    params = jax.eval_shape(lambda: built(config, seed=0)[1])
    mask = decay_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    decayed = {jax.tree_util.keystr(path) for path, value in jax.tree_util.tree_leaves_with_path(mask) if value}
    names = {jax.tree_util.keystr(path): leaf.ndim for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert decayed == {name for name in names if name.endswith(("['kernel']", "['embedding']"))}
    assert len(decayed) == 5
    assert {names[name] for name in names.keys() - decayed} == {1, 2}  # stacked biases and scales have rank 2


# AdamW


def tree(rng: np.random.Generator) -> dict:
    """Return arrays with the names and ranks of a model's parameters."""
    shapes = {
        "wte": {"embedding": (6, 4)},
        "blocks": {"mlp": {"kernel": (N_LAYER, 4, 5), "bias": (N_LAYER, 5)}, "ln_1": {"scale": (N_LAYER, 4)}},
        "ln_f": {"scale": (4,), "bias": (4,)},
    }
    return jax.tree.map(lambda shape: rng.normal(size=shape), shapes, is_leaf=lambda x: isinstance(x, tuple))


def unstacked(params: dict) -> reference.Params:
    """Return the arrays of each layer under separate names, like the reference."""
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        layers = enumerate(leaf) if "blocks" in name else [("", leaf)]
        flat |= {f"{name}{number}": np.asarray(layer) for number, layer in layers}
    return flat


def updated(tx: optax.GradientTransformation, params: dict, grads: list[dict]) -> dict:
    params, state = jax.tree.map(jnp.asarray, params), tx.init(jax.tree.map(jnp.asarray, params))

    @jax.jit
    def step(params: dict, state: optax.OptState, gradient: dict) -> tuple[dict, optax.OptState]:
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in grads:
        params, state = step(params, state, jax.tree.map(jnp.asarray, gradient))
    return params


def test_five_steps_equal_the_reference():
    rng = np.random.default_rng(0)
    params, grads = tree(rng), [tree(rng) for _ in RATES]
    config = OptimizerConfig(weight_decay=0.1, betas=(0.9, 0.95))
    with x64(True):
        got = updated(adamw(config, lambda step: jnp.asarray(RATES)[step]), params, grads)
    expected = reference.adamw_steps(
        unstacked(params), lambda _, step: unstacked(grads[step]), RATES, (0.9, 0.95), weight_decay=0.1
    )
    assert got["wte"]["embedding"].dtype == jnp.float64
    for name, value in unstacked(got).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-11, atol=1e-13, err_msg=name)


def test_without_a_gradient_only_the_decayed_arrays_shrink():
    params = jax.tree.map(np.ones_like, tree(np.random.default_rng(0)))
    zeros = jax.tree.map(np.zeros_like, params)
    got = updated(adamw(OptimizerConfig(weight_decay=0.5), 0.1), params, [zeros])
    assert float(got["blocks"]["mlp"]["kernel"][0, 0, 0]) == pytest.approx(0.95)
    assert float(got["wte"]["embedding"][0, 0]) == pytest.approx(0.95)
    assert (got["blocks"]["mlp"]["bias"] == 1).all()
    assert (got["blocks"]["ln_1"]["scale"] == 1).all()
    assert (got["ln_f"]["bias"] == 1).all()


def test_a_gradient_above_clip_norm_counts_as_one_of_that_norm():
    rng = np.random.default_rng(1)
    params, direction = tree(rng), tree(rng)
    norm = math.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(direction)))
    long, short, unit = (jax.tree.map(lambda x, s=s: x * s / norm, direction) for s in (10.0, 0.5, 1.0))
    free, clipped = (make_optimizer(Config(optimizer=OptimizerConfig(clip_norm=limit)), 0.01) for limit in (None, 1.0))
    # Adam ignores a constant factor: clipping shows only if the norm changes between steps.
    for one, two in zip(
        jax.tree.leaves(updated(clipped, params, [short, long])),
        jax.tree.leaves(updated(free, params, [short, unit])),
        strict=True,
    ):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    assert not np.allclose(
        updated(free, params, [short, long])["ln_f"]["bias"], updated(clipped, params, [short, long])["ln_f"]["bias"]
    )
