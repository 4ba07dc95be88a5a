"""Data parallelism: a mesh of devices that split a batch, and arrays that are replicated or sharded over it.

Functions here accept both kinds of mesh: the usual one, described here, and one that splits the parameters of a model
that is too large for a device (layout.py).

- The usual mesh has one axis, 'data'. Each device computes the gradient of its part of the batch; psum adds them up.
- Parameters and corpus are replicated: each device holds a full copy.
- The optimizer update is sharded (ZeRO-1; Xu et al. 2020, "Automatic cross-replica sharding of weight update in
  data-parallel training"). After the psum every device holds the same gradient. Each device then updates its shard of
  the parameters and stores only that shard of Adam's moments; the parameters are gathered afterwards. The result is
  the same, because Adam treats each element by itself.
"""

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from chargpt_jax.devices import layout, per_device
from chargpt_jax.errors import UserError

MIN_SHARDED_SIZE = 2**17
"""Arrays with fewer elements are replicated: gathering the shards takes time too."""

Tree = TypeVar("Tree")
Shared = TypeVar("Shared")
Rows = TypeVar("Rows")
Sums = TypeVar("Sums")
Minima = TypeVar("Minima")


class Shaped(Protocol):
    """An array, or its shape and dtype (jax.ShapeDtypeStruct)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""
        ...

    @property
    def size(self) -> int:
        """Number of elements."""
        ...


def data_mesh(batch_size: int, devices: Sequence[jax.Device] | None = None, tell: bool = True) -> Mesh:
    """Return the mesh that splits a batch: as many devices as divide it evenly, on one axis named 'data'.

    Every process has the same number of devices in the mesh. On accelerators the number of devices in the mesh also
    divides the number of all devices, which a TPU's all-reduce requires.

    Args:
        batch_size: number of sequences.
        devices: to choose from; None: all devices of all processes.
        tell: log a warning if some devices stay idle.

    Raises:
        UserError: if the number of processes does not divide the batch, or a TPU slice cannot run on a part of its
            devices.
    """
    devices = jax.devices() if devices is None else devices
    hosts = len({device.process_index for device in devices})
    if batch_size % hosts:
        raise UserError(
            f"data.batch_size / optimizer.accumulation_steps is {batch_size}, but it must be a multiple of the number "
            f"of processes, {hosts}: change one of them."
        )
    if devices[0].platform == "cpu":
        local = len(devices) // hosts
        count = hosts * max(n for n in range(1, local + 1) if batch_size // hosts % n == 0)
    else:
        count = hosts * math.gcd(batch_size // hosts, len(devices) // hosts)
    if tell and count < len(devices) and devices[0].platform != "cpu":
        logging.getLogger(__name__).warning(
            "batch of %d is split over %d of %d devices; the others are idle", batch_size, count, len(devices)
        )
    used = layout.from_each_process(devices, count)
    try:
        return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=used)
    except AssertionError:
        raise UserError(
            f"data.batch_size / optimizer.accumulation_steps is {batch_size}, which {count} of {len(devices)} devices "
            f"share, but these are not a rectangle of the TPU slice: make it a multiple of {len(devices)}."
        ) from None


def describe(mesh: Mesh, available: int = 0) -> str:
    """Return the number and kind of the devices in use: '1 x cpu', '8 x TPU v5 lite', '2 of 3 x cpu'.

    Args:
        mesh: the devices in use.
        available: number of all devices, mentioned if it is larger.
    """
    count = f"{mesh.size} of {available}" if available > mesh.size else f"{mesh.size}"
    return f"{count} x {mesh.devices.flat[0].device_kind}"


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh, x: Shaped) -> NamedSharding:
    """Return the sharding of an array that is split along its first axis that the devices divide evenly.

    An array without such an axis, or with fewer than MIN_SHARDED_SIZE elements, is replicated.
    """
    axes = [axis for axis, length in enumerate(x.shape) if length % mesh.size == 0]
    if mesh.size == 1 or x.size < MIN_SHARDED_SIZE or not axes:
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*[None] * axes[0], "data"))


def put(tree: Any, shardings: Any) -> Any:
    """Put a tree of arrays on devices: one sharding for all, or a tree of them.

    Each process holds the same values, and puts only those parts on its devices that belong there.
    """
    if isinstance(shardings, Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    if all(sharding.is_fully_addressable for sharding in jax.tree.leaves(shardings)):
        return jax.device_put(tree, shardings)
    return jax.tree.map(place, tree, shardings)


def place(x: jax.Array | np.ndarray, to: Sharding) -> jax.Array:
    """Put an array, or a random key, that every process holds on devices of several processes."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(place(jax.random.key_data(x), to), impl=jax.random.key_impl(x))
    values = np.asarray(x)
    return jax.make_array_from_callback(values.shape, to, lambda part: values[part])


