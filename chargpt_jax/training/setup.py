"""A run's corpus, model and devices put together, and what is compiled of them.

Three functions are compiled, each traced once whatever the lengths of epochs and dispatches: many updates a dispatch,
many updates of the range test, one validation batch.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from chargpt_jax.config import Config
from chargpt_jax.data import batches
from chargpt_jax.devices import sharding, startup
from chargpt_jax.devices.platform import compiler_options, compute_dtype
from chargpt_jax.model.gpt import plan
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training import optimizer
from chargpt_jax.training.pacing import MAX_DISPATCH_STEPS
from chargpt_jax.training.step import TrainState, create_state, data_key, eval_step, train_step, validation_key

Validator = Callable[..., float | None]
"""(parameters, step, ended) -> nats per character."""

VALIDATED_AT_ONCE = 8192
"""Characters of the held-out part in a batch at most, where a training batch has fewer."""


def updates(
    state: TrainState,
    tokens: jax.Array,
    count: jax.Array,
    *,
    config: Config,
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    mesh: Mesh,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Make `count` updates (int32 scalar, at most MAX_DISPATCH_STEPS), each on the batch that its step says.

    Returns:
        The state after them, and train_step's scalars, float32 [MAX_DISPATCH_STEPS] each, of which `count` are filled.
    """
    return _updated(state, tokens, count, lambda i: tx, config, graphdef, mesh)


def probe(
    state: TrainState,
    tokens: jax.Array,
    rates: jax.Array,
    count: jax.Array,
    *,
    config: Config,
    graphdef: nnx.GraphDef,
    mesh: Mesh,
) -> tuple[TrainState, jax.Array]:
    """Make `count` updates with the first of some learning rates, float32 [MAX_DISPATCH_STEPS].

    Returns:
        The state after them, and the loss before each, float32 [MAX_DISPATCH_STEPS], of which `count` are filled.
    """
    tx_of = lambda i: optimizer.make_optimizer(config.optimizer, rates[i], mesh)  # noqa: E731
    state, history = _updated(state, tokens, count, tx_of, config, graphdef, mesh)
    return state, history["loss"]


