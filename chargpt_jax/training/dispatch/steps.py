"""The functions of a training that are compiled: a dispatch of steps, those of the range test, a validation batch.

Each is traced once, for epochs and dispatches of any length.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from chargpt_jax.config import Config
from chargpt_jax.data import batches
from chargpt_jax.devices import sharding
from chargpt_jax.devices.platform import compiler_options
from chargpt_jax.model.init import Params
from chargpt_jax.training import optimizer
from chargpt_jax.training.dispatch.pacing import MAX_DISPATCH_STEPS
from chargpt_jax.training.step import TrainState, create_state, data_key, eval_step, train_step

History = dict[str, jax.Array]
"""train_step's scalars by name, float32 [MAX_DISPATCH_STEPS] each, one element per training step."""


def train_steps(
    state: TrainState,
    text: jax.Array | batches.Windows,
    count: jax.Array,
    *,
    optimizer_at: Callable[[jax.Array], optax.GradientTransformation],
    config: Config,
    graphdef: nnx.GraphDef[Any],
    mesh: Mesh,
) -> tuple[TrainState, History]:
    """Make one dispatch: `count` training steps, each on the batch of its step.

    Args:
        state: before the dispatch.
        text: the training set, integers [n] of any width; or the windows of these steps.
        count: int32 scalar, at most MAX_DISPATCH_STEPS.
        optimizer_at: the optimizer of the i-th step of the dispatch.
        config: of the run.
        graphdef: the static part of the model.
        mesh: the devices.

    Returns:
        The state after the dispatch, and the history, of which the first `count` elements are set.
    """
    step = partial(train_step, graphdef=graphdef, microbatches=config.optimizer.accumulation_steps, mesh=mesh)

    def body(i: jax.Array, carry: tuple[TrainState, History]) -> tuple[TrainState, History]:
        state, history = carry
        batch = batches.batch_at(text, data_key(state.key), state.step, config.model.block_size, config.data)
        # The batch is replicated, and each device uses its part of it. If it were sharded from the start, the devices
        # would wait for each other in the loops that make it, and to count its targets.
        batch = jax.lax.with_sharding_constraint(batch, sharding.replicated(mesh))
        state, scalars = step(state, batch, tx=optimizer_at(i))
        return state, {name: history[name].at[i].set(value) for name, value in scalars.items()}

    history = {name: jnp.zeros(MAX_DISPATCH_STEPS) for name in ("loss", "grad_norm")}
    return jax.lax.fori_loop(0, count, body, (state, history))


def range_test_steps(
    state: TrainState,
    text: jax.Array | batches.Windows,
    rates: jax.Array,
    count: jax.Array,
    *,
    config: Config,
    graphdef: nnx.GraphDef[Any],
    mesh: Mesh,
) -> tuple[TrainState, jax.Array]:
    """Make `count` training steps with given learning rates, float32 [MAX_DISPATCH_STEPS], one per step.

    Returns:
        The state after them, and the loss before each step, float32 [MAX_DISPATCH_STEPS].
    """

    def optimizer_at(i: jax.Array) -> optax.GradientTransformation:
        return optimizer.make_optimizer(config, rates[i], mesh)

    state, history = train_steps(
        state, text, count, optimizer_at=optimizer_at, config=config, graphdef=graphdef, mesh=mesh
    )
    return state, history["loss"]


def steps_with_rates(
    state: TrainState,
    text: jax.Array | batches.Windows,
    rates: jax.Array,
    count: jax.Array,
    *,
    config: Config,
    graphdef: nnx.GraphDef[Any],
    mesh: Mesh,
) -> tuple[TrainState, History]:
    """Make `count` training steps as `train_steps` does, with learning rates that are not known when it is compiled.

    `rates` are float32 [MAX_DISPATCH_STEPS], one per step. The state is that of a schedule, with its counter.
    """

    def optimizer_at(i: jax.Array) -> optax.GradientTransformation:
        return optimizer.make_optimizer(config, lambda count: rates[i], mesh)

    return train_steps(state, text, count, optimizer_at=optimizer_at, config=config, graphdef=graphdef, mesh=mesh)


def validation_step(
    params: Params, inputs: jax.Array, targets: jax.Array, *, graphdef: nnx.GraphDef[Any], mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """Return the sum of the losses in nats, and the number of targets, of one batch, int32 [B, T] each."""
    return sharding.scalars_over_data(partial(eval_step, graphdef=graphdef), mesh)(params, (inputs, targets))


def jit_train_steps(
    config: Config, graphdef: nnx.GraphDef[Any], tx: optax.GradientTransformation, mesh: Mesh, state: TrainState
) -> jax.stages.Wrapped:
    """Return `train_steps(state, text, count)` under jit, for states like the given one of arrays or shapes."""
    f = partial(train_steps, optimizer_at=lambda i: tx, config=config, graphdef=graphdef, mesh=mesh)
    return _jit_in_place(f, mesh, state)


def jit_range_test_steps(
    config: Config, graphdef: nnx.GraphDef[Any], mesh: Mesh, state: TrainState
) -> jax.stages.Wrapped:
    """Return `range_test_steps(state, text, rates, count)` under jit, for states like the given one."""
    return _jit_in_place(partial(range_test_steps, config=config, graphdef=graphdef, mesh=mesh), mesh, state)


def jit_steps_with_rates(
    config: Config, graphdef: nnx.GraphDef[Any], mesh: Mesh, state: TrainState
) -> jax.stages.Wrapped:
    """Return `steps_with_rates(state, text, rates, count)` under jit, for states like the given one."""
    return _jit_in_place(partial(steps_with_rates, config=config, graphdef=graphdef, mesh=mesh), mesh, state)


def _jit_in_place(f: Callable[..., Any], mesh: Mesh, state: TrainState) -> jax.stages.Wrapped:
    """Compile a function of a state so that the new state uses the memory of the old one (donation)."""
    shardings = state_sharding(state, mesh), sharding.replicated(mesh)
    return jax.jit(f, donate_argnums=0, out_shardings=shardings, compiler_options=compiler_options(mesh))


def state_sharding(state: TrainState, mesh: Mesh) -> TrainState:
    """Return the sharding of each array of a state: replicated, except for sharded parameters and optimizer state."""
    shardings = jax.tree.map(lambda _: sharding.replicated(mesh), state)
    params = sharding.parameter_sharding(state.params, mesh)
    return dataclasses.replace(shardings, params=params, opt_state=sharding.optimizer_sharding(state.opt_state, mesh))


def state_shapes(shapes: Params, tx: optax.GradientTransformation, seed: int, dtype: DTypeLike) -> TrainState:
    """Return the training state, as shapes, of a model whose parameters have these shapes."""
    return jax.eval_shape(partial(create_state, tx=tx, seed=seed, dtype=dtype), shapes)
