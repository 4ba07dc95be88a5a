"""Blockwise attention against the plain formula: values, gradients, dropout, lengths, precisions."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chargpt_jax.devices import sharding
from chargpt_jax.devices.platform import compiler_options
from chargpt_jax.hash_rng import derive
from chargpt_jax.ops import blockwise_attention
from chargpt_jax.ops.blockwise_attention import causal_attention
from chargpt_jax.ops.choose import ops_for
from chargpt_jax.ops.dropout import Dropout, keep_mask
from tests.pairing import x64


def inputs(length: int, dtype=jnp.float32, batch: int = 2, heads: int = 3, width: int = 4, seed: int = 0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(batch, heads, length, width)), dtype) for _ in range(3))


def plain(q, k, v, seeds=None, how=Dropout()):  # noqa: B008
    """Compute attention with the complete [T, T] scores, and the dropout mask that the blocks must use."""
    _, H, T, D = q.shape
    # Full precision of the dtype: the default precision is lower on some devices.
    exactly = partial(jnp.einsum, precision="highest")
    scores = exactly("bhtd,bhsd->bhts", q, k).astype(jnp.promote_types(q.dtype, jnp.float32)) * D**-0.5
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -jnp.inf), axis=-1)
    if seeds is not None:
        place = jnp.arange(T * T, dtype=jnp.uint32).reshape(T, T)
        mask = jnp.stack([keep_mask(derive(seeds, head), place, how) for head in range(H)], axis=1)
        weights = jnp.where(mask, weights / (1 - how.rate), 0)
    return exactly("bhts,bhsd->bhtd", weights.astype(q.dtype), v)


SEEDS = jnp.array([[1, 2], [3, 4]], jnp.uint32)


@pytest.mark.parametrize(
    ("length", "block"),
    [(1, 8), (13, 8), (7, 100), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((8, 8), (16, 5), (4, 1)))],
)
@pytest.mark.parametrize("how", [Dropout(), Dropout(0.3), Dropout(0.3, "jax")], ids=["no dropout", "hash", "jax"])
def test_values_and_gradients_are_those_of_the_plain_formula(length, block, how):
    q, k, v = inputs(length)
    seeds = SEEDS if how.rate else None
    weight = jnp.cos(jnp.arange(q.size)).reshape(q.shape)

    def value(f):
        return jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sum(weight * f(q, k, v)), argnums=(0, 1, 2)))(q, k, v)

    ours, gradients = value(lambda q, k, v: causal_attention(q, k, v, seeds, how, block, True))
    theirs, expected = value(lambda q, k, v: plain(q, k, v, seeds, how))
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)
    for gradient, other in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, other, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("part", [1, 2 * 4 * 13 * 4, 3 * 4 * 13 * 4])
def test_heads_taken_a_few_at_a_time_equal_all_at_once(part, monkeypatch):
    """Chunks of one, two or three of the six (sequence, head) pairs, with dropout and gradients."""
    q, k, v = inputs(13)

    def value():
        f = lambda *x: jnp.sum(jnp.sin(causal_attention(*x, SEEDS, Dropout(0.3), 4, True)))  # noqa: E731
        return jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(q, k, v)

    whole, gradients = value()
    monkeypatch.setattr(blockwise_attention, "MAX_UNCHUNKED", 0)
    monkeypatch.setattr(blockwise_attention, "CHUNK", part)
    some, others = value()
    np.testing.assert_allclose(some, whole, rtol=1e-6)
    for gradient, other in zip(gradients, others, strict=True):
        np.testing.assert_allclose(gradient, other, rtol=1e-5, atol=1e-6)


def test_heads_are_computed_in_chunks_only_if_asked(monkeypatch):
    monkeypatch.setattr(blockwise_attention, "MAX_UNCHUNKED", 0)
    monkeypatch.setattr(blockwise_attention, "CHUNK", 1)
    q, k, v = inputs(13)

    def loops(chunked):
        f = jax.grad(lambda q: jnp.sum(causal_attention(q, k, v, SEEDS, Dropout(0.3), 4, chunked)))
        return "while" in jax.jit(f).lower(q).as_text()

    assert [loops(chunked) for chunked in (True, False)] == [True, False]
    for platform in ("cpu", "tpu", "gpu"):
        chosen = ops_for(query_block=4, platform=platform).attention
        assert chosen is blockwise_attention.attention_in_blocks(4, chunked=platform == "cpu")
    assert ops_for().attention is ops_for(platform=jax.default_backend()).attention


def test_bfloat16_stays_within_its_rounding_of_float32():
    q, k, v = inputs(20, jnp.bfloat16)
    exact = plain(*(x.astype(jnp.float32) for x in (q, k, v)))
    ours = jax.jit(lambda *x: causal_attention(*x, None, Dropout(), 8, True))(q, k, v)
    assert ours.dtype == jnp.bfloat16
    # One rounding of the weights and one of the result, 2**-9 each, of values below 3.
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, atol=0.03)


def test_gradients_keep_the_inputs_dtype():
    q, k, v = inputs(9, jnp.bfloat16)
    grads = jax.grad(
        lambda *x: jnp.sum(causal_attention(*x, None, Dropout(), 4, True).astype(jnp.float32)), argnums=(0, 1, 2)
    )
    assert {g.dtype for g in jax.eval_shape(grads, q, k, v)} == {jnp.dtype(jnp.bfloat16)}


def test_scores_of_all_heads_are_never_stored():
    """The compiled step has no array [B, H, T, T], neither forward nor backward."""
    B, H, T, block = 2, 3, 64, 16
    q, k, v = inputs(T)
    step = jax.jit(jax.grad(lambda q: jnp.sum(causal_attention(q, k, v, SEEDS, Dropout(0.1), block, True))))
    text = step.lower(q).as_text()
    assert f"{B}x{H}x{T}x{T}" not in text
    assert f"{B * H}x{T}x{T}" not in text
    assert f"{B}x{H}x{block}x{T}" in text


def test_keys_masked_by_causality_are_not_read():
    """The first block's scores have as many keys as queries, not T."""
    q, k, v = inputs(64)
    text = jax.jit(lambda q: causal_attention(q, k, v, None, Dropout(), 16, True)).lower(q).as_text()
    assert "2x3x16x16x" in text
    assert "2x3x16x32x" in text


