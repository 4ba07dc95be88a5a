"""The tables and figures of benchmarks/scale.py in docs/leaderboard.md, from benchmarks/results/scale.json.

`python -m benchmarks.scale --write` renews them. A text on a machine has a figure and up to three tables. A number is
the mean over the seeds that were measured.
"""

import json
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import between_markers, table
from chargpt_jax.pictures.plots.axes import BOTTOM, MARGIN, TOP, WIDTH, Axis, dots, frame, line_path, span
from chargpt_jax.pictures.svg import Entry as Legend
from chargpt_jax.pictures.svg import figure, legend

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scale.json"
PAGE = ROOT / "docs" / "leaderboard.md"

DIAL = "dial"
NEIGHBOURS = ("half learning rate", "double learning rate", "fewer layers", "more layers", "half batch", "double batch")
"""Variants of the dial. A model of fewer layers is wider, one of more layers narrower: the size is the same."""

VARIANTS = (DIAL, *NEIGHBOURS)

EMPTY = "No size has been measured yet."

HEIGHT = 300.0
COLOURS = ("cg-s2", "cg-s3", "cg-s4", "cg-s5", "cg-s1")

Result = dict[str, Any]
"""One training: an entry of the leaderboard with size, minutes, variant and settings."""


def load(path: Path = RESULTS) -> list[Result]:
    """Return the committed results; none before the first."""
    found: list[Result] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return found


