"""transformers loads an exported folder, and gives the same logits, greedy text and token ids."""

import json
import re

import numpy as np
import pytest

from chargpt_jax.api import Model
from chargpt_jax.config import Config, ModelConfig
from chargpt_jax.data.tokenizer import CharTokenizer
from chargpt_jax.errors import UserError
from chargpt_jax.interop import convert
from chargpt_jax.interop.ancestor import to_params
from chargpt_jax.interop.hugging_face import padding_name
from tests.interop.test_convert import LETTERS, changed, logits, original
from tests.pairing import built

VOCABULARY = [*LETTERS, "\t", "\r", "\x00", "<", ">", "p", "'", "\u0301", "\u200d", "漢", "\u2028"]


def model(mask: bool, vocabulary: list[str] = VOCABULARY) -> Model:
    """Return a model with random values in all arrays, biases and scales included."""
    tokenizer = CharTokenizer(vocabulary)
    sizes = ModelConfig(**changed({})["model"], used_ids=tokenizer.n_ids, mask_unused_ids=mask)
    graphdef, _ = built(sizes, 0)
    return Model(Config(model=sizes), tokenizer, graphdef, to_params(original(), sizes), 0)


def exported(ours: Model, folder):
    return convert.export("hf", ours.config, ours.tokenizer, ours.params, folder / "hf", print)


def texts(vocabulary: list[str], count: int = 300):
    rng = np.random.default_rng(0)
    yield from ("", "<pad>", "  a  ", "\n\n", "e\u0301a", "a 'b' , c .", "".join(vocabulary))
    for _ in range(count):
        yield "".join(rng.choice(vocabulary, rng.integers(1, 60)))


def test_suppressed_tokens_are_listed_only_if_masked(tmp_path):
    ours = model(mask=True)
    found = json.loads((exported(ours, tmp_path) / "generation_config.json").read_text())
    assert found["suppress_tokens"] == [0, *range(ours.tokenizer.n_ids, 64)]
    found = json.loads((exported(model(mask=False), tmp_path / "open") / "generation_config.json").read_text())
    assert "suppress_tokens" not in found


def test_padding_name_cannot_occur_in_a_text():
    assert padding_name(CharTokenizer("abc")) == "<pad>"
    clash = CharTokenizer("<pad>\ue000")
    assert padding_name(clash) == "\ue001"


def test_tokenizer_file_has_one_token_per_character(tmp_path):
    ours = model(mask=True)
    found = json.loads((exported(ours, tmp_path) / "tokenizer.json").read_text(encoding="utf-8"))
    assert padding_name(ours.tokenizer) == "\ue000"
    assert found["model"]["vocab"] == {"\ue000": 0} | {c: i for i, c in enumerate(sorted(VOCABULARY), 1)}
    assert re.findall(found["pre_tokenizer"]["pattern"]["Regex"], "a\n\r😀") == ["a", "\n", "\r", "😀"]


def test_lone_surrogate_is_rejected_and_writes_no_file(tmp_path):
    with pytest.raises(UserError, match="a lone surrogate"):
        exported(model(True, ["a", "\ud800"]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tokenizers_package_gives_the_same_ids_and_text(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    for vocabulary in (VOCABULARY, ["a", "b", " "]):
        ours = model(True, vocabulary)
        theirs = tokenizers.Tokenizer.from_file(str(exported(ours, tmp_path / str(len(vocabulary))) / "tokenizer.json"))
        for text in texts(vocabulary):
            if set(text) <= set(vocabulary):
                assert theirs.encode(text).ids == ours.tokenizer.encode_text(text).tolist()
                assert theirs.decode(theirs.encode(text).ids) == text


@pytest.fixture(scope="module", params=[True, False], ids=["masked", "open"])
def pair(request, tmp_path_factory):
    """The model of chargpt_jax, that of transformers, and the tokenizer of transformers."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    ours = model(mask=request.param)
    folder = exported(ours, tmp_path_factory.mktemp("hf"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    return ours, theirs, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_transformers_gives_the_same_logits(pair):
    import torch

    ours, theirs, _ = pair
    tokens = np.random.default_rng(2).integers(0, ours.tokenizer.n_ids, (3, 64)).astype(np.int32)
    with torch.no_grad():
        found = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    used = slice(1, ours.tokenizer.n_ids) if ours.config.model.mask_unused_ids else slice(None)
    expected = logits(ours.params, ours.config.model, tokens)
    np.testing.assert_allclose(found[..., used], expected[..., used], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_transformers_generates_the_same_greedy_text(pair):
    ours, theirs, tokenizer = pair
    encoded = tokenizer("abc\n", return_tensors="pt")
    found = theirs.generate(**encoded, do_sample=False, max_new_tokens=60)[0].tolist()
    (sample,) = ours.generate("abc\n", 60, temperature=0)
    # An id without a character is U+FFFD in a sample, and has no text in transformers.
    assert tokenizer.decode(found, skip_special_tokens=True) == sample.text.replace("\ufffd", "")
    if ours.config.model.mask_unused_ids:
        assert found == ours.tokenizer.encode_text(sample.text).tolist()


@pytest.mark.slow
def test_transformers_never_samples_an_id_that_is_masked(pair):
    import torch

    ours, theirs, tokenizer = pair
    if not ours.config.model.mask_unused_ids:
        pytest.skip("nothing is masked")
    torch.manual_seed(0)
    encoded = tokenizer(["a"] * 8, return_tensors="pt")
    found = theirs.generate(**encoded, do_sample=True, temperature=3.0, top_k=0, max_new_tokens=60).numpy()
    assert found.min() > 0
    assert found.max() < ours.tokenizer.n_ids


def test_transformers_own_tokenizer_round_trips(pair):
    ours, _, tokenizer = pair
    for text in texts(VOCABULARY):
        if set(text) <= set(VOCABULARY):
            ids = tokenizer(text)["input_ids"]
            assert ids == ours.tokenizer.encode_text(text).tolist()
            assert tokenizer.decode(ids) == text
