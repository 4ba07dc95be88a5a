"""Which attentions a device can train with, and which one an operation uses."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chargpt_jax.devices.platform import cuda_capability
from chargpt_jax.ops.choose import ATTENTIONS, attentions_for, ops_for, runs_at_once, try_attentions
from chargpt_jax.ops.dropout import Dropout
from chargpt_jax.ops.kernels.trial import Shape
from tests.ops.test_blockwise_attention import SEEDS, inputs

CPU = SimpleNamespace(platform="cpu")
TPU, TPU_V2 = (SimpleNamespace(platform="tpu", device_kind=f"TPU {name}") for name in ("v5 lite", "v2"))
T4, A100, MI300 = (SimpleNamespace(platform="gpu", compute_capability=name) for name in ("7.5", "8.0", "gfx942"))
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


@pytest.mark.parametrize(
    ("device", "dtype", "sizes", "names"),
    [
        (CPU, F32, (512, 8, 0.0), "blocks"),
        (T4, F16, (512, 8, 0.0), "blocks"),
        (MI300, BF16, (512, 8, 0.0), "blocks"),
        (A100, BF16, (512, 8, 0.0), "blocks kernel cudnn"),
        (A100, BF16, (512, 8, 0.1), "blocks kernel"),  # cuDNN has no dropout that a resumed run repeats
        (A100, BF16, (512, 12, 0.0), "blocks kernel"),
        (A100, BF16, (512, 130, 0.0), "blocks"),
        (A100, F32, (512, 64, 0.0), "blocks kernel"),
        (TPU, BF16, (512, 64, 0.0), "blocks kernel"),
        (TPU, BF16, (8192, 64, 0.1), "blocks"),
        (TPU_V2, BF16, (512, 64, 0.0), "blocks"),
    ],
)
def test_attentions_depend_on_device_dtype_and_sizes(device, dtype, sizes, names):
    assert attentions_for(device, dtype, *sizes) == tuple(names.split())


def test_capability_of_other_devices_is_zero():
    assert [cuda_capability(one) for one in (CPU, TPU, T4, A100, MI300)] == [0.0, 0.0, 7.5, 8.0, 0.0]


def test_kernel_is_used_with_seeds_only():
    """Training gives seeds, also without dropout. Validation and generation may run on arrays that XLA splits."""
    x = jax.ShapeDtypeStruct((2, 3, 13, 8), F32)
    fast, blocks = (ops_for(platform="cpu", attention=name).attention for name in ("kernel", "blocks"))

    def program(attention, *rest):
        return str(jax.make_jaxpr(lambda q, k, v: attention(q, k, v, *rest))(x, x, x))

    for how in (Dropout(), Dropout(0.3)):
        assert "pallas_call" in program(fast, SEEDS, how)
        assert "pallas_call" not in program(blocks, SEEDS, how)
    assert program(fast) == program(blocks)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_equal_choices_are_equal_operations(platform):
    """Equal `Ops` share a compilation; all but the attention is the same."""
    found = [ops_for(BF16, 64, platform, name) for name in ATTENTIONS]
    assert found == [ops_for(BF16, 64, platform, name) for name in ATTENTIONS]
    assert len(set(found)) == len(found)
    assert len({(one.linear, one.unembed, one.query_attention, one.cache_type) for one in found}) == 1


def test_trial_compares_the_operations_of_training_steps():
    """A CPU interprets the kernel; cuDNN is not available there, which is a fault and no error."""
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    shape = Shape(sequences=2, heads=1, length=9, width=8, rate=0.0, remat=True)
    blocks, kernel, cudnn = try_attentions(ATTENTIONS, shape, F32, 64, mesh)
    assert (blocks.fault, kernel.fault) == ("", "")
    assert kernel.error < 1e-6
    assert cudnn.fault.startswith("did not run (")


def test_attention_of_cudnn_is_causal_without_dropout(monkeypatch):
    """With JAX's own implementation in place of cuDNN's: the order of the axes, the mask and the scale."""
    own = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *x, implementation, **how: own(*x, **how))
    q, k, v = inputs(13, width=8)
    found, expected = (
        ops_for(platform="cpu", attention=name).attention(q, k, v, SEEDS, Dropout()) for name in ("cudnn", "blocks")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("runs", "tokens", "platform", "expected"),
    [
        (8, 64, "cpu", 4),
        (6, 64, "cpu", 3),
        (7, 64, "cpu", 1),
        (8, 1024, "cpu", 1),
        (8, 1024, "tpu", 8),
        (7, 9, "cuda", 7),
    ],
)
def test_a_cpu_trains_a_few_small_models_at_once(runs, tokens, platform, expected):
    assert runs_at_once(runs, tokens, platform) == expected
