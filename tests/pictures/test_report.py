"""The report: one valid, complete page with and without its script; untrusted text in it is escaped."""

import functools
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt_jax.generation.sample import Sample
from chargpt_jax.pictures.plots.curves import Curve
from chargpt_jax.pictures.plots.histograms import Shares, histogram
from chargpt_jax.pictures.plots.losses import loss_plot
from chargpt_jax.pictures.report import Content, Stage, Text, report

VOID = {"meta"}
PAYLOADS = ["<script>alert(1)</script>", "</pre><b>", "</style>", "</title>", "]]>", "&lt;", "\"'><img src=x>"]


class Page(HTMLParser):
    """Parses a page, checks that its tags nest, and stores the text of each element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(page)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack:
            self.texts[self.stack[-1]][-1] += data


def text(caption: str, characters: str) -> Text:
    """Return a scored text."""
    values = np.arange(len(characters), dtype=np.float32)
    sample = Sample(characters, tuple(characters), values, values, 64)
    return Text(caption, sample.svg(), sample.to_dict())


def content(payload: str = "a") -> Content:
    """Return a report that has everything, with a text in every place for plain text."""
    texts = [text(payload, payload)]
    losses = [Curve("training loss", "nats", ((1, 4.0), (9, 3.0)), 4), Curve("validation loss", "nats", ((9, 3.5),), 4)]
    return Content(
        title=payload,
        lead=payload,
        facts=[(payload, [(payload, payload)])],
        search=lambda width: loss_plot([], [], width=width),
        losses=lambda width: loss_plot([(1, 4.0), (9, 3.0)], [], width=width),
        curves=[*losses, Curve("gradient norm", "", ((1, 1.0), (9, 2.0)))],
        epoch_steps=3,
        samples=texts,
        stages=[Stage(3, payload, texts), Stage(9, payload, texts)],
        histograms=[functools.partial(histogram, payload, payload, ["1"], [Shares(payload, (1.0,))])],
        compared=payload,
        passages=texts,
        sources=[(payload, [(payload, payload)])],
        environment=[(payload, payload)],
    )


def test_report_has_a_language_charset_viewport_and_title():
    page = report(Content("A run"))
    assert page.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert '<meta charset="utf-8">' in page
    assert '<meta name="viewport"' in page
    assert Page(page).texts["title"] == ["A run"]


def test_report_shows_its_sections_in_order():
    read = Page(report(content()))
    titles = ["The run", "Learning-rate search", "Training", "Samples", "Learning to write"]
    titles += ["Does it write like the text?", "Where it was surprised", "The text", "Environment"]
    assert read.texts["h2"] == titles
    links = [value.removeprefix("#") for name, value in read.attributes if name == "href"]
    assert links == [value for name, value in read.attributes if name == "id" and value in links]


def test_report_leaves_out_what_a_run_does_not_have():
    read = Page(report(Content("Nothing yet")))
    assert not {"h2", "dl", "figure", "nav"} & set(read.tags)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_markup_in_plain_text_stays_text(payload):
    plain, read = Page(report(content())), Page(report(content(payload)))
    assert [tag for tag in read.tags if tag != "tspan"] == [tag for tag in plain.tags if tag != "tspan"]
    assert read.texts["h1"] == read.texts["dt"][:1] == read.texts["dd"][:1] == [payload]
    assert "\n" + payload in read.texts["pre"]


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(exclude_categories=()), min_size=1, max_size=40))
def test_any_unicode_makes_a_page_that_utf8_can_hold(payload):
    page = report(content(payload))
    page.encode("utf-8")
    assert "\x00" not in page
    Page(page)


def test_invalid_characters_become_the_replacement_character():
    assert Page(report(Content("a\ud800b\x00c\ufffed\x85e\r\nf"))).texts["h1"] == ["a�b�c�d�e\nf"]


def test_report_without_its_script_has_every_text_and_plot():
    page = report(content("quartz"))
    without = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert len(re.findall(r"<pre>\nquartz</pre>", without)) == 2, "a text for each stage"
    assert without.count('aria-label="Text with its metrics"') == 2, "the sample and the passage as pictures"
    for name in ("Training and validation loss", "gradient norm", "quartz"):
        assert f'aria-label="{name}"' in without


def test_report_names_no_file_and_no_address():
    page = report(content())
    bare = re.sub(r"http-equiv|http://www\.w3\.org/2000/svg", "", page)
    assert "http" not in bare
    assert not re.search(r"<link|@import|src=|href=\"(?!#)|url\((?!#)|fetch\(|XMLHttpRequest|import\(", page)


def test_report_is_light_dark_and_printable():
    page = report(content())
    assert "prefers-color-scheme:dark" in page
    assert "@media print" in page


def test_report_has_the_style_of_its_pictures_once():
    assert report(content()).count(".chargpt .cg-grid{") == 1


def test_every_id_of_a_report_is_unique():
    ids = re.findall(r'\bid="([^"]+)"', report(content("several texts")))
    clips = [name for name in ids if name.startswith("cg-")]
    assert len(set(ids) - set(clips)) == len(ids) - len(clips)
