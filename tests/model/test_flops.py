"""FLOPs of a training step compared with XLA's count, and peak FLOP/s by device name."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from chargpt_jax.config import ModelConfig
from chargpt_jax.model.flops import peak_flops, training_flops
from tests.pairing import built


def test_training_flops_are_three_forward_passes_of_xla():
    """XLA counts the body of a loop once: the model has one layer and one block of queries."""
    config = ModelConfig(
        vocab_size=128, used_ids=97, block_size=64, n_embd=96, n_head=4, n_head_dim=32, n_ff=256, n_layer=1, remat=False
    )
    graphdef, params = jax.eval_shape(lambda: built(config, 0))
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    forward = jax.jit(lambda p, t: nnx.merge(graphdef, p)(t)).lower(params, tokens).compile().cost_analysis()["flops"]
    assert training_flops(config, 2) == pytest.approx(3 * forward, rel=0.1)


@pytest.mark.parametrize("change", [{"n_layer": 6}, {"vocab_size": 1024}, {"n_ff": 999}, {"block_size": 65}])
def test_larger_model_has_more_flops(change):
    small = {"vocab_size": 64, "used_ids": 9, "block_size": 64, "n_layer": 2}
    assert training_flops(ModelConfig(**{**small, **change}), 4) > training_flops(ModelConfig(**small), 4)


def test_sequences_add_up():
    config = ModelConfig(vocab_size=64, used_ids=9)
    assert training_flops(config, 12) == 12 * training_flops(config, 1)


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5", "bfloat16", 459e12),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("NVIDIA L40S", "bfloat16", None),
        ("Tesla T4", "float16", 65e12),
        ("Tesla T4", "bfloat16", None),
        ("TPU v5 lite", "float32", None),
        ("cpu", "float32", None),
    ],
)
def test_peak_is_found_by_device_name_or_none(kind, dtype, peak):
    assert peak_flops(SimpleNamespace(device_kind=kind), dtype) == peak
