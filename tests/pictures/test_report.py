"""The report: one valid, complete page; untrusted text in it is escaped."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt_jax.pictures.plots import loss_plot
from chargpt_jax.pictures.report import CSS, report
from chargpt_jax.pictures.subline import subline
from chargpt_jax.pictures.svg import DARK, LIGHT

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


def test_a_page_has_a_language_a_charset_a_viewport_and_a_title():
    page = report("A run", [], [])
    assert page.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert '<meta charset="utf-8">' in page
    assert '<meta name="viewport"' in page
    assert Page(page).texts["title"] == ["A run"]


def test_facts_figures_and_texts_come_in_their_order():
    svg = loss_plot([(0, 4.0)], [])
    page = report("Run", [("seed", "0"), ("loss", "1.5")], [("Loss", svg), ("Again", svg)], [("Sample", "text")])
    read = Page(page)
    assert read.texts["dt"] == ["seed", "loss"]
    assert read.texts["dd"] == ["0", "1.5"]
    assert read.texts["figcaption"] == ["Loss", "Again", "Sample"]
    assert page.count(svg) == 2


@pytest.mark.parametrize("payload", PAYLOADS)
def test_markup_in_plain_text_stays_text(payload):
    plain = Page(report("a", [("b", "c")], [("d", "")], [("e", "f")]))
    read = Page(report(payload, [(payload, payload)], [(payload, "")], [(payload, payload)]))
    assert read.tags == plain.tags
    assert [read.texts[tag][0] for tag in ("title", "h1", "dt", "dd", "figcaption")] == [payload] * 5
    assert read.texts["pre"] == ["\n" + payload]


@pytest.mark.parametrize("text", ["\nfirst line break", "  spaces\n\n\tand tabs  ", "", "\n\n"])
def test_a_text_keeps_its_spaces_and_line_breaks(text):
    (read,) = Page(report("a", [], [], [("b", text)])).texts["pre"]
    assert read == "\n" + text  # a browser drops the first line break of a <pre>


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=60))
def test_any_unicode_makes_a_page_that_utf8_can_hold(text):
    page = report(text, [(text, text)], [], [(text, text)])
    page.encode("utf-8")
    assert "\x00" not in page
    Page(page)


def test_invalid_characters_become_the_replacement_character():
    assert Page(report("a\ud800b\x00c\ufffed\x85e\r\nf", [], [])).texts["h1"] == ["a�b�c�d�e\nf"]


def test_page_has_no_external_links():
    page = report("Run", [("a", "b")], [("c", loss_plot([], []))], [("d", "e")])
    assert page.replace('xmlns="http://www.w3.org/2000/svg"', "").replace("http-equiv", "").count("http") == 0
    assert not re.search(r"<script|<link|@import|href|src=|url\((?!#)", page)


def test_a_run_without_facts_or_figures_is_still_a_page():
    read = Page(report("Nothing yet", [], []))
    assert "dl" not in read.tags
    assert "figure" not in read.tags


def test_the_page_is_light_dark_and_printable():
    assert "prefers-color-scheme:dark" in CSS
    assert "@media print" in CSS


def test_the_page_has_the_colour_of_the_pictures_paper():
    for theme in (LIGHT, DARK):
        paper = re.findall(r"--cg-paper:(#\w+)", theme)[0]
        assert f"--paper:{paper}" in CSS


def test_pictures_on_one_page_share_no_id():
    page = report("Run", [], [("a", subline(["a"], [])), ("b", subline(["b"], []))])
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) == 2
