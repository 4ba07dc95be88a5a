"""chargpt_jax compared with the PyTorch reference implementation: the same parameters, the same tokens.

benchmarks/fidelity.py computes both sides; this file sets the bounds, relative to the largest value of an array: 1e-9
in float64, 1e-5 in float32. For bfloat16, and for values that only rounding changes, the bounds are the measured
differences, which are about as large as those of PyTorch from float64. The tests need PyTorch.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch.optim.lr_scheduler import LinearLR  # noqa: E402
from torch.utils.data import DataLoader, RandomSampler  # noqa: E402

from benchmarks import fidelity  # noqa: E402
from benchmarks.fidelity import CONFIG, KEYS, SIZES, STEPS, TRAINED, difference, ours, theirs  # noqa: E402
from chargpt_jax.config import DataConfig, LRFinderConfig, SchedulerConfig  # noqa: E402
from chargpt_jax.data.batches import steps_per_epoch  # noqa: E402
from chargpt_jax.data.tokenizer import CharTokenizer  # noqa: E402
from chargpt_jax.errors import UserError  # noqa: E402
from chargpt_jax.training.optimizer import warmup_cosine  # noqa: E402
from chargpt_jax.training.range_test import methods, search  # noqa: E402
from tests import pytorch_reference  # noqa: E402
from tests.pairing import x64  # noqa: E402

pytestmark = pytest.mark.parity

LOSSES = f"losses of {STEPS} training steps"
PARAMETER_NAMES = list(fidelity.parameters())


def distance(quantity: str, precision: str) -> float:
    """Return the relative difference of a result of chargpt_jax from PyTorch's in float64."""
    return difference(ours(precision)[quantity], theirs("float64")[quantity])[1]


# Compared quantities


def test_both_sides_hold_the_same_parameters():
    names = {name for name, _ in pytorch_reference.GPT(**SIZES).named_parameters()}
    assert names == set(PARAMETER_NAMES)
    _, params = fidelity.our_model("float32")
    np.testing.assert_equal(fidelity.by_name(params), fidelity.parameters())


def test_the_common_parameters_and_batches_leave_nothing_out():
    """No bias is 0 and no scale is 1; inputs and targets have padding; every array has a gradient."""
    assert all(np.abs(a - a.mean()).max() > 1e-3 for a in fidelity.parameters().values())
    assert all((a == 0).any() for a in fidelity.batch(0))
    assert ours("float64")["logits"]["logits"].dtype == np.float64
    assert all(a.dtype == np.float64 for a in ours("float64")[TRAINED].values())
    moved = difference(ours("float64")[TRAINED], fidelity.trained(fidelity.parameters())[TRAINED])
    assert moved[1] > 0.05
    losses = ours("float64")[LOSSES]["losses"]
    assert losses[-5:].mean() < losses[:5].mean() - 0.5


def test_a_difference_in_one_number_is_seen():
    logits = theirs("float64")["logits"]["logits"].copy()
    logits[1, 2, 3] += 1e-6
    assert difference({"logits": logits}, theirs("float64")["logits"])[0] == pytest.approx(1e-6)
    logits[0, 0, 0] = np.nan
    with pytest.raises(AssertionError, match="has NaN at different indices"):
        difference({"logits": logits}, theirs("float64")["logits"])


# float64


@pytest.mark.parametrize("quantity", ["logits", "loss", "learning rates", LOSSES])
def test_in_float64_we_are_the_ancestor(quantity):
    assert distance(quantity, "float64") <= 1e-9


@pytest.mark.parametrize("name", PARAMETER_NAMES)
@pytest.mark.parametrize("quantity", ["gradients", TRAINED])
def test_in_float64_each_array_is_the_ancestors(quantity, name):
    """The gradient of the tied table is the sum of its gradients as embedding and as head."""
    found, exact = ours("float64")[quantity][name], theirs("float64")[quantity][name]
    assert np.abs(exact).max() > 0
    assert difference({name: found}, {name: exact})[1] <= 1e-9


# float32


@pytest.mark.parametrize("quantity", ["logits", "loss", "gradients", "learning rates", LOSSES, TRAINED])
def test_in_float32_we_are_the_ancestor_but_for_rounding(quantity):
    assert distance(quantity, "float32") <= 1e-5


def test_slowest_key_biases_differ_from_float64_by_rounding():
    """Their gradient is small: float64 differs by up to 1e-9; in float32, Adam amplifies rounding errors."""
    assert distance(KEYS, "float64") <= 1e-9
    assert 1e-6 < distance(KEYS, "float32") <= 3e-4
    assert difference(theirs("float32")[KEYS], theirs("float64")[KEYS])[1] <= 3e-4


def test_key_biases_have_a_gradient_because_rope_rotates_them():
    """Without rotation it would be 0. The slowest pair, with 0.001 radians per position, has the smallest gradient."""
    width, slowest = SIZES["n_head"] * SIZES["n_head_dim"], fidelity.slowest_of_keys()
    biases = [array for name, array in theirs("float64")["gradients"].items() if name.endswith("qkv.bias")]
    for gradient in map(np.abs, biases):
        assert gradient[width : 2 * width].max() > 1e-3
        assert gradient[slowest].max() < gradient[width : 2 * width].max() / 50


