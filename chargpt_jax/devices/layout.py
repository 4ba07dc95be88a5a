"""Which device holds which part of a large model: one table from the names of arrays to mesh axes.

The mesh has three axes (`MeshConfig`):

- data: each device computes the gradient of its part of the batch.
- fsdp: the same, and the parameters and Adam's moments are sharded; they are gathered where they are used (Zhao et al.
  2023, "PyTorch FSDP").
- tensor: each device computes a part of every matrix multiplication (Shoeybi et al. 2019, "Megatron-LM"): the matrices
  that widen split their columns, and those that narrow split their rows.

The model's operations (ops/sharded.py) and per_device.py contain the collectives of the forward and the backward pass;
XLA inserts those of the optimizer update, which exchanges a few scalars (GSPMD; Xu et al. 2021).
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from chargpt_jax.config import Config
from chargpt_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

BATCH = PartitionSpec(("data", "fsdp"))
"""Of the sequences of a batch."""

TABLE = {
    "blocks.attn.qkv.kernel": PartitionSpec(None, "fsdp", "tensor"),  # [L, C, 3 H D]
    "blocks.attn.qkv.bias": PartitionSpec(None, "tensor"),  # [L, 3 H D]
    "blocks.attn.proj.kernel": PartitionSpec(None, "tensor", "fsdp"),  # [L, H D, C]
    "blocks.mlp.up.kernel": PartitionSpec(None, "fsdp", "tensor"),  # [L, C, F]
    "blocks.mlp.up.bias": PartitionSpec(None, "tensor"),  # [L, F]
    "blocks.mlp.down.kernel": PartitionSpec(None, "tensor", "fsdp"),  # [L, F, C]
}
"""The sharded arrays of the model; all others are small and replicated, as is the embedding of the few characters. The
optimizer's arrays of the same names have the same sharding."""


def splits_parameters(mesh: Mesh | None) -> TypeGuard[Mesh]:
    """Return whether a mesh shards the parameters of a model, as opposed to the batch alone."""
    return mesh is not None and mesh.axis_names == AXES


def name_of(path: Sequence[Any]) -> str:
    """Return the name of a parameter, such as 'blocks.mlp.up.kernel', given its path in a tree; others have ''."""
    names: list[str] = []
    for key in path:
        names = [*names, str(key.key)] if isinstance(key, jax.tree_util.DictKey) else []
    return ".".join(names)


def spec_of(path: Sequence[Any]) -> PartitionSpec:
    """Return how an array of the parameters or of the optimizer's state is sharded, given its path in a tree."""
    return TABLE.get(name_of(path), PartitionSpec())


def specs_of(tree: Any) -> Any:
    """Return how each array of a tree is sharded."""
    return jax.tree_util.tree_map_with_path(lambda path, _: spec_of(path), tree)


def sharding_of(mesh: Mesh, path: Sequence[Any]) -> NamedSharding:
    """Return the sharding of an array of the parameters or of the optimizer's state, given its path in a tree."""
    return NamedSharding(mesh, spec_of(path))


def constrained(mesh: Mesh, tree: Any) -> Any:
    """Inside jit, shard each array of a tree of parameters or optimizer state by its name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.lax.with_sharding_constraint(x, sharding_of(mesh, path)), tree
    )


def from_each_process(devices: Sequence[jax.Device], count: int) -> list[jax.Device]:
    """Return the first `count` devices, of which every process has the same number; in their order."""
    hosts: dict[int, list[jax.Device]] = {}
    for device in devices:
        hosts.setdefault(device.process_index, []).append(device)
    return [device for host in hosts.values() for device in host[: count // len(hosts)]]


def device_mesh(config: Config, devices: Sequence[jax.Device]) -> Mesh:
    """Return the mesh of a config that names one.

    Raises:
        UserError: if the devices, the batch or the model cannot be split like this.
    """
    wanted, model = config.mesh, config.model
    if model.kind != "gpt" and wanted.fsdp * wanted.tensor > 1:
        raise UserError(
            f"mesh.fsdp is {wanted.fsdp} and mesh.tensor is {wanted.tensor}, but with model.kind {model.kind!r} they "
            "must be 1: set mesh.data, or train a 'gpt'."
        )
    each = wanted.fsdp * wanted.tensor
    data = wanted.data or max(1, len(devices) // each)
    if data * each > len(devices):
        more = ", or set JAX_NUM_CPU_DEVICES" if devices[0].platform == "cpu" else ""
        raise UserError(
            f"mesh.data x mesh.fsdp x mesh.tensor is {wanted.data or 1} x {wanted.fsdp} x {wanted.tensor}, but the "
            f"number of devices is {len(devices)}: lower one of them{more}."
        )
    sequences = config.data.batch_size // config.optimizer.accumulation_steps
    if sequences % (data * wanted.fsdp):
        step = data * wanted.fsdp * config.optimizer.accumulation_steps
        lower = config.data.batch_size // step * step
        raise UserError(
            f"data.batch_size is {config.data.batch_size}, but it must be a multiple of {step} (mesh.data x mesh.fsdp "
            f"x optimizer.accumulation_steps): try {f'{lower} or {lower + step}' if lower else step}."
        )
    _check("fsdp", wanted.fsdp, {"model.n_embd": model.n_embd})
    _check("tensor", wanted.tensor, {"model.n_head": model.n_head, "model.n_ff": model.n_ff})
    hosts = len({device.process_index for device in devices})
    if data * each % hosts:
        raise UserError(
            f"mesh is {data} x {wanted.fsdp} x {wanted.tensor} (data x fsdp x tensor), but its product must be a "
            f"multiple of {hosts}, the number of processes: change a number."
        )
    count = 1 if each == 1 else len(AXES)  # with a single axis, every device holds all parameters
    shape, axes = (data, wanted.fsdp, wanted.tensor)[:count], AXES[:count]
    return jax.make_mesh(
        shape, axes, axis_types=(AxisType.Auto,) * count, devices=from_each_process(devices, data * each)
    )


def _check(axis: str, devices: int, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if size % devices:
            fits = [n for n in range(1, size + 1) if all(other % n == 0 for other in sizes.values())]
            near = sorted(sorted(fits, key=lambda n: abs(n - devices))[:2])
            raise UserError(
                f"mesh.{axis} is {devices}, but it must divide {name} ({size}): try {' or '.join(map(str, near))}."
            )
