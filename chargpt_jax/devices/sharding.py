"""Sharding: the mesh of devices that split a batch, and what each of them holds.

Data parallelism with a sharded optimizer update (ZeRO-1; Xu et al. 2020, "Automatic cross-replica sharding of weight
update in data-parallel training"). After the all-reduce every device holds the same gradient. Instead of repeating the
same update, each device updates its part of the parameters, keeps only that part of Adam's moments, and the parameters
are gathered afterwards. The result is the same, because Adam treats each element by itself.
"""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

LEAST_SHARED = 2**17
"""Numbers in an array at least, for each device to hold a part of it only: to bring parts together takes time too."""


def data_mesh(batch_size: int, devices: list[Any] | None = None, tell: bool = True) -> Mesh:
    """Make the mesh that shares a batch, one axis named 'data': as many local devices as divide it evenly.

    Their number also divides that of all devices: a TPU's all-reduce needs that. `tell`: log where some stay idle.
    """
    devices = jax.local_devices() if devices is None else devices
    count = math.gcd(batch_size, len(devices))
    if tell and count < len(devices) and devices[0].platform != "cpu":
        logging.getLogger(__name__).warning("%d sequences share %d of %d devices", batch_size, count, len(devices))
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:count])


def describe(mesh: Mesh) -> str:
    """Name the devices in use: '1 x cpu', '8 x TPU v5 lite'."""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}"


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device holds whole: parameters and the corpus."""
    return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh, x: Any) -> NamedSharding:
    """Return the sharding of what each device holds a part of, for an array or shape.

    It is cut along the first axis that the devices divide evenly. A small one, or one without such an axis, is whole.
    """
    axes = [axis for axis, length in enumerate(x.shape) if length % mesh.size == 0]
    if mesh.size == 1 or x.size < LEAST_SHARED or not axes:
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*[None] * axes[0], "data"))


def shard(mesh: Mesh | None, tree: Any) -> Any:
    """Inside jit, let each device work on its part of every array that `sharded` splits; None: leave the tree alone."""
    return tree if mesh is None else jax.tree.map(lambda x: _constrained(x, sharded(mesh, x), mesh), tree)


def replicate(mesh: Mesh | None, tree: Any) -> Any:
    """Inside jit, let every device have the whole of every array that `sharded` splits; None: leave the tree alone."""
    return tree if mesh is None else jax.tree.map(lambda x: _constrained(x, replicated(mesh), mesh), tree)


def _constrained(x: jax.Array, how: NamedSharding, mesh: Mesh) -> jax.Array:
    # What is never cut is whole already, and to say so of every small array makes a start longer.
    return x if sharded(mesh, x).is_fully_replicated else jax.lax.with_sharding_constraint(x, how)


def with_sharding(shardings: Any, tree: Any) -> Any:
    """Return the shapes of a tree of arrays or shapes, said to lie as a tree of shardings, or one for all, has it."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda x, how: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=how), tree, shardings)


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Inside jit, split a batch's leading axis over the mesh."""
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, PartitionSpec("data")))


def psum_over_data(f: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Let each device of a mesh call f(whole, rows) on rows of its own; bring the results together once.

    Left to itself the compiler would sum the gradient of each layer inside the loop over layers, and the devices would
    wait for each other there.

    Args:
        f: returns two trees, of which the first is summed over the devices and the second's least is taken.
        mesh: as of `data_mesh`; `rows` are split over it, `whole` is what every device holds.
    """
    if mesh.size == 1:
        return f

    def on_each(whole: Any, rows: Any) -> Any:
        sums, least = f(whole, rows)
        least = jax.tree.map(lambda x: jax.lax.pmin(x.astype(jnp.float32), "data").astype(x.dtype), least)
        return jax.lax.psum(sums, "data"), least

    specs = (PartitionSpec(), PartitionSpec("data"))
    return jax.shard_map(on_each, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)


def map_over_data(f: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """Let each device of a mesh call f on some rows of a tree of arrays.

    Of results whose rows the devices divide evenly each keeps its own, of the others every device has all.

    Args:
        f: of a tree of arrays whose rows do not concern each other, to one of as many rows.
        mesh: as of `data_mesh`; None: one device does it all.
    """
    if mesh is None or mesh.size == 1:
        return f

    def shared_out(tree: Any) -> Any:
        # Zeros make up for rows that are lacking.
        even = jax.tree.map(lambda x: jnp.pad(x, ((0, -len(x) % mesh.size), *((0, 0),) * (x.ndim - 1))), tree)
        made = jax.shard_map(f, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))(even)
        everywhere = lambda y: jax.lax.with_sharding_constraint(y, replicated(mesh))  # noqa: E731
        return jax.tree.map(lambda x, y: y if len(x) % mesh.size == 0 else everywhere(y)[: len(x)], tree, made)

    return shared_out


def sharded_update(tx: optax.GradientTransformation, mesh: Mesh | None) -> optax.GradientTransformation:
    """Let each device of a mesh make its share of a transform's updates and keep its share of the state.

    Args:
        tx: a transform that treats every number by itself.
        mesh: as of `data_mesh`; None: each device makes and keeps all.
    """
    share = partial(shard, mesh)

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = tx.update(share(gradient), share(state), share(params))
        return share(updates), share(state)

    return optax.GradientTransformation(tx.init, update)


def optimizer_sharding(state: optax.OptState, mesh: Mesh) -> Any:
    """Return how an optimizer's state, arrays or shapes, lies on a mesh: Adam's moments in shares, all else whole."""
    is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)  # noqa: E731

    def lie(node: Any) -> Any:
        how = partial(sharded, mesh) if is_adam(node) else lambda _: replicated(mesh)
        return jax.tree.map(how, node)

    return jax.tree.map(lie, state, is_leaf=is_adam)
