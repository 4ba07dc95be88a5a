"""Blockwise attention against the plain formula: values, gradients, dropout, lengths, precisions."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chargpt_jax import devices
from chargpt_jax.attention import cached_attention, causal_attention, read_widths
from chargpt_jax.bits import derive
from chargpt_jax.dropout import Dropout, keep_mask
from tests.pairing import x64


def inputs(length: int, dtype=jnp.float32, batch: int = 2, heads: int = 3, width: int = 4, seed: int = 0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(batch, heads, length, width)), dtype) for _ in range(3))


def plain(q, k, v, seeds=None, how=Dropout()):  # noqa: B008
    """Spell the whole T x T array out, with the mask that the blocks should use."""
    _, H, T, D = q.shape
    # As exact as their dtype, which they are not on every device by themselves.
    exactly = partial(jnp.einsum, precision="highest")
    scores = exactly("bhtd,bhsd->bhts", q, k).astype(jnp.promote_types(q.dtype, jnp.float32)) * D**-0.5
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -jnp.inf), axis=-1)
    if seeds is not None:
        place = jnp.arange(T * T, dtype=jnp.uint32).reshape(T, T)
        mask = jnp.stack([keep_mask(derive(seeds, head), place, how) for head in range(H)], axis=1)
        weights = jnp.where(mask, weights / (1 - how.rate), 0)
    return exactly("bhts,bhsd->bhtd", weights.astype(q.dtype), v)


SEEDS = jnp.array([[1, 2], [3, 4]], jnp.uint32)


@pytest.mark.parametrize(("length", "block"), [(1, 8), (8, 8), (13, 8), (16, 5), (4, 1), (7, 100)])
@pytest.mark.parametrize("how", [Dropout(), Dropout(0.3), Dropout(0.3, "jax")], ids=["no dropout", "hash", "jax"])
def test_values_and_gradients_are_those_of_the_plain_formula(length, block, how):
    q, k, v = inputs(length)
    seeds = SEEDS if how.rate else None
    weight = jnp.cos(jnp.arange(q.size)).reshape(q.shape)

    def value(f):
        return jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sum(weight * f(q, k, v)), argnums=(0, 1, 2)))(q, k, v)

    ours, gradients = value(lambda q, k, v: causal_attention(q, k, v, seeds, how, block))
    theirs, expected = value(lambda q, k, v: plain(q, k, v, seeds, how))
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)
    for gradient, other in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("part", [1, 2 * 4 * 13 * 4, 3 * 4 * 13 * 4])
def test_heads_taken_a_few_at_a_time_equal_all_at_once(part, monkeypatch):
    """Of six rows one, two or three a part, masks and gradients included."""
    q, k, v = inputs(13)

    def value():
        f = lambda *x: jnp.sum(jnp.sin(causal_attention(*x, SEEDS, Dropout(0.3), 4)))  # noqa: E731
        return jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(q, k, v)

    whole, gradients = value()
    monkeypatch.setattr(devices, "WHOLE", 0)
    monkeypatch.setattr(devices, "PART", part)
    some, others = value()
    np.testing.assert_allclose(some, whole, rtol=1e-6)
    for gradient, other in zip(gradients, others, strict=True):
        np.testing.assert_allclose(gradient, other, rtol=1e-5, atol=1e-6)


def test_only_a_cpu_takes_a_few_heads_at_a_time(monkeypatch):
    monkeypatch.setattr(devices, "WHOLE", 0)
    monkeypatch.setattr(devices, "PART", 1)
    q, k, v = inputs(13)

    def loops(on):
        f = jax.grad(lambda q: jnp.sum(causal_attention(q, k, v, SEEDS, Dropout(0.3), 4, on)))
        return "while" in jax.jit(f).lower(q).as_text()

    assert [loops(on) for on in ("cpu", "tpu", "gpu")] == [True, False, False]
    assert loops(None) == (jax.default_backend() == "cpu")


def test_bfloat16_stays_within_its_rounding_of_float32():
    q, k, v = inputs(20, jnp.bfloat16)
    exact = plain(*(x.astype(jnp.float32) for x in (q, k, v)))
    ours = jax.jit(lambda *x: causal_attention(*x, None, Dropout(), 8))(q, k, v)
    assert ours.dtype == jnp.bfloat16
    # One rounding of the weights and one of the result, 2**-9 each, of values below 3.
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, atol=0.03)


def test_gradients_keep_the_inputs_dtype():
    q, k, v = inputs(9, jnp.bfloat16)
    grads = jax.grad(
        lambda *x: jnp.sum(causal_attention(*x, None, Dropout(), 4).astype(jnp.float32)), argnums=(0, 1, 2)
    )
    assert {g.dtype for g in jax.eval_shape(grads, q, k, v)} == {jnp.dtype(jnp.bfloat16)}


def test_no_array_of_all_heads_scores_is_ever_made():
    """Of [B, H, T, T] there is no trace in the compiled step, forward or backward."""
    B, H, T, block = 2, 3, 64, 16
    q, k, v = inputs(T)
    step = jax.jit(jax.grad(lambda q: jnp.sum(causal_attention(q, k, v, SEEDS, Dropout(0.1), block))))
    text = step.lower(q).as_text()
    assert f"{B}x{H}x{T}x{T}" not in text
    assert f"{B * H}x{T}x{T}" not in text
    assert f"{B}x{H}x{block}x{T}" in text


def test_keys_that_causality_masks_are_not_looked_at():
    """The first block's scores have as many keys as queries, not T."""
    q, k, v = inputs(64)
    text = jax.jit(lambda q: causal_attention(q, k, v, None, Dropout(), 16)).lower(q).as_text()
    assert "2x3x16x16x" in text
    assert "2x3x16x32x" in text


