"""A sample: equality, hashing, and the arguments of its plot."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest

from chargpt_jax.errors import UserError
from chargpt_jax.generation.sample import Sample


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


@pytest.mark.parametrize("width", [0, -1, "80", None, 1.5])
def test_plot_refuses_an_invalid_width(width):
    with pytest.raises(UserError, match=r"chars_per_line is .*, but it must be .*: try 80"):
        sample().svg(width)
