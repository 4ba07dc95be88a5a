"""Functions that run on each device of a mesh that splits the parameters: what a device gets, and how results combine.

They run in a shard_map over all axes of the mesh (layout.py). So every exchange between devices is written down, here
and in `ops/sharded.py`; XLA adds none.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from chargpt_jax.devices import layout

Shared = TypeVar("Shared")
Rows = TypeVar("Rows")
Sums = TypeVar("Sums")
Minima = TypeVar("Minima")
Tree = TypeVar("Tree")

PARTS = 3
"""Queries, keys and values: their columns follow each other in one array."""


def sum_over_batch(
    f: Callable[[Shared, Rows], tuple[Sums, Minima]], mesh: Mesh, like: Any
) -> Callable[[Shared, Rows], tuple[Sums, Minima]]:
    """Return a function that runs f(shared, rows) on every device, for its own rows, and combines the results.

    f gets this device's shards of the arrays in `layout.TABLE`, and returns shards of the arrays of these names, which
    it has summed over the axis 'fsdp' if that splits them. Devices along 'tensor' have the same rows.

    Args:
        f: returns two trees. The first is summed over the sequences; of the second the minimum is returned.
        mesh: the sequences are split over its axes 'data' and 'fsdp'.
        like: a tree with the structure of the sums, for the names of its arrays.
    """
    tensor = mesh.shape["tensor"]

    def on_each_device(shared: Shared, rows: Rows) -> tuple[Sums, Minima]:
        sums, minima = f(_with_own_heads(shared, tensor), rows)
        minima = jax.tree.map(lambda x: jax.lax.pmin(x.astype(jnp.float32), layout.AXES).astype(x.dtype), minima)
        return jax.tree_util.tree_map_with_path(add, _with_own_heads(sums, tensor, back=True)), minima

    def add(path: Sequence[Any], x: jax.Array) -> jax.Array:
        axes = [axis for axis in ("data", "fsdp") if axis not in layout.spec_of(path) and mesh.shape[axis] > 1]
        return jax.lax.psum(x, axes) if axes else x

    def call(shared: Shared, rows: Rows) -> tuple[Sums, Minima]:
        arguments, results = (layout.specs_of(shared), layout.BATCH), (layout.specs_of(like), PartitionSpec())
        mapped = jax.shard_map(on_each_device, mesh=mesh, in_specs=arguments, out_specs=results, check_vma=False)
        return mapped(shared, rows)

    return call


def map_over_layers(f: Callable[[Tree], Tree], mesh: Mesh) -> Callable[[Tree], Tree]:
    """Return a function that runs f on each device for some of the layers, of which the device gets full matrices.

    A device exchanges its shards of all layers for full matrices of some layers, and the results back. In each of the
    two exchanges it receives as many bytes as its shards have, and with the axis 'data' also the results of others.

    Args:
        f: from a tree of arrays [layers, ...] of names in `layout.TABLE` to one of the same shapes; it treats each
            layer by itself.
        mesh: the devices.
    """
    data = mesh.shape["data"]

    def full(path: Sequence[Any], x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, -len(x) % mesh.size), *((0, 0),) * (x.ndim - 1)))
        for axis, name in _split_axes(path):
            x = jax.lax.all_to_all(x, name, split_axis=0, concat_axis=axis, tiled=True)
        length = len(x) // data
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("data") * length, length)

    def shards(path: Sequence[Any], x: jax.Array, y: jax.Array) -> jax.Array:
        y = jax.lax.all_gather(y, "data", tiled=True) if data > 1 else y
        for axis, name in reversed(list(_split_axes(path))):
            y = jax.lax.all_to_all(y, name, split_axis=axis, concat_axis=0, tiled=True)
        return y[: len(x)]

    def on_each_device(tree: Tree) -> Tree:
        with_path = jax.tree_util.tree_map_with_path
        result: Tree = with_path(shards, tree, f(with_path(full, tree)))
        return result

    def call(tree: Tree) -> Tree:
        specs = layout.specs_of(tree)
        mapped = jax.shard_map(on_each_device, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=False)
        return mapped(tree)

    return call


def _split_axes(path: Sequence[Any]) -> Iterator[tuple[int, str]]:
    """Yield the axes of an array that are split, each with the axis of the mesh that splits it."""
    return ((axis, name) for axis, name in enumerate(layout.spec_of(path)) if name)


def _with_own_heads(tree: Tree, tensor: int, back: bool = False) -> Tree:
    """Return a tree of shards in which the columns of `qkv` are those of this device's heads; `back`: the reverse.

    The table splits the columns of all queries, keys and values as they are stored, which gives a device, for example,
    the queries of some heads and the keys of others.
    """

    def exchanged(path: Sequence[Any], x: jax.Array) -> jax.Array:
        return _exchange(x, tensor, back) if ".qkv." in layout.name_of(path) and tensor > 1 else x

    result: Tree = jax.tree_util.tree_map_with_path(exchanged, tree)
    return result


def _exchange(x: jax.Array, tensor: int, back: bool) -> jax.Array:
    """Exchange the columns of x [..., 3 HD / tensor] so that they belong to the same heads; `back`: the reverse.

    All columns are `3 tensor` chunks. Device s stores the chunks 3 s to 3 s + 2, and the chunk of part p for device d
    is p tensor + d. In each of three rounds a device sends one chunk and receives one.
    """
    own = jax.lax.axis_index("tensor")
    chunks = x.reshape(*x.shape[:-1], PARTS, -1)
    result = jnp.zeros_like(chunks)
    for sent in _rounds(tensor):
        pairs = [(source, chunk % tensor) for source, chunk in enumerate(sent)]
        stored = jnp.asarray([chunk % PARTS for chunk in sent])[own]
        used = jnp.asarray([chunk // tensor for chunk in sorted(sent, key=lambda chunk: chunk % tensor)])[own]
        if back:
            pairs, stored, used = [pair[::-1] for pair in pairs], used, stored
        chunk = jax.lax.dynamic_index_in_dim(chunks, stored, axis=-2)
        result = jax.lax.dynamic_update_slice_in_dim(result, jax.lax.ppermute(chunk, "tensor", pairs), used, axis=-2)
    return result.reshape(x.shape)


def _rounds(tensor: int) -> Iterator[list[int]]:
    """Yield three lists: the chunk that each device sends, such that each device also receives one."""
    for number in range(PARTS):
        turns = [PARTS * device // tensor if tensor % PARTS == 0 else 0 for device in range(tensor)]
        yield [PARTS * device + (number + turn) % PARTS for device, turn in enumerate(turns)]
