"""Samples side by side: each with its name and the means of what was generated, in a grid with one panel."""

import numpy as np
import pytest

from chargpt_jax.analysis.comparison import Comparison
from chargpt_jax.errors import UserError
from chargpt_jax.generation.sample import Sample


def sample(prompt: str, text: str, value: float) -> Sample:
    surprisal = np.full(len(text), value, np.float32)
    surprisal[: len(prompt)] = 100
    return Sample(prompt, tuple(text), surprisal, surprisal / 2, 64)


BOTH = Comparison({"<greedy>": sample("ab", "abcd", 1.5), "hot": sample("ab", "abxy", 3.0)})


def test_caption_gives_the_means_of_the_generated_part():
    assert BOTH.captions() == [
        "<greedy>: surprisal 1.50, entropy 0.75 nats",
        "hot: surprisal 3.00, entropy 1.50 nats",
    ]


def test_caption_of_a_scored_text_is_of_all_of_it():
    assert Comparison({"a": sample("", "abc", 2.0)}).captions() == ["a: surprisal 2.00, entropy 1.00 nats"]


def test_caption_without_metrics_is_the_name():
    assert Comparison({"a": sample("", "abc", np.nan)}).captions() == ["a"]


def test_terminal_shows_names_and_texts():
    assert repr(BOTH).split("\n\n")[1] == "hot: surprisal 3.00, entropy 1.50 nats\nabxy"


def test_a_notebook_shows_one_figure_per_sample_and_escapes_names():
    page = BOTH._repr_html_()
    assert page.count("<figure>") == page.count("data-sample=") == page.count("<svg") == 2
    assert "&lt;greedy&gt;: surprisal" in page
    assert "<greedy>" not in page
    assert page.count("<script>") == 1


def test_it_is_a_dictionary_in_the_order_given():
    assert list(BOTH) == ["<greedy>", "hot"]
    assert BOTH["hot"].text == "abxy"


@pytest.mark.parametrize("samples", [{"a": "text"}, {1: sample("", "ab", 1.0)}, {" ": sample("", "ab", 1.0)}])
def test_other_values_are_refused(samples):
    with pytest.raises(UserError, match="it must hold names with samples"):
        Comparison(samples)
    both = Comparison(BOTH)
    with pytest.raises(UserError, match="it must hold names with samples"):
        both.__setitem__(*next(iter(samples.items())))
    assert list(both) == list(BOTH)


@pytest.mark.parametrize("samples", [None, [sample("", "ab", 1.0)], "text", iter([])])
def test_samples_without_names_are_refused(samples):
    with pytest.raises(UserError, match="it must be samples by name"):
        Comparison(samples)
