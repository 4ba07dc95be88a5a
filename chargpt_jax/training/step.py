"""TrainState, loss, train_step, eval_step: pure functions on plain trees, jitted by whoever calls them."""

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

from chargpt_jax.data.batches import Batch
from chargpt_jax.devices import sharding
from chargpt_jax.ops.dropout import seeds_for


@flax.struct.dataclass
class TrainState:
    """All that training changes, and so all that a checkpoint holds."""

    step: jax.Array
    """Updates made so far, int32 scalar."""
    params: dict[str, Any]
    """Nested dicts of float32 arrays."""
    opt_state: optax.OptState
    key: jax.Array
    """The run's key; what is random in a step is a function of (key, step)."""
    loss_scale: DynamicScale | None = None
    """For float16: what the loss is multiplied by so that small gradients do not vanish."""


def data_key(key: jax.Array) -> jax.Array:
    """Return the key that batches are drawn with."""
    return jax.random.fold_in(key, 0)


def dropout_key(key: jax.Array, step: jax.Array) -> jax.Array:
    """Return the key of a step's dropout masks."""
    return jax.random.fold_in(jax.random.fold_in(key, 1), step)


def validation_key(key: jax.Array, step: jax.Array | int) -> jax.Array:
    """Return the key of the crops that are validated on after a step, where the config asks for random ones."""
    return jax.random.fold_in(jax.random.fold_in(key, 2), step)


def create_state(
    params: dict[str, Any], tx: optax.GradientTransformation, seed: int, dtype: Any = jnp.float32
) -> TrainState:
    """Return the state before the first update; `dtype` is that of the matrix products."""
    scale = DynamicScale(fin_steps=jnp.int32(0), scale=jnp.float32(2**16)) if dtype == jnp.float16 else None
    return TrainState(jnp.int32(0), params, tx.init(params), jax.random.key(seed), scale)


def nats(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Sum -log p(target) over targets that are not padding.

    Args:
        logits: float32 [B, T, V].
        targets: int32 [B, T]; 0 does not count.

    Returns:
        Scalar, nats.
    """
    # With integer labels the gradient would be scattered, which a GPU does in any order or one by one.
    losses = optax.softmax_cross_entropy(logits, jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype))
    return jnp.sum(losses * (targets != 0))


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    parts: int = 1,
    mesh: Mesh | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Make one optimizer update.

    Args:
        state: before the update.
        batch: inputs and targets, int32 [B, T].
        graphdef: the model's static half.
        tx: the optimizer that made state.opt_state.
        parts: each device's rows go through the model in this many equal parts; the update is the same.
        mesh: the devices that share the batch's rows, and `tx` the update; None: one does it all.

    Returns:
        The next state, and scalars: loss (nats per character, before the update) and grad_norm. In float16 an update
        with overflowing gradients is left out and the loss scale halved.
    """
    inputs, targets = batch
    count = jnp.maximum(jnp.sum(targets != 0), 1)
    seeds = seeds_for(dropout_key(state.key, state.step), inputs.shape[0])
    own = partial(gradients, graphdef=graphdef, parts=parts)
    sums = own if mesh is None else sharding.psum_over_data(own, mesh)
    before = sharding.replicate(mesh, state.params)
    (loss, grads), (scale, finite) = sums((before, count, state.loss_scale), (inputs, targets, seeds))
    updates, opt_state = tx.update(grads, state.opt_state, before)
    # Each device adds to its share of the parameters, which are then brought together.
    share = partial(sharding.shard, mesh)
    params = sharding.replicate(mesh, share(optax.apply_updates(share(before), share(updates))))
    if scale is not None:
        keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
        params, opt_state = jax.tree.map(keep, (params, opt_state), (before, state.opt_state))
    scalars = {"loss": loss, "grad_norm": optax.tree_utils.tree_norm(grads)}
    state = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state, loss_scale=scale)
    return state, scalars


def gradients(whole: tuple[Any, ...], rows: tuple[jax.Array, ...], *, graphdef: nnx.GraphDef, parts: int) -> Any:
    """Return what some rows of a batch add to its loss and gradient.

    Args:
        whole: the parameters, the number of targets in the whole batch, and the loss scale or None.
        rows: inputs and targets, int32 [b, T], and dropout's seeds, uint32 [b, 2].
        graphdef: the model's static half.
        parts: how many equal parts the rows are taken in, one after the other.

    Returns:
        Loss and gradient, to be summed over all rows; and the next loss scale and whether the gradient is finite, of
        which the least over all rows counts.
    """
    params, count, scale = whole

    def loss_fn(params: dict[str, Any], inputs: jax.Array, targets: jax.Array, seeds: jax.Array) -> jax.Array:
        return nats(nnx.merge(graphdef, params)(inputs, seeds), targets) / count

    def part(carry: Any, xs: tuple[jax.Array, ...]) -> tuple[Any, None]:
        (loss, grads), (scale, finite) = carry
        if scale is None:
            more, gradient = jax.value_and_grad(loss_fn)(params, *xs)
        else:
            scale, fine, more, gradient = scale.value_and_grad(loss_fn)(params, *xs)
            finite = finite & fine
        return ((loss + more, jax.tree.map(jnp.add, grads, gradient)), (scale, finite)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    carry = (jnp.zeros((), gradient_dtype(zeros)), zeros), (scale, jnp.bool_(True))
    if parts == 1:
        return part(carry, rows)[0]
    return jax.lax.scan(part, carry, jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), rows))[0]


def gradient_dtype(params: dict[str, Any]) -> Any:
    """Return the dtype that a sum over the parameters' gradients has: float32, or float64 under x64."""
    return jnp.result_type(*jax.tree.leaves(params))


def eval_step(params: dict[str, Any], batch: Batch, *, graphdef: nnx.GraphDef) -> tuple[jax.Array, jax.Array]:
    """Return the batch's sum of losses in nats, without dropout, and how many characters it is over."""
    inputs, targets = batch
    return nats(nnx.merge(graphdef, params)(inputs), targets), jnp.sum(targets != 0)
