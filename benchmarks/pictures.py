"""Make the pictures of the README and of docs/, of a run that was trained before.

    pip install -e ".[browser]"
    python -m benchmarks.pictures --workdir=runs/book --out=docs
    python -m benchmarks.pictures --workdir=runs/temperature/models/tiny-book --out=docs --samplers

The run of the README: --config=tiny, 12 epochs of The Scarlet Pimpernel, prompts "The Scarlet Pimpernel " and
"Sir Percy ". With --samplers: only budget.svg and mirostat.svg, of the first model of benchmarks/temperature.py.
"""

import argparse
import io
import os
import pty
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

import chargpt_jax
from benchmarks.page import chromium

COLUMNS = 84
"""Width of the terminal."""


def output_of(command: list[str]) -> str:
    """Return what a command prints on a terminal of COLUMNS columns with 256 colours."""
    reader, writer = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
    with subprocess.Popen(command, stdout=writer, stderr=subprocess.DEVNULL, env=environment) as process:
        os.close(writer)
        found = b""
        try:
            while piece := os.read(reader, 1 << 16):
                found += piece
        except OSError:  # the end of a pseudo-terminal
            pass
        process.wait()
    return found.decode().replace("\r\n", "\n")


def terminal_page(output: str) -> str:
    """Return an HTML page that shows coloured output of a terminal."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.from_ansi(output.strip()))
    body = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
    style = "body{margin:0;background:#fff}pre{margin:18px;font:15px/1.25 'DejaVu Sans Mono',monospace}"
    return f"<!DOCTYPE html><meta charset='utf-8'><style>{style}</style>{body}"


def pointed_at(page: Any, characters: int) -> None:
    """Select a character of the first text by the arrow keys."""
    page.locator(".cg-flow").first.focus()
    for _ in range(characters):
        page.keyboard.press("ArrowRight")


def clip_of(page: Any, selector: str) -> dict[str, float]:
    """Return the rectangle around all elements of a page that match, with a margin of 12 pixels."""
    boxes = [box for element in page.locator(selector).all() if (box := element.bounding_box())]
    right = max(box["x"] + box["width"] for box in boxes)
    bottom = max(box["y"] + box["height"] for box in boxes)
    return {"x": 0, "y": 0, "width": right + 12, "height": bottom + 12}


LINE = "They seek him here, they seek him there, those Frenchies seek"
"""The text of the pictures of the inside of a model."""


def inside(workdir: str, out: Path) -> None:
    """Write layers.svg, attention.svg and letters.svg: what `analysis` shows."""
    model, text = chargpt_jax.load(workdir), chargpt_jax.corpus_text(workdir)
    found = chargpt_jax.inspect(model, LINE)
    distance = np.arange(len(LINE))[:, None] - np.arange(len(LINE))
    layer, head = np.argwhere((reach := (found.attention * distance).sum(axis=-1).mean(axis=-1)) == reach.max())[0]
    letters = chargpt_jax.by_letter(model.score(text[-50_000:]))
    (out / "layers.svg").write_text(found.by_layer().svg, encoding="utf-8")
    (out / "attention.svg").write_text(found.attention_maps(int(layer) + 1, int(head) + 1).svg, encoding="utf-8")
    (out / "letters.svg").write_text(letters.svg(), encoding="utf-8")
    print(letters, f"{reach.max():.1f} characters back", sep="\n")


def side_by_side(workdir: str) -> str:
    """Return an HTML page with samples at four settings of the sampler."""
    model = chargpt_jax.load(workdir)
    ways = {
        "greedy": {"temperature": 0.0},
        "temperature 0.5": {"temperature": 0.5},
        "temperature 1": {"temperature": 1.0},
        "temperature 1, top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
    }
    samples = {name: model.generate("Sir Percy ", max_new_tokens=150, **way)[0] for name, way in ways.items()}
    body = chargpt_jax.Comparison(samples)._repr_html_()
    return f"<!DOCTYPE html><meta charset='utf-8'><body style='margin:12px;font-family:sans-serif'>{body}"


STATEFUL = {"budget": "temperature=0.8,budget", "mirostat": "mirostat=2.0"}
"""Chains of samplers by the name of their picture."""


def samplers(workdir: str, out: Path) -> None:
    """Write budget.svg and mirostat.svg: a text with the state of its sampler under it."""
    model = chargpt_jax.load(workdir)
    for name, chain in STATEFUL.items():
        sample = model.generate("Sir Percy ", max_new_tokens=150, sampler=chain)[0]
        (out / f"{name}.svg").write_text(sample.svg(), encoding="utf-8")
        print(sample)


def main() -> None:
    """Write the screenshots and the SVG files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samplers", action="store_true", help="write only the pictures of docs/samplers.md")
    options = parser.parse_args()
    if options.samplers:
        samplers(options.workdir, options.out)
        return
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        page = browser.new_page(viewport={"width": 800, "height": 640})
        page.goto(chargpt_jax.write_report(options.workdir).absolute().as_uri())
        page.locator("#samples").scroll_into_view_if_needed()
        page.evaluate("document.querySelector('#samples').scrollIntoView()")
        pointed_at(page, 46)
        page.screenshot(path=options.out / "report.png")

        page = browser.new_page(viewport={"width": 800, "height": 860})
        page.goto(chargpt_jax.export(options.workdir, Path(folder) / "model.html", "html").absolute().as_uri())
        page.fill("#seed", "3")
        page.click("#write")
        page.get_by_text("characters generated").wait_for()
        pointed_at(page, 46)
        page.screenshot(path=options.out / "page.png")

        command = [sys.executable, "-m", "chargpt_jax.main", "--mode=generate", f"--workdir={options.workdir}"]
        command += ["--prompt=The Scarlet Pimpernel ", "--max_new_tokens=230", "--subline"]
        (Path(folder) / "terminal.html").write_text(
            terminal_page(output_of(command).partition("\n\nloss")[0]), encoding="utf-8"
        )
        page = browser.new_page(viewport={"width": 820, "height": 200})
        page.goto((Path(folder) / "terminal.html").as_uri())
        page.screenshot(path=options.out / "terminal.png", full_page=True)

        (Path(folder) / "comparison.html").write_text(side_by_side(options.workdir), encoding="utf-8")
        page = browser.new_page(viewport={"width": 940, "height": 1100})
        page.goto((Path(folder) / "comparison.html").as_uri())
        page.locator(".cg-beside figure").last.wait_for()
        page.screenshot(path=options.out / "comparison.png", clip=clip_of(page, ".cg-beside figure"))
    inside(options.workdir, options.out)


if __name__ == "__main__":
    main()
