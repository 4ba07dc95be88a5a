"""A sweep's corpus, model, devices and compiled programs, ready to train; the same after every restart."""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from chargpt_jax.data.batches import MAX_ON_DEVICE
from chargpt_jax.devices import sharding, startup
from chargpt_jax.devices.platform import compiler_options, compute_dtype
from chargpt_jax.errors import UserError
from chargpt_jax.lab import many
from chargpt_jax.lab.grid import Member, config_of, members
from chargpt_jax.lab.many import ManyState
from chargpt_jax.model.init import Params, abstract_model, drawing_program
from chargpt_jax.ops import choose
from chargpt_jax.training import optimizer
from chargpt_jax.training.run import Run
from chargpt_jax.training.setup import Setup

Validator = Callable[[Params, Callable[[], bool]], np.ndarray | None]
"""(parameters, stop) -> validation loss of each run, float64 [K], nats; None if stop() returned True meanwhile."""


@dataclasses.dataclass
class SweepSetup:
    """What a sweep trains: K runs of one model on one text."""

    run: Run
    """The workdir, config and corpus."""
    members: tuple[Member, ...]
    ordinary: Setup
    """Of an ordinary training with the config: its corpus, record and validation batches."""
    graphdef: nnx.GraphDef[Any]
    shapes: Params
    """The shapes of one run's parameters."""
    dtype: DTypeLike
    """Of matrix multiplications."""
    mesh: Mesh
    at_once: int
    """Runs that a device trains at once, by vmap."""

    @classmethod
    def of(cls, run: Run) -> "SweepSetup":
        """Build the model of a sweep.

        Raises:
            UserError: if the training set does not fit on a device.
        """
        startup.start()
        config, runs = run.config, members(run.config)
        if run.n_train > MAX_ON_DEVICE:
            raise UserError(
                f"The training part has {run.n_train:,} characters, but a sweep keeps it on the devices, which can "
                f"hold at most {MAX_ON_DEVICE:,}: use a shorter text."
            )
        rate = dataclasses.replace(config.optimizer, learning_rate=runs[0].learning_rate)
        ordinary = Setup.of(dataclasses.replace(run, config=dataclasses.replace(config, optimizer=rate)))
        dtype = compute_dtype(config.amp)
        mesh = many.runs_mesh(len(runs), jax.local_devices())
        each = len(many.padded(len(runs), mesh)) // mesh.size
        at_once = choose.runs_at_once(each, config.data.batch_size * config.model.block_size)
        ops = choose.ops_for if at_once == 1 else choose.ops_for_many
        graphdef, shapes = abstract_model(config.model, ops(dtype, config.model.attention_block))
        return cls(run, runs, ordinary, graphdef, shapes, dtype, mesh, at_once)

    @functools.cached_property
    def places(self) -> np.ndarray:
        """The run in each place of the axis of runs, int [P], P >= K; see `many.padded`."""
        return many.padded(len(self.members), self.mesh)

    @functools.cached_property
    def text(self) -> jax.Array:
        """Integers [n_train] of the corpus's width, the training set, on every device."""
        return sharding.put(self.run.tokens[: self.run.n_train], NamedSharding(self.mesh, many.ALL))

    def initial_state(self) -> ManyState:
        """Return the state of the K runs before the first step, on one device."""
        config, own = self.run.config, choose.ops_for(self.dtype, self.run.config.model.attention_block)
        draw = drawing_program(config.model, self.shapes, own, compiler_options(self.mesh))
        seeds = [member.seed for member in self.members]
        return many.initial_state(draw, seeds, optimizer.empty(config), self.dtype)

    def on_devices(self, state: ManyState) -> ManyState:
        """Add the padding of the axis of runs to a state of K runs, and split it over the devices."""
        runs, diverged = jax.jit(lambda tree: jax.tree.map(lambda x: x[self.places], tree))(
            (state.runs, state.diverged)
        )
        spread = ManyState(state.step, runs, diverged)
        return sharding.put(spread, many.state_sharding(spread, self.mesh))

    def without_padding(self, state: ManyState) -> ManyState:
        """Return a state of K runs, as a checkpoint holds it, whatever the number of devices."""
        count = len(self.members)
        if count == len(self.places):
            return state
        runs, diverged = jax.tree.map(lambda x: x[:count], (state.runs, state.diverged))
        return ManyState(state.step, runs, diverged)

    def lower(self, state: ManyState) -> jax.stages.Lowered:
        """Trace the dispatch (state, text, count) -> (state, history), with donation of the state."""
        rates = list(dict.fromkeys(member.learning_rate for member in self.members))
        indices = np.array([rates.index(member.learning_rate) for member in self.members], np.int32)[self.places]
        which = sharding.put(indices, NamedSharding(self.mesh, many.RUNS))

        def dispatch(state: ManyState, which: jax.Array, text: jax.Array, count: jax.Array) -> Any:
            return many.many_steps(
                state,
                which,
                text,
                count,
                schedules=[self._schedule(rate) for rate in rates],
                config=self.run.config,
                graphdef=self.graphdef,
                mesh=self.mesh,
                at_once=self.at_once,
            )

        out = many.state_sharding(state, self.mesh), NamedSharding(self.mesh, many.RUNS)
        jitted = jax.jit(dispatch, donate_argnums=0, out_shardings=out, compiler_options=compiler_options(self.mesh))
        self.which = which
        return jitted.lower(state, which, self.text, np.int32(1))

    def _schedule(self, rate: float) -> Any:
        config = config_of(self.run.config, Member(self.run.config.seed, rate))
        return dataclasses.replace(self.run, config=config).schedule()

    def validator(self) -> Validator:
        """Return the function (parameters [P, ...], stop) -> each run's loss on the validation set, nats, [K].

        stop() is called before each batch; if it returns True the result is None.
        """
        step = partial(many.many_validation, graphdef=self.graphdef, mesh=self.mesh)
        sums = jax.jit(step, compiler_options=compiler_options(self.mesh))

        def losses(params: Params, stop: Callable[[], bool]) -> np.ndarray | None:
            totals, counts = np.zeros(len(self.places)), np.zeros(len(self.places))
            for inputs, targets in self.ordinary.validation_windows():
                if stop():
                    return None
                # Wait for each result: with several CPU devices, two dispatches in flight can deadlock.
                total, count = jax.device_get(sums(params, inputs, targets))
                totals, counts = totals + total.astype(float), counts + count
            found: np.ndarray = totals[: len(self.members)] / counts[: len(self.members)]
            return found

        return losses

    def record(self) -> dict[str, Any]:
        """Return the description of the sweep that its checkpoints hold, as JSON can hold it."""
        return dict(self._record)

    @functools.cached_property
    def _record(self) -> dict[str, Any]:
        return self.run.record()
