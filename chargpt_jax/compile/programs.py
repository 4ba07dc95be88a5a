"""The programs of a config, traced on shapes instead of arrays, for devices that need not be there.

The functions are those of a real run: `train_steps` and `validation_step` of training/dispatch/steps.py, `prefill`,
`inside_context` and `beyond_context` of generation/generate.py.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from chargpt_jax.compile import least_bytes
from chargpt_jax.config import Config, MeshConfig
from chargpt_jax.devices import layout, sharding
from chargpt_jax.devices.platform import compute_dtype
from chargpt_jax.generation.generate import (
    beyond_context,
    bucket,
    decoding_program,
    inside_context,
    prefill,
    with_memory,
)
from chargpt_jax.generation.sampler import Sampler
from chargpt_jax.model.init import abstract_model
from chargpt_jax.ops.choose import ops_for
from chargpt_jax.training import optimizer
from chargpt_jax.training.attention import expected
from chargpt_jax.training.dispatch.feed import Feed
from chargpt_jax.training.dispatch.steps import jit_train_steps, state_shapes, state_sharding, validation_step

N_TRAIN = 400_000
"""Assumed length of the training text, in characters."""

VOCAB_SIZE, USED_IDS = 128, 97
"""Assumed numbers of embeddings and of token ids, before a text is read."""


DECODING_STEP = "decoding step"
"""One token of every sequence."""


class Program(NamedTuple):
    """A jitted function and the shapes of its arguments."""

    name: str
    function: Any
    args: tuple[Any, ...]
    static: dict[str, Any]
    devices: str
    """In words."""
    device_count: int
    unit: str
    """What the program computes once, or its main loop per iteration: 'training step', 'batch', 'decoding step'."""
    least_bytes: least_bytes.Parts
    """What it has to read and write per unit and device, at least."""


def programs(config: Config, on: Sequence[Any]) -> Iterator[Program]:
    """Yield a run's programs: training and validation on the devices that split a batch, generation on one device."""
    config = with_vocabulary(config)
    dtype, mesh = compute_dtype(config.amp, on[0]), training_mesh(config, on)
    given = dtype, config.model.attention_block, on[0].platform, expected(config, mesh)
    graphdef, params = abstract_model(config.model, ops_for(*given))
    sharded, _ = abstract_model(config.model, ops_for(*given, mesh))
    yield from _training(config, mesh, dtype, graphdef, sharded, params)
    yield from _generation(config, on[0], graphdef, params)


def with_vocabulary(config: Config) -> Config:
    """Return the config, with assumed vocabulary sizes if it has none."""
    if config.model.vocab_size:
        return config
    model = dataclasses.replace(config.model, vocab_size=VOCAB_SIZE, used_ids=USED_IDS)
    return dataclasses.replace(config, model=model)


def training_mesh(config: Config, on: Sequence[Any]) -> Mesh:
    """Return those of the given devices that a training with this config uses."""
    if config.mesh != MeshConfig():
        return layout.device_mesh(config, list(on))
    return sharding.data_mesh(config.data.batch_size // config.optimizer.accumulation_steps, list(on))


def _training(config: Config, mesh: Mesh, dtype: Any, graphdef: Any, sharded: Any, params: Any) -> Iterator[Program]:
    """Yield training and validation; `sharded` is `graphdef` with the operations of one device of the mesh."""
    used = sharding.describe(mesh)
    # A run determines the learning rate and the length of an epoch; neither changes the shapes of the program.
    # The program of a run of given minutes differs only in that the learning rates are an argument.
    scheduler = dataclasses.replace(config.scheduler, minutes=None)
    schedule = optimizer.warmup_cosine(scheduler, peak=1e-3, epoch_steps=100)
    tx = optimizer.make_optimizer(config, schedule, mesh)
    state = state_shapes(params, tx, config.seed, dtype)
    state = sharding.with_sharding(state_sharding(state, mesh), state)
    B, T, n = config.data.batch_size, config.model.block_size, mesh.size
    yield Program(
        "training",
        jit_train_steps(config, sharded, tx, mesh, state),
        (state, Feed(N_TRAIN, np.dtype(np.uint8), config, mesh).shape, _ints()),
        {},
        used,
        n,
        "training step",
        least_bytes.training(state, graphdef, B, T, config.model.n_layer, n),
    )
    validation = jax.jit(partial(validation_step, graphdef=sharded, mesh=mesh))
    moved = {"parameters": least_bytes.bytes_per_device(state.params), "batch": 2 * least_bytes.INT32 * B * T // n}
    yield Program("validation", validation, (state.params, *[_ints(B, T)] * 2), {}, used, n, "batch", moved)


def _generation(config: Config, device: Any, graphdef: Any, params: Any) -> Iterator[Program]:
    """Yield the programs that continue the config's sample prompts, also beyond the context if they go there."""
    mesh, how = sharding.data_mesh(1, [device]), config.sample
    here, used = sharding.replicated(mesh), sharding.describe(mesh)
    lengths = [len(prompt) for prompt in how.prompts]
    params, B, longest = sharding.with_sharding(here, params), len(lengths), max(lengths)
    length, block_size = bucket(longest + how.max_new_tokens), config.model.block_size
    width = min(block_size, bucket(longest), length)
    prompts = (params, *sharding.with_sharding(here, (_ints(B, length), _ints(B))))
    static = {"graphdef": graphdef, "width": width, "mesh": mesh}
    state = sharding.with_sharding(here, jax.eval_shape(partial(prefill, **static), *prompts))
    stop = [np.zeros(len(one), np.int32) for one in how.stop]
    with_key = partial(Sampler.of(how).with_key, vocab_size=config.model.vocab_size, stop=stop)
    sampler = jax.eval_shape(with_key, jax.eval_shape(jax.random.key, 0))
    begun = jax.eval_shape(with_memory, dataclasses.replace(state, cache=None), sampler)
    cache, carry = state.cache, (_ints(B), sharding.with_sharding(here, begun))

    own = {"parameters": least_bytes.bytes_per_device(params)}
    per_position = least_bytes.bytes_per_device(cache) / min(block_size, length)
    moved = own | {"KV cache": int(per_position * width), "batch": least_bytes.INT32 * B * width}
    yield Program("prefill", prefill, prompts, static, used, 1, "batch of prompts", moved)
    inside = decoding_program(inside_context, graphdef, mesh, type(cache).generate, False)
    # The positions that the shortest prompt's cache holds, mean over the tokens that are generated.
    first, last = (min(block_size, min(lengths) + count) for count in (0, how.max_new_tokens))
    filled = (first + last) / 2
    moved = own | {"KV cache": int(per_position * filled)}
    yield Program("decoding", inside, (params, carry, cache, sampler), {}, used, 1, DECODING_STEP, moved)
    if longest + how.max_new_tokens > block_size:
        beyond = decoding_program(beyond_context, graphdef, mesh, type(cache).generate, False)
        moved = own | {"batch": least_bytes.INT32 * B * block_size}
        yield Program("beyond the context", beyond, (params, carry, None, sampler), {}, used, 1, DECODING_STEP, moved)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