def shard(mesh: Mesh | None, tree: Tree) -> Tree:
    """Inside jit, split each array of a tree as `sharded` says, or by name; without a mesh, return the tree."""
    if layout.splits_parameters(mesh):
        return layout.constrained(mesh, tree)
    return tree if mesh is None else jax.tree.map(lambda x: _constrain(x, sharded(mesh, x), mesh), tree)


def replicate(mesh: Mesh | None, tree: Tree) -> Tree:
    """Inside jit, gather each array of a tree that `sharded` splits; return the tree if parameters stay split."""
    return (
        tree
        if mesh is None or layout.splits_parameters(mesh)
        else jax.tree.map(lambda x: _constrain(x, replicated(mesh), mesh), tree)
    )


def _constrain(x: jax.Array, to: NamedSharding, mesh: Mesh) -> jax.Array:
    # Small arrays are always replicated. A constraint on each of them would only make compilation longer.
    return x if sharded(mesh, x).is_fully_replicated else jax.lax.with_sharding_constraint(x, to)


def shard_batch(mesh: Mesh, batch: Tree) -> Tree:
    """Inside jit, split the leading axis of a batch's arrays over the axis 'data' of a mesh."""
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, PartitionSpec("data")))


def batches_of_steps(mesh: Mesh) -> NamedSharding:
    """Return the sharding of the batches of several steps, [steps, B, ...]: their sequences are split over the mesh."""
    rows = layout.BATCH if layout.splits_parameters(mesh) else PartitionSpec("data")
    return NamedSharding(mesh, PartitionSpec(None, *rows))


def own_part(to: Sharding, shape: Sequence[int]) -> tuple[slice, ...]:
    """Return the part of an array that the devices of this process hold, the smallest one with all of their shards."""
    parts = list(to.addressable_devices_indices_map(tuple(shape)).values())
    bounds = [[part[axis].indices(length)[:2] for part in parts if part] for axis, length in enumerate(shape)]
    return tuple(slice(min(start for start, _ in axis), max(stop for _, stop in axis)) for axis in bounds)


def with_sharding(shardings: Any, tree: Tree) -> Tree:
    """Return the shapes of a tree of arrays or shapes, with shardings: one for all, or a tree of them."""
    if isinstance(shardings, Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), tree, shardings)


def psum_over_data(
    f: Callable[[Shared, Rows], tuple[Sums, Minima]], mesh: Mesh | None, like: Any = None
) -> Callable[[Shared, Rows], tuple[Sums, Minima]]:
    """Return a function that runs f(shared, rows) on every device, for its own rows, and combines the results.

    Without this, XLA would sum the gradient of each layer inside the loop over layers, and the devices would wait for
    each other in every layer.

    Args:
        f: returns two trees. The first is summed over the devices; of the second the minimum is returned.
        mesh: `rows` are split over it, and `shared` is replicated, but if the mesh splits parameters, f gets a device's
            shards of them. None: one device.
        like: a tree with the structure of the sums, for the names of its arrays: those of parameters are sharded.
    """
    if layout.splits_parameters(mesh):
        return per_device.sum_over_batch(f, mesh, like)
    if mesh is None or mesh.size == 1:
        return f

    def on_each_device(shared: Shared, rows: Rows) -> tuple[Sums, Minima]:
        sums, minima = f(shared, rows)
        minima = jax.tree.map(lambda x: jax.lax.pmin(x.astype(jnp.float32), "data").astype(x.dtype), minima)
        return jax.lax.psum(sums, "data"), minima

    specs = (PartitionSpec(), PartitionSpec("data"))
    return jax.shard_map(on_each_device, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)


