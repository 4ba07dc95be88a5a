"""The mean of several runs with its interval, over the steps, as SVG: one band per group of runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from chargpt_jax.pictures.plots.axes import (
    BOTTOM,
    MARGIN,
    TOP,
    WIDTH,
    Axis,
    decimal,
    dots,
    finite,
    frame,
    line_path,
    span,
    thinned,
)
from chargpt_jax.pictures.svg import Entry, figure, label, legend, number

HEIGHT = 300.0
COLOURS = ("cg-s2", "cg-s3", "cg-s4", "cg-s5", "cg-s1")
HALF_BAR = 3.0
"""Half the width of the bar that shows the interval of a single point."""

MAX_DOTS = 40
"""Number of points up to which each gets a dot."""


@dataclass(frozen=True)
class Band:
    """The runs of one group."""

    name: str
    points: tuple[tuple[float, float, float, float], ...]
    """(x, mean, lower end, upper end), sorted by x; the ends are NaN for a single run."""


def bands_plot(
    bands: Sequence[Band],
    note: str,
    *,
    title: str = "Sweep",
    legend_title: str = "learning rate",
    width: float = WIDTH,
    unit: str = "character",
) -> str:
    """Plot the means of groups of runs with their intervals as a self-contained SVG, in nats and in bits.

    Points that are not finite are omitted. The sixth group has the first colour again, and a dashed line.

    Args:
        bands: one per group.
        note: what lines and bands are, for the corner of the picture.
        title: accessible name of the picture.
        legend_title: what the names of the groups are.
        width: in pixels.
        unit: what a token is, 'character' or 'byte'.
    """
    means = [finite((x, mean) for x, mean, *_ in band.points) for band in bands]
    edges = [_edges(band) for band in bands]
    values = [y for points in means for _, y in points] + [y for pair in edges for line in pair for _, y in line]
    x = Axis(*span([px for points in means for px, _ in points], (0.0, 1.0)), MARGIN, width - MARGIN)
    low, high = span(values, (0.0, 5.0))
    room = 0.06 * (high - low)
    y = Axis(low - room, high + room, BOTTOM, TOP)
    bits = Axis(y.low / math.log(2), y.high / math.log(2), y.start, y.end)
    ticks = bits.ticks(7)
    parts = [
        frame(x, y, "step", f"validation loss, nats per {unit}", decimal),
        *(label(x.end + 8, bits(t) + 4, text) for t, text in zip(ticks, decimal(ticks), strict=True)),
        label(x.end + MARGIN - 16, 22, f"bits per {unit}", "cg-end"),
        label((x.start + x.end) / 2, 22, note, "cg-middle"),
        *(_area(pair, x, y, COLOURS[i % len(COLOURS)]) for i, pair in enumerate(edges)),
        *(line_path(thinned(points), x, y, _line(i)) for i, points in enumerate(means)),
        *(
            dots(points, x, y, "", 1.6).replace("<circle", f'<circle style="fill:var(--{COLOURS[i % len(COLOURS)]})"')
            for i, points in enumerate(means)
            if len(points) <= MAX_DOTS
        ),
    ]
    if not values:
        parts.append(label((x.start + x.end) / 2, (TOP + BOTTOM) / 2, "no data yet", "cg-middle"))
    entries = [Entry("", 0, legend_title), *(Entry(_sample(i), 16, band.name) for i, band in enumerate(bands))]
    key, last = legend(entries, x.start, HEIGHT - 14, x.end - x.start - 60)
    said = "; ".join(
        f"{band.name}: {points[-1][1]:.3f} nats at step {points[-1][0]:g}"
        for band, points in zip(bands, means, strict=True)
        if points
    )
    description = f"Mean validation loss over the steps by {legend_title}. {note}. {said}."
    return figure(width, last + 14, "".join([*parts, key]), name=title, description=description)


def _edges(band: Band) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Return the lower and the upper edge of a band, at the points where both and the mean are finite."""
    both = [
        (x, low, high) for x, *values in band.points if all(map(math.isfinite, values)) for _, low, high in [values]
    ]
    return finite((x, low) for x, low, _ in both), finite((x, high) for x, _, high in both)


def _area(edges: tuple[list[tuple[float, float]], list[tuple[float, float]]], x: Axis, y: Axis, colour: str) -> str:
    """Return the area between two edges; that of a single point is a narrow bar."""
    lower, upper = ([(x(px), y(py)) for px, py in edge] for edge in edges)
    if not lower:
        return ""
    if len(lower) == 1:
        lower, upper = ([(px - HALF_BAR, py), (px + HALF_BAR, py)] for ((px, py),) in (lower, upper))
    corners = "L".join(f"{number(px)} {number(py)}" for px, py in [*lower, *reversed(upper)])
    return f'<path class="cg-area {colour}" d="M{corners}Z"/>'


def _line(i: int) -> str:
    """Return the classes of the line of the i-th group."""
    return f"cg-line {COLOURS[i % len(COLOURS)]}{' cg-dashed' if i // len(COLOURS) % 2 else ''}"


def _sample(i: int) -> str:
    """Return the i-th group's sample in the legend."""
    colour = COLOURS[i % len(COLOURS)]
    return f'<path class="cg-area {colour}" d="M0 -4H16V4H0Z"/><path class="cg-curve {_line(i)}" d="M0 0H16"/>'
