"""Exports without a mask give chargpt_jax's loss and probabilities, by their weights alone."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from chargpt_jax.api import Model
from chargpt_jax.config import Config, ModelConfig
from chargpt_jax.data.tokenizer import CharTokenizer
from chargpt_jax.interop import convert
from chargpt_jax.interop.ancestor import to_params
from chargpt_jax.interop.safetensors_file import read_safetensors
from chargpt_jax.interop.unused_ids import TIED_LOGIT, UNTIED_LOGIT, tied_row, untied
from tests import reference
from tests.interop.test_convert import HEADS, LETTERS, changed, logits, original
from tests.pairing import built

WIDTH = 16
TWO = ("trained", "zeros in the scale")


def norms() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return scales and biases of a final LayerNorm, float32 [WIDTH] each, by name."""
    rng = np.random.default_rng(3)
    scale, bias = (rng.normal(1, 0.3, WIDTH) + 0.1).astype(np.float32), rng.normal(0, 0.1, WIDTH).astype(np.float32)
    zeros = scale.copy()
    zeros[[2, 7]] = 0
    opposite = np.float32([1, -1] * (WIDTH // 2))
    return {
        "trained": (scale, bias),
        "initial": (np.ones_like(scale), np.zeros_like(bias)),
        "zeros in the scale": (zeros, bias),
        "only zeros in the scale": (np.zeros_like(scale), bias),
        "bias / scale sums to 0": (np.ones_like(scale), opposite),
        "tiny and negative scale": (1e-4 * opposite, bias),
    }


def model(norm: tuple[np.ndarray, np.ndarray], padding_chance: float = 0.0) -> Model:
    """Return a masked model with random parameters and this final LayerNorm; rows of unused ids are likely."""
    tokenizer = CharTokenizer(LETTERS)
    sizes = ModelConfig(**changed({})["model"], used_ids=tokenizer.n_ids, mask_unused_ids=True)
    params: dict[str, Any] = to_params(original(), sizes)
    params = {**params, "ln_f": {"scale": norm[0], "bias": norm[1]}}
    config = Config(model=sizes)
    config.data.padding_chance = padding_chance
    return Model(config, tokenizer, built(sizes, 0)[0], params, 0)


def text(length: int, seed: int = 0) -> str:
    return "".join(np.random.default_rng(seed).choice(LETTERS, length))


def probabilities(values: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.softmax(values.astype(np.float64), axis=-1))


@pytest.mark.parametrize("name", norms())
def test_untied_head_gives_the_same_logits(name):
    (scale, bias), rng = norms()[name], np.random.default_rng(0)
    table = rng.normal(size=(64, WIDTH)).astype(np.float32)
    n = rng.normal(size=(500, WIDTH))
    n = (n - n.mean(axis=1, keepdims=True)) / n.std(axis=1, keepdims=True)
    new_scale, new_bias, head = untied(scale, bias, table, 40)
    found = (n * new_scale + new_bias) @ head.T
    np.testing.assert_allclose(found[:, 1:40], ((n * scale + bias) @ table.T)[:, 1:40], rtol=0, atol=2e-6)
    np.testing.assert_allclose(found[:, [0, *range(40, 64)]], UNTIED_LOGIT, rtol=1e-5)
    assert head.dtype == new_scale.dtype == new_bias.dtype == np.float32


@pytest.mark.parametrize("name", norms())
def test_tied_row_has_a_constant_logit_if_there_is_one(name):
    (scale, bias), rng = norms()[name], np.random.default_rng(1)
    row = tied_row(scale, bias)
    if name not in ("trained", "tiny and negative scale"):
        assert row is None
        return
    n = rng.normal(size=(500, WIDTH)).astype(np.float32)
    n = (n - n.mean(axis=1, keepdims=True)) / n.std(axis=1, keepdims=True)
    np.testing.assert_allclose((n * scale + bias) @ row, TIED_LOGIT, rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",  # a model with a tied head and one without; the laws of the others are above
    [pytest.param(name, marks=() if name in TWO else pytest.mark.slow) for name in norms()],
)
def test_transformers_gives_our_loss_and_probabilities(name, tmp_path):
    """No suppressed tokens are needed: neither for the loss, nor for greedy or sampled text."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ours = model(norms()[name])
    folder = convert.export("hf", ours.config, ours.tokenizer, ours.params, tmp_path / "hf", print)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    given = text(60)
    encoded = tokenizer(given, return_tensors="pt")
    with torch.no_grad():
        found = theirs(**encoded, labels=encoded["input_ids"])
    assert found.loss.item() == pytest.approx(ours.score(given).loss, abs=1e-5)
    tokens = ours.tokenizer.encode_text(given)[None]
    expected = probabilities(logits(ours.params, ours.config.model, tokens))
    np.testing.assert_allclose(probabilities(found.logits.numpy()), expected, rtol=0, atol=1e-5)

    theirs.generation_config.suppress_tokens = None
    prompt = tokenizer("abc\n", return_tensors="pt")
    greedy = theirs.generate(**prompt, do_sample=False, max_new_tokens=50)[0].tolist()
    assert tokenizer.decode(greedy) == ours.generate("abc\n", 50, temperature=0)[0].text
    torch.manual_seed(0)
    prompts = tokenizer(["a"] * 8, return_tensors="pt")
    sampled = theirs.generate(**prompts, do_sample=True, temperature=3.0, top_k=0, max_new_tokens=50).numpy()
    assert 0 < sampled.min() <= sampled.max() < ours.tokenizer.n_ids


def test_padding_embedding_is_exported_as_it_was_trained(tmp_path):
    ours = model(norms()["trained"], padding_chance=0.5)
    folder = convert.export("hf", ours.config, ours.tokenizer, ours.params, tmp_path / "hf", print)
    table = read_safetensors(folder / "model.safetensors")[0]["model.embed_tokens.weight"].read()
    np.testing.assert_array_equal(table, ours.params["wte"]["embedding"])


def exported(ours: Model, folder: Path, said: list[str]) -> reference.Params:
    """Return the arrays of an export for the original, as float64."""
    path = convert.export("original", ours.config, ours.tokenizer, ours.params, folder / "original", said.append)
    arrays = read_safetensors(path / "model.safetensors")[0]
    return {name: stored.read().astype(np.float64) for name, stored in arrays.items()}


def test_original_gives_our_probabilities(tmp_path):
    said: list[str] = []
    ours = model(norms()["trained"])
    arrays, tokens = exported(ours, tmp_path, said), ours.tokenizer.encode_text(text(60))
    expected = probabilities(logits(ours.params, ours.config.model, tokens[None])[0])
    np.testing.assert_allclose(probabilities(reference.logits(arrays, tokens, **HEADS)), expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(arrays["lm_head.weight"], arrays["transformer.wte.weight"])
    used = slice(1, ours.tokenizer.n_ids)
    np.testing.assert_array_equal(arrays["lm_head.weight"][used], ours.params["wte"]["embedding"][used])
    assert said == []


@pytest.mark.parametrize("name", ["initial", "zeros in the scale", "bias / scale sums to 0"])
def test_export_says_if_the_original_cannot_give_our_loss(name, tmp_path):
    said: list[str] = []
    ours = model(norms()[name])
    arrays = exported(ours, tmp_path, said)
    np.testing.assert_array_equal(arrays["lm_head.weight"], ours.params["wte"]["embedding"])
    assert len(said) == 1
    assert "the original's loss will be higher: train longer, or use --format=hf." in said[0]


def test_export_says_if_the_original_loses_the_padding_embedding(tmp_path):
    said: list[str] = []
    exported(model(norms()["trained"], padding_chance=0.1), tmp_path, said)
    assert len(said) == 1
    assert "overwrite the trained embedding of padding" in said[0]
