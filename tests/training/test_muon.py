"""Muon compared with singular value decompositions and a float64 reference, and properties of polar factors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from chargpt_jax.config import Config, ModelConfig, OptimizerConfig
from chargpt_jax.training.muon import MARGIN, POLYNOMIALS, is_layer_matrix, orthogonal, scale_by_muon
from chargpt_jax.training.optimizer import adamw, make_optimizer
from tests.pairing import built, x64

SHAPES = [(5, 5), (4, 9), (9, 4), (1, 6), (32, 96)]


def polar(x: np.ndarray, steps: int) -> np.ndarray:
    """Apply the polynomials to the singular values of matrices [..., m, n], by their decomposition."""
    u, s, v = np.linalg.svd(x, full_matrices=False)
    s = s / (MARGIN * (s**4).sum(-1, keepdims=True) ** 0.25)
    for a, b, c in POLYNOMIALS[:steps]:
        s = a * s + b * s**3 + c * s**5
    return (u * s[..., None, :]) @ v


def matrices(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_orthogonal_changes_only_singular_values(shape, steps):
    x = matrices(3, *shape)
    with x64(True):
        got = orthogonal(jnp.asarray(x), steps)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, polar(x, steps), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("steps", "low", "high"), [(5, 0.87, 1.13), (3, 0.13, 1.87)])
def test_singular_values_of_a_thousandth_to_1_come_near_1(steps, low, high):
    s = np.geomspace(1e-3, 1, 2000)
    for a, b, c in POLYNOMIALS[:steps]:
        s = a * s + b * s**3 + c * s**5
    assert low < s.min() < 1 < s.max() < high


def test_orthogonal_matrix_keeps_its_direction():
    q, _ = np.linalg.qr(matrices(6, 6))
    got = np.asarray(orthogonal(jnp.asarray(q, jnp.float32)))
    np.testing.assert_allclose(got / got[0, 0] * q[0, 0], q, atol=1e-5)
    np.testing.assert_allclose(np.linalg.svd(got)[1], 1, atol=0.13)


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6, 1e30])
def test_scale_of_a_matrix_does_not_matter(factor):
    x = jnp.asarray(matrices(2, 4, 7), jnp.float32)
    np.testing.assert_allclose(orthogonal(x * factor), orthogonal(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_orthogonal_of_zero_is_zero(shape):
    assert (np.asarray(orthogonal(jnp.zeros((2, *shape)))) == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal_commutes_with_transposing_and_stacking(shape):
    with x64(True):
        x = jnp.asarray(matrices(2, 3, *shape))
        got = np.asarray(orthogonal(x))
        np.testing.assert_allclose(orthogonal(x.swapaxes(-1, -2)), got.swapaxes(-1, -2), rtol=0, atol=1e-10)
        np.testing.assert_allclose(orthogonal(x[1, 2]), got[1, 2], rtol=0, atol=1e-10)


# The transform


def layers(seed: int) -> dict:
    """Return the weight matrices of 2 layers with C = 6 and F = 10, named and stacked as in a model."""
    shapes = {"attn": {"qkv": (6, 18), "proj": (6, 6)}, "mlp": {"up": (6, 10), "down": (10, 6)}}
    rng = np.random.default_rng(seed)
    kernel = lambda shape: {"kernel": rng.normal(size=(2, *shape))}  # noqa: E731
    return {"blocks": jax.tree.map(kernel, shapes, is_leaf=lambda x: isinstance(x, tuple))}


def expected_direction(name: str, mixed: np.ndarray, steps: int) -> np.ndarray:
    if "qkv" in name:
        return np.concatenate([polar(part, steps) for part in np.split(mixed, 3, axis=-1)], axis=-1)
    return polar(mixed, steps) * max(1, mixed.shape[-1] / mixed.shape[-2]) ** 0.5


@pytest.mark.parametrize(("momentum", "steps"), [(0.9, 5), (0.85, 3), (0.0, 5)])
def test_four_steps_equal_the_formula(momentum, steps):
    tx, gradients = scale_by_muon(momentum, steps), [layers(seed) for seed in range(4)]
    with x64(True):
        state = tx.init(jax.tree.map(jnp.asarray, gradients[0]))
        mean = jax.tree.map(np.zeros_like, gradients[0])
        for gradient in gradients:
            got, state = jax.jit(tx.update)(jax.tree.map(jnp.asarray, gradient), state)
            mean = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, mean, gradient)
            mixed = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, mean, gradient)
            for (path, direction), one in zip(
                jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(mixed), strict=True
            ):
                expected = expected_direction(jax.tree_util.keystr(path), one, steps)
                np.testing.assert_allclose(direction, expected, rtol=0, atol=1e-9, err_msg=str(path))
    for one, other in zip(jax.tree.leaves(state.mean), jax.tree.leaves(mean), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_muon_applies_to_layer_matrices_only():
    config = ModelConfig(64, 10, block_size=8, n_embd=8, n_head=2, n_head_dim=4, n_ff=12, n_layer=2)
    params = jax.eval_shape(lambda: built(config, seed=0)[1])
    mask = jax.tree_util.tree_map_with_path(is_layer_matrix, params)
    hidden = {jax.tree_util.keystr(path) for path, value in jax.tree_util.tree_leaves_with_path(mask) if value}
    kernels = {"['attn']['qkv']", "['attn']['proj']", "['mlp']['up']", "['mlp']['down']"}
    assert hidden == {f"['blocks']{name}['kernel']" for name in kernels}


def model_like(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    tree = layers(seed)
    tree["blocks"]["mlp"]["up"]["bias"] = rng.normal(size=(2, 10))
    return {**tree, "wte": {"embedding": rng.normal(size=(7, 6))}, "ln_f": {"scale": rng.normal(size=6)}}


def moves(tx: optax.GradientTransformation, params: dict, gradients: list[dict]) -> list[dict]:
    params = jax.tree.map(jnp.asarray, params)
    state, found = tx.init(params), []
    for gradient in gradients:
        move, state = jax.jit(tx.update)(jax.tree.map(jnp.asarray, gradient), state, params)
        found.append({jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(move)})
    return found


RATES = jnp.array([1e-2, 2e-2, 5e-3])


def rate(count: jax.Array) -> jax.Array:
    return RATES[count]


def test_other_arrays_are_updated_by_adamw():
    config = OptimizerConfig(weight_decay=0.1, betas=(0.9, 0.95), kind="muon")
    params, gradients = model_like(9), [model_like(seed) for seed in range(3)]
    for mine, plain in zip(
        moves(make_optimizer(Config(optimizer=config), rate), params, gradients),
        moves(adamw(config, rate), params, gradients),
        strict=True,
    ):
        others = [name for name in plain if "blocks" not in name or "bias" in name]
        assert len(others) == 3
        for name in others:
            np.testing.assert_allclose(mine[name], plain[name], rtol=1e-6, atol=1e-9, err_msg=name)
        assert not np.allclose(mine["['blocks']['mlp']['up']['kernel']"], plain["['blocks']['mlp']['up']['kernel']"])


def test_muon_learning_rate_and_weight_decay_of_matrices():
    config = OptimizerConfig(weight_decay=0.5, kind="muon", muon_factor=4.0, muon_momentum=0.0, muon_steps=5)
    params, gradient = model_like(9), model_like(0)
    with x64(True):
        (got,) = moves(make_optimizer(Config(optimizer=config), 0.01), params, [gradient])
    for name, keys in {"proj": ("attn", "proj"), "down": ("mlp", "down")}.items():
        x, g = (tree["blocks"][keys[0]][keys[1]]["kernel"] for tree in (params, gradient))
        expected = -0.01 * (4 * expected_direction(name, g, 5) + 0.5 * x)
        np.testing.assert_allclose(got[f"['blocks']['{keys[0]}']['{name}']['kernel']"], expected, rtol=0, atol=1e-11)


def test_the_gradient_is_clipped_first():
    """Muon ignores the scale of a matrix, but not the relative scale of gradients of different steps."""
    params, short, long = model_like(9), model_like(0), jax.tree.map(lambda x: 1e3 * x, model_like(1))
    free, clipped = (
        moves(
            make_optimizer(Config(optimizer=OptimizerConfig(kind="muon", clip_norm=limit)), 0.01), params, [short, long]
        )[-1]
        for limit in (None, 1.0)
    )
    name = "['blocks']['mlp']['down']['kernel']"
    assert np.abs(free[name] - clipped[name]).max() > 1e-3