@pytest.mark.parametrize(("length", "block"), [(1, 8), (13, 8), (130, 128), (96, 1000)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_what_a_gradient_is_taken_of_is_what_is_made_without_one(length, block, dtype):
    """A CPU has a way of its own where no gradient is taken; it and the one with a gradient are the plain formula."""
    with x64(dtype == jnp.float64):
        q, k, v = inputs(length, dtype)
        on_cpu, elsewhere = (partial(causal_attention, platform=platform) for platform in ("cpu", "gpu"))
        rest = (None, Dropout(0.3), block)
        found = [f(q, k, v, *rest) for f in (on_cpu, elsewhere)]
        found.append(jax.vjp(lambda *x: on_cpu(*x, *rest), q, k, v)[0])
        expected = plain(q, k, v)
    exact = {jnp.float32: 1e-5, jnp.bfloat16: 3e-2, jnp.float64: 1e-13}[dtype]
    for ours in found:
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours.astype(float), expected.astype(float), rtol=exact, atol=exact)


def test_dropout_is_dropout_without_a_gradient_too():
    q, k, v = inputs(13)
    ours = causal_attention(q, k, v, SEEDS, Dropout(0.3), 8, "cpu")
    np.testing.assert_allclose(ours, plain(q, k, v, SEEDS, Dropout(0.3)), rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how XLA compiles for a CPU")
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 3), (2, 3)])
def test_no_kernel_of_a_cpu_writes_exp_over_what_it_takes_it_of(batch, heads):
    """It would take it of one score at a time: where a kernel writes what it reads, LLVM sees no way to use vectors."""
    q, k, v = inputs(128, batch=batch, heads=heads)
    step = jax.grad(lambda *x: jnp.sum(causal_attention(*x, SEEDS[:batch], Dropout(0.1), 64)), (0, 1, 2))
    options = devices.compiler_options(devices.data_mesh(1))
    text = jax.jit(step, compiler_options=options).lower(q, k, v).compile().as_text()
    kernels = [part for part in re.split(r"\n\n", text) if re.search(r"\[(?:\d+,)*64,\d+\]\S* exponential\(", part)]
    assert len(kernels) >= 4  # two blocks, forward and backward
    for kernel in kernels:
        taken, made = re.search(r"\((.*?)\) -> (\S+) {", kernel).groups()
        assert made.startswith("f32[")
        assert made not in [what.split(": ")[1] for what in taken.split(", ")]


@pytest.mark.skipif(jax.default_backend() != "cpu" or jax.__version_info__ < (0, 10), reason="XLA's library for CPUs")
def test_without_a_gradient_a_cpu_makes_large_blocks_in_one_kernel():
    """In the compiled program their scores are inside kernels only, from which outputs and sums of weights come."""
    q, k, v = inputs(256, batch=1, heads=8, width=8)
    text = jax.jit(lambda *x: causal_attention(*x, None, Dropout(), 64)).lower(q, k, v).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    for width in (192, 256):
        assert f"8,64,{width}]" in text
        assert f"8,64,{width}]" not in entry
    assert len(re.findall(r" = f32\[(?:1,)?8,64,9\]\S* fusion\(", entry)) >= 2


