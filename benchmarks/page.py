"""Measure a model as a page in headless Chromium: characters per second inside and beyond the context.

    pip install -e ".[browser]"
    python -m benchmarks.page --workdir=runs/tiny --rounds=5

It prints the median and the range over the rounds of the speed that the page itself shows.
"""

import argparse
import contextlib
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chargpt_jax

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Yield a running browser of playwright."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, BROWSERS)))
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def characters_per_second(page: Any, prompt: str, count: int) -> float:
    """Let the page continue a prompt, and return the speed that it shows at the end."""
    page.fill("#prompt", prompt)
    page.fill("#count", str(count))
    page.click("#write")
    page.get_by_text("generated with seed").wait_for(timeout=300_000)
    return float(page.inner_text("#speed").split()[0].replace(",", ""))


def main() -> None:
    """Print a line for generation inside the context, and one for generation beyond it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model = chargpt_jax.load(options.workdir)
    size = model.config.model.block_size
    first = next(c for c in model.tokenizer.vocabulary[1:] if c.isalpha())
    speeds: dict[str, list[float]] = {"inside the context": [], "beyond the context": []}
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        path = chargpt_jax.export(options.workdir, Path(folder) / "model.html", "html")
        for _ in range(options.rounds):
            for name, prompt in zip(speeds, (first, first * size), strict=True):
                page = browser.new_page()
                page.goto(path.absolute().as_uri())
                speeds[name].append(characters_per_second(page, prompt, size - 1 if prompt == first else 200))
                page.close()
    for name, found in speeds.items():
        print(f"{name}: {statistics.median(found):,.0f} characters/s ({min(found):,.0f} to {max(found):,.0f})")


if __name__ == "__main__":
    main()
