"""Units of a loss: nats, bits per character, perplexity."""

import math

import pytest

from chargpt_jax.events import bits_per_character, perplexity


def test_perplexity_and_bits_of_a_coin():
    assert perplexity(math.log(2)) == pytest.approx(2)
    assert bits_per_character(math.log(2)) == pytest.approx(1)
    assert perplexity(0.0) == 1
    assert bits_per_character(math.log(256)) == pytest.approx(8)
    assert perplexity(1000.0) == math.inf
