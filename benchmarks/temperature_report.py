"""The tables and pictures of docs/temperature.md, from benchmarks/results/temperature.json.

`python -m benchmarks.temperature --write` renews them. An interval is that of Student's t over the sets of texts, 95 %.
A difference from plain temperature is computed set by set: all sets continue the same prompts.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import temperature_plot as plot
from benchmarks.markdown import table
from chargpt_jax.pictures.plots.letters import letters_plot

RESULTS = Path(__file__).parent / "results" / "temperature.json"
PAGE = Path(__file__).parents[1] / "docs" / "temperature.md"

STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5 % quantiles of Student's t by the number of values."""

BASELINE = "temperature"

FIGURES = {
    "unknown": ("unknown words, %", 1, -1),
    "judge": ("judge, nats", 3, -1),
    "repeated": ("repeated, %", 2, -1),
    "longest": ("longest repetition", 1, -1),
    "copied": ("copied, %", 2, 0),
    "distinct": ("distinct words", 1, 1),
    "zlib": ("zlib, bits", 3, 1),
}
"""By name: the head of its column, decimals, and whether more is better (1), worse (-1) or neither (0)."""

LETTERS = "larger, book"
"""The model whose entropies by letter are shown."""

Found = dict[str, Any]
"""The content of RESULTS."""


def rounded(found: Any) -> Any:
    """Return results with five significant digits."""
    if isinstance(found, dict):
        return {name: rounded(value) for name, value in found.items()}
    if isinstance(found, list):
        return [rounded(value) for value in found]
    return float(f"{found:.5g}") if isinstance(found, float) else found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of values, and half of the width of its interval."""
    n = len(values)
    quantile = STUDENT.get(n, 2.0 if n > 10 else math.inf)
    return float(np.mean(values)), float(quantile * np.std(values, ddof=1) / math.sqrt(n))


def difference(cells: Found, sampler: str, figure: str) -> tuple[float, float]:
    """Return how much more a sampler has of a figure than plain temperature, and half of the interval's width."""
    one, other = (np.array(cells[name]["figures"][figure]) for name in (sampler, BASELINE))
    return interval((one - other).tolist())


def verdict(cells: Found, sampler: str, figure: str) -> int:
    """Return 1 if a sampler is better than plain temperature, -1 if it is worse, 0 if the interval contains 0."""
    mean, half = difference(cells, sampler, figure)
    return int(np.sign(mean)) * FIGURES[figure][2] if abs(mean) > half else 0


def measured(cells: Found, sampler: str, figure: str) -> str:
    """Return a mean with its interval; bold if it differs from that of plain temperature."""
    mean, half = interval(cells[sampler]["figures"][figure])
    digits = FIGURES[figure][1]
    text = f"{mean:.{digits}f} ± {half:.{digits}f}"
    apart, width = difference(cells, sampler, figure)
    return f"**{text}**" if sampler != BASELINE and abs(apart) > width else text


def models(found: Found) -> str:
    """Return the table of the models and of held-out text."""
    head = ["model", "parameters", "validation loss, nats", "held-out passages: surprisal"]
    head += [FIGURES[name][0] for name in FIGURES]
    rows = []
    for name, own in found["models"].items():
        row = [name, f"{own['parameters']:,}", f"{own['loss']:.3f}", f"{own['level']:.3f}"]
        rows.append(row + [f"{own['held_out_text'][k]:.{d}f}" for k, (_, d, _) in FIGURES.items()])
    return table(head, rows)


def samplers(found: Found) -> str:
    """Return the table of the chains."""
    return table(["sampler", "chain"], [[k, f"`{chain.replace('{}', 'x')}`"] for k, chain in found["chains"].items()])


def letters(found: Found) -> str:
    """Return the table of entropies by the letter of a word."""
    rows = []
    for name, own in found["models"].items():
        cells = [f"{h:.2f}" for h in own["entropy"][:6]]
        rows.append([name, *cells, f"{own['outside'][1]:.2f}", f"{100 * own['first_letters']:.0f} %"])
    head = ["model", *(f"letter {i}" for i in range(1, 7)), "outside of words", "first letters' part of the surprisal"]
    return table(head, rows)


def scores(found: Found) -> str:
    """Return the table that counts where samplers are better and worse than plain temperature."""
    names = [name for name, (_, _, sign) in FIGURES.items() if sign]
    rows = []
    for sampler in found["chains"]:
        if sampler == BASELINE:
            continue
        cells = [c for _, _, c in cells_of(found) if "figures" in c[sampler]]
        row = [f"{sampler} ({len(cells)})"]
        for name in names:
            seen = [verdict(c, sampler, name) for c in cells]
            row.append(f"{seen.count(1)} / {seen.count(-1)}")
        rows.append(row)
    return table(["sampler", *(FIGURES[name][0] for name in names)], rows)


