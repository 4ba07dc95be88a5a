"""Untrusted text in pictures, pages and notebooks: payloads stay text, and a browser does not run them."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from chargpt_jax.cli import progress
from chargpt_jax.cli.terminal import printable
from chargpt_jax.events import Prepared, Validated
from chargpt_jax.generation.sample import Sample, Samples
from chargpt_jax.pictures.page_assets import script
from chargpt_jax.pictures.plots.losses import loss_plot, lr_finder_plot
from chargpt_jax.pictures.report import Content, Stage, Text, report
from chargpt_jax.pictures.subline import Series, subline
from chargpt_jax.pictures.text_layout import MAX_MARKS
from tests.payloads import MARK, PAYLOADS, STEERING
from tests.pictures.test_report import content

SVG = "{http://www.w3.org/2000/svg}"
ELEMENTS = {"svg", "style", "desc", "rect", "text", "tspan", "clipPath", "path", "g", "circle", "line"}
ATTRIBUTES = {
    *("class", "role", "aria-label", "width", "height", "viewBox", "rx", "id", "d", "transform", "clip-path", "x", "y"),
    *("cx", "cy", "r", "style", "{http://www.w3.org/XML/1998/namespace}space"),
}
NAMES = pytest.mark.parametrize("name", PAYLOADS)


def sample(text: str, prompt: str | None = None) -> Sample:
    """Return a text as a generated sample, after a prompt if one is given."""
    numbers = np.linspace(0, 2, len(text), dtype=np.float32)
    return Sample(text if prompt is None else prompt, tuple(text), numbers, numbers[::-1], 64)


def pictures(text: str) -> dict[str, str]:
    """Return every kind of SVG that can contain untrusted text."""
    one = [Series(text, np.ones(1))]
    return {
        "title and label and token": subline([text], one, title=text),
        "characters": subline(list(text), [Series("flat", np.ones(len(text)))], chars_per_line=7),
        "sample": sample(text).svg(),
        "prompt": sample(text + " ", text).svg(),
        "axis": loss_plot([(0, 4.0), (1, 3.0)], [(1, 3.5)], x_label=text),
        "method": lr_finder_plot([([1e-3, 1e-2], [4.0, 3.0])], [1e-3], 1e-3, method=text),
    }


class Tags(HTMLParser):
    """Collects the tags and attributes of a page, as an HTML parser sees them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))


@NAMES
def test_a_picture_has_only_its_own_elements_and_attributes(name):
    for svg in pictures(PAYLOADS[name]).values():
        root = ET.fromstring(svg)
        assert {element.tag.removeprefix(SVG) for element in root.iter()} <= ELEMENTS
        assert {attribute for element in root.iter() for attribute in element.attrib} <= ATTRIBUTES


@NAMES
def test_a_picture_is_the_same_to_an_html_page_as_to_xml(name):
    """HTML parses an inline SVG by other rules: style, title and CDATA can end earlier."""
    for svg in pictures(PAYLOADS[name]).values():
        tags = [element.tag.removeprefix(SVG).lower() for element in ET.fromstring(svg).iter()]
        assert [tag for tag, _ in Tags(svg).found] == tags
        assert not re.search(r"<!|<\?|]]>", svg)


@NAMES
def test_a_report_has_the_elements_that_it_has_for_a_plain_text(name):
    text = PAYLOADS[name]
    page, plain = (report(dataclasses.replace(content(t), samples=[], passages=[])) for t in (text, "plain"))
    assert Tags(page).found == Tags(plain).found
    page.encode("utf-8")


@pytest.mark.parametrize("name", [n for n in STEERING if "direction" in n or "right" in n or "isolates" in n])
def test_bidirectional_controls_are_replaced(name):
    turning = set("\u061c\u200e\u200f") | set(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))
    text = STEERING[name]
    assert turning & set(text)
    for shown in (*pictures(text).values(), report(content(text))):
        assert not turning & set(shown)
        assert "\ufffd" in shown


def test_a_cell_holds_so_many_marks_and_the_rest_stand_on_circles():
    text = "a" + "\u0301" * 100
    root = ET.fromstring(subline(list(text), []))
    cells = [span.text or "" for span in root.iter(f"{SVG}tspan")]
    assert max(map(len, cells)) == 1 + MAX_MARKS
    assert "".join(cells).replace("◌", "") == text