def test_key_biases_affect_the_logits():
    with x64(True):
        graphdef, params = fidelity.our_model("float64")
        logits = jax.jit(lambda p: nnx.merge(graphdef, p)(fidelity.batch(0)[0]))
        before, qkv = np.asarray(logits(params)), params["blocks"]["attn"]["qkv"]
        width = SIZES["n_head"] * SIZES["n_head_dim"]
        qkv["bias"] = qkv["bias"].at[:, width : 2 * width].set(0)
        assert np.abs(np.asarray(logits(params)) - before).max() > 0.01


# bfloat16


BFLOAT16 = {  # bounds; measured: a CPU now, a CPU when all was bfloat16 (PyTorch under autocast)
    "logits": 0.03,  # 0.011, 0.015 (0.015)
    "loss": 5e-4,  # 9e-5, 5e-5 (3e-4)
    "gradients": 0.06,  # 0.012, 0.031 (0.013)
    LOSSES: 1.5e-3,  # 4e-4, 6e-4 (7e-4)
    TRAINED: 0.03,  # 0.008, 0.011 (0.010)
}


@pytest.mark.slow
@pytest.mark.parametrize("quantity", BFLOAT16)
def test_bfloat16_stays_within_the_measured_bound(quantity):
    assert 1e-6 < distance(quantity, "bfloat16") <= BFLOAT16[quantity]


# Generation


