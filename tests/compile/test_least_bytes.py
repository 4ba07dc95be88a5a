"""The lower bound on the bytes that a program moves."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from chargpt_jax.compile import least_bytes
from chargpt_jax.compile.programs import programs, with_vocabulary
from chargpt_jax.config import Config
from chargpt_jax.model.init import abstract_model
from chargpt_jax.ops.choose import ops_for


def small(**model: int | bool) -> Config:
    config = with_vocabulary(Config())
    sizes = {"block_size": 32, "n_embd": 16, "n_head": 2, "n_head_dim": 8, "n_ff": 64, "n_layer": 3, "dropout": 0.1}
    for name, value in {**sizes, "remat": False, **model}.items():
        setattr(config.model, name, value)
    config.data.batch_size = 4
    return config


def saved(config: Config, dtype=jnp.bfloat16) -> int:
    m = config.model
    graphdef, params = abstract_model(m, ops_for(dtype, m.attention_block, "tpu"))
    return least_bytes.saved_activations(graphdef, params, config.data.batch_size, m.block_size, m.n_layer)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_saved_activations_are_proportional_to_batch_and_layers(remat):
    config = small(remat=remat)
    before = saved(config)
    config.data.batch_size *= 3
    assert saved(config) == 3 * before
    config.model.n_layer *= 2
    assert saved(config) == 6 * before


def test_saved_activations_contain_what_the_backward_pass_needs():
    """The input of each layer in float32; queries, keys, values, and the outputs of attention and the MLP's matrix."""
    config = small(remat=True)
    m, characters = config.model, config.data.batch_size * config.model.block_size
    width = m.n_head * m.n_head_dim
    assert saved(config) >= m.n_layer * characters * (4 * m.n_embd + 2 * (3 * width + width + m.n_ff))


def test_recomputation_saves_fewer_activations():
    assert saved(small(remat=True)) < saved(small(remat=False))


@pytest.mark.slow
def test_lower_precision_saves_fewer_bytes():
    assert saved(small(), jnp.bfloat16) < saved(small(), jnp.float32)


def test_bytes_of_a_sharded_array_are_those_of_one_shard():
    devices = jax.devices()
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    shape = (8 * len(devices), 3)
    for spec, count in ((PartitionSpec("data"), len(devices)), (PartitionSpec(), 1)):
        x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        assert least_bytes.bytes_per_device([x, x]) == 2 * 4 * 8 * 3 * len(devices) // count
    assert least_bytes.bytes_per_device(jax.ShapeDtypeStruct(shape, jnp.bfloat16)) == 2 * 8 * 3 * len(devices)


def test_training_reads_and_writes_parameters_and_optimizer_state():
    training, validation, *_ = programs(small(), jax.devices()[:1])
    parameters = validation.least_bytes["parameters"]
    assert training.least_bytes["parameters"] == 2 * parameters
    assert 2 * 2 * parameters <= training.least_bytes["optimizer state"] < 2.1 * 2 * parameters  # AdamW has two moments
    assert training.least_bytes["batch"] == 2 * 4 * 4 * 32


@pytest.mark.slow
def test_decoding_reads_more_of_the_cache_the_more_it_generates():
    def cache(max_new_tokens: int) -> int:
        config = small(block_size=64)
        config.sample.prompts, config.sample.max_new_tokens = ("ab",), max_new_tokens
        _, _, prefill, decoding, *_ = programs(config, jax.devices()[:1])
        assert decoding.least_bytes["KV cache"] < prefill.least_bytes["KV cache"]
        return decoding.least_bytes["KV cache"]

    assert cache(10) < cache(40) < cache(60)
