"""Meshes that split the parameters: every layout of eight devices trains like one, and shards what its table says.

The eight devices are virtual, in another process: run as a script, this file trains on them and prints the results.
"""

import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from chargpt_jax.compile.hlo import COLLECTIVES, Module, work_per_unit
from chargpt_jax.config import Config, MeshConfig
from chargpt_jax.config.files import load_config
from chargpt_jax.devices import layout, sharding
from chargpt_jax.errors import UserError
from chargpt_jax.model.init import abstract_model
from chargpt_jax.ops.plain import Ops
from chargpt_jax.training import optimizer, stages
from chargpt_jax.training import setup as training_setup
from chargpt_jax.training.dispatch.steps import jit_train_steps, state_shapes
from chargpt_jax.training.run import Run
from chargpt_jax.training.setup import Setup
from chargpt_jax.training.stages import prepare
from tests.corpus_text import small_config, write_words
from tests.devices.eight_devices import run_on_eight

LAYOUTS = [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 4, 1), (2, 2, 2), (2, 1, 4), (1, 8, 1), (1, 4, 2), (1, 2, 4), (1, 1, 8)]
"""All of eight devices: data x fsdp x tensor."""

STEPS = 3


@dataclass(frozen=True)
class Device:
    """The attributes of a device that a mesh uses."""

    id: int
    platform: str = "gpu"
    device_kind: str = "imaginary"
    process_index: int = 0


EIGHT = [Device(i) for i in range(8)]


def config_of(data: int = 0, fsdp: int = 1, tensor: int = 1, batch_size: int = 16, parts: int = 1) -> Config:
    config = load_config("tiny")
    config.model.n_embd, config.model.n_head, config.model.n_ff = 32, 8, 64
    config.data.batch_size, config.optimizer.accumulation_steps = batch_size, parts
    config.mesh = MeshConfig(data, fsdp, tensor)
    return config


@pytest.mark.parametrize(("data", "fsdp", "tensor"), LAYOUTS[1:])
def test_mesh_has_the_axes_of_the_config(data, fsdp, tensor):
    for given in (data, 0):
        mesh = layout.device_mesh(config_of(given, fsdp, tensor), EIGHT)
        assert dict(mesh.shape) == {"data": data, "fsdp": fsdp, "tensor": tensor}


def test_mesh_of_data_alone_keeps_the_parameters_whole():
    mesh = layout.device_mesh(config_of(4), EIGHT)
    assert dict(mesh.shape) == {"data": 4}
    assert not layout.splits_parameters(mesh)
    assert not layout.splits_parameters(None)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            config_of(4, 2, 2),
            "tensor is 4 x 2 x 2, but the number of devices is 8: lower one of them.",
        ),
        (config_of(0, 16, 1, 64), "mesh.data x mesh.fsdp x mesh.tensor is 1 x 16 x 1, but the number of devices is 8"),
        (config_of(4, 2, 1, 12), "data.batch_size is 12, but it must be a multiple of 8 (mesh.data x mesh.fsdp x"),
        (config_of(4, 2, 1, 12), "try 8 or 16."),
        (config_of(4, 2, 1, 4), "try 8."),
        (config_of(2, 2, 1, 12, 2), "must be a multiple of 8"),
        (config_of(1, 6, 1, 12), "mesh.fsdp is 6, but it must divide model.n_embd (32): try 4 or 8."),
        (config_of(1, 1, 3), "mesh.tensor is 3, but it must divide model.n_head (8): try 2 or 4."),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_the_nearest_that_does(config, sentence):
    with pytest.raises(UserError) as error:
        layout.device_mesh(config, EIGHT)
    assert sentence in str(error.value)


