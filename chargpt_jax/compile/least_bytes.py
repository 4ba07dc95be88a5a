"""A lower bound on the bytes that a program moves between memory and chip, per device.

Each array below is counted once per direction. Gradients, temporaries and repeated reads are left out, so a real
program moves more. The bound assumes that the arrays do not stay in a cache or in on-chip memory from their writing to
their reading; where they do, as in small models, a program may move less.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from chargpt_jax.model.init import Params
from chargpt_jax.training.step import TrainState, cross_entropy_sum

Parts = dict[str, int]
"""{what: bytes read and written}."""

INT32 = 4
"""Bytes."""


def training(
    state: TrainState, graphdef: nnx.GraphDef[Any], batch_size: int, block_size: int, n_layer: int, devices: int
) -> Parts:
    """Return the parts for one training step: each array is written once and read once, the batch only read.

    Args:
        state: the shapes and shardings of the training state.
        graphdef: the static part of the model.
        batch_size: B, on all devices together.
        block_size: T.
        n_layer: L.
        devices: that split the batch.
    """
    saved = saved_activations(graphdef, state.params, batch_size, block_size, n_layer) // devices
    return {
        "parameters": 2 * bytes_per_device(state.params),
        "optimizer state": 2 * bytes_per_device(state.opt_state),
        "saved activations": 2 * saved,
        "batch": 2 * INT32 * batch_size * block_size // devices,
    }


def saved_activations(
    graphdef: nnx.GraphDef[Any], params: Params, batch_size: int, block_size: int, n_layer: int
) -> int:
    """Return the bytes of the activations that the forward pass of a batch saves in the layers for the backward pass.

    XLA may recompute what is saved outside the layers, such as the softmax of the logits.
    """

    def saved(layers: int, sequences: int) -> int:
        blocks = jax.tree.map(lambda x: jax.ShapeDtypeStruct((layers, *x.shape[1:]), x.dtype), params["blocks"])
        tokens = jax.ShapeDtypeStruct((sequences, block_size), jnp.int32)
        seeds = jax.ShapeDtypeStruct((sequences, 2), jnp.uint32)
        leaves = jax.eval_shape(partial(_residuals, graphdef), {**params, "blocks": blocks}, tokens, seeds)
        return sum(x.size * x.dtype.itemsize for x in leaves)

    # Differences between batch sizes leave out arrays that do not depend on the batch, such as the parameters.
    # Differences between numbers of layers leave out what is outside the layers.
    one, two = (saved(layers, 2) - saved(layers, 1) for layers in (1, 2))
    return (two - one) * batch_size * n_layer


def _residuals(graphdef: nnx.GraphDef[Any], params: Params, tokens: jax.Array, seeds: jax.Array) -> list[jax.Array]:
    """Return the arrays that the forward pass saves for the parameters' gradient, each once."""
    pull_back = jax.vjp(lambda params: cross_entropy_sum(nnx.merge(graphdef, params)(tokens, seeds), tokens), params)[1]
    return list({id(x): x for x in jax.tree.leaves(pull_back)}.values())


def bytes_per_device(tree: Any) -> int:
    """Return the bytes of a tree of shapes, of each the shard that one device holds."""

    def size(x: Any) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * int(x.dtype.itemsize)

    return sum(map(size, jax.tree.leaves(tree)))
