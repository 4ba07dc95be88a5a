"""Exchanges between the devices of a mesh that splits the parameters.

The eight devices are virtual, in another process: run as a script, this file computes on them and prints the results.
"""

import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from chargpt_jax.devices import layout, per_device
from tests.devices.eight_devices import run_on_eight

TENSOR = range(2, 9)
MESHES = [(2, 2, 2), (1, 4, 2), (1, 1, 8), (4, 2, 1), (1, 2, 3)]
"""Data x fsdp x tensor."""

LAYERS, WIDTH, HEAD = 3, 16, 2


@pytest.mark.parametrize("tensor", range(1, 25))
def test_each_device_sends_and_receives_one_chunk_per_round(tensor):
    rounds = list(per_device._rounds(tensor))
    assert sorted(chunk for sent in rounds for chunk in sent) == list(range(3 * tensor))
    for sent in rounds:
        assert [chunk // 3 for chunk in sent] == list(range(tensor))
        assert sorted(chunk % tensor for chunk in sent) == list(range(tensor))


def mesh_of(*sizes: int) -> Mesh:
    types = (AxisType.Auto,) * 3
    return jax.make_mesh(sizes, layout.AXES, axis_types=types, devices=jax.devices()[: int(np.prod(sizes))])


def exchanged(tensor: int, back: bool) -> Any:
    """Return the column numbers of q, k and v after the exchange; two heads per device."""
    spec = PartitionSpec(None, "tensor")
    f = partial(per_device._exchange, tensor=tensor, back=back)
    run = jax.shard_map(f, mesh=mesh_of(1, 1, tensor), in_specs=spec, out_specs=spec, check_vma=False)
    return np.asarray(jax.jit(run)(jnp.arange(3 * 2 * HEAD * tensor)[None])).tolist()


def of_layers(*sizes: int) -> Any:
    """Return the largest error of a function that differs by layer and needs full matrices."""
    heads = WIDTH * sizes[2]
    shapes = {"up": {"kernel": (LAYERS, WIDTH, heads)}, "down": {"kernel": (LAYERS, heads, WIDTH)}}
    tree = {"blocks": {"mlp": jax.tree.map(lambda s: np.random.rand(*s), shapes, is_leaf=lambda s: type(s) is tuple)}}

    def f(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.cumsum(jnp.cumsum(x, axis=1), axis=2), tree)

    found = jax.jit(per_device.map_over_layers(f, mesh_of(*sizes)))(tree)
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), found, f(tree))))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_on_eight(__file__, tmp_path_factory.mktemp("none"))[0]


@pytest.mark.slow
@pytest.mark.parametrize("tensor", TENSOR)
def test_devices_exchange_the_columns_of_their_heads(found, tensor):
    stored = np.arange(3 * 2 * HEAD * tensor)
    used = stored.reshape(3, tensor, -1).swapaxes(0, 1).reshape(-1)  # a device's queries, keys and values
    assert found["there"][str(tensor)] == [used.tolist()]
    assert found["back"][str(tensor)] == [np.argsort(used).tolist()]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
def test_devices_share_the_layers_of_full_matrices(found, sizes):
    assert found["layers"][str(sizes)] < 1e-9


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    results = {
        "there": {tensor: exchanged(tensor, False) for tensor in TENSOR},
        "back": {tensor: exchanged(tensor, True) for tensor in TENSOR},
        "layers": {str(sizes): of_layers(*sizes) for sizes in MESHES},
    }
    print(json.dumps(results, default=str))
