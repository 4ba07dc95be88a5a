"""The subline: the text is complete, curves are under their characters, and untrusted text is escaped."""

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt_jax.pictures.subline import FALL, RISE, Series, metric_series, subline
from chargpt_jax.pictures.svg import CSS, escaped, glyph
from chargpt_jax.pictures.text_layout import CELL

SVG = "{http://www.w3.org/2000/svg}"
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)
PAYLOADS = ["<script>alert(1)</script>", "]]>", "&amp;", "\"'", "</svg>", "</pre>", "<!--", "--><b onload=x>"]


def flat(tokens: list[str], value: float = 0.5) -> list[Series]:
    return [Series("flat", np.full(len(tokens), value))]


def draw(text: str, **options: int) -> ET.Element:
    return ET.fromstring(subline(list(text), flat(list(text)), **options))


def lines(root: ET.Element) -> list[list[tuple[str, list[float]]]]:
    """Return for each line the text and the x positions of its tspans."""
    found = [text for text in root.iter(f"{SVG}text") if text.get("class") == "cg-text"]
    return [
        [(span.text or "", [float(x) for x in span.attrib["x"].split()]) for span in text.iter(f"{SVG}tspan")]
        for text in found
    ]


def shown(root: ET.Element) -> list[str]:
    return ["".join(text for text, _ in line) for line in lines(root)]


def curves(root: ET.Element, kind: str = "cg-line") -> list[str]:
    return [
        path.attrib["d"]
        for group in root.iter(f"{SVG}g")
        if "clip-path" in group.attrib
        for path in group.iter(f"{SVG}path")
        if kind in path.attrib["class"].split()
    ]


def knots(path: str) -> list[tuple[float, float]]:
    """Return the points on a path of M and C commands."""
    pairs = [re.findall(r"-?[\d.]+", part)[-2:] for part in re.findall(r"[MC][^MCLZ]*", path.replace("h0", ""))]
    return [(float(x), float(y)) for x, y in pairs]


def test_every_glyph_is_drawn_in_order():
    text = "Mind the gap.\nTwo\tof them: 漢字 😀 e\u0301"
    assert "".join(shown(draw(text, chars_per_line=7))) == "Mind the gap.↵Two→of them: 漢字 😀 e\u0301"


@settings(max_examples=60, deadline=None)
@given(st.lists(ANY_TEXT, max_size=12), st.integers(1, 30), st.integers(0, 5))
def test_any_unicode_gives_a_well_formed_svg_with_the_whole_text(tokens, chars_per_line, n_prompt):
    svg = subline(tokens, flat(tokens), chars_per_line=chars_per_line, n_prompt=n_prompt, title="".join(tokens))
    svg.encode("utf-8")
    text = "".join(shown(ET.fromstring(svg)))
    assert text.replace("◌", "") == "".join(map(glyph, "".join(tokens))).replace("◌", "")


@given(ANY_TEXT)
def test_escaped_text_is_read_back_as_its_glyphs_by_xml(text):
    expected = "".join(map(glyph, text))
    assert (ET.fromstring(f'<a b="{escaped(text)}">{escaped(text)}</a>').text or "") == expected


@pytest.mark.parametrize("payload", PAYLOADS)
def test_markup_in_tokens_labels_and_titles_stays_text(payload):
    svg = subline([payload], [Series(payload, np.ones(1))], title=payload)
    root = ET.fromstring(svg)
    assert payload in "".join(shown(root))
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        *("svg", "style", "desc", "rect", "text", "tspan", "clipPath", "path", "g")
    }


def test_svg_has_no_external_links():
    svg = subline(list("calm"), flat(list("calm")), n_prompt=2, title="calm")
    assert svg.count("http") == 1
    assert 'xmlns="http://www.w3.org/2000/svg"' in svg
    assert not re.search(r"<script|@import|href|@font-face|url\((?!#)", svg)


def test_lines_hold_at_most_chars_per_line_columns():
    assert shown(draw("abcdefghij", chars_per_line=4)) == ["abcd", "efgh", "ij"]


def test_wide_character_wraps_to_the_next_line():
    assert shown(draw("abc漢d", chars_per_line=4)) == ["abc", "漢d"]


@pytest.mark.parametrize("wide", ["漢", "😀", "\uff21", "❤\ufe0f", "\U0001f1f3"])
def test_wide_characters_take_two_columns(wide):
    xs = [x for _, span in lines(draw(f"a{wide}b"))[0] for x in span]
    assert xs == pytest.approx([CELL * 0.5, CELL * 2, CELL * 3.5], abs=0.051)


