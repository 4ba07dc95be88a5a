"""The rows of a text's layers: one per layer and line, dots where predictions settle, nothing outside the picture."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chargpt_jax.pictures.layers import RISE, ROW, TOP, layers


def picture(text: str, rows: int, settled=None, columns: int = 20, value: float = 1.0) -> str:
    metrics = np.full((rows, len(text)), value)
    metrics[:, 0] = np.nan
    settled = np.zeros(len(text), int) if settled is None else settled
    return layers(list(text), metrics, metrics, settled, 64, columns)


def groups(svg: str) -> list[ET.Element]:
    """Return the rows of all lines: groups with a curve."""
    return [
        g for g in ET.fromstring(svg).iter() if g.tag.endswith("}g") and g.find("{*}path[@class='cg-grid']") is not None
    ]


@given(st.text(alphabet="ab é漢\u0301אב", min_size=2, max_size=60), st.integers(2, 16))
def test_every_line_has_a_row_per_layer_and_every_known_character_one_dot(text, rows):
    settled = np.arange(len(text)) % rows
    svg = picture(text, rows, settled)
    lines = len([t for t in ET.fromstring(svg).iter() if t.get("class") == "cg-text"])
    found = groups(svg)
    assert len(found) == lines * rows
    dots = sum(len(row.findall("{*}circle")) for row in found)
    visible = {i for i, c in enumerate(text) if i and c != "\u0301"}
    assert len(visible) <= dots <= len(text) - 1


def test_dots_are_in_the_row_where_the_prediction_settles():
    found = groups(picture("abcd", 4, [0, 3, 1, 1]))
    assert [len(row.findall("{*}circle")) for row in found] == [0, 2, 0, 1]


def test_rows_are_below_each_other_at_equal_distances():
    ys = [float(re.search(r"translate\(\S+ (\S+)\)", row.get("transform"))[1]) for row in groups(picture("ab", 5))]
    np.testing.assert_allclose(np.diff(ys), ROW)


def test_curves_are_fractions_of_the_largest_entropy_and_stay_in_their_row():
    whole = picture("abc", 2, value=np.log(64))
    assert f" {-RISE:g}C" in whole
    beyond = picture("abc", 2, value=1e3)
    heights = [float(y) for y in re.findall(r"(-\d+\.?\d*)(?=[CL\"])", " ".join(re.findall(r' d="(M[^"]*)"', beyond)))]
    assert min(heights) == pytest.approx(-RISE * TOP, abs=0.06)


def test_description_says_what_is_plotted():
    svg = picture("abc", 3)
    assert "Entropy and surprisal after each of 2 layers, under each character of: abc" in svg
    assert "row k: after k of 2 layers" in svg