@pytest.mark.parametrize(
    "position", [(0, 11), (62, 63), (64, 3), (127, 127), (128, 0), (199, 199)], ids=lambda x: f"{x[0]} {x[1]}"
)
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_one_query_against_a_cache_equals_its_row(position, platform):
    """At either side of where more of the cache begins to be read; junk lies ahead of each row's position."""
    q, k, v = inputs(200)
    whole = jax.jit(lambda *x: causal_attention(*x, None, Dropout(), 64))(q, k, v)
    position = jnp.array(position)
    rows = jnp.arange(2)
    junk = jnp.arange(200)[None, None, :, None] > position[:, None, None, None]
    keys, values = (jnp.stack([jnp.where(junk, 99.0, x).swapaxes(2, 3)] * 3) for x in (k, v))
    other = jnp.array([[[[[7.0]]]]])
    keys, values = (x.at[jnp.array([0, 2])].set(other) for x in (keys, values))  # of other layers
    one = jax.jit(partial(cached_attention, platform=platform))(q[rows, :, position], keys, values, 1, position)
    np.testing.assert_allclose(one, whole[rows, :, position], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capacity", [1, 12, 63, 96, 250, 256, 508])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_sums_written_out_are_the_products(capacity, dtype):
    """A CPU's way and that of the others, for caches that can be cut into equal stretches and for others."""
    with x64(dtype == jnp.float64):
        rng = np.random.default_rng(0)
        q, *cache = (jnp.asarray(rng.normal(size=shape), dtype) for shape in [(3, 2, 6), *[(4, 3, 2, 6, capacity)] * 2])
        position = jnp.array([0, capacity // 2, capacity - 1])
        ours, theirs = (cached_attention(q, *cache, 2, position, platform) for platform in ("cpu", "tpu"))
    assert ours.dtype == theirs.dtype == dtype
    exact = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2, jnp.float64: 1e-13}[dtype]
    np.testing.assert_allclose(ours.astype(float), theirs.astype(float), rtol=exact, atol=exact / 10)


@pytest.mark.parametrize("capacity", [100, 1024])
@pytest.mark.parametrize("width", [6, 33])
def test_one_sequence_alone_gets_what_it_gets_among_others(width, capacity):
    rng = np.random.default_rng(0)
    shapes = [(2, 3, width), *[(2, 2, 3, width, capacity)] * 2]
    q, *cache = (jnp.asarray(4 * rng.normal(size=shape), jnp.float32) for shape in shapes)
    position = jnp.array([0, 4 * capacity // 5])
    attend = jax.jit(partial(cached_attention, platform="cpu"))
    both = attend(q, *cache, 1, position)
    for row in range(2):
        own = slice(row, row + 1)
        alone = attend(q[own], *(x[:, own] for x in cache), 1, position[own])
        np.testing.assert_allclose(alone, both[own], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_cache_may_be_read_in_the_width_that_is_asked_for(platform):
    rng = np.random.default_rng(0)
    q, *cache = (jnp.asarray(rng.normal(size=shape)) for shape in [(2, 2, 6), *[(3, 2, 2, 6, 512)] * 2])
    position = jnp.array([3, 100])
    expected = cached_attention(q, *cache, 1, position, platform)
    for width in (101, 256, 512):
        found = cached_attention(q, *cache, 1, position, platform, width)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    narrow = cached_attention(q, *cache, 1, position, platform, 64)
    np.testing.assert_allclose(narrow[0], expected[0], rtol=1e-5, atol=1e-6)
    assert np.abs(narrow[1] - expected[1]).max() > 1e-3  # no more than 64 places were read


def test_a_cpu_copies_neither_keys_nor_values_out_of_the_cache():
    B, H, D, S = 3, 2, 16, 512
    with jax.default_device(jax.devices("cpu")[0]):  # which there is beside any accelerator
        cache = jnp.zeros((4, B, H, D, S))
        args = (jnp.zeros((B, H, D)), cache, cache, 1, jnp.array([0, 300, 511]))
        temporaries = {
            platform: jax.jit(partial(cached_attention, platform=platform)).lower(*args).compile().memory_analysis()
            for platform in ("cpu", "tpu")
        }
    of_a_layer = B * H * D * S * 4
    assert temporaries["cpu"].temp_size_in_bytes < of_a_layer / 2
    assert temporaries["tpu"].temp_size_in_bytes > of_a_layer


@pytest.mark.parametrize("capacity", [1, 63, 64, 65, 100, 512, 513, 2048])
def test_a_cache_is_read_in_at_most_eight_steps_up_to_the_whole(capacity):
    widths = read_widths(capacity)
    assert widths[-1] == capacity
    assert widths == sorted(set(widths))
    assert len(widths) <= 8
    assert all(width == number * widths[0] for number, width in enumerate(widths[:-1], 1))
    assert widths[0] == capacity or widths[0] >= 64
