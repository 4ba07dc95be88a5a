"""Histograms: bars in proportion to the shares, side by side."""

import re
import xml.etree.ElementTree as ET

import pytest

from chargpt_jax.pictures.plots.axes import NARROW, WIDTH
from chargpt_jax.pictures.plots.histograms import Shares, histogram

TEXTS = [Shares("text", (0.5, 0.25, 0.25)), Shares("samples", (0.75, 0.25, 0.0))]


def bars(picture: str) -> list[tuple[float, float]]:
    """Return the left edge and the height of each bar, in order."""
    paths = [e.attrib["d"] for e in ET.fromstring(picture).iter() if e.attrib.get("class") in ("cg-b1", "cg-b2")]
    boxes = [re.match(r"M([\d.]+) [\d.]+v(-?[\d.]+)h", path) for path in paths]
    return [(float(box[1]), -float(box[2])) for box in boxes if box]


@pytest.mark.parametrize("width", [WIDTH, NARROW])
def test_bars_are_in_proportion_and_do_not_overlap(width):
    found = bars(histogram("Rank", "rank", ["1", "2", "3"], TEXTS, width))
    heights = [height for _, height in found]
    assert heights[0] == pytest.approx(2 * heights[1], abs=0.2)
    assert heights[3] == pytest.approx(1.5 * heights[0], abs=0.2)
    assert heights[5] == 0
    lefts = sorted(left for left, _ in found)
    assert lefts == sorted(set(lefts))


def test_description_gives_the_shares_in_words():
    picture = histogram("Rank", "rank", ["1", "2", "3"], TEXTS)
    assert "samples: 1 75 %, 2 25 %, 3 0 %" in picture


def test_a_share_per_bin_is_required():
    with pytest.raises(ValueError, match="3 shares, but there are 2 bins"):
        histogram("Rank", "rank", ["1", "2"], TEXTS)


def test_text_without_characters_has_no_bars_of_height():
    assert bars(histogram("Rank", "rank", ["1"], [Shares("text", (0.0,))])) == [(pytest.approx(110.4), 0.0)]
