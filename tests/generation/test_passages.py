"""A long text's loss and its most surprising passages, collected from pieces."""

import itertools
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt_jax.generation.alternatives import Alternatives
from chargpt_jax.generation.passages import (
    LENGTH,
    MOST_SURPRISING,
    RANKS,
    SURPRISALS,
    Counts,
    Passages,
    passages,
)
from chargpt_jax.generation.sample import Sample

TEXT = "".join(chr(97 + i % 26) for i in range(12 * LENGTH + 150))
SURPRISAL = np.random.default_rng(0).random(len(TEXT)).astype(np.float32)
SURPRISAL[0] = np.nan
SURPRISAL[7 * LENGTH : 8 * LENGTH] += 3
SURPRISAL[2 * LENGTH : 3 * LENGTH] += 2
ENTROPY = np.where(np.isnan(SURPRISAL), np.nan, 1.0).astype(np.float32)


def pieces(cuts):
    for start, end in zip([0, *cuts], [*cuts, len(TEXT)], strict=True):
        yield Sample(TEXT[start:end], tuple(TEXT[start:end]), SURPRISAL[start:end], ENTROPY[start:end], 64)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, len(TEXT) - 1), max_size=20, unique=True).map(sorted))
def test_the_pieces_do_not_matter(cuts):
    found = passages(pieces(cuts))
    assert found.characters == len(TEXT)
    assert found.loss == pytest.approx(np.nanmean(SURPRISAL.astype(np.float64)))
    assert found.starts[:3] == (0, 7 * LENGTH, 2 * LENGTH)
    assert len(found.starts) == len(found.samples) == 1 + MOST_SURPRISING
    for start, sample in zip(found.starts, found.samples, strict=True):
        assert sample.text == TEXT[start : start + LENGTH]
        np.testing.assert_array_equal(sample.surprisal, SURPRISAL[start : start + LENGTH])
    losses = [sample.loss for sample in found.samples[1:]]
    assert losses == sorted(losses, reverse=True)


def test_passages_are_given_as_json():
    found = passages(pieces([5])).to_dict()
    assert found["characters"] == len(TEXT)
    assert found["bits_per_character"] == pytest.approx(found["loss"] / np.log(2))
    assert [sample["start"] for sample in found["samples"]][:2] == [0, 7 * LENGTH]


def test_counts_of_ranks_and_surprisals_are_of_all_characters():
    rank = np.array([0, 1, 1, 6, 10, 11, 50], np.int32)
    none = np.full(7, np.nan, np.float32)
    likeliest = Alternatives(rank, np.full((7, 1), "a"), np.ones((7, 1), np.float32), none)
    surprisal = np.float32([np.nan, 0.0, 0.49, 0.5, 7.99, 8.0, 99.0])
    sample = Sample("abcdefg", tuple("abcdefg"), surprisal, surprisal, 64, likeliest)
    counts = passages([sample[:3], sample[3:]]).counts
    assert dict(zip(RANKS, counts.ranks, strict=True)) == {1: 2, 2: 0, 3: 0, 4: 0, 5: 0, 6: 2, 11: 1, 21: 1}
    assert {low: n for low, n in zip(SURPRISALS, counts.surprisals, strict=True) if n} == {0: 2, 0.5: 1, 7.5: 1, 8: 2}


def test_counts_of_parts_add_up():
    whole, parts = Counts.of(pieces([])), Counts.of(pieces([9, 700]))
    assert whole == parts
    assert sum(whole.surprisals) == len(TEXT) - 1


def test_passages_survive_json():
    found = passages(pieces([5]))
    again = Passages.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.to_dict() == found.to_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"characters": "5"},
        {"loss": None},
        {"counts": None},
        {"counts": {"ranks": [1], "surprisals": [1]}},
        {"counts": {"ranks": [0.5] * len(RANKS), "surprisals": [0] * len(SURPRISALS)}},
        {"samples": [{}]},
        {"samples": None},
    ],
)
def test_malformed_passages_are_rejected(change):
    with pytest.raises(ValueError, match="must have|must be|no list"):
        Passages.from_dict({**passages(pieces([5])).to_dict(), **change})


def test_a_text_shorter_than_a_passage_is_one_passage():
    found = passages([Sample("ab", ("a", "b"), np.float32([np.nan, 2.0]), np.ones(2, np.float32), 64)])
    assert (found.characters, found.loss, found.starts) == (2, 2.0, (0,))


def test_memory_does_not_depend_on_the_length():
    def peak(count: int) -> int:
        numbers = np.full(1_000, 1.5, np.float32)
        piece = Sample("x" * 1_000, ("x",) * 1_000, numbers, numbers, 64)
        tracemalloc.start()
        found = passages(itertools.repeat(piece, count))
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert found.characters == count * 1_000
        return highest

    assert peak(400) < 1.2 * peak(40)