def changes(found: Found) -> str:
    """Return the table of the changes from plain temperature in percent, the range over the models."""
    levels = next(iter(found["models"].values()))["cells"]
    shown = [(level, name) for level in levels for name in ("unknown", "distinct")]
    rows = []
    for sampler in found["chains"]:
        if sampler == BASELINE:
            continue
        row = [sampler]
        for level, name in shown:
            cells = [own["cells"][level] for own in found["models"].values()]
            row.append(_range([relative(c, sampler, name) for c in cells if "figures" in c[sampler]]))
        rows.append(row)
    return table(
        ["sampler", *(f"{FIGURES[name][0].partition(',')[0]}, {100 * float(n):.0f} %" for n, name in shown)], rows
    )


def relative(cells: Found, sampler: str, figure: str) -> float:
    """Return the change of a mean figure from that of plain temperature, percent."""
    one, other = (float(np.mean(cells[name]["figures"][figure])) for name in (sampler, BASELINE))
    return 100 * (one / other - 1)


def _range(values: Sequence[float]) -> str:
    return f"{min(values):+.0f} to {max(values):+.0f} %" if values else ""


def cells_of(found: Found) -> Iterator[tuple[str, str, Found]]:
    """Yield (model, level, cells by sampler)."""
    for name, own in found["models"].items():
        for level, cells in own["cells"].items():
            yield name, level, cells


def all_figures(found: Found, model: str, level: str) -> str:
    """Return the table of one model at one level."""
    own = found["models"][model]
    cells = own["cells"][level]
    head = ["sampler", "setting", *(FIGURES[name][0] for name in FIGURES), "held-out, nats", "excluded, %"]
    plain = own["temperature_1"]
    rows = [["held-out text", "", *(f"{own['held_out_text'][k]:.{d}f}" for k, (_, d, _) in FIGURES.items()), "", ""]]
    means = (f"{np.mean(plain['figures'][k]):.{d}f}" for k, (_, d, _) in FIGURES.items())
    rows.append(["temperature 1", "1", *means, f"{plain['held_out']:.3f}", f"{plain['excluded']:.1f}"])
    for sampler, cell in cells.items():
        if "figures" not in cell:
            low, high = cell["range"]
            rows.append([sampler, f"only {low:.2f} to {high:.2f} nats", *[""] * (len(head) - 2)])
            continue
        row = [sampler, f"{cell['setting']:.3g}", *(measured(cells, sampler, name) for name in FIGURES)]
        rows.append([*row, f"{cell['held_out']:.3f}", f"{cell['excluded']:.1f}"])
    return table(head, rows)


def tables(found: Found) -> dict[str, str]:
    """Return all tables of the page by name, as Markdown."""
    made = {"models": models(found), "samplers": samplers(found), "letters": letters(found), "scores": scores(found)}
    made["changes"] = changes(found)
    for model, level, _ in cells_of(found):
        made[mark(model, level)] = all_figures(found, model, level)
    return made


def mark(model: str, level: str) -> str:
    """Return the name of a table of figures."""
    return re.sub(r"\W+", "_", f"{model}_{level}")


def pictures(found: Found) -> dict[str, str]:
    """Return the pictures of the page by file name, as SVG."""
    own = found["models"][LETTERS]
    entropy, surprisal = (
        np.array([np.nan if v is None else v for v in own[name]]) for name in ("entropy", "surprisal")
    )
    names = [*map(str, range(1, len(entropy))), f"{len(entropy)} or later"]
    made = {"temperature_letters.svg": letters_plot(entropy, surprisal, names)}
    for figure in ("unknown", "distinct"):
        panels = []
        for model, inside in found["models"].items():
            marks = {
                sampler: [
                    interval(cells[sampler]["figures"][figure]) if "figures" in cells[sampler] else None
                    for cells in inside["cells"].values()
                ]
                for sampler in found["chains"]
            }
            panels.append(plot.Panel(model, marks, inside["held_out_text"][figure]))
        levels = [f"{100 * float(level):.0f} % of held-out text's surprisal" for level in own["cells"]]
        made[f"temperature_{figure}.svg"] = plot.intervals_plot(panels, levels, FIGURES[figure][0])
    return made


def renewed(page: str, found: Found) -> str:
    """Return the page with every table that follows a comment `<!-- temperature: NAME -->` replaced by the current one.

    Raises:
        ValueError: if the page does not have every table exactly once.
    """
    made = tables(found)
    marks = re.findall(r"<!-- temperature: (\w+) -->", page)
    if sorted(marks) != sorted(made):
        raise ValueError(f"The page has the tables {marks}, but it must have {list(made)}, each of them once.")
    pattern = r"(<!-- temperature: (\w+) -->)\n+(?:\|.*\n)*\n*"
    return re.sub(pattern, lambda at: f"{at[1]}\n\n{made[at[2]]}\n\n", page).rstrip("\n") + "\n"


def load() -> Found:
    """Return the committed results."""
    found: Found = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def write() -> None:
    """Renew the page and its pictures."""
    found = load()
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    for name, svg in pictures(found).items():
        (PAGE.parent / name).write_text(svg, encoding="utf-8")
