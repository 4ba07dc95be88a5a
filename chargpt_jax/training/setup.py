"""A run's model and devices, ready to train."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from chargpt_jax.config import Config, LRFinderConfig, MeshConfig, SampleConfig, TrainConfig
from chargpt_jax.config.saved import to_json
from chargpt_jax.data import batches
from chargpt_jax.devices import layout, sharding, startup
from chargpt_jax.devices.platform import compiler_options, compute_dtype
from chargpt_jax.model.init import Params, plan
from chargpt_jax.ops import choose
from chargpt_jax.storage.checkpoint import Checkpoints
from chargpt_jax.training import optimizer
from chargpt_jax.training.dispatch.kept import kept
from chargpt_jax.training.dispatch.steps import state_shapes, state_sharding, validation_step
from chargpt_jax.training.run import Run, record_of
from chargpt_jax.training.step import TrainState, create_state, validation_key

Validator = Callable[..., float | None]
"""(parameters, step, stop) -> validation loss, nats per character; None if stop() returned True meanwhile."""

Function = TypeVar("Function")

VALIDATED_AT_ONCE = 8192
"""Characters of the validation set in one batch, at most, if a training batch has fewer."""


def training_mesh(config: Config, tell: bool = True) -> Mesh:
    """Return the devices that a training with this config uses; `tell` as in `sharding.data_mesh`.

    Raises:
        UserError: if the config's mesh does not fit the devices, the batch or the model.
    """
    startup.start()
    if config.mesh != MeshConfig():
        return layout.device_mesh(config, jax.devices())
    return sharding.data_mesh(config.data.batch_size // config.optimizer.accumulation_steps, tell=tell)


@dataclasses.dataclass
class Setup:
    """A run's corpus, model and devices, ready to train; the same for every stage and after every restart."""

    config: Config
    tokens: np.ndarray
    """Integers [N] of any width, the whole corpus."""
    n_train: int
    n_validation: int
    vocabulary: tuple[str, ...]
    graphdef: nnx.GraphDef[Any]
    shapes: Params
    """The shapes of the parameters."""
    initial_params: Callable[[], Params]
    """Initialises new parameters, on one device."""
    dtype: DTypeLike
    """Of matrix multiplications."""
    mesh: Mesh

    @classmethod
    def of(cls, run: Run) -> "Setup":
        """Build the model of a run."""
        return cls.on(run.config, run.tokens, run.tokenizer.vocabulary, run.attention)

    @classmethod
    @startup.gc_paused()
    def on(
        cls, config: Config, tokens: np.ndarray, vocabulary: tuple[str, ...], attention: str = choose.BLOCKS
    ) -> "Setup":
        """Build the model of a config for a corpus, integers [N]; `attention` is that of training steps."""
        mesh = training_mesh(config)
        dtype = compute_dtype(config.amp)
        train, validation = batches.split(tokens, config.data, config.model.block_size)
        graphdef, shapes, initial_params = plan(
            config.model,
            config.seed,
            choose.ops_for(dtype, config.model.attention_block, attention=attention, mesh=mesh),
            compiler_options=compiler_options(mesh),
        )
        setup = cls(
            config, tokens, len(train), len(validation), vocabulary, graphdef, shapes, initial_params, dtype, mesh
        )
        setup.initial_params = setup.kept("initial parameters", lambda: initial_params, config.seed)
        return setup

    def kept(self, name: str, make: Callable[[], Function], *more: Hashable) -> Function:
        """Return a compiled function of this setup; equal setups get the same one, and it is compiled once."""
        return kept((name, self._identity, *more), make)

    @functools.cached_property
    def _identity(self) -> Hashable:
        """All that a compiled function of a setup depends on, except for the seed."""
        data = dataclasses.replace(self.config.data, source="")
        config = dataclasses.replace(self.config, data=data, seed=0)
        config = dataclasses.replace(config, train=TrainConfig(), sample=SampleConfig(), lr_finder=LRFinderConfig())
        return to_json(config), self.n_train, self.n_validation, self.graphdef, self.mesh

    def with_seed(self, seed: int) -> "Setup":
        """Return the same with another seed, of parameters, batches and dropout, on the same devices."""
        config = dataclasses.replace(self.config, seed=seed)
        dtype, block, options = self.dtype, self.config.model.attention_block, compiler_options(self.mesh)
        _, _, initial_params = plan(config.model, seed, choose.ops_for(dtype, block, mesh=self.mesh), options)
        return dataclasses.replace(self, config=config, initial_params=initial_params)

    @functools.cached_property
    def on_device(self) -> jax.Array:
        """Integers [n_train] of the corpus's width, the training set, on every device."""
        return sharding.put(self.tokens[: self.n_train], sharding.replicated(self.mesh))

    def params_of(self, checkpoints: Path, step: int) -> Params:
        """Read the parameters of a checkpoint, on one device.

        Raises:
            NoCheckpoint: if it is damaged.
        """
        tx, here = optimizer.empty(self.config), jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = sharding.with_sharding(here, state_shapes(self.shapes, tx, self.config.seed, self.dtype))
        with contextlib.closing(Checkpoints(checkpoints)) as store:
            params: Params = store.load(step, lambda record: like)[2].params
        return params

    def initial_state(self, tx: optax.GradientTransformation) -> TrainState:
        """Return the state before the first step, with its shardings, in memory of its own (steps reuse it)."""
        create = partial(create_state, tx=tx, seed=self.config.seed, dtype=self.dtype)
        params, options = self.initial_params(), compiler_options(self.mesh)
        if layout.splits_parameters(self.mesh):  # one device may hold the parameters, but not the whole state
            shardings = state_sharding(jax.eval_shape(create, params), self.mesh)
            params = sharding.put(params, shardings.params)
            return jax.jit(create, out_shardings=shardings, compiler_options=options)(params)
        structure = jax.tree.structure(jax.eval_shape(tx.init, params))
        program = self.kept(
            "initial state", lambda: jax.jit(create, compiler_options=options), structure, self.config.seed
        )
        state = program(params)
        return sharding.put(state, state_sharding(state, self.mesh))

    def initial_state_in_background(self, tx: optax.GradientTransformation) -> Future[TrainState]:
        """Compute the state before the first step in a thread: tracing the training step keeps one core busy."""
        thread = ThreadPoolExecutor(1)
        state = thread.submit(self.initial_state, tx)
        thread.shutdown(wait=False)
        return state

    def state_shapes(self, tx: optax.GradientTransformation) -> TrainState:
        """Return the training state as shapes with shardings."""
        state = state_shapes(self.shapes, tx, self.config.seed, self.dtype)
        return sharding.with_sharding(state_sharding(state, self.mesh), state)

    @property
    def validation_batches(self) -> int:
        """Number of batches of a validation on the full validation set."""
        per_batch = self._validation_batch_size("validation") * self.config.model.block_size
        return -(-self.n_validation // per_batch)

    @property
    def n_test(self) -> int:
        """Length of the test set, which follows the validation set."""
        return len(self.tokens) - self.n_train - self.n_validation

    def validator(self, whole: bool = False, split: str = "validation") -> Validator:
        """Return the function (parameters, step, stop) -> loss on the validation set, nats per character.

        The step only matters if the config asks for random crops and `whole` is False. stop() is called before each
        batch; if it returns True the loss is None. `split` is 'test' for the loss on the test set.
        """
        crops = self.config.ancestor.random_validation and not whole
        windows_at = self._crops() if crops else self._windows(split)
        step = partial(validation_step, graphdef=self.graphdef, mesh=self.mesh)
        loss_sum = self.kept("validation", lambda: jax.jit(step, compiler_options=compiler_options(self.mesh)))

        def loss(params: Params, step: int, stop: Callable[[], bool] = lambda: False) -> float | None:
            pairs = []
            for inputs, targets in windows_at(step):
                if stop():
                    return None
                # Wait for each result: with several CPU devices, two dispatches in flight can deadlock.
                pairs.append(jax.device_get(loss_sum(params, inputs, targets)))
            if crops:  # the original averages the means of its batches
                return sum(float(total) / int(count) for total, count in pairs) / len(pairs)
            return sum(float(total) for total, _ in pairs) / sum(int(count) for _, count in pairs)

        return loss

    def validation_windows(self) -> Iterable[np.ndarray]:
        """Return the batches of the validation set, int32 [2, B, T] each; each character is a target once."""
        return self._windows("validation")(0)

    def _windows(self, split: str) -> Callable[[int], Iterable[np.ndarray]]:
        """Return the function from a step to the batches of a set: inputs and targets, int32 [2, B, T]."""
        start, stop = self._bounds(split)
        block_size, batch_size = self.config.model.block_size, self._validation_batch_size(split)
        return lambda step: batches.validation_batches(self.tokens[:stop], start, block_size, batch_size)

    def _bounds(self, split: str) -> tuple[int, int]:
        """Return where in the corpus a set begins and ends."""
        start, stop = self.n_train, self.n_train + self.n_validation
        return (stop, len(self.tokens)) if split == "test" else (start, stop)

    def _validation_batch_size(self, split: str) -> int:
        """Return the sequences per batch.

        Short batches are merged: validation stores no activations, and each dispatch has a fixed cost.
        """
        start, stop = self._bounds(split)
        characters, batch_size = min(VALIDATED_AT_ONCE, stop - start), self.config.data.batch_size
        return batch_size * max(1, characters // (batch_size * self.config.model.block_size))

    def _crops(self) -> Callable[[int], Iterable[tuple[np.ndarray, ...]]]:
        """Return the same function for validation like the original's: new random crops at each step."""
        data = self.config.data
        draw = jax.jit(partial(batches.validation_crops, block_size=self.config.model.block_size, data=data))
        validation_set, key = self.tokens[self.n_train :][: self.n_validation], jax.random.key(self.config.seed)
        return lambda step: zip(*jax.device_get(draw(validation_set, validation_key(key, step))), strict=True)

    def record(self) -> dict[str, Any]:
        """Return the description of the run that is saved in a checkpoint, as JSON can hold it."""
        return dict(self._record)

    @functools.cached_property
    def _record(self) -> dict[str, Any]:
        return record_of(self.config, self.vocabulary, self.tokens)
