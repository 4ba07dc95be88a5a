"""The plot of metrics by letter: points at the means, gaps where a text has no such letter."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from chargpt_jax.pictures.plots.axes import BOTTOM, TOP
from chargpt_jax.pictures.plots.letters import letters_plot


def points(svg: str, kind: str) -> list[tuple[float, float]]:
    circles = [c for c in ET.fromstring(svg).iter() if c.get("class") == kind and c.get("cx")]
    return [(float(c.get("cx")), float(c.get("cy"))) for c in circles]


def test_points_are_at_the_means_in_proportion():
    svg = letters_plot(np.array([2.0, 1.0, np.nan]), np.array([4.0, 2.0, np.nan]), ["1", "2", "3"])
    entropy, surprisal = points(svg, "cg-b1"), points(svg, "cg-b3")
    assert len(entropy) == len(surprisal) == 2
    heights = [BOTTOM - y for _, y in (*entropy, *surprisal)]
    assert heights[0] == pytest.approx(2 * heights[1], abs=0.2)
    assert heights[2] == pytest.approx(2 * heights[0], abs=0.2)
    assert all(TOP <= y <= BOTTOM for _, y in (*entropy, *surprisal))
    assert [x for x, _ in entropy] == [x for x, _ in surprisal]


def test_every_letter_has_a_label_and_a_sentence():
    svg = letters_plot(np.array([2.0, np.nan]), np.array([4.0, np.nan]), ["1", "last"])
    labels = [t.text for t in ET.fromstring(svg).iter() if t.tag.endswith("text")]
    assert {"1", "last"} <= set(labels)
    assert "1: entropy 2.00, surprisal 4.00." in svg
    assert "nan" not in svg


def test_plot_without_any_letter_is_empty():
    assert points(letters_plot(np.full(3, np.nan), np.full(3, np.nan), ["1", "2", "3"]), "cg-b3") == []
