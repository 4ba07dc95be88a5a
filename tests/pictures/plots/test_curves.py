"""Curves over the steps of a run, and what a cursor reads of them."""

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chargpt_jax.pictures.plots.axes import MARGIN, NARROW, WIDTH
from chargpt_jax.pictures.plots.curves import MAX_READ, Curve, every_nth, readable, x_range

CURVE = Curve("gradient norm", "", ((10, 1.0), (20, 0.5), (30, math.nan), (40, 2.0)))


@pytest.mark.parametrize("width", [WIDTH, NARROW])
def test_curve_spans_the_frame_between_its_margins(width):
    picture = ET.fromstring(CURVE.svg((10, 40), width))
    assert float(picture.attrib["width"]) == width
    (path,) = [e.attrib["d"] for e in picture.iter() if e.attrib.get("class") == "cg-curve cg-training"]
    xs = [float(x) for x in re.findall(r"(?:M|L)([\d.]+) ", path)]
    assert (xs[0], xs[-1]) == (MARGIN, width - MARGIN)
    assert len(xs) == 3, "the value that is not a number is left out"


@pytest.mark.parametrize(
    ("points", "label"),
    [
        (((1, 0.5), (2, 0.7)), "rate, units"),
        (((1, 50_000.0), (2, 60_000.0)), "rate, units (thousands)"),
        (((1, 0.001), (2, 0.002)), "rate, units (thousandths)"),
    ],
)
def test_axis_of_large_or_small_values_is_scaled_and_says_so(points, label):
    texts = [e.text for e in ET.fromstring(Curve("rate", "units", points).svg((1, 2))).iter() if e.text]
    assert label in texts


def test_curve_without_points_is_a_frame_without_a_line():
    picture = ET.fromstring(Curve("loss", "nats", ()).svg(x_range([])))
    classes = [element.attrib.get("class") for element in picture.iter()]
    assert "cg-grid" in classes
    assert "cg-curve cg-training" not in classes


@given(st.integers(1, 5 * MAX_READ))
def test_thinned_curve_keeps_its_last_point_and_order(count):
    points = [(step, float(step)) for step in range(count)]
    found = every_nth(points)
    assert len(found) <= MAX_READ
    assert found[-1] == points[-1]
    assert found == sorted(set(found))


def test_cursor_reads_finite_values_of_curves_with_points():
    found = readable([CURVE, Curve("empty", "", ())], epoch_steps=7)
    assert (found["low"], found["high"], found["epoch_steps"], found["margin"]) == (10, 40, 7, MARGIN)
    (curve,) = found["curves"]
    assert (curve["steps"], curve["values"]) == ([10, 20, 40], [1.0, 0.5, 2.0])
