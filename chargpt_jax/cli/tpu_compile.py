"""Ahead-of-time compilation of a config's programs for a TPU, without a TPU.

The functions are those of a real run: `train_steps` and `validation_step` of setup.py, `prefill`, `inside_context` and
`beyond_context` of generate.py. They are traced on shapes instead of arrays; libtpu compiles them for the devices of a
named slice. This proves that they compile, and shows the memory that they take; it does not run them.
"""

import dataclasses
import importlib.util
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from chargpt_jax.config import Config
from chargpt_jax.devices import sharding
from chargpt_jax.devices.platform import compute_dtype
from chargpt_jax.errors import UserError
from chargpt_jax.generation.generate import beyond_context, bucket, decoding_program, inside_context, prefill
from chargpt_jax.generation.sampler import Sampler
from chargpt_jax.model.init import abstract_model
from chargpt_jax.ops.choose import ops_for
from chargpt_jax.training import optimizer
from chargpt_jax.training.setup import jit_train_steps, state_shapes, state_sharding, validation_step

OFFLINE = "TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_WORKER_HOSTNAMES=localhost TPU_ACCELERATOR_TYPE=v4-8"
"""Environment variables without which libtpu queries the network for the machine's type, and prints errors."""

TOPOLOGIES: dict[str, dict[str, Any]] = {
    "v5e:1x1": {"chips_per_host_bounds": (1, 1, 1)},  # libtpu assumes 2x2 chips per host
    "v6e:1x1": {"chips_per_host_bounds": (1, 1, 1)},
    "v4:2x2x1": {"chip_config_name": "megacore"},  # the two cores of a chip are one device, as in JAX
    **{name: {} for name in ("v5e:2x4", "v6e:2x4", "v5p:2x2x1", "v3:2x2")},
}
"""{some of the known topologies: options that libtpu needs in addition to the name}."""

N_TRAIN = 400_000  # assumed length of the training text, in characters


class Program(NamedTuple):
    """A jitted function and the shapes of its arguments."""

    name: str
    function: Any
    args: tuple[Any, ...]
    static: dict[str, Any]
    devices: str


def for_tpu(config: Config, topology: str = "v5e:2x4") -> Iterator[str]:
    """Compile the programs for training, validation and generation; yield a message about each.

    Raises:
        UserError: if libtpu is missing, does not know the topology, or finds that a program needs too much memory.
    """
    slice_ = tpu_devices(topology)
    yield (
        f"Compiling for {topology} ({len(slice_)} x {slice_[0].device_kind}) without a TPU. This proves that the steps "
        "compile, and shows the memory that they take; it does not run them."
    )
    yield f"A training text of {N_TRAIN:,} characters is assumed. Temporaries that stay on the chip are not counted."
    if not config.model.vocab_size:
        yield "The vocabulary is not known before a text is read: 97 token ids and 128 embeddings are assumed."
    for program in programs(config, slice_):
        yield _compiled(program, topology)


def tpu_devices(topology: str) -> Sequence[Any]:
    """Return the devices of a topology such as 'v5e:2x4', to compile for only."""
    if importlib.util.find_spec("libtpu") is None:
        fix = f"pip install libtpu, in the version that jax[tpu] names for jax {jax.__version__}"
        raise UserError(f"--mode=compile needs the TPU's compiler, libtpu, which is not installed: {fix}.")
    for variable in OFFLINE.split():
        os.environ.setdefault(*variable.split("="))
    if not os.environ.get("JAX_PLATFORMS"):  # otherwise libtpu counts as a TPU; no effect if JAX is already initialised
        jax.config.update("jax_platforms", "cpu")
    try:
        return topologies.get_topology_desc(topology, "tpu", **TOPOLOGIES.get(topology, {})).devices
    except jax.errors.JaxRuntimeError:
        raise UserError(f"--topology is {topology!r}, but libtpu knows {', '.join(TOPOLOGIES)} and more.") from None


