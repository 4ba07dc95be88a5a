"""A sample: parts, sums, differences, JSON, equality, hashing, and the arguments of its plot."""

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chargpt_jax.errors import UserError
from chargpt_jax.generation.alternatives import Alternatives
from chargpt_jax.generation.sample import Sample

ALTERNATIVES = Alternatives(
    rank=np.array([0, 1, 3], np.int32),
    characters=np.array([["", ""], ["b", "x"], ["a", "é"]]),
    probability=np.array([[np.nan, np.nan], [0.75, 0.125], [0.5, 0.25]], np.float32),
    sampled_probability=np.array([np.nan, 0.875, 0.0625], np.float32),
)


def sample(**changes: object) -> Sample:
    values = np.array([np.nan, 1.0, 2.0], np.float32)
    return dataclasses.replace(Sample("a", ("a", "b", "c"), values, values / 2, 64), **changes)


def test_equal_samples_have_equal_hashes():
    one = sample()
    for other in (sample(), copy.deepcopy(one), pickle.loads(pickle.dumps(one)), Sample.from_dict(one.to_dict())):
        assert one == other
        assert hash(one) == hash(other)
    assert [sample(), sample(prompt="ab")].index(sample(prompt="ab")) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "ab"},
        {"tokens": ("a", "b", "d")},
        {"surprisal": np.array([np.nan, 1.0, 2.5], np.float32)},
        {"entropy": np.zeros(3, np.float32)},
        {"vocab_size": 128},
    ],
)
def test_samples_that_differ_are_unequal(changes):
    assert sample() != sample(**changes)
    assert sample() != "abc"


def test_alternatives_are_lists_in_json_and_come_back():
    one = sample(alternatives=ALTERNATIVES)
    saved = one.to_dict()
    assert saved["rank"] == [None, 1, 3]
    assert saved["alternatives"] == [None, [["b", 0.75], ["x", 0.125]], [["a", 0.5], ["é", 0.25]]]
    assert saved["sampled_probability"] == [None, 0.875, 0.0625]
    assert Sample.from_dict(json.loads(json.dumps(saved, allow_nan=False))) == one
    assert one != sample()
    assert (one.rank is ALTERNATIVES.rank, sample().rank) == (True, None)
    assert "rank" not in sample().to_dict()


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": [None, 1]},
        {"rank": [None, "1", 2]},
        {"alternatives": None},
        {"alternatives": [None, [["b", 0.5]], [["a", 0.5], ["c", 0.5]]]},
        {"alternatives": [None, [["b", 2], ["a", 0]], None]},
        {"alternatives": [None, [["bc", 0.5]], None]},
        {"sampled_probability": [1e99, 0, 0]},
    ],
)
def test_malformed_alternatives_are_refused(changes):
    with pytest.raises(ValueError, match="a sample must|alternatives of a sample|metrics of a sample"):
        Sample.from_dict({**sample(alternatives=ALTERNATIVES).to_dict(), **changes})


@pytest.mark.parametrize("alternatives", [None, ALTERNATIVES])
@given(cut=st.integers(0, 3))
def test_the_parts_of_a_sample_together_are_the_sample(alternatives, cut):
    for prompt in ("", "a", "abc"):  # a scored text is its own prompt
        one = sample(prompt=prompt, alternatives=alternatives)
        assert one[:cut] + one[cut:] == one
        assert (one[:cut].text, len(one[cut:])) == ("abc"[:cut], 3 - cut)
    assert sample(alternatives=ALTERNATIVES)[-1:].rank.tolist() == [3]
    for cut in (-1, -2, -3, -9):
        assert sample(prompt="ab")[cut:] == sample(prompt="ab")[max(0, 3 + cut) :]
        assert sample(prompt="ab")[:cut] == sample(prompt="ab")[: max(0, 3 + cut)]


def test_a_part_must_be_a_range():
    for part in (1, slice(0, 3, 2), slice(None, None, -1)):
        with pytest.raises(UserError, match="give a range of characters"):
            sample()[part]


def test_sums_have_the_alternatives_that_both_have():
    one = sample(alternatives=ALTERNATIVES)
    assert (one + sample()).alternatives is None
    both = one + sample(alternatives=ALTERNATIVES.most(1))
    assert both.alternatives.at(1) == [("b", 0.75)]
    assert both.alternatives.at(0) == []


def test_a_difference_of_two_models_on_one_text():
    other = sample(surprisal=np.array([np.nan, 0.5, 2.5], np.float32), vocab_size=128, prompt="")
    difference = sample() - other
    assert difference.text == "abc"
    np.testing.assert_array_equal(difference.surprisal, [np.nan, 0.5, -0.5])
    np.testing.assert_array_equal(difference.entropy, [np.nan, 0, 0])
    np.testing.assert_allclose(difference.surprise_surprise, sample().surprise_surprise - other.surprise_surprise)
    assert difference.loss == pytest.approx(sample().loss - other.loss)
    assert "(height: 1 nats)" in difference.svg()  # 0.5 below the line needs as much room as 1 above it
    assert "(height: 1 nats)" in (sample() - sample()).svg()
    with pytest.raises(UserError, match="different texts"):
        sample() - sample(tokens=("a", "b", "d"))


@pytest.mark.parametrize("width", [0, -1, "80", None, 1.5])
def test_plot_refuses_an_invalid_width(width):
    with pytest.raises(UserError, match=r"chars_per_line is .*, but it must be .*: try 80"):
        sample().svg(width)