def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    config = small_config(write_words(tmp_path / "words.txt", 300))
    config.mesh.fsdp = 4
    with pytest.raises(UserError, match="the number of devices is 1"):
        list(stages.train(config, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def shapes_of(config: Config, kind: str = "adamw") -> Any:
    """Return the training state of a config, as shapes."""
    config.model.vocab_size, config.optimizer.kind = 64, kind
    _, params = abstract_model(config.model, Ops())
    return state_shapes(params, optimizer.empty(config), 0, jnp.float32)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizer_arrays_are_sharded_like_their_parameter(kind):
    mesh = layout.device_mesh(config_of(2, 2, 2), EIGHT)
    state = shapes_of(config_of(), kind)
    found = sharding.optimizer_sharding(state.opt_state, mesh)
    own = sharding.parameter_sharding(state.params, mesh)
    specs = {jax.tree_util.keystr(path): x.spec for path, x in jax.tree_util.tree_leaves_with_path(own)}
    compared = 0
    for path, x in jax.tree_util.tree_leaves_with_path(found):
        name = next((name for name in specs if jax.tree_util.keystr(path).endswith(name)), None)
        assert x.spec == (specs[name] if name else PartitionSpec())
        compared += name is not None
    assert compared >= len(specs)


def test_every_name_of_the_table_is_an_array_of_the_model():
    state = shapes_of(config_of())
    names = {".".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(state.params)}
    assert set(layout.TABLE) <= names


def test_arrays_outside_the_table_are_a_small_part_of_a_large_model():
    config = load_config("nanogpt_baby")
    config.model.vocab_size = 64
    _, params = abstract_model(config.model, Ops())
    whole, rest = 0, 0
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        whole += x.size
        rest += x.size * (".".join(k.key for k in path) not in layout.TABLE)
    assert rest / whole < 0.01


def trained(workdir: Path, data: int, fsdp: int, tensor: int, kind: str = "adamw", parts: int = 1) -> dict[str, Any]:
    """Train in float64 on eight devices, to distinguish bugs from rounding."""
    training_setup.compute_dtype = lambda amp: jnp.float64
    run = Run.load(workdir)
    run.config.mesh = MeshConfig(data, fsdp, tensor)
    run.config.optimizer = replace(run.config.optimizer, kind=kind, accumulation_steps=parts)
    setup = Setup.of(run)
    params = setup.initial_params()
    setup = replace(setup, initial_params=lambda: jax.tree.map(lambda x: x.astype(jnp.float64), params))
    tx = optimizer.make_optimizer(run.config, 1e-2, setup.mesh)
    state = setup.initial_state(tx)
    steps = jit_train_steps(run.config, setup.graphdef, tx, setup.mesh, state)
    compiled = steps.lower(state, setup.on_device, np.int32(STEPS)).compile()
    given = jax.tree.leaves(compiled.input_shardings[0][0])
    state, history = compiled(state, setup.on_device, np.int32(STEPS))
    found = jax.tree_util.tree_leaves_with_path((state.params, state.opt_state))
    text = compiled.as_text()
    work = work_per_unit(text)
    arrays = jax.tree.leaves(state)
    return {
        "losses": np.asarray(history["loss"])[:STEPS].tolist(),  # waits for the result
        "validation": setup.validator()(state.params, 0),
        "params": {jax.tree_util.keystr(k): x.tolist() for k, x in jax.tree_util.tree_leaves_with_path(state.params)},
        "shards": {
            jax.tree_util.keystr(path): [list(x.shape), list(x.sharding.shard_shape(x.shape))] for path, x in found
        },
        "bytes": work.collective_bytes,
        "exchanged": exchanged_shapes(text),
        "same": all(one.is_equivalent_to(x.sharding, x.ndim) for one, x in zip(given, arrays, strict=True)),
    }


def exchanged_shapes(text: str) -> list[list[int]]:
    """Return the shapes of all operands and results of a program's collectives."""
    computations = Module(text).computations.values()
    found = set()
    for computation in computations:
        for one in computation.values():
            if one.opcode.removesuffix("-start") in COLLECTIVES:
                known = [computation[name].shape for name in one.operand_names()]
                found |= {shape for text in (one.shape, *known) for shape in re.findall(r"\[([\d,]*)\]", text)}
    return sorted([int(n) for n in shape.split(",") if n] for shape in found)


CASES = {
    **{" x ".join(map(str, sizes)): sizes for sizes in LAYOUTS},
    "one": (1, 1, 1),
    "one, Muon": (1, 1, 1, "muon"),
    "2 x 2 x 2, Muon": (2, 2, 2, "muon"),
    "2 x 2 x 2, in two parts": (2, 2, 2, "adamw", 2),
    "1 x 8 x 1, in two parts": (1, 8, 1, "adamw", 2),
}
SPLIT = [name for name in CASES if not name.startswith("one")]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    config = small_config(write_words(folder / "words.txt", 3000), dropout=0.2, n_layer=2)
    config.model.n_embd, config.model.n_head, config.model.n_ff = 32, 8, 64
    config.data.batch_size, config.data.padding_chance = 16, 0.5
    list(prepare(config, folder / "run"))
    results, printed = run_on_eight(__file__, folder / "run")
    assert "rematerialization" not in printed, "XLA warns that it replicates an array"
    return {**results, "config": config}


def alone(name: str) -> str:
    return "one, Muon" if "Muon" in name else "one"


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLIT)
def test_every_layout_trains_and_validates_like_one_device(found, name):
    one, many = found[alone(name)], found[name]
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-6)
    np.testing.assert_allclose(many["validation"], one["validation"], rtol=1e-6)
    for path, expected in one["params"].items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(many["params"][path], expected, rtol=0, atol=1e-6 * scale, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLIT)