@pytest.mark.slow
@pytest.mark.parametrize(("length", "block"), [(13, 8), (96, 1000), (1, 8), (130, 128)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_output_is_the_same_with_and_without_gradient(length, block, dtype):
    """A CPU uses other operations without a gradient; both variants must equal the plain formula."""
    with x64(dtype == jnp.float64):
        q, k, v = inputs(length, dtype)
        on_cpu, elsewhere = (partial(causal_attention, chunked=chunked) for chunked in (True, False))
        rest = (None, Dropout(0.3), block)
        found = [f(q, k, v, *rest) for f in (on_cpu, elsewhere)]
        found.append(jax.vjp(lambda *x: on_cpu(*x, *rest), q, k, v)[0])
        expected = plain(q, k, v)
    exact = {jnp.float32: 1e-5, jnp.bfloat16: 3e-2, jnp.float64: 1e-13}[dtype]
    for ours in found:
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours.astype(float), expected.astype(float), rtol=exact, atol=exact)


def test_dropout_is_applied_without_a_gradient_too():
    q, k, v = inputs(13)
    ours = causal_attention(q, k, v, SEEDS, Dropout(0.3), 8, True)
    np.testing.assert_allclose(ours, plain(q, k, v, SEEDS, Dropout(0.3)), rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how XLA compiles for a CPU")
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 3), (2, 3)])
def test_no_cpu_kernel_overwrites_the_input_of_exp(batch, heads):
    """LLVM does not vectorise a kernel that overwrites its own input."""
    q, k, v = inputs(128, batch=batch, heads=heads)
    step = jax.grad(lambda *x: jnp.sum(causal_attention(*x, SEEDS[:batch], Dropout(0.1), 64, True)), (0, 1, 2))
    options = compiler_options(sharding.data_mesh(1))
    text = jax.jit(step, compiler_options=options).lower(q, k, v).compile().as_text()
    kernels = [part for part in re.split(r"\n\n", text) if re.search(r"\[(?:\d+,)*64,\d+\]\S* exponential\(", part)]
    assert len(kernels) >= 4  # two blocks, forward and backward
    for kernel in kernels:
        taken, made = re.search(r"\((.*?)\) -> (\S+) {", kernel).groups()
        assert made.startswith("f32[")
        assert made not in [what.split(": ")[1] for what in taken.split(", ")]


@pytest.mark.skipif(jax.default_backend() != "cpu" or jax.__version_info__ < (0, 10), reason="XLA's library for CPUs")
def test_cpu_attention_without_gradient_is_fused():
    """The compiled program has no array of scores: they exist only inside the fused kernels."""
    q, k, v = inputs(256, batch=1, heads=8, width=8)
    text = jax.jit(lambda *x: causal_attention(*x, None, Dropout(), 64, True)).lower(q, k, v).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    for width in (192, 256):
        assert f"8,64,{width}]" in text
        assert f"8,64,{width}]" not in entry
    assert len(re.findall(r" = f32\[(?:1,)?8,64,9\]\S* fusion\(", entry)) >= 2