def scalars_over_data(
    f: Callable[[Shared, Rows], tuple[jax.Array, jax.Array]], mesh: Mesh
) -> Callable[[Shared, Rows], tuple[jax.Array, jax.Array]]:
    """Return a function that computes f(shared, rows), two scalars that are sums over the sequences, on all devices."""
    if not layout.splits_parameters(mesh):
        return lambda shared, rows: f(shared, shard_batch(mesh, rows))

    def both(shared: Shared, rows: Rows) -> tuple[tuple[jax.Array, jax.Array], tuple[()]]:
        return f(shared, rows), ()

    summed = per_device.sum_over_batch(both, mesh, like=(0, 0))
    return lambda shared, rows: summed(shared, rows)[0]


def map_over_data(f: Callable[[Tree], Tree], mesh: Mesh | None) -> Callable[[Tree], Tree]:
    """Return a function that splits a tree's arrays along their leading axis and runs f on each device.

    A result whose leading axis the devices divide evenly stays split; other results are replicated. If the mesh splits
    parameters, the results are sharded like their parameters.

    Args:
        f: from a tree of arrays to one of the same shapes; it treats each index of the leading axis by itself.
        mesh: the devices; None: one device.
    """
    if layout.splits_parameters(mesh):
        return per_device.map_over_layers(f, mesh)
    if mesh is None or mesh.size == 1:
        return f

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, -len(x) % mesh.size), *((0, 0),) * (x.ndim - 1)))

    def trim(x: jax.Array, y: jax.Array) -> jax.Array:
        even = len(x) % mesh.size == 0
        return y if even else jax.lax.with_sharding_constraint(y, replicated(mesh))[: len(x)]

    def on_all_devices(tree: Tree) -> Tree:
        padded = jax.tree.map(pad, tree)
        results = jax.shard_map(f, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))(padded)
        return jax.tree.map(trim, tree, results)

    return on_all_devices


def sharded_update(tx: optax.GradientTransformation, mesh: Mesh | None) -> optax.GradientTransformation:
    """Return an optimizer with a sharded update: each device computes its shard and stores that shard of the state.

    Args:
        tx: an optimizer that treats each element by itself.
        mesh: from `data_mesh`; None: one device.
    """
    split = partial(shard, mesh)

    def update(
        gradient: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = tx.update(split(gradient), split(state), split(params))
        return split(updates), split(state)

    return optax.GradientTransformation(tx.init, update)


def apply_updates(mesh: Mesh | None, params: optax.Params, updates: optax.Updates) -> optax.Params:
    """Add an optimizer's updates to the parameters; each device adds its shard, then the parameters are gathered."""
    new_params = optax.apply_updates(shard(mesh, params), shard(mesh, updates))
    return replicate(mesh, shard(mesh, new_params))


def parameter_sharding(params: Any, mesh: Mesh) -> Any:
    """Return the sharding of each array of the parameters: replicated, unless the mesh splits parameters."""
    if layout.splits_parameters(mesh):
        return jax.tree_util.tree_map_with_path(lambda path, _: layout.sharding_of(mesh, path), params)
    return jax.tree.map(lambda _: replicated(mesh), params)


def optimizer_sharding(state: optax.OptState, mesh: Mesh) -> optax.OptState:
    """Return the sharding of each array of an optimizer state.

    If the mesh splits parameters, arrays have the sharding of their parameter. Otherwise Adam's moments are sharded,
    and all else is replicated.
    """
    if layout.splits_parameters(mesh):
        return jax.tree_util.tree_map_with_path(lambda path, _: layout.sharding_of(mesh, path), state)

    def is_adam(node: object) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    def sharding_of(node: optax.OptState) -> optax.OptState:
        return jax.tree.map(partial(sharded, mesh) if is_adam(node) else lambda _: replicated(mesh), node)

    return jax.tree.map(sharding_of, state, is_leaf=is_adam)
