"""The training step: TrainState, cross_entropy_sum, train_step, eval_step.

These are pure functions on trees of arrays. The caller jits them.
"""

import dataclasses
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import Mesh
from jax.typing import DTypeLike

from chargpt_jax.data.batches import Batch
from chargpt_jax.devices import sharding
from chargpt_jax.model.init import Params
from chargpt_jax.ops.dropout import seeds_for

Sums = tuple[tuple[jax.Array, Params], tuple[DynamicScale | None, jax.Array]]
"""(loss, gradients), to be summed over all sequences; (next loss scale, whether the gradients are finite)."""


@flax.struct.dataclass
class TrainState:
    """All state of a run in training: the content of a checkpoint."""

    step: jax.Array
    """Training steps made so far, int32 scalar."""
    params: Params
    opt_state: optax.OptState
    key: jax.Array
    """The run's random key; each step's random numbers are a function of (key, step)."""
    loss_scale: DynamicScale | None = None
    """float16 only: a factor on the loss, without which small gradients would underflow to 0."""


def data_key(key: jax.Array) -> jax.Array:
    """Return the key that selects training batches."""
    return jax.random.fold_in(key, 0)


def dropout_key(key: jax.Array, step: jax.Array) -> jax.Array:
    """Return the key of a step's dropout masks."""
    return jax.random.fold_in(jax.random.fold_in(key, 1), step)


def validation_key(key: jax.Array, step: jax.Array | int) -> jax.Array:
    """Return the key of a step's random validation crops, for configs that ask for them."""
    return jax.random.fold_in(jax.random.fold_in(key, 2), step)


def create_state(
    params: Params, tx: optax.GradientTransformation, seed: int, dtype: DTypeLike = jnp.float32
) -> TrainState:
    """Return the state before the first step; `dtype` is that of the matrix multiplications."""
    scale = DynamicScale(fin_steps=jnp.int32(0), scale=jnp.float32(2**16)) if dtype == jnp.float16 else None
    return TrainState(jnp.int32(0), params, tx.init(params), jax.random.key(seed), scale)


def cross_entropy_sum(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Sum -log p(target) over the targets that are not padding.

    Args:
        logits: float32 [B, T, V].
        targets: int32 [B, T]; targets of 0 are padding.

    Returns:
        Scalar, nats.
    """
    # One-hot labels: the gradient of integer labels is a scatter, which a GPU runs in any order, or serially.
    losses = optax.softmax_cross_entropy(logits, jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype))
    return jnp.sum(losses * (targets != 0))


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    graphdef: nnx.GraphDef[Any],
    tx: optax.GradientTransformation,
    microbatches: int = 1,
    mesh: Mesh | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Make one training step.

    Args:
        state: before the step.
        batch: inputs and targets, int32 [B, T] each.
        graphdef: the static part of the model.
        tx: the optimizer that initialised state.opt_state.
        microbatches: gradient accumulation: number of parts that each device's sequences are processed in.
        mesh: the devices that share the batch and the optimizer update; None: one device.

    Returns:
        The next state, and scalars: loss (nats per character, before the update) and grad_norm. In float16, if the
        gradients overflow, the parameters stay as they are and the loss scale is lowered.
    """
    inputs, targets = batch
    n_targets = jnp.maximum(jnp.sum(targets != 0), 1)
    seeds = seeds_for(dropout_key(state.key, state.step), inputs.shape[0])
    params = sharding.replicate(mesh, state.params)

    gradients_of = partial(gradients, graphdef=graphdef, microbatches=microbatches)
    (loss, grads), (scale, finite) = sharding.psum_over_data(gradients_of, mesh, like=(n_targets, params))(
        (params, n_targets, state.loss_scale), (inputs, targets, seeds)
    )
    updates, opt_state = tx.update(grads, state.opt_state, params)
    new_params = sharding.apply_updates(mesh, params, updates)

    if scale is not None:  # float16
        new_params, opt_state = jax.tree.map(
            partial(jnp.where, finite), (new_params, opt_state), (params, state.opt_state)
        )
    scalars = {"loss": loss, "grad_norm": optax.tree_utils.tree_norm(grads)}
    new_state = dataclasses.replace(
        state, step=state.step + 1, params=new_params, opt_state=opt_state, loss_scale=scale
    )
    return new_state, scalars


def gradients(
    shared: tuple[Params, jax.Array, DynamicScale | None],
    sequences: tuple[jax.Array, jax.Array, jax.Array],
    *,
    graphdef: nnx.GraphDef[Any],
    microbatches: int,
) -> Sums:
    """Return the contribution of some sequences of a batch to its mean loss and gradient.

    Args:
        shared: the parameters, the number of targets in the whole batch, and the loss scale or None.
        sequences: inputs and targets, int32 [b, T] each, and dropout seeds, uint32 [b, 2].
        graphdef: the static part of the model.
        microbatches: number of equal parts that the sequences are processed in, sequentially.

    Returns:
        Loss and gradient, to be summed over all sequences. The next loss scale and whether the gradient is finite, of
        which the minimum over all devices is used.
    """
    params, n_targets, loss_scale = shared

    def loss_fn(params: Params, inputs: jax.Array, targets: jax.Array, seeds: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params)(inputs, seeds)
        return cross_entropy_sum(logits, targets) / n_targets

    def add_microbatch(sums: Sums, arrays: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Sums, None]:
        (total, grads), (scale, finite) = sums
        if scale is None:
            loss, gradient = jax.value_and_grad(loss_fn)(params, *arrays)
        else:
            scale, is_finite, loss, gradient = scale.value_and_grad(loss_fn)(params, *arrays)
            finite = finite & is_finite
        return ((total + loss, jax.tree.map(jnp.add, grads, gradient)), (scale, finite)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    sums: Sums = (jnp.zeros((), gradient_dtype(zeros)), zeros), (loss_scale, jnp.bool_(True))
    if microbatches == 1:
        return add_microbatch(sums, sequences)[0]
    split = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), sequences)
    return jax.lax.scan(add_microbatch, sums, split)[0]


def gradient_dtype(params: Params) -> jnp.dtype:
    """Return the dtype of a sum over the gradients of all parameters: float32, or float64 under x64."""
    return jnp.result_type(*jax.tree.leaves(params))


def eval_step(params: Params, batch: Batch, *, graphdef: nnx.GraphDef[Any]) -> tuple[jax.Array, jax.Array]:
    """Return the sum of a batch's losses in nats, without dropout, and the number of targets."""
    inputs, targets = batch
    return cross_entropy_sum(nnx.merge(graphdef, params)(inputs), targets), jnp.sum(targets != 0)
