"""Samplers, stop strings and several samples per prompt in `Model.generate`; series in a sample's forms."""

import itertools
import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from chargpt_jax.errors import UserError
from chargpt_jax.generation.sample import Sample, Samples
from chargpt_jax.generation.samplers.series import Shown
from chargpt_jax.pictures import terminal_text
from chargpt_jax.pictures.page_assets import compact
from tests.interop.page_models import random_model

MODEL = random_model("even")
CHAIN = "min_p=0.01,budget=4:low=0.5,mirostat=3"


@pytest.mark.slow
def test_several_samples_are_those_of_a_repeated_prompt():
    prompts = ["ab", "cde"]
    several = MODEL.generate(prompts, 20, n=3, sampler=CHAIN)
    assert several == MODEL.generate([prompt for prompt in prompts for _ in range(3)], 20, sampler=CHAIN)
    assert [sample.prompt for sample in several] == ["ab"] * 3 + ["cde"] * 3
    assert len({sample.text for sample in several}) == 6


@pytest.mark.slow
def test_streamed_parts_add_up_to_the_sample_up_to_the_stop_string():
    free = MODEL.generate(["ab", "cde"], 60, sampler=CHAIN)
    stop = free[0].text[30:32]
    expected = [sample.text[: end + 2 if (end := sample.text.find(stop, 1)) >= 0 else None] for sample in free]
    assert len(expected[0]) <= 32
    parts, texts = {0: [], 1: []}, {0: "", 1: ""}

    def add(i, text):
        texts[i] += text

    streamed = MODEL.generate(
        ["ab", "cde"], 60, sampler=CHAIN, stop=stop, on_sample=lambda i, part: parts[i].append(part), on_text=add
    )
    at_once = MODEL.generate(["ab", "cde"], 60, sampler=CHAIN, stop=[stop])
    assert [sample.text for sample in streamed] == [sample.text for sample in at_once] == expected
    for i, sample in enumerate(streamed):
        total = parts[i][0]
        for part in parts[i][1:]:
            total = total + part
        assert total == sample
        assert sample.prompt + texts[i] == sample.text
        for one, other in zip(sample.series.values(), at_once[i].series.values(), strict=True):
            np.testing.assert_array_equal(one.values, other.values)


@pytest.mark.slow
def test_a_branch_uses_the_chain():
    sample = MODEL.generate("ab", 20, sampler=CHAIN)[0]
    branch = MODEL.branch(sample, 5, "z", sampler=CHAIN)
    assert set(branch.series) == {"budget", "mirostat"}
    assert np.isnan(branch.series["mirostat"].values[:6]).all()
    assert branch.series["mirostat"].values[6] == 6


def test_series_are_in_the_json_the_plot_and_the_page():
    sample = MODEL.generate("ab", 20, sampler=CHAIN)[0]
    assert {name: own.top for name, own in sample.series.items()} == {"budget": 4, "mirostat": 12}
    saved = json.loads(json.dumps(Samples([sample]).to_dict()))
    assert Samples.from_dict(saved).to_dict() == saved
    assert Sample.from_dict(saved["samples"][0]).series == sample.series
    assert "Budget, nats (height: 4)" in sample.svg()
    assert len(compact(saved["samples"][0])["series"]["mirostat"]["values"]) == len(sample)
    assert "series" not in MODEL.generate("ab", 5, temperature=0.5)[0].to_dict()


def test_parts_of_a_sample_keep_their_series():
    sample = MODEL.generate("ab", 20, sampler=CHAIN)[0]
    assert sample[:9] + sample[9:] == sample
    longer = sample + MODEL.generate("cd", 3)[0]
    assert np.isnan(longer.series["budget"].values[22:]).all()
    assert len(longer.series["budget"].values) == len(longer)
    values = replace(sample.series["budget"], values=sample.series["budget"].values + 1)
    assert replace(sample, series=sample.series | {"budget": values}) != sample


@pytest.mark.parametrize(
    "series",
    [
        [],
        {"a": 3},
        {"a": {"label": 3, "top": 1, "values": [1]}},
        {"a": {"label": "x" * 81, "top": 1, "values": [1]}},
        {"a": {"label": "x", "top": 0, "values": [1]}},
        {"a": {"label": "x", "top": True, "values": [1]}},
        {"a": {"label": "x", "top": 1e40, "values": [1]}},
        {"a": {"label": "x", "top": 1, "values": [1, 2]}},
        {"a": {"label": "x", "top": 1, "values": ["1"]}},
        {"a": {"label": "x", "top": 1}},
    ],
)
def test_malformed_series_of_a_file_are_rejected(series):
    saved = {"prompt": "a", "tokens": ["a"], "vocab_size": 2, "surprisal": [None], "entropy": [None]}
    assert len(Sample.from_dict(saved)) == 1
    with pytest.raises(ValueError, match="a sample must"):
        Sample.from_dict(saved | {"series": series})


def test_a_terminal_shows_series_as_rows():
    look = terminal_text.Look(vocab_size=64)
    (line,) = terminal_text.lines("abc", 80)
    own = Shown("T", 2.0, np.float32([np.nan, 1.0, 2.0]))
    rows = terminal_text.sublined(line, np.zeros(3), np.zeros(3), look, heights=[own.height])
    assert rows.splitlines()[3] == " ▅█"
    assert "further row: T, from ▁ 0 to █ 2" in terminal_text.legend(look, True, others=[("T", 2.0)])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"n": 0}, "^n is 0, but it must be at least 1"),
        ({"n": 1.5}, "^n is 1.5, but it must be an integer"),
        ({"n": 4097}, "^n is 4097, but it must be at least 1 and at most 4,096"),
        ({"stop": ""}, "^stop is '', but it must have 1 to 256 characters"),
        ({"stop": ["a", 3]}, "^stop is 3, but it must be a string"),
        ({"stop": 3}, "^stop is 3, but it must be a string, or a list"),
        ({"stop": b"a"}, "^stop is b'a'"),
        ({"stop": ["a"] * 65}, "^stop has 65 strings"),
        ({"stop": "a☃"}, "^stop is 'a☃', but '☃' .* is not in the vocabulary"),
        ({"sampler": "min_p=0.1", "top_k": 3}, "^sampler and top_k are both given"),
    ],
)
def test_invalid_arguments_are_answered_by_a_sentence(how, message):
    with pytest.raises(UserError, match=message):
        MODEL.generate("ab", 5, **how)


@pytest.mark.slow
def test_a_function_of_the_readers_own_is_a_sampler():
    def no_repeat(state, logits):
        return state, logits.at[state.last].set(-jnp.inf)

    text = MODEL.generate("ab", 60, sampler=[no_repeat, "temperature=0.5"])[0].text
    assert all(one != other for one, other in itertools.pairwise(text[1:]))
