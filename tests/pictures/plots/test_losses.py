"""The two plots: positions of points, ticks inside the frame, labels, missing and extreme values."""

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt_jax.pictures.plots.axes import BOTTOM, MARGIN, MAX_POINTS, TOP, WIDTH, Axis
from chargpt_jax.pictures.plots.losses import SMOOTH_FROM, loss_plot, lr_finder_plot

SVG = "{http://www.w3.org/2000/svg}"
RATES = np.logspace(-6, 0, 13).tolist()
LOSSES = np.linspace(4.8, 3.0, 13).tolist()


def paths(svg: str, kind: str) -> list[str]:
    """Return the paths of a class inside the frame, without those of the legend."""
    found = [p for p in ET.fromstring(svg).iter(f"{SVG}path") if kind in p.get("class", "").split()]
    return [p.attrib["d"] for p in found if not re.fullmatch(r"M0 0H16|M[\d.]+ 0h[\d.]+", p.attrib["d"])]


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)]


def circles(svg: str, kind: str) -> list[tuple[float, float]]:
    found = [c for c in ET.fromstring(svg).iter(f"{SVG}circle") if c.get("class") == kind and c.get("cy") != "0"]
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in found]


def words(svg: str) -> str:
    return " ".join("".join(text.itertext()) for text in ET.fromstring(svg).iter(f"{SVG}text"))