def _updated(
    state: TrainState,
    tokens: jax.Array,
    count: jax.Array,
    tx_of: Callable[[jax.Array], optax.GradientTransformation],
    config: Config,
    graphdef: nnx.GraphDef,
    mesh: Mesh,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Make `count` updates, the i-th with the optimizer tx_of(i)."""
    step = partial(train_step, graphdef=graphdef, microbatches=config.optimizer.accumulation_steps, mesh=mesh)

    def body(i: jax.Array, carry: Any) -> Any:
        state, history = carry
        state, scalars = step(state, _batch(state, tokens, config, mesh), tx=tx_of(i))
        return state, {name: history[name].at[i].set(value) for name, value in scalars.items()}

    history = {name: jnp.zeros(MAX_DISPATCH_STEPS) for name in ("loss", "grad_norm")}
    return jax.lax.fori_loop(0, count, body, (state, history))


def compiled_updates(
    config: Config, graphdef: nnx.GraphDef, tx: optax.GradientTransformation, mesh: Mesh, state: TrainState
) -> Any:
    """Return `updates` under jit, for states like one of arrays or shapes, whose memory is reused."""
    return _in_place(partial(updates, config=config, graphdef=graphdef, tx=tx, mesh=mesh), mesh, state)


def compiled_probe(config: Config, graphdef: nnx.GraphDef, mesh: Mesh, state: TrainState) -> Any:
    """Return `probe` under jit, for states like one of arrays or shapes, whose memory is reused."""
    return _in_place(partial(probe, config=config, graphdef=graphdef, mesh=mesh), mesh, state)


def _in_place(f: Callable[..., Any], mesh: Mesh, state: TrainState) -> Any:
    ends = state_sharding(state, mesh), sharding.replicated(mesh)
    return jax.jit(f, donate_argnums=0, out_shardings=ends, compiler_options=compiler_options(mesh))


def state_sharding(state: TrainState, mesh: Mesh) -> TrainState:
    """Return how a training state, of arrays or shapes, lies: whole on every device, but for what an update shares."""
    everywhere = jax.tree.map(lambda _: sharding.replicated(mesh), state)
    return dataclasses.replace(everywhere, opt_state=sharding.optimizer_sharding(state.opt_state, mesh))


def validation_step(
    params: Any, inputs: jax.Array, targets: jax.Array, *, graphdef: nnx.GraphDef, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """Return the sum of losses in nats, and the characters, of one batch int32 [B, T]."""
    return eval_step(params, sharding.shard_batch(mesh, (inputs, targets)), graphdef=graphdef)


def _batch(state: TrainState, tokens: jax.Array, config: Config, mesh: Mesh) -> batches.Batch:
    batch = batches.batch_at(tokens, data_key(state.key), state.step, config.model.block_size, config.data)
    # Whole on every device, which takes its rows from it: shared out from the start, its loops would wait for each
    # other, and so would the count of its targets.
    return jax.lax.with_sharding_constraint(batch, sharding.replicated(mesh))


def fresh_state(params: Any, tx: optax.GradientTransformation, seed: int, dtype: Any, mesh: Mesh) -> TrainState:
    """Return the state before the first update, sharded, in memory of its own (updates are made in place)."""
    make = partial(create_state, tx=tx, seed=seed, dtype=dtype)
    state = jax.jit(make, compiler_options=compiler_options(mesh))(params)
    return jax.device_put(state, state_sharding(state, mesh))


def state_shapes(shapes: Any, tx: optax.GradientTransformation, seed: int, dtype: Any) -> TrainState:
    """Return the training state of parameters of these shapes, as shapes."""
    return jax.eval_shape(partial(create_state, tx=tx, seed=seed, dtype=dtype), shapes)


def laid_out(state: TrainState, mesh: Mesh) -> TrainState:
    """Return a training state's shapes, said to lie as `state_sharding` has it: what can be compiled for."""
    return sharding.with_sharding(state_sharding(state, mesh), state)


@dataclasses.dataclass
class Setup:
    """A run's corpus, model and devices, ready to train; the same for every stage and every restart."""

    config: Config
    tokens: np.ndarray
    """int32 [N], the whole corpus."""
    n_train: int
    vocabulary: tuple[str, ...]
    graphdef: nnx.GraphDef
    shapes: dict[str, Any]
    """The parameters' shapes."""
    draw: Callable[[], dict[str, Any]]
    """Draws the initial parameters, on one device; nothing keeps them."""
    dtype: Any
    mesh: Mesh
    on_device: jax.Array
    """int32 [n_train], the training part."""

    @classmethod
    def of(cls, workdir: Workdir) -> "Setup":
        """Read a prepared workdir and build its model."""
        return cls.on(workdir.load_config(), workdir.load_tokens(), workdir.load_tokenizer().vocabulary)

    @classmethod
    @startup.gc_paused()
    def on(cls, config: Config, tokens: np.ndarray, vocabulary: tuple[str, ...]) -> "Setup":
        """Build a config's model for a corpus, int32 [N]."""
        startup.use_every_core()
        dtype = compute_dtype(config.amp)
        mesh = sharding.data_mesh(config.data.batch_size // config.optimizer.accumulation_steps)
        train, _ = batches.split(tokens, config.data.train_split, config.model.block_size)
        on_device = jax.device_put(train, sharding.replicated(mesh))
        graphdef, shapes, draw = plan(config.model, config.seed, dtype, compiler_options=compiler_options(mesh))
        return cls(config, tokens, len(train), vocabulary, graphdef, shapes, draw, dtype, mesh, on_device)

    @property
    def epoch_steps(self) -> int:
        """Updates in an epoch."""
        return batches.steps_per_epoch(
            self.n_train, self.config.model.block_size, self.config.data, self.config.ancestor.short_epochs
        )

    def fresh_state(self, tx: optax.GradientTransformation) -> TrainState:
        """Return the state before the first update."""
        return fresh_state(self.draw(), tx, self.config.seed, self.dtype, self.mesh)

    @startup.gc_paused()
    def begin(self, tx: optax.GradientTransformation) -> tuple[TrainState, Any]:
        """Return the state before the first update, and `updates` traced and lowered, to be compiled.

        The one is compiled and drawn while the other is traced, for tracing keeps one core busy.
        """
        with ThreadPoolExecutor(1) as thread:
            fresh = thread.submit(self.fresh_state, tx)
            state = self.state_shapes(tx)
            update = compiled_updates(self.config, self.graphdef, tx, self.mesh, state)
            lowered = update.lower(state, self.on_device, np.int32(1))
            return fresh.result(), lowered

    def prober(self, tx: optax.GradientTransformation) -> Any:
        """Return `probe` under jit; it takes (state, tokens, rates, count) and reuses the state's memory."""
        return compiled_probe(self.config, self.graphdef, self.mesh, self.state_shapes(tx))

    def state_shapes(self, tx: optax.GradientTransformation) -> TrainState:
        """Return the training state's shapes, and how it lies."""
        return laid_out(state_shapes(self.shapes, tx, self.config.seed, self.dtype), self.mesh)

    def validator(self, whole: bool = False) -> "Validator":
        """Return the function from parameters, and their step, to the loss on the held-out part, in nats per character.

        The step matters only where the config asks for random crops, and `whole` does not overrule it. A third
        argument is asked before every batch; where it says yes the loss is None.
        """
        crops = self.config.ancestor.random_validation and not whole
        windows_at = self._crops() if crops else self._windows()
        step = partial(validation_step, graphdef=self.graphdef, mesh=self.mesh)
        step_on = jax.jit(step, compiler_options=compiler_options(self.mesh))

        def loss(params: Any, step: int, ended: Callable[[], bool] = lambda: False) -> float | None:
            pairs = []
            for x, y in zip(*windows_at(step), strict=True):
                if ended():
                    return None
                # Awaited one by one: with several CPU devices two dispatches in flight can deadlock.
                pairs.append(jax.device_get(step_on(params, x, y)))
            if crops:  # the ancestor takes the mean of its batches' means
                return sum(float(total) / int(count) for total, count in pairs) / len(pairs)
            return sum(float(total) for total, _ in pairs) / sum(int(count) for _, count in pairs)

        return loss

    def _windows(self) -> Callable[[int], tuple[np.ndarray, ...]]:
        """Return the function from a step to the inputs and targets, int32 [batches, B, T], to validate on after it."""
        block_size, batch_size = self.config.model.block_size, self.config.data.batch_size
        # Short batches are taken together: nothing is kept for a backward pass, and a dispatch costs what it costs.
        characters = min(VALIDATED_AT_ONCE, len(self.tokens) - self.n_train)
        batch_size *= max(1, characters // (batch_size * block_size))
        windows = batches.validation_batches(self.tokens, self.n_train, block_size, batch_size)
        return lambda step: windows

    def _crops(self) -> Callable[[int], tuple[np.ndarray, ...]]:
        """Return the same for the ancestor's way: crops that each step draws anew."""
        data = self.config.data
        draw = jax.jit(partial(batches.validation_crops, block_size=self.config.model.block_size, data=data))
        held_out, key = self.tokens[self.n_train :], jax.random.key(self.config.seed)
        return lambda step: jax.device_get(draw(held_out, validation_key(key, step)))

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint says of itself, as JSON."""
        return {
            "config": dataclasses.asdict(self.config),
            "vocabulary": list(self.vocabulary),
            "corpus_sha256": hashlib.sha256(self.tokens.tobytes()).hexdigest(),
        }
