"""Print docs/benchmark_details.md from the measurements in benchmarks/results/.

    python -m benchmarks.tables > docs/benchmark_details.md

A results file is a JSON object with a title, notes (paragraphs) and tables. A table has either columns and rows as
printed, or measurements: one object per config, figure and implementation, with the values [median, lowest, highest]
and the ratio [median, lowest, highest] by which chargpt_jax is better. One round gives one value instead of three.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from benchmarks.baselines import UNITS, number

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "benchmark_details.md"

SECTIONS = (
    *("setup", "training", "cold_start", "generation", "time_to_loss", "range_test", "scaling", "profile"),
    *("xeon", "epyc_zen4", "h100"),
)
"""The results files, in the order of the page."""

HEAD = """# Benchmark details

All tables behind [benchmarks.md](benchmarks.md). `python -m benchmarks.tables` prints this page from
[benchmarks/results](../benchmarks/results): edit those files, not this page."""


class Measurement(TypedDict):
    """One figure of one implementation; ratio: how many times better chargpt_jax is, median and range."""

    config: str
    figure: str
    implementation: str
    values: list[float]
    ratio: NotRequired[list[float]]


class Table(TypedDict):
    """Columns and rows as printed, or measurements."""

    caption: str
    columns: NotRequired[list[str]]
    rows: NotRequired[list[list[str]]]
    rounds: NotRequired[int]
    measurements: NotRequired[list[Measurement]]


class Section(TypedDict):
    """One results file."""

    title: str
    notes: list[str]
    tables: list[Table]


def load(name: str) -> Section:
    """Read a results file."""
    section: Section = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return section


def with_range(values: Sequence[float], unit: str = "") -> str:
    """Format a median with its range: '27.5x (26.3 to 29)'; one value without a range."""
    median, *ends = map(number, values)
    return f"{median}{unit} ({' to '.join(ends)})" if ends else f"{median}{unit}"


def measured(rows: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Arrange measurements: one row per config and implementation, two columns per figure."""
    figures = list(dict.fromkeys(row["figure"] for row in rows))
    columns = ["config", "implementation"]
    for figure in figures:
        title, more_is_better = UNITS[figure]
        better = "less memory" if figure.endswith("mib") else "faster"
        assert more_is_better or figure.endswith(("mib", "seconds"))
        columns += [title, f"chargpt_jax: {better} by"]
    found = {(row["config"], row["implementation"], row["figure"]): row for row in rows}
    lines = []
    for config, implementation in dict.fromkeys((row["config"], row["implementation"]) for row in rows):
        cells = [config, implementation]
        for figure in figures:
            row = found[config, implementation, figure]
            cells += [with_range(row["values"]), with_range(row["ratio"], "x") if "ratio" in row else ""]
        lines.append(cells)
    filled = [i for i in range(len(columns)) if any(line[i] for line in lines)]
    return [columns[i] for i in filled], [[line[i] for i in filled] for line in lines]


def markdown(table: Table) -> Iterator[str]:
    """Yield the lines of a table with its caption."""
    rounds = table.get("rounds")
    counted = "" if rounds is None else f" ({rounds} {'round' if rounds == 1 else 'rounds'})"
    yield f"**{table['caption']}{counted}**\n"
    if "measurements" in table:
        columns, rows = measured(table["measurements"])
    else:
        columns, rows = table["columns"], table["rows"]
    numeric = [all(row[i][:1].isdigit() or not row[i] for row in rows) for i in range(len(columns))]
    yield f"| {' | '.join(columns)} |"
    yield "|" + "".join("---:|" if right else "---|" for right in numeric)
    yield from (f"| {' | '.join(row)} |" for row in rows)


def page() -> str:
    """Return the page as Markdown."""
    parts = [HEAD]
    for section in map(load, SECTIONS):
        parts += [f"## {section['title']}", *section["notes"]]
        parts += ["\n".join(markdown(table)) for table in section["tables"]]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")
