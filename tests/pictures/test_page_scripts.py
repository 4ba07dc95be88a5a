"""The scripts of a model as a page give Python's results; here they run in V8, without a browser."""

import base64
import itertools
import json
import math
from typing import Any

import jax
import numpy as np
import pytest

from chargpt_jax.api import Model
from chargpt_jax.generation.metrics import predictions, surprisal_and_entropy
from chargpt_jax.generation.sample import Sample
from chargpt_jax.generation.sampler import Sampler
from chargpt_jax.interop.html_page import About
from chargpt_jax.pictures import page_assets
from tests import reference
from tests.generation.samplers.calls import adjusted
from tests.interop.page_models import SIZES, arrays_of, block, page, random_model

CLOSE = {"rtol": 0, "atol": 1e-4}
METRICS = {"surprisal": "surprisal", "entropy": "entropy", "surprise_surprise": "s2", "sampled_probability": "sampled"}


class Page:
    """An exported page, and its scripts in V8."""

    def __init__(self, model: Model, about: About | None = None):
        racer = pytest.importorskip("py_mini_racer")
        self.text = page(model, about)
        self.data = json.loads(block(self.text, "model"))
        values = np.frombuffer(base64.b64decode(block(self.text, "parameters")), "<f4")
        self.engine = racer.MiniRacer()
        for name in ("arithmetic", "model", "predict", "session"):
            self.engine.eval(page_assets.asset(f"{name}.js"))
        self.engine.eval(f"const data = {json.dumps(self.data)};")
        self.engine.eval(f"const values = new Float32Array({json.dumps(values.tolist())});")
        self.engine.eval("const model = createModel(data.config, data.names, values);")
        self.engine.eval("const session = new Session(model, data.vocabulary);")
        self.engine.eval("const run = (pieces) => [...pieces].flat();")

    def eval(self, code: str) -> Any:
        return json.loads(self.engine.eval(f"JSON.stringify({code})"))

    def read(self, prompt: str) -> list[dict[str, Any]]:
        return self.eval(f"run(session.read({json.dumps(prompt)}))")

    def write(self, count: int, temperature: float = 0, seed: int = 0) -> list[dict[str, Any]]:
        sampler = json.dumps({"temperature": temperature, "topK": None, "seed": seed})
        return self.eval(f"run(session.write({count}, {sampler}))")

    def branch(self, index: int, text: str) -> list[dict[str, Any]]:
        return self.eval(f"session.branch({index}, {json.dumps(text)})")


def text_of(tokens: list[dict[str, Any]]) -> str:
    return "".join(token["text"] for token in tokens)


def assert_equal(tokens: list[dict[str, Any]], sample: Sample) -> None:
    """Check text, metrics, ranks and alternatives of a page's tokens."""
    expected = sample.to_dict()
    assert text_of(tokens) == sample.text
    assert [token["rank"] for token in tokens] == expected["rank"]
    for name, key in METRICS.items():
        found, wanted = (
            [math.nan if x is None else x for x in xs] for xs in ([t[key] for t in tokens], expected[name])
        )
        np.testing.assert_allclose(found, wanted, **CLOSE, err_msg=name)
    for token, pairs in zip(tokens, expected["alternatives"], strict=True):
        assert [text for text, _ in token["alternatives"]] == [text for text, _ in pairs or []]
        np.testing.assert_allclose([p for _, p in token["alternatives"]], [p for _, p in pairs or []], **CLOSE)


@pytest.fixture(scope="module", params=SIZES)
def pair(request):
    model = random_model(request.param)
    return model, Page(model)


