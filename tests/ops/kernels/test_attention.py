"""The attention kernels, interpreted, against the plain formula; and their compilers, without a device."""

import importlib.util
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from chargpt_jax.ops import plain
from chargpt_jax.ops.blockwise_attention import attention_in_blocks
from chargpt_jax.ops.dropout import Dropout, fold_seeds, keep_mask
from chargpt_jax.ops.kernels import tiles
from chargpt_jax.ops.kernels.attention import attention_in_kernels
from chargpt_jax.ops.kernels.tiles import Tiles
from tests.ops.test_blockwise_attention import SEEDS, inputs

interpreted = attention_in_kernels("interpret")
slow = pytest.mark.slow


def value_and_gradients(attention, arrays, how, seeds=SEEDS):
    """Return the output, and the gradients of q, k and v from an arbitrary gradient of the output."""
    weight = jnp.cos(jnp.arange(arrays[0].size)).reshape(arrays[0].shape).astype(arrays[0].dtype)

    def both(q, k, v):
        out, pull_back = jax.vjp(lambda *x: attention(*x, seeds, how), q, k, v)
        return out, *pull_back(weight)

    return jax.jit(both)(*arrays)


def largest_difference(found, expected):
    """Return the largest difference of any array, as a fraction of its largest value, or of 1."""
    pairs = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in zip(found, expected, strict=True)]
    return max(np.abs(x - y).max() / max(np.abs(y).max(), 1) for x, y in pairs)


@pytest.mark.parametrize(
    ("length", "width", "rate"),
    [
        *((1, 8, 0.3), (13, 6, 0.0), (70, 8, 0.3)),
        *(pytest.param(*sizes, marks=slow) for sizes in ((13, 6, 0.3), (70, 8, 0.0), (64, 16, 0.9), (16, 2, 0.3))),
        *(pytest.param(*sizes, marks=slow) for sizes in ((130, 64, 0.3), (130, 24, 0.0), (257, 128, 0.2))),
    ],
)
def test_kernels_equal_the_plain_formula(length, width, rate):
    """Within 1e-6 of the largest value, or of 1, in float32: one block, several, and padding."""
    arrays, how = inputs(length, width=width), Dropout(rate)
    found, expected = (value_and_gradients(f, arrays, how) for f in (interpreted, plain.attention))
    assert largest_difference(found, expected) < 1e-6


@pytest.mark.parametrize("compiler", ["interpret", pytest.param("mosaic", marks=slow)])
def test_kernels_drop_the_elements_that_the_plain_mask_drops(compiler, monkeypatch):
    """With one-hot values the output is the matrix of weights after dropout; no element may differ."""
    monkeypatch.setattr(Tiles, "options", lambda self: {"interpret": True})  # with the blocks of that compiler
    T, how = 70, Dropout(0.5)
    q, k, _ = inputs(T, width=T)
    weights = attention_in_kernels(compiler)(q, k, jnp.broadcast_to(jnp.eye(T), q.shape), SEEDS, how)
    index = jnp.arange(T * T, dtype=jnp.uint32).reshape(T, T)
    kept = jnp.stack([keep_mask(fold_seeds(SEEDS, head), index, how) for head in range(3)], axis=1)
    past = jnp.tril(jnp.ones((T, T), bool))
    np.testing.assert_array_equal(weights != 0, kept & past)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=slow)])
def test_kernels_round_no_more_than_attention_in_blocks(dtype):
    arrays, how = inputs(70, dtype, width=8), Dropout(0.3)
    exact = value_and_gradients(plain.attention, [x.astype(jnp.float32) for x in arrays], how)
    found, known = (value_and_gradients(f, arrays, how) for f in (interpreted, attention_in_blocks(64, False)))
    assert {x.dtype for x in found} == {jnp.dtype(dtype)}
    assert largest_difference(found, exact) <= 1.5 * largest_difference(known, exact)


def test_no_gradient_reaches_later_positions():
    q, k, v = inputs(40, width=4)
    sums = jax.jit(jax.grad(lambda *x: jnp.sum(interpreted(*x, SEEDS, Dropout(0.3))[:, :, :17]), argnums=(0, 1, 2)))
    for gradient in sums(q, k, v):
        assert np.all(gradient[:, :, 17:] == 0)
        assert np.any(gradient[:, :, :17] != 0)


@slow
def test_kernels_give_the_same_bits_with_and_without_a_gradient():
    arrays, how = inputs(20, width=4), Dropout(0.3)
    alone = jax.jit(partial(interpreted, seeds=SEEDS, how=how))(*arrays)
    np.testing.assert_array_equal(alone, value_and_gradients(interpreted, arrays, how)[0])