@pytest.mark.parametrize("mark", ["\u0301", "\u200d", "\u200b", "\u0903", "\u11a8"])
def test_characters_without_width_stand_with_the_cell_before(mark):
    root = draw(f"a{mark}b")
    assert [(text, len(xs)) for text, xs in lines(root)[0]] == [(f"a{mark}", 1), ("b", 1)]
    assert lines(root)[0][1][1] == pytest.approx([CELL * 1.5], abs=0.051)


def test_a_mark_at_the_start_stands_on_a_dotted_circle():
    assert shown(draw("\u0301a")) == ["◌\u0301a"]


def test_padding_takes_no_space():
    tokens = ["", "", "a", "", "b"]
    assert [xs for _, xs in lines(ET.fromstring(subline(tokens, flat(tokens))))[0]] == [[4.2, 12.6]]


@pytest.mark.parametrize(
    ("char", "picture"),
    [("\x00", "␀"), ("\x1b", "␛"), ("\r", "␍"), ("\x7f", "␡"), ("\x85", "�"), ("\ud800", "�"), ("\ufffe", "�")],
)
def test_characters_invalid_in_xml_are_replaced(char, picture):
    assert shown(draw(f"a{char}b")) == [f"a{picture}b"]


def test_a_real_arrow_is_ink_and_a_tab_is_a_faint_arrow():
    kinds = [span.get("class") for span in draw("→\t").iter(f"{SVG}tspan")]
    assert kinds == [None, "cg-stand-in"]


def test_knots_stand_under_the_centres_of_their_glyphs():
    text = "ab漢c\u0301d"
    root = draw(text)
    glyphs = [x for _, span in lines(root)[0] for x in span]
    (path,) = curves(root)
    assert [x for x, _ in knots(path)] == glyphs


def test_long_token_has_a_plateau():
    (path,) = curves(ET.fromstring(subline(["a", "long", "b"], [Series("v", np.array([0.0, 1.0, 0.0]))])))
    plateau = [x for x, y in knots(path) if y == -RISE]
    assert plateau == pytest.approx([CELL * 1.5, CELL * 4.5], abs=0.051)


def test_curves_continue_on_the_next_line():
    first, second = curves(draw("abcdef", chars_per_line=3))
    assert [x for x, _ in knots(first)] == pytest.approx([4.2, 12.6, 21.0, 29.4])
    assert [x for x, _ in knots(second)] == pytest.approx([-4.2, 4.2, 12.6, 21.0])


@pytest.mark.parametrize(("gaps", "runs"), [([], 1), ([0], 1), ([3], 2), ([2, 4], 3), ([2, 3], 2), (list(range(8)), 0)])
def test_a_curve_breaks_at_each_nan(gaps, runs):
    values = np.linspace(0, 1, 8)
    values[gaps] = math.nan
    paths = curves(ET.fromstring(subline(list("abcdefgh"), [Series("v", values)])))
    assert "".join(paths).count("M") == runs
    assert "nan" not in "".join(paths)


def test_a_value_between_two_gaps_is_a_dot():
    (path,) = curves(ET.fromstring(subline(list("abc"), [Series("v", np.array([math.nan, 0.5, math.nan]))])))
    assert path == "M12.6 -9h0"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1.5, 1.5), min_size=2, max_size=30))
def test_smooth_curves_never_overshoot_their_knots(values):
    tokens = ["x"] * len(values)
    (path,) = curves(ET.fromstring(subline(tokens, [Series("v", np.array(values))])))
    ends = knots(path)
    handles = [[float(n) for n in re.findall(r"-?[\d.]+", part)][1:4:2] for part in path.split("C")[1:]]
    for (_, before), (_, after), ys in zip(ends, ends[1:], handles, strict=False):
        assert all(min(before, after) - 0.11 <= y <= max(before, after) + 0.11 for y in ys)


def test_infinite_and_large_values_are_clipped():
    values = np.array([math.inf, -math.inf, 1e300, -3.0])
    root = ET.fromstring(subline(list("abcd"), [Series("v", values)]))
    (path,) = curves(root)
    assert {y for _, y in knots(path)} == {-2 * RISE, 2 * RISE}
    (clip,) = root.iter(f"{SVG}clipPath")
    assert clip[0].attrib["d"].startswith(f"M0 {-RISE - 1:g}H")
    assert f"V{FALL:g}H" in clip[0].attrib["d"]


