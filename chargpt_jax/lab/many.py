"""Many models of one shape in one program: their state, their training steps and their validation.

The state of K runs is the `TrainState` of an ordinary run with a leading axis of runs, [K, ...]. `jax.vmap` applies
`train_step` to each run with its own batch, dropout and learning rate, so a run's numbers are those of an ordinary
training with its seed, up to the order of sums. The runs are split over devices, which exchange nothing. A device
trains its runs in groups: all at once on an accelerator, a few on a CPU, whose caches are small.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from chargpt_jax.config import Config
from chargpt_jax.data import batches
from chargpt_jax.devices.platform import compute_dtype
from chargpt_jax.lab.grid import members
from chargpt_jax.model.init import Params, abstract_model
from chargpt_jax.ops import choose
from chargpt_jax.training import optimizer
from chargpt_jax.training.dispatch import steps
from chargpt_jax.training.dispatch.pacing import MAX_DISPATCH_STEPS
from chargpt_jax.training.step import TrainState, create_state, data_key, eval_step, train_step

History = dict[str, jax.Array]
"""train_step's scalars by name, float32 [K, MAX_DISPATCH_STEPS] each."""

Group = tuple[TrainState, jax.Array, History]
"""The state of some runs, the steps at which they diverged, and their history."""

RUNS, ALL = PartitionSpec("runs"), PartitionSpec()
"""How arrays lie on the devices: split along the axis of runs, or in full on each."""


@flax.struct.dataclass
class ManyState:
    """All state of K runs in training: the content of a sweep's checkpoint."""

    step: jax.Array
    """Training steps that each run has made, int32 scalar."""
    runs: TrainState
    """Each array has a leading axis of runs, [K, ...]."""
    diverged: jax.Array
    """int32 [K]: the step at which a run's loss or gradient was first not finite; 0: never."""


