"""Means with their intervals, in a row per sampler and a panel per model, as SVG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chargpt_jax.pictures.plots.axes import Axis, decimal
from chargpt_jax.pictures.svg import Entry, figure, label, legend, number

WIDTH, LEFT, RIGHT, GAP = 720.0, 104.0, 16.0, 26.0
TOP, ROW, BELOW = 62.0, 26.0, 66.0
"""In pixels: the first row's upper edge, the height of a row, and the space below the last one."""

APART = 8.0
"""Between the marks of a row, pixels."""

COLOURS = ("cg-s2", "cg-s3")
FILLS = ("cg-b3", "cg-b2")
"""Classes of the marks: lines and dots."""


@dataclass(frozen=True)
class Panel:
    """One panel."""

    name: str
    rows: Mapping[str, Sequence[tuple[float, float] | None]]
    """By the name of the row: at most two marks, a mean and half of its interval's width each; None: no mark."""
    guide: float
    """A value that is marked by a dashed line."""


def intervals_plot(panels: Sequence[Panel], marks: Sequence[str], name: str) -> str:
    """Plot panels side by side, as a self-contained SVG.

    Args:
        panels: with the same rows.
        marks: the names of a row's marks.
        name: the quantity with its unit.
    """
    rows = list(panels[0].rows)
    bottom = TOP + ROW * len(rows)
    width = (WIDTH - LEFT - RIGHT - GAP * (len(panels) - 1)) / len(panels)
    body = [label(LEFT - 10, TOP + ROW * (i + 0.5) + 4, row, "cg-end") for i, row in enumerate(rows)]
    for i, panel in enumerate(panels):
        start = LEFT + i * (width + GAP)
        body.append(_panel(panel, start, start + width, bottom))
    entries = [
        Entry(f'<path class="cg-line {c}" d="M0 0H16"/><circle class="{f}" cx="8" cy="0" r="3"/>', 16, text)
        for c, f, text in zip(COLOURS, FILLS, marks, strict=True)
    ]
    entries.append(Entry('<path class="cg-guide" d="M0 0H16"/>', 16, "held-out text"))
    body += [label(16, 22, name), legend(entries, LEFT, bottom + 50, WIDTH - LEFT - RIGHT)[0]]
    said = "; ".join(f"{panel.name}: {_said(panel)}" for panel in panels)
    return figure(WIDTH, bottom + BELOW, "".join(body), name=name, description=f"{name}, with 95 % intervals. {said}.")


def _panel(panel: Panel, left: float, right: float, bottom: float) -> str:
    """Return the grid, the tick labels and the marks of a panel."""
    found = [(mean, half) for row in panel.rows.values() for mark in row if mark for mean, half in [mark]]
    ends = [panel.guide, *(mean - half for mean, half in found), *(mean + half for mean, half in found)]
    low, high = min(ends), max(ends)
    spare = 0.06 * (high - low) or 1.0
    x = Axis(low - spare, high + spare, left, right)
    ticks = x.ticks(4)
    at = [number(x(tick)) for tick in ticks]
    parts = [
        label((left + right) / 2, TOP - 14, panel.name, "cg-middle"),
        f'<path class="cg-grid" d="{"".join(f"M{a} {TOP:g}V{bottom:g}" for a in at)}"/>',
        f'<path class="cg-axis" d="M{number(left)} {bottom:g}H{number(right)}"/>',
        f'<path class="cg-guide" d="M{number(x(panel.guide))} {TOP:g}V{bottom:g}"/>',
        *(label(float(a), bottom + 18, text, "cg-middle") for a, text in zip(at, decimal(ticks), strict=True)),
    ]
    for i, row in enumerate(panel.rows.values()):
        for j, mark in enumerate(row):
            if mark is not None:
                y = TOP + ROW * (i + 0.5) + APART * (j - (len(row) - 1) / 2)
                ends = [number(x(mark[0] - mark[1])), number(x(mark[0] + mark[1]))]
                parts.append(f'<path class="cg-line {COLOURS[j]}" d="M{ends[0]} {number(y)}H{ends[1]}"/>')
                parts.append(f'<circle class="{FILLS[j]}" cx="{number(x(mark[0]))}" cy="{number(y)}" r="3"/>')
    return "".join(parts)


def _said(panel: Panel) -> str:
    """Return a panel's means in words."""
    rows = (
        f"{name} {' and '.join(f'{mark[0]:.3g}' for mark in row if mark) or 'none'}" for name, row in panel.rows.items()
    )
    return ", ".join(rows) + f", held-out text {panel.guide:.3g}"