def test_rematerialisation_saves_the_forward_kernels_results(capsys):
    """The output and the logs of the denominators: the backward pass does not need to run the kernel again."""
    q, k, v = inputs(20, width=4)
    attend = plain.rematerialised(lambda q: jnp.sin(interpreted(q, k, v, SEEDS, Dropout(0.3))))
    print_saved_residuals(attend, q)
    lines = capsys.readouterr().out.splitlines()
    saved = [line.split()[0] for line in lines if "from a constant" not in line and "from the argument" not in line]
    assert sorted(saved) == ["f32[2,3,20,4]", "f32[6,1,1,32]"]


@pytest.mark.parametrize(("compiler", "platform"), [("triton", "cuda"), ("mosaic", "tpu")])
def test_gradient_is_two_kernels_on_an_accelerator(compiler, platform):
    text = lowered(compiler, platform, (300, 24), jnp.bfloat16, 0.2).as_text()
    assert len(re.findall(r"custom_call @\S*(?:triton|tpu_custom_call)", text)) == 2
    assert "stablehlo.dot_general" not in text


def lowered(compiler, platform, sizes, dtype, rate):
    """Return the gradients of attention [2, 3, T, D], lowered for a platform that need not be here."""
    x, seeds = jax.ShapeDtypeStruct((2, 3, *sizes), dtype), jax.ShapeDtypeStruct((2, 2), jnp.uint32)

    def gradients(q, k, v, seeds):
        attend = attention_in_kernels(compiler)
        return jax.grad(lambda *x: jnp.sum(attend(*x, seeds, Dropout(rate)).astype(jnp.float32)), (0, 1, 2))(q, k, v)

    try:
        return jax.jit(gradients).trace(x, x, x, seeds).lower(lowering_platforms=(platform,))
    except RuntimeError as error:  # since JAX 0.12
        if "No supported GPU devices" not in str(error):
            raise
        pytest.skip("this version of JAX lowers a kernel for a GPU only where it has one")


@pytest.mark.parametrize(
    ("length", "width", "compiler", "dtype", "block", "padded"),
    [
        (1, 2, "triton", jnp.bfloat16, 16, (16, 16)),
        (13, 24, "triton", jnp.bfloat16, 16, (16, 32)),
        (65, 64, "triton", jnp.bfloat16, 64, (128, 64)),
        (512, 128, "triton", jnp.bfloat16, 64, (512, 128)),
        (512, 32, "triton", jnp.float32, 32, (512, 32)),
        (512, 8, "triton", jnp.float32, 64, (512, 16)),
        (513, 80, "mosaic", jnp.float32, 128, (640, 128)),
    ],
)
def test_blocks_are_powers_of_two_that_cover_the_length(length, width, compiler, dtype, block, padded):
    one = Tiles(length, width, dtype, compiler)
    assert (one.block, (one.padded_length, one.padded_width)) == (block, padded)


@pytest.mark.parametrize(
    ("length", "width", "dtype", "on"),
    [
        (512, 8, jnp.bfloat16, {"triton", "mosaic"}),
        (512, 128, jnp.float32, {"triton", "mosaic"}),
        (512, 64, jnp.float16, {"triton"}),  # TPUs have no float16
        (2560, 64, jnp.float32, {"triton", "mosaic"}),
        (2561, 64, jnp.float32, {"triton"}),  # a head no longer fits into a TPU's vector memory
        (512, 130, jnp.bfloat16, set()),
        (512, 64, jnp.float64, set()),
    ],
)
def test_supported_sizes_and_dtypes_depend_on_the_compiler(length, width, dtype, on):
    assert {name for name in ("triton", "mosaic") if Tiles(length, width, dtype, name).supported} == on
    assert not Tiles(length, width, dtype, "triton", Dropout(0.1, "jax")).supported


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU's compiler, is not installed")
@pytest.mark.parametrize(("length", "width", "dtype"), [(300, 8, jnp.bfloat16), (2560, 128, jnp.float32)])
def test_kernels_compile_for_a_tpu(length, width, dtype):
    from chargpt_jax.cli.tpu_compile import tpu_devices

    assert tiles.Tiles(length, width, dtype, "mosaic").supported
    mesh = jax.sharding.Mesh(tpu_devices("v5e:2x4")[:1], ("data",))
    everywhere = jax.sharding.PartitionSpec()
    here = jax.sharding.NamedSharding(mesh, everywhere)
    x = jax.ShapeDtypeStruct((2, 3, length, width), dtype, sharding=here)
    seeds = jax.ShapeDtypeStruct((2, 2), jnp.uint32, sharding=here)
    f = jax.shard_map(
        partial(value_and_gradients_of, how=Dropout(0.2)), mesh=mesh, in_specs=everywhere, out_specs=everywhere,
        check_vma=False,
    )  # fmt: skip
    with jax.set_mesh(mesh):  # otherwise the lowering asks the CPU what it is
        compiled = jax.jit(f).trace(x, x, x, seeds).lower(lowering_platforms=("tpu",)).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2


def value_and_gradients_of(q, k, v, seeds, how):
    return value_and_gradients(attention_in_kernels("mosaic"), (q, k, v), how, seeds)
