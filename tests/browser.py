"""A real browser for tests of pages: headless Chromium through playwright; tests are skipped if there is none."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => ((v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const [r, g, b, a = 1] = rgb(getComputedStyle(node).backgroundColor);
      if (a === 1) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.data.trim() || parent.closest("script,style,title,desc,.cg-details:not(.cg-open)")) continue;
    if (!parent.getClientRects().length) continue;
    const style = getComputedStyle(parent);
    const ink = rgb(parent.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(parent))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push([parent.className.baseVal ?? parent.className, node.data.slice(0, 20), ratio]);
  }
  return found;
}"""
"""Returns the texts of a page whose contrast is below 4.5, the limit of WCAG 2 for normal text."""


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Yield a running browser; skip the test if there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: Any, path: Path, *, phone: bool = False, dark: bool = False, scripts: bool = True) -> Iterator[Any]:
    """Yield a page of playwright that shows a file; check that it prints no message and requests nothing else."""
    context = browser.new_context(
        viewport={"width": 390, "height": 780} if phone else {"width": 1000, "height": 900},
        color_scheme="dark" if dark else "light",
        has_touch=phone,
        java_script_enabled=scripts,
    )
    page, messages, requests = context.new_page(), [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.absolute().as_uri())
    yield page
    context.close()
    assert messages == []
    assert requests == [path.absolute().as_uri()]