@pytest.mark.parametrize(
    ("precision", "bound"), [("float64", 1e-9), pytest.param("float32", 1e-5, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", ["surprisal", "entropy", "S2"])
def test_generation_metrics_equal_the_originals(name, precision, bound):
    """PyTorch computes the metrics of the generated tokens, one window per token; padding is an ordinary token."""
    tokens, found = fidelity.written(precision)
    assert tokens.shape[1] > CONFIG.block_size + 12
    assert difference({name: found[name]}, {name: fidelity.measured(precision)[name]})[1] <= bound


def test_metrics_are_nan_for_first_token_and_padding():
    undefined = fidelity.prompts() == 0
    undefined[:, 0] = True
    for array in fidelity.written("float64")[1].values():
        np.testing.assert_array_equal(np.isnan(array[:, :12]), undefined)
        assert np.isfinite(array[:, 12:]).all()


def test_entropy_differs_from_the_originals_by_its_floor_only():
    """The original computes log(p + 1e-10), which lowers an entropy by at most 1e-10 per vocabulary entry."""
    below = (
        fidelity.written("float64")[1]["entropy"]
        - fidelity.measured("float64", pytorch_reference.ENTROPY_FLOOR)["entropy"]
    )
    assert np.nanmin(below) > -1e-14
    assert 1e-10 < np.nanmax(below) <= 1e-10 * SIZES["vocab_size"] + 1e-14


def test_greedy_text_is_the_ancestors():
    tokens, _ = fidelity.written("float64", temperature=0.0)
    given = torch.from_numpy(fidelity.prompts()).long()
    expected = pytorch_reference.greedy(fidelity.torch_model(torch.float64), given, 30, CONFIG.block_size)
    assert tokens.tolist() == expected.tolist()


def test_original_reads_padding_in_front_of_a_prompt_as_tokens():
    """chargpt_jax processes each prompt without padding."""
    padded, model = fidelity.prompts(), fidelity.torch_model(torch.float64)
    for row in (padded[0], padded[2]):
        with torch.no_grad():
            both = [model(torch.from_numpy(tokens).long()[None])[0, -1] for tokens in (row, row[row > 0])]
        surprisals = [-torch.log_softmax(logits, -1) for logits in both]
        assert (surprisals[0] - surprisals[1]).abs().max() > 0.1


# Settings of the original


@given(st.integers(30, 5000), st.integers(1, 20), st.integers(1, 9), st.floats(0.3, 3))
@settings(deadline=None)
def test_a_short_epoch_is_as_long_as_the_ancestors_loader(n, block_size, batch_size, oversample):
    """The original's sampler draws length / (batch x block) crops, and its loader makes batches of them."""
    crops = range(n - block_size - 1)
    sampler = RandomSampler(
        crops, replacement=True, num_samples=math.ceil(len(crops) * oversample / batch_size / block_size)
    )
    data = DataConfig(batch_size=batch_size, oversample=oversample)
    assert steps_per_epoch(n, block_size, data, short_epochs=True) == len(
        DataLoader(crops, batch_size, sampler=sampler)
    )


@pytest.mark.parametrize("warmup", [1.0, 2.5, 9.0])
def test_a_warm_up_without_decay_is_the_ancestors(warmup):
    config = SchedulerConfig(max_steps=50, warmup_epochs=warmup, min_lr_factor=0.1)
    with x64(True):
        found = np.asarray(warmup_cosine(config, 1e-2, 10, "none")(jnp.arange(50)))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
    schedule, expected = LinearLR(optimizer, start_factor=0.1, total_iters=int(10 * warmup)), []
    for _ in range(50):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(found, expected, rtol=1e-12)


# The range test


def draws(count: int):
    """Yield increasing learning rates and falling losses, 2 to 12 of each."""
    rng = np.random.default_rng(0)
    for n in rng.integers(2, 13, count):
        yield np.exp(np.sort(rng.uniform(-23, 2, n))), 5 - np.cumsum(rng.exponential(size=n))


def test_the_helpers_of_the_range_test_are_the_ancestors():
    for rates, losses in draws(200):
        logs, heights = torch.from_numpy(np.log(rates)), torch.from_numpy(losses)
        expected = pytorch_reference.steepest(logs, heights).exp().item()
        assert methods.steepest_rate(rates, losses) == pytest.approx(expected, rel=1e-12)
        assert methods.lowest_rate(rates, losses) == rates[-1]
        spaced = pytorch_reference.log_spaced(logs[[0, -1]], 10).numpy()
        np.testing.assert_allclose(methods.log_spaced((rates[0], rates[-1]), 10), spaced, rtol=1e-12)


def test_equal_falls_are_steepest_in_the_middle():
    for losses in ([3.0, 2.0], [3.0, 2.0, 1.0]):
        rates = np.geomspace(1e-6, 1e-2, len(losses))
        found = methods.steepest_rate(rates, losses)
        expected = pytorch_reference.steepest(torch.from_numpy(np.log(rates)), torch.tensor(losses)).exp().item()
        assert found == pytest.approx(expected, rel=1e-12) == pytest.approx(1e-4, rel=1e-12)


@pytest.mark.parametrize("method", ["steepest", "lowest", "balanced"])
@pytest.mark.parametrize(
    "change", [{}, {"num_zooms": 1}, {"steps_per_zoom": 25, "zoom_factor": 0.2}, {"start_lr": 1e-4, "end_lr": 0.5}]
)
def test_the_range_test_on_a_formula_is_the_ancestors(method, change):
    config = dataclasses.replace(LRFinderConfig(method=method), **change)
    found = fidelity.our_zooms(fidelity.one_by_one(fidelity.analytic_loss), config)
    assert difference(found, fidelity.their_zooms(fidelity.analytic_loss, config))[1] <= 1e-12


FINDER_FIELDS = ("start_lr", "end_lr", "num_zooms", "steps_per_zoom", "zoom_factor", "method")
SETTINGS_OF_THE_ORIGINAL = {name: getattr(LRFinderConfig(), name) for name in FINDER_FIELDS}


def test_a_zoom_without_two_improvements_is_skipped_alike():
    """The second zoom has no finite loss, and the third continues with the range of the first."""

    def loss(zoom: int, step: int, rate: float) -> float:
        return math.nan if zoom == 1 else fidelity.analytic_loss(zoom, step, rate)

    found = list(search.search(fidelity.one_by_one(loss), LRFinderConfig()))[-1].zooms
    expected = pytorch_reference.range_test(loss, **SETTINGS_OF_THE_ORIGINAL)
    assert [zoom.number for zoom in found] == [1, 3, 4, 5]
    np.testing.assert_allclose([zoom.best for zoom in found], [zoom.best for zoom in expected], rtol=1e-12)


def test_where_no_rate_helps_both_find_nothing():
    assert pytorch_reference.range_test(lambda *_: 1.0, **SETTINGS_OF_THE_ORIGINAL) == []
    with pytest.raises(UserError, match="lowers the loss"):
        list(search.search(fidelity.one_by_one(lambda *_: 1.0), LRFinderConfig()))


@pytest.mark.slow
def test_the_range_test_of_the_model_is_the_ancestors():
    """With a new AdamW per zoom, in float64: the same points, and the same learning rate."""
    found, expected = fidelity.model_zooms()
    assert difference(found, expected)[1] <= 1e-9
    assert len(found["losses 1"]) >= 3


# Tokenizer

TEXTS = st.lists(st.text(st.characters()), max_size=4)  # any code points, including surrogates


@given(TEXTS, st.none() | st.integers(0, 12))
@settings(max_examples=200, deadline=None)
def test_the_tokenizer_is_the_ancestors(texts, block_size):
    tokenizer, names = CharTokenizer.from_text("".join(texts)), pytorch_reference.vocabulary("".join(texts))
    assert list(tokenizer.vocabulary) == names
    assert tokenizer.n_ids == len(names)
    ids = pytorch_reference.encode(names, texts, block_size)
    assert tokenizer.encode(texts, block_size).tolist() == ids
    assert tokenizer.decode_each(ids) == pytorch_reference.decode_each(names, ids)
    assert tokenizer.decode(ids) == [text[:block_size] for text in texts]


@given(st.text(), st.lists(st.lists(st.integers(-3, 300), max_size=5), max_size=3))
@settings(deadline=None)
def test_ids_without_a_character_decode_to_nothing_alike(text, ids):
    names = pytorch_reference.vocabulary(text)
    assert CharTokenizer.from_text(text).decode_each(ids) == pytorch_reference.decode_each(names, ids)
