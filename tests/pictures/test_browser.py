"""The report in a real browser: pointer, finger and keyboard, both themes, a phone, and no script at all."""

import dataclasses
import math

import numpy as np
import pytest

from chargpt_jax.generation.alternatives import Alternatives
from chargpt_jax.generation.sample import Sample
from chargpt_jax.pictures.report import Stage, Text, report
from tests.browser import CONTRAST, chromium, opened
from tests.pictures.test_report import content

PROMPT, REST = "Ab\n", "c<d>é中e\u0301שלום" * 9
N = len(PROMPT + REST)


def sample() -> Sample:
    """Return a sample of several lines, with combining marks, wide characters and two directions."""
    surprisal = np.linspace(0.1, 3, N).astype(np.float32)
    surprisal[0] = math.nan
    likeliest = np.array([["c", "<", "z"]] * N)
    p = np.array([[0.5, 0.25, 0.0004]] * N, np.float32)
    rank = np.minimum(np.arange(N, dtype=np.int32), 3)
    kept = Alternatives(rank, likeliest, p, np.where(np.arange(N) < 3, np.nan, 0.3).astype(np.float32))
    return Sample(PROMPT, tuple(PROMPT + REST), surprisal, surprisal / 2, 64, kept)


@pytest.fixture(scope="module")
def browser():
    """A running browser."""
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A report with everything."""
    one = sample()
    text = Text("Continues a prompt", one.svg(), one.to_dict())
    stages = [Stage(step, f"Step {step}", [text]) for step in (10, 20, 30)]
    path = tmp_path_factory.mktemp("page") / "report.html"
    full = dataclasses.replace(content("plain text"), samples=[text], stages=stages, passages=[text])
    path.write_text(report(full), encoding="utf-8")
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("phone", [False, True], ids=["desktop", "phone"])
def test_report_is_legible_and_fits_the_screen(browser, path, phone, dark):
    with opened(browser, path, phone=phone, dark=dark) as page:
        page.locator(".cg-flow").first.focus()
        assert page.evaluate(CONTRAST) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def test_arrow_keys_move_the_selection_and_escape_ends_it(browser, path):
    with opened(browser, path) as page:
        flow, panel = page.locator(".cg-flow").first, page.locator(".cg-details")
        flow.focus()
        assert "U+0041" in panel.inner_text()
        assert "no prediction" in panel.inner_text() or "without a prediction" in panel.inner_text()
        for _ in range(4):
            page.keyboard.press("ArrowRight")
        assert panel.locator(".cg-name").inner_text().split() == ["<", "U+003C"]
        text = panel.inner_text()
        assert "probability in the sampler" in text
        assert "30 %" in text
        assert panel.locator("li").all_inner_texts() == ["c\n50 %", "<\n25 %", "z\nbelow 0.1 %"]
        assert panel.locator("li.cg-own b").inner_text() == "<"
        before = page.locator(".cg-current").bounding_box()
        page.keyboard.press("ArrowDown")
        after = page.locator(".cg-current").bounding_box()
        assert after["y"] > before["y"] + 40
        page.keyboard.press("End")
        assert panel.locator(".cg-name").inner_text().split()[1] == f"U+{ord(REST[-1]):04X}"
        page.keyboard.press("Escape")
        assert not panel.is_visible()
        assert page.locator(".cg-current").count() == 0


def test_cursor_stands_under_the_selected_character(browser, path):
    with opened(browser, path) as page:
        for live in page.locator(".cg-live").all():
            live.locator(".cg-flow").focus()
            for _ in range(5):
                page.keyboard.press("ArrowRight")
            box, line = (live.locator(name).bounding_box() for name in (".cg-current", ".cg-cursor"))
            assert line["x"] + line["width"] / 2 == pytest.approx(box["x"] + box["width"] / 2, abs=1)


def test_selected_character_stays_in_the_window(browser, path):
    with opened(browser, path, phone=True) as page:
        page.set_viewport_size({"width": 390, "height": 420})
        page.locator(".cg-flow").first.focus()
        for key in ("End", "Home", "ArrowDown", "ArrowDown", "ArrowDown"):
            page.keyboard.press(key)
            box, panel = page.locator(".cg-current").bounding_box(), page.locator(".cg-details").bounding_box()
            assert 0 <= box["y"] <= panel["y"] - box["height"], key


def test_escape_ends_a_selection_from_everywhere(browser, path):
    with opened(browser, path) as page:
        page.locator(".cg-flow").first.locator("span").nth(4).hover()
        assert page.locator(".cg-details").is_visible()
        page.keyboard.press("Escape")
        assert not page.locator(".cg-details").is_visible()


def test_print_shows_the_pictures_in_place_of_live_texts(browser, path):
    with opened(browser, path, dark=True) as page:
        page.locator(".cg-flow").first.focus()
        page.emulate_media(media="print")
        assert page.locator(".static > svg").first.is_visible()
        assert not page.locator(".cg-live").first.is_visible()
        assert not page.locator("#cursor").is_visible()
        assert page.locator("#watch pre").last.is_visible()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_arrow_keys_follow_the_direction_of_the_text(browser, tmp_path):
    values = np.ones(8, np.float32)
    hebrew = Sample("", tuple("שלוםאבגד"), values, values, 64)
    path = tmp_path / "rtl.html"
    path.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{hebrew._repr_html_()}", encoding="utf-8")
    with opened(browser, path) as page:
        page.locator(".cg-flow").focus()
        page.keyboard.press("ArrowLeft")
        first = page.locator(".cg-current").bounding_box()
        page.keyboard.press("ArrowLeft")
        assert page.locator(".cg-current").bounding_box()["x"] < first["x"]
        page.keyboard.press("ArrowRight")
        assert page.locator(".cg-current").bounding_box()["x"] == first["x"]


def test_pointer_selects_the_character_below_it(browser, path):
    with opened(browser, path) as page:
        spans = page.locator(".cg-flow").first.locator("span")
        for index in (1, 5, 40):
            spans.nth(index).hover()
            assert "cg-current" in spans.nth(index).get_attribute("class")
        assert page.locator(".cg-current").count() == 1


def test_finger_selects_a_character_and_a_tap_beside_the_text_ends_it(browser, path):
    with opened(browser, path, phone=True) as page:
        span = page.locator(".cg-flow").first.locator("span").nth(5)
        span.tap()
        assert "cg-current" in span.get_attribute("class")
        page.locator("h1").tap()
        assert page.locator(".cg-current").count() == 0


def test_curves_follow_the_characters_and_can_be_switched_off(browser, path):
    with opened(browser, path) as page:
        live = page.locator(".cg-live").first
        areas = live.locator("path.cg-area").count()
        assert areas > 1, "one for each line"
        live.get_by_role("button", name="Entropy").click()
        assert live.locator("path.cg-area").count() == 0
        live.get_by_role("button", name="Entropy").click()
        assert live.locator("path.cg-area").count() == areas
        page.set_viewport_size({"width": 390, "height": 780})
        live.locator("path.cg-area").nth(areas).wait_for(state="attached")


def test_one_cursor_reads_all_curves(browser, path):
    with opened(browser, path) as page:
        slider, values = page.get_by_role("slider", name="Step"), page.locator("#cursor dd")
        slider.focus()
        page.keyboard.press("Home")
        assert values.all_inner_texts() == ["1 (epoch 0.33)", "4.0000 nats", "none yet", "1"]
        page.keyboard.press("End")
        assert values.all_inner_texts() == ["9 (epoch 3.00)", "3.0000 nats", "3.5000 nats", "2"]
        assert "training loss 3.0000 nats" in slider.get_attribute("aria-valuetext")
        plot = page.locator(".curve .wide svg").first
        box = plot.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 100)
        assert values.first.inner_text().startswith("5 ")


@pytest.mark.slow
def test_samples_along_the_training_can_be_played(browser, path):
    with opened(browser, path) as page:
        watch = page.locator("#watch")
        slider = watch.get_by_role("slider")
        slider.focus()
        page.keyboard.press("Home")
        assert watch.locator(".cg-caption").inner_text() == "Step 10"
        watch.get_by_role("button", name="Play").click()
        watch.locator(".cg-caption", has_text="Step 30").wait_for()
        watch.get_by_role("button", name="Play").wait_for()


def test_report_without_scripts_shows_the_pictures(browser, path):
    with opened(browser, path, scripts=False) as page:
        assert page.locator(".static svg").first.is_visible()
        page.locator("summary").first.click()
        assert page.locator("pre").first.is_visible()


def test_notebook_replaces_its_picture_by_the_live_text(browser, tmp_path):
    one = sample()
    path = tmp_path / "output.html"
    path.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{one._repr_html_()}{one[:9]._repr_html_()}", "utf-8")
    with opened(browser, path) as page:
        assert page.locator(".cg-live").count() == 2
        assert page.locator(".cg-notebook > svg").count() == 0
        page.locator(".cg-flow").first.focus()
        page.keyboard.press("ArrowRight")
        assert "U+0062" in page.locator(".cg-details").first.inner_text()
        assert page.evaluate(CONTRAST) == []