@NAMES
def test_notebook_output_is_pictures_and_the_script_for_any_text(name):
    text = PAYLOADS[name]
    shown = Samples([sample(text), sample(text + " ", text)])
    page = shown._repr_html_()
    found = Tags(page).found
    tags = [tag for tag, _ in found]
    assert tags.count("svg") == tags.count("div") == 2
    assert tags.count("script") == 1
    assert page.count(script("subline", "notebook")) == 1, "the script does not depend on the text"
    assert set(tags) <= {"div", "script", *(element.lower() for element in ELEMENTS)}
    assert all(not attribute.startswith("on") for _, names in found for attribute in names)
    for kind in (Sample, Samples):
        own = {way for way in dir(kind) if way.startswith(("_repr_", "_ipython_"))}
        assert own == {"_repr_html_"}, "no other kind of output is offered"
    assert repr(shown[0]).isprintable()


@NAMES
def test_a_sample_of_any_text_survives_json(name):
    first = Samples([sample(PAYLOADS[name])])
    again = Samples.from_dict(json.loads(json.dumps(first.to_dict())))
    assert again[0].text == first[0].text
    assert again._repr_html_() == first._repr_html_()


@NAMES
def test_a_title_reaches_a_log_and_a_notebook_without_effect(name, monkeypatch):
    text = PAYLOADS[name]
    event = Prepared((text, "two\nlines"), 10, 8, 2, 5, 64, text)
    line = progress.sentence(event)
    assert printable(line, keep="") == line
    assert len(line) < 2_000
    assert len(progress.sentence(Prepared((text * 10_000,), 10, 8, 2, 5, 64, text * 10_000))) < 2_000

    shown: list[str] = []
    display = lambda thing, **_: shown.append(thing) or SimpleNamespace(update=shown.append)  # noqa: E731
    fake = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=None))
    monkeypatch.setitem(sys.modules, "IPython", fake)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(HTML=str, display=display))
    progress.show([event, Validated(1, 1.0, 1.7, 2.4, True, 1.0)][:1])
    assert {tag for page in shown for tag, _ in Tags(page["text/html"]).found} == {"div", "pre"}


def test_report_tells_browsers_to_run_its_script_and_fetch_nothing():
    page = report(Content("Run"))
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    rules = dict(rule.split(" ", 1) for rule in html.unescape(policy).split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert re.fullmatch(r"'sha256-[\w+/=]{44}'", rules["script-src"])
    assert page.index("Content-Security-Policy") < page.index("<style>")


# In a browser


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for path in map(shutil.which, BROWSERS) if path), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"needs a browser on PATH: one of {', '.join(BROWSERS)}")


def dom(page: Path, folder: Path) -> str:
    """Load a page in a headless browser, and return the document after its scripts have run."""
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
        *("--disable-extensions", "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND"),
        *(f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000", "--dump-dom", page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return done.stdout.decode("utf-8", "replace")


def whole_page() -> str:
    """Return a report with every payload in every field, without the content security policy."""
    payloads = list(PAYLOADS.values())
    texts = [Text(text, sample(text).svg(), sample(text).to_dict()) for text in payloads]
    texts += [Text(text, Samples([sample(text)])._repr_html_(), sample(text, text[:1]).to_dict()) for text in payloads]
    facts = [(text, [(text, text)]) for text in payloads]
    everything = dataclasses.replace(
        content("".join(payloads)),
        facts=facts,
        samples=texts,
        stages=[Stage(i, text.caption, [text]) for i, text in enumerate(texts)],
        passages=texts,
        sources=facts,
    )
    page = report(everything)
    assert page.count("Content-Security-Policy") == 1
    return page.replace("Content-Security-Policy", "X-No-Policy")


@needs_browser
@pytest.mark.slow
def test_in_a_browser_the_control_runs(tmp_path):
    page = tmp_path / "control.html"
    page.write_text(f"<!DOCTYPE html><html><body><p><img src=x onerror={MARK}></p></body></html>", encoding="utf-8")
    assert 'data-ran="1"' in dom(page, tmp_path)


@needs_browser
@pytest.mark.slow
def test_in_a_browser_no_payload_of_a_report_runs(tmp_path):
    page = tmp_path / "report.html"
    page.write_text(whole_page(), encoding="utf-8")
    scripts = len(re.findall(r"<script\b", whole_page()))
    document = dom(page, tmp_path)
    assert "data-ran" not in document
    assert not re.search(r"<(img|iframe|object|base|foreignobject)\b", document, re.IGNORECASE)
    assert len(re.findall(r"<script\b", document)) == scripts, "those of the page, and no other one"
    assert document.count("cg-live") > 4 * len(PAYLOADS), "the script ran"
    assert "</main>" in document


@needs_browser
@pytest.mark.slow
def test_in_a_browser_no_payload_of_a_picture_by_itself_runs(tmp_path):
    texts = "".join(PAYLOADS.values())
    for name, svg in pictures(texts).items():
        page = tmp_path / f"{name}.svg"
        page.write_text(svg, encoding="utf-8")
        document = dom(page, tmp_path)
        assert "data-ran" not in document
        assert "parsererror" not in document
        assert document.startswith("<svg")
