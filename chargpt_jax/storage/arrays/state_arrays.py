"""A training state as named arrays on the host, as a checkpoint stores it.

A name is a path through the state: 'params.wte.embedding'. A JAX key is stored as its bits.
"""

import hashlib
from collections.abc import Mapping
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from chargpt_jax.storage.manifest import Damaged

Arrays = dict[str, np.ndarray]
Description = dict[str, list[object]]
"""{name: [dtype, shape]}, as JSON holds it."""


class State(Protocol):
    """A training state: a pytree of arrays that includes the number of training steps done."""

    @property
    def step(self) -> jax.Array:
        """Number of training steps done, int32 scalar."""


StateT = TypeVar("StateT", bound=State)


class Shaped(Protocol):
    """An array of JAX or NumPy, or a description of one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes."""

    @property
    def dtype(self) -> np.dtype:
        """The type of the elements."""


def named(state: State) -> list[tuple[str, jax.Array]]:
    """Return (name, array) for each array of a state; for a state of shapes, (name, shape)."""
    pairs = jax.tree_util.tree_leaves_with_path(state)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in pairs]


def _is_key(leaf: Shaped) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def stored_shape(leaf: jax.Array) -> Shaped:
    """Return something with the shape and dtype that a checkpoint stores for an array; for a key, those of its bits."""
    return jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf


def on_host(state: State) -> Arrays:
    """Return a state's arrays on the host by name, keys as their bits."""
    leaves = {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in named(state)}
    return {name: np.asarray(array) for name, array in jax.device_get(leaves).items()}


def placed(array: np.ndarray, leaf: jax.Array) -> jax.Array:
    """Put an array on the devices of `leaf`, with its sharding; if `leaf` is a key, as a key.

    The devices may belong to several processes, each of which holds the array.
    """
    if leaf.sharding.is_fully_addressable:
        return jax.device_put(jax.random.wrap_key_data(jnp.asarray(array)) if _is_key(leaf) else array, leaf.sharding)
    there = jax.make_array_from_callback(array.shape, leaf.sharding, lambda part: array[part])
    return jax.random.wrap_key_data(there) if _is_key(leaf) else there


def described(arrays: Mapping[str, Shaped]) -> Description:
    """Return {name: [dtype, shape]}, as JSON holds it."""
    return {name: [str(x.dtype), list(x.shape)] for name, x in arrays.items()}


def digest(arrays: Arrays) -> str:
    """Return the sha256 of names, dtypes, shapes and bytes, in hexadecimal."""
    sha256 = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha256.update(f"{name}\0{array.dtype.name}\0{arrays[name].shape}\0".encode())
        sha256.update(array.reshape(-1).view(np.uint8).data)
    return sha256.hexdigest()


def check_same(file: str, found: Mapping[str, object], expected: Description) -> None:
    """Compare two descriptions of arrays.

    Raises:
        Damaged: if they differ, naming the file and the first array.
    """
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            there, here = (_spelled(side.get(name)) for side in (found, expected))
            raise Damaged(file, f"holds {there} as {name[:100]!a}, but the model has {here}")


def _spelled(array: object) -> str:
    if not isinstance(array, list) or len(array) != 2:
        return "no array" if array is None else f"{array!a}"[:100]
    return f"{array[0]} {array[1]}"[:100]
