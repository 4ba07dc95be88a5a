"""The plot of several runs: one line and one band per group."""

import math
import re
from xml.etree import ElementTree

import pytest

from chargpt_jax.pictures.plots.bands import Band, bands_plot

BAND = Band("0.01", ((10.0, 2.0, 1.5, 2.5), (20.0, 1.0, 0.8, 1.2)))


def test_each_group_has_a_line_an_area_and_an_entry():
    svg = bands_plot([BAND, Band("0.02", BAND.points)], "mean and interval")
    ElementTree.fromstring(svg)
    assert len(re.findall(r'class="cg-area cg-s\d" d="M4', svg)) == 2
    assert "0.02" in svg
    assert "mean and interval" in svg


def test_an_area_goes_along_the_lower_edge_and_back_along_the_upper_one():
    (corners,) = re.findall(r'class="cg-area cg-s2" d="M(4[^"]*)Z"', bands_plot([BAND], ""))
    points = [tuple(map(float, pair.split())) for pair in corners.split("L")]
    assert [x for x, _ in points] == [48, 672, 672, 48]
    low, later, upper, first = (y for _, y in points)
    assert first < low
    assert upper < later


def test_the_area_of_a_single_point_is_a_bar():
    (corners,) = re.findall(r'class="cg-area cg-s2" d="M(\d{3}[^"]*)Z"', bands_plot([Band("a", BAND.points[:1])], ""))
    points = [tuple(map(float, pair.split())) for pair in corners.split("L")]
    assert [x - points[0][0] for x, _ in points] == [0, 6, 6, 0]
    assert points[0][1] == points[1][1] > points[2][1] == points[3][1]


def test_the_sixth_group_is_dashed():
    svg = bands_plot([Band(str(i), BAND.points) for i in range(6)], "")
    assert svg.count("cg-line cg-s2 cg-dashed") == 2  # the line and its entry


@pytest.mark.parametrize(
    "points", [(), ((1.0, math.nan, math.nan, math.nan),), ((1.0, 2.0, math.nan, math.nan),), ((1.0, math.inf, 0, 1),)]
)
def test_missing_values_are_left_out(points):
    svg = bands_plot([Band("<a>", points)], "")
    ElementTree.fromstring(svg)
    assert "nan" not in svg.lower()
    assert "&lt;a&gt;" in svg