@settings(max_examples=100, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_linear_ticks_are_round_and_within_the_axis(low, length):
    axis = Axis(low, low + length, 0.0, 100.0)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 8
    assert all(-0.01 <= axis(tick) <= 100.01 for tick in ticks)
    assert len(set(ticks)) == len(ticks)


@settings(max_examples=100, deadline=None)
@given(st.floats(-12, 2), st.floats(0.01, 14))
def test_log_ticks_are_within_the_axis(low, decades):
    axis = Axis(10.0**low, 10.0 ** (low + decades), 0.0, 100.0, log=True)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 13
    assert all(-0.01 <= axis(tick) <= 100.01 for tick in ticks)


def test_a_log_axis_of_many_decades_has_powers_of_ten():
    assert Axis(1e-4, 1.0, 0.0, 1.0, log=True).ticks() == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_log_axis_has_decades_of_equal_width():
    axis = Axis(1e-3, 1e3, 0.0, 60.0, log=True)
    assert [axis(10.0**e) for e in range(-3, 4)] == pytest.approx([0, 10, 20, 30, 40, 50, 60])


@pytest.mark.parametrize("n", [0, 1, 2, 5, 30])
def test_range_test_has_one_curve_per_zoom(n):
    svg = lr_finder_plot([(RATES, LOSSES)] * n, [1e-3] * n, 1e-3)
    assert len(paths(svg, "cg-zoom")) == n
    assert len(circles(svg, "cg-step")) == n


def test_later_zooms_are_thicker_and_of_another_colour():
    svg = lr_finder_plot([(RATES, LOSSES)] * 4, [], None)
    styles = [p.attrib["style"] for p in ET.fromstring(svg).iter(f"{SVG}path") if p.get("style")][:4]
    widths = [float(re.findall(r"stroke-width:([\d.]+)", style)[0]) for style in styles]
    assert widths == sorted(set(widths))
    assert len({re.findall(r"on-light:(#\w{6})", style)[0] for style in styles}) == 4


def test_the_search_without_points_says_so():
    for svg in (lr_finder_plot([], [], None), lr_finder_plot([([], [])], [], None)):
        assert "no data yet" in words(svg)


def test_suggestion_is_a_dashed_line_with_its_value():
    svg = lr_finder_plot([(RATES, LOSSES)], [1e-3], RATES[4], method="balanced")
    (guide,), (curve,) = paths(svg, "cg-guide"), paths(svg, "cg-zoom")
    assert points(guide)[0] == (points(curve)[4][0], BOTTOM)
    assert f"{RATES[4]:.3g} suggested (balanced)" in words(svg)


@pytest.mark.parametrize("suggestion", [None, 1e40])
def test_no_line_is_drawn_without_a_suggestion_in_the_range(suggestion):
    svg = lr_finder_plot([(RATES, LOSSES)], [1e-3], suggestion)
    assert paths(svg, "cg-guide") == []


def test_steepest_rates_are_on_their_curves():
    svg = lr_finder_plot([(RATES, LOSSES)], [RATES[4]], None)
    (curve,), (ring,) = paths(svg, "cg-zoom"), circles(svg, "cg-step")
    assert ring == points(curve)[4]


def test_diverged_loss_is_clipped_at_the_top():
    svg = lr_finder_plot([([*RATES, 10.0], [*LOSSES, 1e6])], [1e-3], None)
    ys = [y for _, y in points(paths(svg, "cg-zoom")[0])]
    assert ys[-1] < TOP
    assert max(ys) - ys[0] > 0.5 * (BOTTOM - TOP)


def test_non_finite_range_test_points_are_omitted():
    svg = lr_finder_plot([([1e-3, 0.0, 1e-2, 1e-1, 1.0], [4.0, 3.9, math.nan, 3.0, math.inf])], [math.nan], None)
    assert len(points(paths(svg, "cg-zoom")[0])) == 2
    assert "nan" not in svg


def test_band_of_seeds_lies_between_its_losses():
    low, high = [loss - 0.1 for loss in LOSSES], [loss + 0.1 for loss in LOSSES]
    svg = lr_finder_plot([(RATES, LOSSES)], [1e-3], RATES[4], band=(RATES, low, high))
    (area,) = [p.attrib["d"] for p in ET.fromstring(svg).iter(f"{SVG}path") if p.get("class") == "cg-band"]
    edge = [tuple(map(float, pair.split())) for pair in area.strip("MZ").split("L")]
    curve = points(paths(svg, "cg-zoom")[0])
    assert len(edge) == 2 * len(RATES)
    for (x, y), (x_low, y_low), (x_high, y_high) in zip(curve, edge, edge[::-1], strict=False):
        assert x == x_low == x_high
        assert y_high < y < y_low  # y grows downwards
    assert "seeds, last zoom" in words(svg)
    assert "cg-band" not in lr_finder_plot([(RATES, LOSSES)], [1e-3], RATES[4]).partition("</style>")[2]


def test_band_without_finite_points_is_not_drawn():
    band = ([1e-3, 0.0], [math.nan, 1.0], [2.0, 3.0])
    assert "nan" not in lr_finder_plot([(RATES, LOSSES)], [1e-3], None, band=band)


ANY_POINTS = st.lists(st.tuples(st.floats(), st.floats()), max_size=8)


@settings(max_examples=150, deadline=None)
@given(ANY_POINTS, ANY_POINTS)
def test_any_numbers_give_plots_without_nan(first, second):
    search = lr_finder_plot(
        [([x for x, _ in p], [y for _, y in p]) for p in (first, second)], [x for x, _ in first], None
    )
    for svg in (loss_plot(first, second), search):
        ET.fromstring(svg)
        assert not re.search(r"[ \"LM>](nan|-?inf)\b", svg)


def test_unequal_numbers_of_rates_and_losses_are_rejected():
    with pytest.raises(ValueError, match="Zoom 1 has 2 learning rates, but 1 losses"):
        lr_finder_plot([([1e-3, 1e-2], [4.0])], [], None)


@pytest.mark.parametrize(
    ("train", "validation"),
    [([], []), ([(1, 4.0)], []), ([], [(1, 4.0)]), ([(0, 4.0)], [(0, 4.0)]), ([(1, math.nan)], [(math.inf, 2.0)])],
)
def test_few_points_give_a_plot(train, validation):
    svg = loss_plot(train, validation)
    ET.fromstring(svg)
    assert not re.search(r"\b(nan|inf)\b", svg)
    finite = [p for p in (*train, *validation) if np.isfinite(p).all()]
    assert ("no data yet" in words(svg)) == (not finite)


def test_points_that_are_not_finite_are_dropped():
    svg = loss_plot([(1, 4.0), (2, math.nan), (3, 3.0), (4, math.inf)], [])
    assert len(points(paths(svg, "cg-training")[0])) == 2


def test_best_validation_loss_is_marked_in_nats_and_bits():
    svg = loss_plot([(0, 5.0), (30, 1.0)], [(10, 2.0), (20, 1.5), (30, 1.6)])
    (ring,) = circles(svg, "cg-ring")
    assert ring in circles(svg, "cg-dot")
    assert f"1.500 nats = {1.5 / math.log(2):.3f} bits" in words(svg)


def test_many_training_points_get_a_moving_average():
    few = [(i, 4.0) for i in range(SMOOTH_FROM)]
    assert paths(loss_plot(few, []), "cg-raw") == []
    many = [(i, 4.0 + (-1) ** i) for i in range(400)]
    (raw,), (smooth,) = (paths(loss_plot(many, []), kind) for kind in ("cg-raw", "cg-training"))
    middle = [y for _, y in points(smooth)[20:-20]]
    assert max(middle) - min(middle) < 0.2 * (max(y for _, y in points(raw)) - min(y for _, y in points(raw)))


def test_a_long_run_is_thinned_and_keeps_its_extremes():
    losses = np.random.default_rng(0).normal(3.0, 0.1, 20_000)
    losses[7_000], losses[13_000] = 9.0, 1.0
    (raw,) = paths(loss_plot(list(enumerate(losses.tolist())), []), "cg-raw")
    heights = [y for _, y in points(raw)]
    assert len(heights) <= 2 * MAX_POINTS
    whole = Axis(1.0 - 0.06 * 8, 9.0 + 0.06 * 8, BOTTOM, TOP)
    assert [max(heights), min(heights)] == pytest.approx([whole(1.0), whole(9.0)], abs=0.1)


def test_the_name_of_x_is_escaped():
    assert "<b>&]]>" in words(loss_plot([], [], x_label="<b>&]]>"))


def test_every_point_lies_in_the_frame():
    svg = loss_plot([(0, 5.0), (100, 1.0)], [(50, 2.0)])
    drawn = [p for kind in ("cg-training", "cg-validation") for path in paths(svg, kind) for p in points(path)]
    assert all(MARGIN <= x <= WIDTH - MARGIN and TOP <= y <= BOTTOM for x, y in drawn)


def test_two_plots_share_no_id_and_have_no_external_links():
    one = lr_finder_plot([(RATES, LOSSES)], [1e-3], None)
    two = lr_finder_plot([(RATES, LOSSES[::-1])], [1e-3], None)
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, two)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for svg in (one, two, loss_plot([(0, 1.0)], [])):
        assert svg.count("http") == 1
        assert not re.search(r"<script|@import|href|url\((?!#)", svg)
