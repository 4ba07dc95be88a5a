"""The worked example of docs/metrics.md, computed by the package."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chargpt_jax.events import bits_per_character
from chargpt_jax.generation.metrics import predictions, surprisal_and_entropy, surprise_surprise
from chargpt_jax.generation.sampler import Sampler
from tests.generation.samplers.calls import adjusted

PAGE = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8").replace("−", "-")
ROWS = [
    [float(value) for value in row]
    for row in re.findall(r"^\| `\w` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (-?[\d.]+) \| (\d) \|$", PAGE, re.MULTILINE)
]
LOGITS = jnp.log(jnp.array([row[0] for row in ROWS]))


@pytest.mark.parametrize("index", range(4))
def test_rows_of_the_example_are_the_metrics(index):
    p, nats, bits, s2, rank = ROWS[index]
    tokens = jnp.array([index], jnp.int32)
    surprisal, entropy = (np.asarray(x) for x in surprisal_and_entropy(LOGITS[None], tokens))
    assert surprisal[0] == pytest.approx(nats, abs=5e-4)
    assert bits_per_character(float(surprisal[0])) == pytest.approx(bits, abs=1e-5)
    assert surprise_surprise(surprisal, entropy, 4)[0] == pytest.approx(s2, abs=1e-5)
    assert int(predictions(LOGITS[None], tokens, 4).rank[0]) == rank
    assert np.exp(-surprisal[0]) == pytest.approx(p)


def test_entropy_of_the_example_is_that_of_the_page():
    entropy = float(surprisal_and_entropy(LOGITS[None], jnp.array([0], jnp.int32))[1][0])
    bits, nats = map(float, re.findall(r"= ([\d.]+) bits, which is ([\d.]+) nats", PAGE)[0])
    assert bits_per_character(entropy) == pytest.approx(bits, abs=1e-5)
    assert entropy == pytest.approx(nats, abs=5e-4)


def test_temperature_of_the_example_gives_the_probability_of_the_page():
    (expected,) = re.findall(r"\+ 0.015625\) = ([\d.]+)\.", PAGE)
    scaled = np.asarray(adjusted(Sampler(temperature=0.5).with_key(jax.random.key(0)), LOGITS[None]))[0]
    assert np.exp(scaled[0]) / np.exp(scaled).sum() == pytest.approx(float(expected), abs=5e-4)