def groups(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the results of each text on each machine, by a name for files."""
    found: dict[tuple[Any, ...], list[Result]] = {}
    for one in results:
        key = one["text"]["name"], one["text"]["sha256"], one["machine"]["cpu"], one["machine"]["cores"]
        found.setdefault(key, []).append(one)
    named: dict[str, list[Result]] = {}
    for (text, *_), own in found.items():
        slug = re.sub(r"\W+", "_", text.lower()).strip("_") or "text"
        same = sum(re.fullmatch(rf"{re.escape(slug)}(_on_\d+)?", name) is not None for name in named)
        named[f"{slug}_on_{same + 1}" if same else slug] = own
    return named


def mean(found: Sequence[Result], score: str = "windows") -> float:
    """Return the mean score, bits per character."""
    return statistics.mean(one["bits"][score] for one in found)


def by_cell(results: Sequence[Result], variant: str = DIAL) -> dict[tuple[float, float], list[Result]]:
    """Return the seeds of each (size, minutes) of a variant, sorted."""
    found: dict[tuple[float, float], list[Result]] = {}
    for one in sorted(results, key=lambda one: (one["size"], one["minutes"], one["seed"])):
        if one["variant"] == variant:
            found.setdefault((one["size"], one["minutes"]), []).append(one)
    return found


def sizes_table(results: Sequence[Result]) -> str:
    """Return a row per size, with the bits after each number of minutes; the best of a column is bold."""
    cells = by_cell(results)
    sizes, minutes = sorted({size for size, _ in cells}), sorted({time for _, time in cells})
    best = {time: min(mean(own) for (_, other), own in cells.items() if other == time) for time in minutes}
    rows = []
    for size in sizes:
        first = next(own[0] for (other, _), own in cells.items() if other == size)
        of = first["settings"]
        row = [f"{size:g}", f"{first['parameters']:,}", f"{of['model.n_layer']} x {of['model.n_embd']}"]
        row += [f"{of['optimizer.learning_rate']:g}", str(of["data.batch_size"])]
        for time in minutes:
            own = cells.get((size, time))
            text = f"{mean(own):.4f}" if own else ""
            row.append(f"**{text}**" if own and mean(own) == best[time] else text)
        rows.append(row)
    head = ["size", "parameters", "layers x width", "learning rate", "batch size", *map(bits_after, minutes)]
    return table(head, rows, left=0)


def bits_after(minutes: float) -> str:
    """Return the head of a column."""
    return f"bits, {in_words(minutes)}"


def in_words(minutes: float) -> str:
    """Return a number of minutes with its unit."""
    return f"{minutes:g} minute{'' if minutes == 1 else 's'}"


def details_table(results: Sequence[Result]) -> str:
    """Return a row per size and number of minutes."""
    rows = []
    for (size, minutes), own in by_cell(results).items():
        of, text = own[0]["settings"], own[0]["text"]
        steps = statistics.mean(one["steps"] for one in own)
        epoch = (text["characters"] - text["held_out"]) / (of["data.batch_size"] * of["model.block_size"])
        rows.append(
            [
                *(f"{size:g}", f"{minutes:g}", ", ".join(str(one["seed"]) for one in own), f"{steps:,.0f}"),
                *(f"{steps / epoch:.3g}", f"{statistics.mean(one['seconds'] for one in own):,.0f}"),
                *(f"{mean(own):.4f}", f"{max(one['bits']['windows'] for one in own):.4f}"),
                *(f"{statistics.mean(one['nats']['windows'] for one in own):.4f}", f"{mean(own, 'half_windows'):.4f}"),
            ]
        )
    head = ["size", "minutes", "seeds", "steps", "epochs", "seconds", "bits", "worst", "nats", "bits, half windows"]
    return table(head, rows, left=0)


def difference(results: Sequence[Result], cell: tuple[float, float], variant: str) -> float | None:
    """Return by how many bits a variant is above the dial, over the seeds that both have; None without one."""
    own, dial = ({one["seed"]: one for one in by_cell(results, name).get(cell, [])} for name in (variant, DIAL))
    seeds = own.keys() & dial.keys()
    if not seeds:
        return None
    return mean([own[seed] for seed in seeds]) - mean([dial[seed] for seed in seeds])


def variants_table(results: Sequence[Result]) -> str:
    """Return a row per size and number of minutes with neighbours; '' if none was measured."""
    rows = []
    for cell, own in by_cell(results).items():
        found = [difference(results, cell, variant) for variant in NEIGHBOURS]
        if any(value is not None for value in found):
            signed = ["" if value is None else f"{value:+.4f}" for value in found]
            rows.append([f"{cell[0]:g}", f"{cell[1]:g}", f"{mean(own):.4f}", *signed])
    return table(["size", "minutes", "dial", *NEIGHBOURS], rows, left=0) if rows else ""


def picture(results: Sequence[Result]) -> str:
    """Plot bits per character against parameters as SVG: a line per number of minutes."""
    cells, minutes = by_cell(results), sorted({time for _, time in by_cell(results)})
    lines = [[(float(own[0]["parameters"]), mean(own)) for (_, at), own in cells.items() if at == t] for t in minutes]
    sizes = [size for line in lines for size, _ in line]
    low, high = span([bits for line in lines for _, bits in line], (0.0, 5.0))
    room = 0.08 * (high - low)
    x = Axis(min(sizes) / 1.25, max(sizes) * 1.25, MARGIN, WIDTH - 16, log=True)
    y = Axis(low - room, high + room, BOTTOM, TOP)
    ticks = sorted({1e6 * size for size, _ in cells})
    parts = [frame(x, y, "parameters", "bits per held-out character", millions, ticks=ticks)]
    entries = []
    for i, (line, time) in enumerate(zip(lines, minutes, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        mark = f'<circle style="fill:var(--{colour})"'
        parts.append(line_path(line, x, y, f"cg-line {colour}"))
        parts.append(dots(line, x, y, "", 2.6).replace("<circle", mark))
        sample = f'<path class="cg-line {colour}" d="M0 0H16"/>{mark} cx="8" cy="0" r="2.6"/>'
        entries.append(Legend(sample, 16, in_words(time)))
    key, last = legend(entries, x.start, HEIGHT - 14, x.end - x.start - 90)
    said = "; ".join(
        f"{in_words(time)}: " + ", ".join(f"{bits:.3f} bits at {size:,.0f}" for size, bits in line)
        for line, time in zip(lines, minutes, strict=True)
    )
    about = f"Bits per held-out character against the number of parameters, on a log axis. {said}."
    return figure(WIDTH, last + 14, "".join([*parts, key]), name="Bits per character by size", description=about)


def millions(ticks: Sequence[float]) -> list[str]:
    """Return numbers of parameters in millions."""
    return [f"{tick / 1e6:g} M" for tick in ticks]


def section(results: Sequence[Result]) -> str:
    """Return the tables, and links to the figures, as Markdown."""
    parts = list[str]()
    for name, own in groups(results).items():
        if by_cell(own):
            parts += _parts(name, own)
    if not parts:
        return EMPTY
    return "\n\n".join([*parts, "All values are in [scale.json](../benchmarks/results/scale.json)."])


def _parts(name: str, own: Sequence[Result]) -> Iterator[str]:
    """Yield the paragraphs of a text on a machine."""
    text, machine = own[0]["text"], own[0]["machine"]
    yield (
        f"**{text['name']}**: {text['characters']:,} characters, of which the last {text['held_out']:,} are held out. "
        f"{machine['cores']} cores of {machine['cpu']}."
    )
    yield f"![Bits per character against the number of parameters, {text['name']}]({file_name(name)})"
    yield sizes_table(own)
    yield "The same trainings, with the scores of the protocol:"
    yield details_table(own)
    if neighbours := variants_table(own):
        yield "Neighbours of the dial: bits per character above the dial. A negative number is better than the dial."
        yield neighbours


def file_name(name: str) -> str:
    """Return the file of a figure in docs/."""
    return f"scale_{name}.svg"


def pictures(results: Sequence[Result]) -> dict[str, str]:
    """Return the figures of the page by file name, as SVG."""
    return {file_name(name): picture(own) for name, own in groups(results).items() if by_cell(own)}


def renewed(page: str, results: Sequence[Result]) -> str:
    """Return the page with the current tables between its markers."""
    return between_markers(page, "scale", section(results))


def write(results: Sequence[Result], path: Path = RESULTS, page: Path = PAGE) -> None:
    """Write the results, one per line, and renew the page and its figures."""
    order = sorted(
        results, key=lambda one: (one["text"]["name"], one["size"], one["minutes"], VARIANTS.index(one["variant"]))
    )
    lines = ",\n".join(json.dumps(one) for one in order)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    page.write_text(renewed(page.read_text(encoding="utf-8"), order), encoding="utf-8")
    for old in page.parent.glob(file_name("*")):
        old.unlink()
    for name, svg in pictures(order).items():
        (page.parent / name).write_text(svg, encoding="utf-8")