def runs_mesh(count: int, devices: Sequence[jax.Device]) -> Mesh:
    """Return the devices that share K runs: as few as give each the least number of runs, on one axis named 'runs'."""
    each = -(-count // len(devices))
    used = devices[: -(-count // each)]
    return jax.make_mesh((len(used),), ("runs",), axis_types=(AxisType.Auto,), devices=used)


def padded(count: int, mesh: Mesh) -> np.ndarray:
    """Return the run in each place of the axis of runs, int [P]: K runs, then copies of the last one as padding.

    P is the smallest multiple of the number of devices that is at least K.
    """
    return np.minimum(np.arange(-(-count // mesh.size) * mesh.size), count - 1)


def state_sharding(state: ManyState, mesh: Mesh) -> ManyState:
    """Return the sharding of each array of a state: all but the step are split along the axis of runs."""
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, RUNS), state)
    return shardings.replace(step=NamedSharding(mesh, ALL))


def initial_state(
    draw: Callable[[jax.Array], Params], seeds: Sequence[int], tx: optax.GradientTransformation, dtype: DTypeLike
) -> ManyState:
    """Return the state of K runs before their first step, on one device.

    Args:
        draw: from a JAX key to the initial parameters of an ordinary run.
        seeds: of the K runs.
        tx: the optimizer.
        dtype: of matrix multiplications.
    """
    drawn = {seed: draw(jax.random.key(seed)) for seed in dict.fromkeys(seeds)}
    params = jax.tree.map(lambda *arrays: jnp.stack(arrays), *(drawn[seed] for seed in seeds))
    create = jax.vmap(lambda params, seed: create_state(params, tx, seed, dtype))
    runs = jax.jit(create)(params, jnp.asarray(seeds, jnp.int32))
    return ManyState(jnp.int32(0), runs, jnp.zeros(len(seeds), jnp.int32))


def state_shapes(config: Config) -> ManyState:
    """Return the state of a sweep's K runs as shapes, on one device; `config` has the sizes of its vocabulary."""
    dtype, count = compute_dtype(config.amp), len(members(config))
    shapes = abstract_model(config.model, choose.ops_for_many(dtype, config.model.attention_block))[1]
    one = steps.state_shapes(shapes, optimizer.empty(config), config.seed, dtype)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def shape(x: jax.Array, leading: tuple[int, ...]) -> Any:
        return jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype, sharding=here)

    step = shape(one.step, ())
    return ManyState(step, jax.tree.map(lambda x: shape(x, (count,)), one), shape(one.step, (count,)))


def many_steps(
    state: ManyState,
    which: jax.Array,
    text: jax.Array,
    count: jax.Array,
    *,
    schedules: Sequence[optax.Schedule],
    config: Config,
    graphdef: nnx.GraphDef[Any],
    mesh: Mesh,
    at_once: int,
) -> tuple[ManyState, History]:
    """Make one dispatch: `count` training steps of every run.

    Args:
        state: before the dispatch.
        which: int32 [K], the index of each run's schedule.
        text: the training set, integers [n] of any width.
        count: int32 scalar, at most MAX_DISPATCH_STEPS.
        schedules: the learning rates of the sweep, each a function of the step.
        config: of the sweep.
        graphdef: the static part of the model.
        mesh: the devices, from `runs_mesh`.
        at_once: runs that a device trains at once, by vmap; it trains one group of so many after the other. It divides
            the number of runs of a device.

    Returns:
        The state after the dispatch, and the history, of which the first `count` columns are set.
    """

    def step_of_one(run: TrainState, which: jax.Array, text: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        def rate(count: jax.Array) -> jax.Array:
            return jnp.stack([jnp.asarray(schedule(count)) for schedule in schedules])[which]

        tx = optimizer.make_optimizer(config, rate)
        batch = batches.batch_at(text, data_key(run.key), run.step, config.model.block_size, config.data)
        return train_step(run, batch, graphdef=graphdef, tx=tx, microbatches=config.optimizer.accumulation_steps)

    together = jax.vmap(step_of_one, in_axes=(0, 0, None)) if at_once > 1 else step_of_one

    def steps_of_some(group: tuple[TrainState, jax.Array, jax.Array], text: jax.Array, count: jax.Array) -> Group:
        """Make the steps of `at_once` runs, [at_once, ...], or of one, [...]."""
        runs, diverged, which = group

        def body(i: jax.Array, carry: Group) -> Group:
            runs, diverged, history = carry
            runs, scalars = together(runs, which, text)
            good = jnp.isfinite(scalars["loss"])
            if runs.loss_scale is None:  # with loss scaling (float16) an infinite gradient norm is normal
                good &= jnp.isfinite(scalars["grad_norm"])
            diverged = jnp.where((diverged == 0) & ~good, runs.step, diverged)
            return runs, diverged, {name: history[name].at[..., i].set(value) for name, value in scalars.items()}

        history = {name: jnp.zeros((*which.shape, MAX_DISPATCH_STEPS)) for name in ("loss", "grad_norm")}
        return jax.lax.fori_loop(0, count, body, (runs, diverged, history))

    def on_device(
        runs: TrainState, diverged: jax.Array, which: jax.Array, text: jax.Array, count: jax.Array
    ) -> tuple[TrainState, jax.Array, History]:
        groups = grouped((runs, diverged, which), at_once)
        done: Group = jax.lax.map(lambda group: steps_of_some(group, text, count), groups)
        return jax.tree.map(lambda x: x.reshape(len(which), *x.shape[1 + (at_once > 1) :]), done)

    specs = (RUNS, RUNS, RUNS, ALL, ALL)
    on_all = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=RUNS, check_vma=False)
    runs, diverged, history = on_all(state.runs, state.diverged, which, text, count)
    return ManyState(state.step + count, runs, diverged), history


def grouped(tree: Any, at_once: int) -> Any:
    """Split the axis of runs, [P, ...], into groups: [P / at_once, at_once, ...], or as it is for groups of one."""
    if at_once == 1:
        return tree
    return jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), tree)


def many_validation(
    params: Params, inputs: jax.Array, targets: jax.Array, *, graphdef: nnx.GraphDef[Any], mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """Return each run's sum of losses in nats, and its number of targets, [K] each, of one batch, int32 [B, T] each."""

    def on_device(params: Params, inputs: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        # One run after the other: a validation batch is large enough to occupy a device, and K of them take memory.
        return jax.lax.map(lambda own: eval_step(own, (inputs, targets), graphdef=graphdef), params)

    on_all = jax.shard_map(on_device, mesh=mesh, in_specs=(RUNS, ALL, ALL), out_specs=RUNS, check_vma=False)
    sums: tuple[jax.Array, jax.Array] = on_all(params, inputs, targets)
    return sums