def test_page_generates_the_greedy_text_of_the_reference(pair):
    """Inside the context and beyond it."""
    model, its_page = pair
    sizes = model.config.model
    count = 2 * sizes.block_size + 10
    tokens = its_page.read("ab c") + its_page.write(count)
    arrays = {name: array.astype(np.float32).astype(np.float64) for name, array in arrays_of(sizes).items()}
    used = sizes.used_ids if sizes.mask_unused_ids else None
    heads = {"n_head": sizes.n_head, "n_head_dim": sizes.n_head_dim, "used_ids": used}
    ids, surprisal, entropy = reference.generate_greedy(
        arrays, model.tokenizer.encode_text("ab c"), count, sizes.block_size, **heads
    )
    assert [token["id"] for token in tokens] == ids.tolist()
    np.testing.assert_allclose([token["surprisal"] for token in tokens[4:]], surprisal, **CLOSE)
    np.testing.assert_allclose([token["entropy"] for token in tokens[4:]], entropy, **CLOSE)
    assert [token["prompt"] for token in tokens] == [True] * 4 + [False] * count


@pytest.fixture(scope="module")
def odd():
    model = random_model("odd")
    return model, Page(model)


def test_page_generates_as_python(odd):
    model, its_page = odd
    assert_equal(its_page.read("ab c") + its_page.write(30), model.generate("ab c", 30, temperature=0)[0])


def test_page_scores_a_prompt_as_python(odd):
    """Inside the context, and beyond it, where windows overlap."""
    model, its_page = odd
    rng = np.random.default_rng(1)
    for length in (2, 3 * model.config.model.block_size + 2):
        prompt = "".join(rng.choice(list(model.tokenizer.vocabulary[1:]), length))
        assert_equal(its_page.read(prompt), model.score(prompt))


def test_size_of_the_pieces_changes_nothing(pair):
    model, its_page = pair
    results = []
    for piece in (1, 2, 3, 64):
        its_page.engine.eval(f"session.piece = {piece}")
        results.append(its_page.read("aé 漢'z" * 3) + its_page.write(model.config.model.block_size + 3))
    for other in results[1:]:
        assert text_of(other) == text_of(results[0])
        np.testing.assert_allclose([t["entropy"] for t in other[1:]], [t["entropy"] for t in results[0][1:]], rtol=1e-5)


def test_branch_to_the_greedy_character_gives_the_same_text(pair):
    model, its_page = pair
    text = text_of(its_page.read("ab c") + its_page.write(2 * model.config.model.block_size + 4))
    for index in (len(text) - 1, model.config.model.block_size + 4, 4):
        its_page.branch(index, text[index])
        assert text_of(its_page.eval("session.tokens")) == text[: index + 1]
        its_page.write(len(text) - index - 1)
        assert text_of(its_page.eval("session.tokens")) == text