def test_each_token_has_its_mark_on_the_baseline():
    root = ET.fromstring(subline(["a", "long", "b"], flat(["a", "long", "b"])))
    (mark,) = [path.attrib["d"] for path in root.iter(f"{SVG}path") if path.get("class") == "cg-mark"]
    assert mark == "M4.2 0h0M12.6 0h25.2M46.2 0h0"


def test_the_prompt_is_set_apart_and_named_in_the_legend():
    root = draw("prompt and more", n_prompt=6)
    bold = [e.text for e in root.iter() if "cg-prompt" in e.get("class", "").split()]
    assert bold == ["prompt", "Prompt"]
    assert "Prompt" not in "".join(draw("prompt and more").itertext())


def test_metrics_are_fractions_of_log_vocab_size():
    surprisal, entropy = np.array([math.nan, 4.0]), np.array([math.nan, 2.0])
    s2 = (surprisal - entropy) / math.log(128)
    series = metric_series(surprisal, entropy, s2, 128)
    assert [s.label for s in series] == ["Entropy", "Surprisal", "S₂ (surprise-surprise)"]
    np.testing.assert_allclose(series[1].values - series[0].values, series[2].values)
    assert series[1].values[1] == pytest.approx(4.0 / math.log(128))


def test_metrics_take_the_nulls_of_json():
    assert math.isnan(metric_series([None, 1.0], [None, 1.0], [None, 0.0], 64)[2].values[0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: subline(["a"], [Series("v", np.ones(2))]), r"Series 'v' has shape \(2,\), but there are 1 tokens"),
        (lambda: subline(["a"], [], chars_per_line=0), "chars_per_line is 0"),
        (lambda: metric_series(np.ones(1), np.ones(1), np.ones(1), 1), "vocab_size is 1"),
    ],
)
def test_invalid_arguments_raise_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("tokens", [[], ["", ""]])
def test_a_text_without_glyphs_is_a_picture_with_only_its_legend(tokens):
    root = ET.fromstring(subline(tokens, flat(tokens)))
    assert lines(root) == []
    assert "flat" in "".join(root.itertext())


def test_ids_in_the_svg_depend_on_the_text():
    one, same, other = (subline(list(t), flat(list(t))) for t in ("abc", "abc", "abd"))
    assert one == same
    assert not set(re.findall(r'id="([^"]+)"', one)) & set(re.findall(r'id="([^"]+)"', other))


def test_every_css_rule_is_held_to_the_picture():
    bare = re.sub(r"@media[^{]+\{", "", CSS).replace("}}", "}")
    selectors = [rule.partition("{")[0] for rule in bare.split("}") if rule]
    assert selectors
    assert all(".chargpt" in selector for selector in selectors)
    used = {kind for svg_class in re.findall(r"\.(cg-[\w-]+|chargpt)", CSS) for kind in [svg_class]}
    assert all(kind == "chargpt" or kind.startswith("cg-") for kind in used)


def test_svg_of_500_characters_is_below_100_kilobytes():
    rng = np.random.default_rng(0)
    tokens = ["a"] * 500
    series = metric_series(rng.uniform(0, 5, 500), rng.uniform(0, 5, 500), rng.uniform(-1, 1, 500), 128)
    assert len(subline(tokens, series).encode()) < 100_000


def positions(root: ET.Element) -> list[list[float]]:
    """Return the x of the characters of each line, in the order of the text."""
    return [[x for _, span in line for x in span] for line in lines(root)]


def test_a_text_from_right_to_left_ends_at_the_left() -> None:
    root = draw("אבג 12 ab גד", chars_per_line=6)
    first, second = positions(root)
    assert first[:4] == sorted(first[:4], reverse=True)
    assert first[4] < first[5] < first[3], "a number runs from left to right"
    assert max(first) == max(second), "both lines begin at the right edge"
    texts = [e for e in root.iter(f"{SVG}text") if e.get("class") == "cg-text"]
    assert [e.get("direction") for e in texts] == ["rtl", "rtl"]


def test_curves_follow_the_characters_of_both_directions() -> None:
    root = draw("ab אב cd")
    (line,) = positions(root)
    assert line[:3] == sorted(line[:3])
    assert line[3] > line[4] > line[2]
    for curve in root.iter(f"{SVG}path"):
        if "cg-line" in curve.get("class", "") and curve.get("d", "").startswith("M") and "C" in curve.get("d", ""):
            knots = [float(part.split()[-2]) for part in curve.get("d", "")[1:].split("C")[1:]]
            assert knots == sorted(knots)