def test_compiled_program_shards_what_the_table_shards(found, name):
    """Its results have the table's shapes on each device, and its arguments are sharded like its results."""
    sizes = dict(zip(layout.AXES, CASES[name][:3], strict=True))
    assert found[name]["same"]
    for path, (shape, part) in found[name]["shards"].items():
        keys = [key.strip("'\"") for key in path.replace("]", "").split("[")]
        names = ".".join(keys[keys.index("blocks") :]) if "blocks" in keys else ""
        spec = layout.TABLE.get(names, PartitionSpec()) if sizes["fsdp"] * sizes["tensor"] > 1 else PartitionSpec()
        axes = [*spec, *[None] * (len(shape) - len(spec))]
        assert part == [n // sizes[axis] if axis else n for n, axis in zip(shape, axes, strict=True)], path


def expected_bytes(config: Config, shards: dict[str, list[list[int]]], case: tuple[Any, ...]) -> dict[str, int]:
    """Return the bytes that each kind of collective has to move per training step, in float64.

    Args:
        config: of the training.
        shards: {path: the shape of an array, and of a device's part of it}.
        case: data x fsdp x tensor, and perhaps the optimizer and the number of microbatches.
    """
    data, fsdp, tensor, kind, parts = (*case, *("adamw", 1)[len(case) - 3 :])
    params = {path: shape for path, shape in shards.items() if path.startswith("[0]")}
    matrices = {path: np.prod(shape[1]) for path, shape in params.items() if "kernel" in path}
    gathered = sum(matrices.values()) * fsdp
    replicated = sum(np.prod(part) for path, (_, part) in params.items() if path not in matrices)
    qkv = sum(np.prod(part) for path, (_, part) in params.items() if "qkv" in path)
    activations = config.data.batch_size // (data * fsdp) * config.model.block_size * config.model.n_embd
    found = {
        "all-gather": 2 * parts * gathered if fsdp > 1 else 0,
        "reduce-scatter": parts * gathered if fsdp > 1 else 0,
        "collective-permute": 2 * qkv if tensor > 1 else 0,
        "all-reduce": (sum(matrices.values()) if data > 1 else 0)
        + (replicated if data * fsdp > 1 else 0)
        + (4 * config.model.n_layer * activations if tensor > 1 else 0),
        "all-to-all": 0,
    }
    if kind == "muon":
        padded = -(-config.model.n_layer // 8) * 8 / config.model.n_layer * sum(matrices.values())
        found["all-to-all"] = int(2 * padded * ((fsdp > 1) + (tensor > 1)))
        found["all-gather"] += int(padded) if data > 1 else 0
    return {name: 8 * int(size) for name, size in found.items()}


SCALARS = 512
"""Bytes of the sums of scalars in one training step, at most."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SPLIT if name != "8 x 1 x 1"])
def test_devices_exchange_each_layers_matrices_and_no_more(found, name):
    """Per layer: two gathers and one scattered sum (fsdp), four sums of activations (tensor). No stack is gathered."""
    expected = expected_bytes(found["config"], found[name]["shards"], CASES[name])
    for kind in expected.keys() | found[name]["bytes"].keys():
        extra = found[name]["bytes"].get(kind, 0) - expected.get(kind, 0)
        assert 0 <= extra <= (SCALARS if kind == "all-reduce" else 0), kind
    if "Muon" in name:  # which exchanges stacks of full matrices, but each device only those of its layers
        return
    stacks = [shape for shape, part in found[name]["shards"].values() if len(shape) == 3 and shape != part]
    assert stacks
    assert not [shape for shape in stacks if shape in found[name]["exchanged"]]


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    print(json.dumps({name: trained(Path(sys.argv[1]), *case) for name, case in CASES.items()}))
