"""Attention maps: every weight is a square of its level at its place, in every map."""

import itertools
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chargpt_jax.pictures.attention_maps import LEVELS, MAX_CHARACTERS, WIDTH, attention_map, attention_maps
from chargpt_jax.pictures.svg import text_width


def squares(group: ET.Element, T: int) -> np.ndarray:
    """Return the opacity of each square of a map, [T, T]; 0 where there is none."""
    found = np.zeros((T, T))
    for path in group.iter("{http://www.w3.org/2000/svg}path"):
        if path.get("class") == "cg-weight":
            for x, y, length in re.findall(r"M(\d+) (\d+)h(\d+)", path.get("d")):
                found[int(y), int(x) : int(x) + int(length)] += float(path.get("stroke-opacity"))
    return found


def maps(svg: str) -> list[ET.Element]:
    return [g for g in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}g") if g.find("{*}title") is not None]


def expected(weights: np.ndarray) -> np.ndarray:
    opacity = np.zeros(weights.shape)
    for lowest, shown in LEVELS:
        opacity[weights >= lowest] = shown
    return opacity


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 3), st.integers(1, 4))
def test_every_square_has_the_opacity_of_its_weight(seed, T, L, H):
    attention = np.tril(np.random.default_rng(seed).dirichlet(np.full(T, 0.3), (L, H, T)))
    found = maps(attention_maps(["x"] * T, attention))
    assert [g.find("{*}title").text for g in found] == [
        f"layer {i + 1}, head {j + 1}" for i in range(L) for j in range(H)
    ]
    for group, weights in zip(found, attention.reshape(-1, T, T), strict=True):
        np.testing.assert_allclose(squares(group, T), expected(weights))


def test_one_map_has_its_text_along_both_sides():
    text = "a<\n\té😀 \u0301"
    weights = np.eye(len(text))
    root = ET.fromstring(attention_map(list(text), weights, "Attention & more"))
    shown = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text") if t.get("class") == "cg-text"]
    assert shown == [*"a<↵→é😀", "␣", "◌\u0301"] * 2
    (group,) = maps(ET.tostring(root, encoding="unicode"))
    np.testing.assert_allclose(squares(group, len(text)), np.eye(len(text)))
    assert root.get("aria-label") == "Attention & more"


def test_names_of_heads_do_not_overlap():
    for T in (1, 2, 5, 60, MAX_CHARACTERS):
        for H in (1, 4, 12, 16, 64):
            root = ET.fromstring(attention_maps(["x"] * T, np.zeros((1, H, T, T))))
            labels = [t for t in root.iter("{http://www.w3.org/2000/svg}text") if "cg-middle" in t.get("class")]
            spans = [(float(t.get("x")), text_width(t.text)) for t in labels]
            for (x, width), (next_x, next_width) in itertools.pairwise(spans):
                assert x + width / 2 <= next_x - next_width / 2
            assert spans[-1][0] + spans[-1][1] / 2 <= float(root.get("width"))


@pytest.mark.parametrize(("L", "H"), [(15, 8), (1, 1), (6, 32), (2, 100)])
def test_maps_fit_in_the_width_of_a_page(L, H):
    T = MAX_CHARACTERS
    svg = attention_maps(["x"] * T, np.broadcast_to(np.eye(T), (L, H, T, T)))
    root = ET.fromstring(svg)
    assert float(root.get("width")) <= WIDTH + 0.1
    edges = [re.match(r"translate\((\S+) ", g.get("transform")) for g in maps(svg)]
    assert max(float(edge[1]) for edge in edges if edge) < WIDTH
    assert len(svg) < 1_500_000
