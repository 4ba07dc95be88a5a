"""Curves over the steps of a run, one plot each, on a common axis: learning rate, gradient norm, throughput.

The plots of a report have one frame, so that one cursor reads all of them at a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chargpt_jax.pictures.plots.axes import MARGIN, TOP, WIDTH, Axis, decimal, finite, frame, line_path, span, thinned
from chargpt_jax.pictures.svg import figure

BOTTOM, HEIGHT = 130.0, 176.0
"""Of a plot of one curve, in pixels; BOTTOM is the lower edge of its frame."""

MAX_READ = 2_000
"""Number of points of a curve that a cursor can read; of a longer curve every second, third, ... one is left."""


@dataclass(frozen=True)
class Curve:
    """One quantity over the steps of a run."""

    name: str
    unit: str
    points: tuple[tuple[int, float], ...]
    """(step, value), sorted by step."""
    exact: int | None = None
    """Decimals of a value that is read; None: three significant digits."""

    @property
    def label(self) -> str:
        """The name with its unit."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    def svg(self, x_range: tuple[float, float], width: float = WIDTH) -> str:
        """Plot the curve over an axis of steps, as SVG; values that are not finite are omitted."""
        points = finite(self.points)
        x = Axis(*x_range, MARGIN, width - MARGIN)
        low, high = span([y for _, y in points], (0.0, 1.0))
        low = 0.0 if 0 <= low < 0.5 * high else low
        y = Axis(low, high + 0.06 * (high - low), BOTTOM, TOP - 12)
        scale, unit = _scaled(high)
        ticks = Axis(y.low / scale, y.high / scale, y.start, y.end)
        body = frame(x, ticks, "step", self.label + unit, decimal, bottom=BOTTOM, rows=3)
        description = f"{self.label}, over the steps of the run."
        return figure(
            width,
            HEIGHT,
            body + line_path(thinned(points), x, y, "cg-training"),
            name=self.name,
            description=description,
        )


def _scaled(high: float) -> tuple[float, str]:
    """Return the divisor of an axis whose highest value is `high`, and how its label names it."""
    if high >= 1e4:
        return 1e3, " (thousands)"
    if 0 < high < 0.01:
        return 1e-3, " (thousandths)"
    return 1.0, ""


def x_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """Return the first and the last step of all curves, moved apart if they are equal."""
    return span([float(step) for curve in curves for step, _ in curve.points], (0.0, 1.0))


def readable(curves: Sequence[Curve], epoch_steps: int) -> dict[str, Any]:
    """Return what a cursor reads: the frame of the plots and the points of the curves, as JSON can hold them."""
    low, high = x_range(curves)
    return {
        "margin": MARGIN,
        "low": low,
        "high": high,
        "epoch_steps": epoch_steps,
        "curves": [
            {
                "name": curve.name,
                "unit": curve.unit,
                "exact": curve.exact,
                "steps": [step for step, _ in read],
                "values": [float(f"{value:.6g}") for _, value in read],
            }
            for curve in curves
            if (read := every_nth(finite(curve.points)))
        ],
    }


def every_nth(points: Sequence[tuple[float, float]]) -> list[tuple[int, float]]:
    """Return at most MAX_READ of the points, evenly chosen, with the last one."""
    n = -(-len(points) // MAX_READ) or 1
    chosen = list(points[::-n][::-1])
    return [(int(step), value) for step, value in chosen]
