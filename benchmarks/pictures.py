"""Take the pictures of the README: the report, a model as a page and the terminal, of a run that was trained before.

    pip install -e ".[browser]"
    python -m benchmarks.pictures --workdir=runs/book --out=docs

The run of the README: --config=tiny, 12 epochs of The Scarlet Pimpernel, prompts "The Scarlet Pimpernel " and
"Sir Percy ".
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


def main() -> None:
    """Write report.png, page.png and terminal.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
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


if __name__ == "__main__":
    main()
