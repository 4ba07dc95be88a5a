"""A training state as named arrays on the host: what a checkpoint holds, and what tells it from another.

A name is a path through the state: 'params.wte.embedding'. A key of JAX is held as its bits.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chargpt_jax.storage.manifest import Damaged
from chargpt_jax.training.step import TrainState

Arrays = dict[str, np.ndarray]


def named(state: TrainState) -> list[tuple[str, Any]]:
    """Return a state's arrays, or their shapes, with their names."""
    pairs = jax.tree_util.tree_leaves_with_path(state)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in pairs]


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def plain(leaf: Any) -> Any:
    """Return an array's shape and dtype as they are written; of a typed key, those of its bits."""
    return jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf


def on_host(state: TrainState) -> Arrays:
    """Return a state's arrays on the host, keys as their bits."""
    leaves = {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in named(state)}
    return {name: np.asarray(array) for name, array in jax.device_get(leaves).items()}


def placed(array: np.ndarray, leaf: Any) -> jax.Array:
    """Put an array on the devices of `leaf`, as a key where that is one."""
    return jax.device_put(jax.random.wrap_key_data(jnp.asarray(array)) if _is_key(leaf) else array, leaf.sharding)


def described(arrays: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return {name: [dtype, shape]} as JSON holds it."""
    return {name: [str(x.dtype), list(x.shape)] for name, x in arrays.items()}


def digest(arrays: Arrays) -> str:
    """Return the sha256 of names, dtypes, shapes and bytes."""
    sha256 = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha256.update(f"{name}\0{array.dtype.name}\0{arrays[name].shape}\0".encode())
        sha256.update(array.reshape(-1).view(np.uint8).data)
    return sha256.hexdigest()


def check_same(file: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse what a file of a checkpoint says of its arrays, as `described` has it, where other arrays are wanted."""
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            there, here = (_spelled(side.get(name)) for side in (found, wanted))
            raise Damaged(file, f"holds {there} as {name[:100]!a}, where the model has {here}")


def _spelled(array: Any) -> str:
    return "nothing" if array is None else f"{array[0]} {array[1]}"[:100]