def test_branch_inside_a_prompt_continues_from_there(pair):
    model, its_page = pair
    prompt = "a 'bc\n" * (2 + model.config.model.block_size // 3)
    for index in (len(prompt) - 1, len(prompt) // 2, 1):
        its_page.read(prompt)
        its_page.write(3)
        others = its_page.eval(f"session.tokens[{index}].alternatives.map(([text]) => text)")
        (token,) = its_page.branch(index, next(text for text in others if text not in ("\ufffd", prompt[index])))
        found = text_of(its_page.write(12))
        its_page.read(prompt[:index] + token["text"])
        assert text_of(its_page.write(12)) == found


def test_branch_has_the_metrics_of_the_other_character(odd):
    model, its_page = odd
    its_page.read("ab c")
    its_page.write(4)
    other = its_page.eval("session.tokens[6].alternatives[2][0]")
    its_page.branch(6, other)
    tokens = its_page.eval("session.tokens")
    for token in tokens:
        token["sampled"] = None  # a scored text is not sampled
    assert_equal(tokens, model.score(text_of(tokens)))


def test_abandoned_piece_of_work_leaves_a_usable_session(pair):
    _, its_page = pair
    its_page.engine.eval("session.piece = 1")
    whole = text_of(its_page.read("ab c") + its_page.write(30))
    its_page.read("ab c")
    its_page.engine.eval(
        "{const pieces = session.write(30, {temperature: 0}); for (let i = 0; i < 21; i++) pieces.next();}"
    )
    done = its_page.eval("session.tokens.length")
    its_page.write(34 - done)
    assert text_of(its_page.eval("session.tokens")) == whole


def test_seed_repeats_a_text_and_another_one_does_not():
    its_page = Page(random_model())
    texts = [text_of(its_page.read("a") + its_page.write(40, 1.0, seed)) for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]


def test_unused_ids_are_sampled_only_without_the_mask():
    for name, missing in (("even", False), ("unmasked", True)):
        its_page = Page(random_model(name, "ab"))
        its_page.read("a")
        assert ("\ufffd" in text_of(its_page.write(200, 1000.0))) == missing


def test_prompt_is_repaired_only_if_more_of_it_is_known_then():
    its_page = Page(random_model())
    assert its_page.eval("session.repaired('e\\u0301 don\\u2019t')") == "é don't"
    assert its_page.eval("session.repaired('e\\u0301 Q')") == "é Q"
    assert its_page.eval("session.repaired('\\u201cQ\\u201d')") == "\u201cQ\u201d"  # the model knows no double quotes
    assert its_page.eval("session.unknown('abQ\\u0000Q😀')") == ["Q", "\0"]
    assert Page(random_model(vocabulary="e\u0301é")).eval("session.repaired('e\\u0301')") == "e\u0301"


@pytest.fixture(scope="module")
def scripts():
    return Page(random_model())


def test_gelu_and_erf_are_exact(scripts):
    xs = [*np.linspace(-9, 9, 2001).tolist(), 0.0, -8.0, 8.0, 1e-9]
    found = np.array(scripts.eval(f"{xs}.map((x) => [erf(x), gelu(x)])"))
    np.testing.assert_allclose(found[:, 0], [math.erf(x) for x in xs], rtol=0, atol=1e-14)
    np.testing.assert_allclose(found[:, 1], [x * 0.5 * math.erfc(-x / 2**0.5) for x in xs], rtol=0, atol=1e-9)


def test_metrics_equal_pythons_at_extreme_logits(scripts):
    logits = np.float32([1e4, -1e9, 1e4 - 30, 1e4, -1e9, 9_999.5])
    for token in range(6):
        found = scripts.eval(f"tokenMetrics(Float32Array.from({logits.tolist()}), {token}, 4)")
        surprisal, entropy = surprisal_and_entropy(logits, np.int32(token))
        kept = predictions(logits, np.int32(token), 4)
        np.testing.assert_allclose(found["surprisal"], surprisal, rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(found["entropy"], entropy, rtol=1e-5)
        assert found["rank"] == kept.rank
        assert [token for token, _ in found["likeliest"]] == kept.likeliest.tolist()


@pytest.mark.parametrize(
    ("temperature", "top_k"), [(1.0, None), (0.3, None), (2.0, 3), (1.0, 1), (0.7, 99), (0.0, None)]
)
def test_sampler_has_pythons_probabilities(scripts, temperature, top_k):
    logits = np.float32([0.1, 2, -1e9, 1.5, 1.5, -1])
    state = Sampler(temperature, top_k).with_key(jax.random.key(0))
    expected = np.asarray(jax.nn.softmax(adjusted(state, logits[None])))[0] if temperature else np.eye(6)[1]
    sampler = json.dumps({"temperature": temperature, "topK": top_k})
    given = f"Float32Array.from({logits.tolist()}), {sampler}"
    drawn = scripts.eval(f"[...Array(2000).keys()].map((i) => sampleToken({given}, i / 2000))")
    counts = np.bincount([one["id"] for one in drawn], minlength=6) / 2000
    np.testing.assert_allclose(counts, expected, rtol=0, atol=1 / 2000)
    np.testing.assert_allclose([one["p"] for one in drawn], expected[[one["id"] for one in drawn]], rtol=1e-6)


def test_random_numbers_are_uniform_and_independent(scripts):
    grid = np.array(scripts.eval("[...Array(40).keys()].map((s) => [...Array(500).keys()].map((i) => randomAt(s, i)))"))
    assert ((grid >= 0) & (grid < 1)).all()
    counts = np.histogram(grid, 50, (0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 100  # chi-squared, 49 degrees of freedom: 85 is exceeded once in 1,000
    for one, other in itertools.combinations((grid, np.roll(grid, 1, 0), np.roll(grid, 1, 1)), 2):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.03