def programs(config: Config, on: Sequence[Any]) -> Iterator[Program]:
    """Yield a run's programs: training and validation on the devices that split a batch, generation on one device."""
    if not config.model.vocab_size:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=128, used_ids=97))
    dtype = compute_dtype(config.amp, on[0])
    graphdef, params = abstract_model(config.model, ops_for(dtype, config.model.attention_block, on[0].platform))
    yield from _training(config, on, dtype, graphdef, params)
    yield from _generation(config, on[0], graphdef, params)


def _training(config: Config, on: Sequence[Any], dtype: Any, graphdef: Any, params: Any) -> Iterator[Program]:
    mesh = sharding.data_mesh(config.data.batch_size // config.optimizer.accumulation_steps, list(on))
    everywhere, used = sharding.replicated(mesh), sharding.describe(mesh)
    # A run determines the learning rate and the length of an epoch; neither changes the shapes of the program.
    schedule = optimizer.warmup_cosine(config.scheduler, peak=1e-3, epoch_steps=100)
    tx = optimizer.make_optimizer(config.optimizer, schedule, mesh)
    state = state_shapes(params, tx, config.seed, dtype)
    state = sharding.with_sharding(state_sharding(state, mesh), state)
    yield Program(
        "training",
        jit_train_steps(config, graphdef, tx, mesh, state),
        (state, sharding.with_sharding(everywhere, _ints(N_TRAIN)), _ints()),
        {},
        used,
    )
    validation = jax.jit(partial(validation_step, graphdef=graphdef, mesh=mesh))
    batch = [_ints(config.data.batch_size, config.model.block_size)] * 2
    yield Program("validation", validation, (state.params, *batch), {}, used)


def _generation(config: Config, device: Any, graphdef: Any, params: Any) -> Iterator[Program]:
    """Yield the programs that continue the config's sample prompts, also beyond the context if they go there."""
    mesh, how = sharding.data_mesh(1, [device]), config.sample
    here, used = sharding.replicated(mesh), sharding.describe(mesh)
    params, B, longest = sharding.with_sharding(here, params), len(how.prompts), max(map(len, how.prompts))
    length = bucket(longest + how.max_new_tokens)
    width = min(config.model.block_size, bucket(longest), length)
    prompts = (params, *sharding.with_sharding(here, (_ints(B, length), _ints(B))))
    static = {"graphdef": graphdef, "width": width, "mesh": mesh}
    yield Program("prefill", prefill, prompts, static, used)
    state = sharding.with_sharding(here, jax.eval_shape(partial(prefill, **static), *prompts))
    sampler = jax.eval_shape(Sampler(how.temperature, how.top_k, how.top_p).with_key, jax.eval_shape(jax.random.key, 0))
    cache, carry = state.cache, (_ints(B), dataclasses.replace(state, cache=None))
    inside = decoding_program(inside_context, graphdef, mesh, type(cache).generate, False)
    yield Program("decoding", inside, (params, carry, cache, sampler), {}, used)
    if longest + how.max_new_tokens > config.model.block_size:
        beyond = decoding_program(beyond_context, graphdef, mesh, type(cache).generate, False)
        yield Program("beyond the context", beyond, (params, carry, None, sampler), {}, used)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _compiled(program: Program, topology: str) -> str:
    began = time.perf_counter()
    lowered = program.function.trace(*program.args, **program.static).lower(lowering_platforms=("tpu",))
    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"{program.name} does not fit into {topology}: lower data.batch_size. {reason}") from None
    seconds, mb = time.perf_counter() - began, 1e-6
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes  # the other outputs overwrite donated arguments
    return (
        f"{program.name}: compiled for {program.devices} of {topology} in {seconds:.1f} s; per device "
        f"{memory.argument_size_in_bytes * mb:.1f} MB of arguments, {outputs * mb:.1f} MB of additional outputs, "
        f"{memory.temp_size_in_bytes * mb:.1f} MB of temporaries"
    )
