"""Which part of an optimizer state a device stores; test_sharding.py tests the results."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from chargpt_jax.config import Config, OptimizerConfig
from chargpt_jax.devices import sharding
from chargpt_jax.devices.sharding import optimizer_sharding, sharded_update
from chargpt_jax.training import optimizer
from tests.devices.test_sharding import Device

PARAMS = {
    "blocks": {"large": jnp.ones((2, 512, 256)), "small": jnp.ones((2, 8))},
    "wte": {"embedding": jnp.ones((1024, 256))},
}
SHARE, WHOLE = ("data",), ()


@pytest.mark.parametrize(("kind", "hidden"), [("adamw", SHARE), ("muon", None)])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_only_adam_moments_of_large_arrays_are_sharded(kind, hidden, clip):
    mesh = sharding.data_mesh(2, [Device("gpu", id=i) for i in range(2)])
    tx = optimizer.make_optimizer(Config(optimizer=OptimizerConfig(kind=kind, clip_norm=clip)), 1e-3, mesh)
    state = jax.eval_shape(tx.init, PARAMS)
    found = optimizer_sharding(state, mesh)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    adam = [x for x in jax.tree.leaves(found, is_leaf=is_adam) if is_adam(x)]
    assert len(adam) == 1
    for moment in (adam[0].mu, adam[0].nu):
        assert tuple(moment["wte"]["embedding"].spec) == SHARE
        assert tuple(moment["blocks"]["small"].spec) == WHOLE
        if hidden is not None:
            assert tuple(moment["blocks"]["large"].spec) == hidden
    assert tuple(adam[0].count.spec) == WHOLE
    others = [x for x in jax.tree.leaves(found, is_leaf=is_adam) if not is_adam(x)]
    assert {tuple(x.spec) for x in others} <= {WHOLE}
    assert bool(others) == (kind == "muon")  # the momentum of Muon


def is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)


def test_sharded_update_on_one_device_changes_nothing():
    tx = optax.adamw(1e-2, weight_decay=0.1)
    rng = np.random.default_rng(0)
    gradient = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), PARAMS)
    expected = jax.jit(tx.update)(gradient, tx.init(PARAMS), PARAMS)
    for mesh in (None, sharding.data_mesh(1)):
        found = jax.jit(sharded_update(tx, mesh).update)(gradient, tx.init(PARAMS), PARAMS)
        for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_array_equal(ours, theirs)
