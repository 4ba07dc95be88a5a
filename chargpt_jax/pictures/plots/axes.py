"""What all plots of a run share: axes, ticks, curves, and the frame around them."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from chargpt_jax.pictures.svg import label, number

WIDTH, NARROW = 720.0, 364.0
"""Widths of a plot, in pixels: on a page, and on the screen of a phone."""

MARGIN, TOP, BOTTOM = 48.0, 50.0, 246.0
"""The frame of a plot within its picture, in pixels; MARGIN is left and right of it."""

MAX_POINTS = 600
"""Number of segments of a long curve; the lowest and the highest value of each are plotted."""

LIMIT = 1e30  # larger values count as infinite; on a log axis, values below 1 / LIMIT count as 0


@dataclass(frozen=True)
class Axis:
    """A map from values low..high to pixels start..end, linear or log10; it extrapolates."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the position of a value in pixels."""
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 6) -> list[float]:
        """Return about `count` round values within low..high."""
        return _log_ticks(self.low, self.high, count) if self.log else _linear_ticks(self.low, self.high, count)


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for m in (1, 2, 5, 10) if (step := m * power) >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 1 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    """Return powers of ten: only some of them if there are many, with 2 and 5 between if there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / (2 * count)))
    digits = (1, 2, 5) if last - first <= 3 else (1,)
    found = [float(f"{d}e{e}") for e in range(first, last + 1) if e % every == 0 for d in digits]
    found = [tick for tick in found if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
    return found if len(found) > 1 else _linear_ticks(low, high, count)


def finite(points: Iterable[tuple[float, float]], positive: bool = False) -> list[tuple[float, float]]:
    """Return the points that can be plotted: no NaN, no infinite value and, on a log axis, no x that counts as 0."""
    pairs = [(float(x), float(y)) for x, y in points]
    return [(x, y) for x, y in pairs if abs(x) < LIMIT and abs(y) < LIMIT and (x > 1 / LIMIT or not positive)]


def span(values: Sequence[float], default: tuple[float, float]) -> tuple[float, float]:
    """Return the lowest and the highest value, moved apart if they are equal."""
    if not values:
        return default
    low, high = min(values), max(values)
    size = max(abs(low), abs(high), 1.0)
    spare = 0.5 * size if high - low <= 1e-9 * size else 0.0
    return low - spare, high + spare


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the lowest and the highest point of each of MAX_POINTS segments, in order; the plot looks the same."""
    if len(points) <= 2 * MAX_POINTS:
        return list(points)
    losses = np.array([p[1] for p in points])
    segments = np.array_split(np.arange(len(points)), MAX_POINTS)
    shown = {int(part[pick(losses[part])]) for part in segments for pick in (np.argmin, np.argmax)}
    return [points[i] for i in sorted(shown)]


def line_path(points: Sequence[tuple[float, float]], x: Axis, y: Axis, kind: str, style: str = "") -> str:
    """Return a curve through points as a path; `kind` adds classes; a single point is a dot."""
    if not points:
        return ""
    path = "L".join(f"{number(x(px))} {number(y(py))}" for px, py in points)
    styled = f' style="{style}"' if style else ""
    return f'<path class="cg-curve {kind}"{styled} d="M{path}{"h0" if len(points) == 1 else ""}"/>'


def dots(points: Sequence[tuple[float, float]], x: Axis, y: Axis, kind: str, radius: float = 2.0) -> str:
    """Return a circle at each point."""
    at = ((number(x(px)), number(y(py))) for px, py in points)
    return "".join(f'<circle class="{kind}" cx="{cx}" cy="{cy}" r="{radius}"/>' for cx, cy in at)


def frame(
    x: Axis,
    y: Axis,
    x_label: str,
    y_label: str,
    named: Callable[[Sequence[float]], list[str]],
    *,
    bottom: float = BOTTOM,
    rows: int = 5,
    ticks: Sequence[float] | None = None,
) -> str:
    """Return the grid, the tick labels and the names of the axes.

    Args:
        x: the horizontal axis.
        y: the vertical axis.
        x_label: name of the horizontal axis.
        y_label: name of the vertical axis.
        named: returns the labels of ticks on the horizontal axis.
        bottom: lower edge of the frame, in pixels; the labels are below it.
        rows: about how many lines the grid has.
        ticks: on the horizontal axis; None: round values.
    """
    lines = [number(y(t)) for t in y.ticks(rows)]
    ticks = x.ticks(6 if x.end - x.start > NARROW else 3) if ticks is None else ticks
    columns = [number(x(t)) for t in ticks]
    grid = "".join(f"M{x.start:g} {at}H{x.end:g}" for at in lines)
    marks = f"M{x.start:g} {bottom:g}H{x.end:g}" + "".join(f"M{at} {bottom:g}v4" for at in columns)
    return (
        f'<path class="cg-grid" d="{grid}"/><path class="cg-axis" d="{marks}"/>'
        + "".join(
            label(x.start - 8, float(at) + 4, t, "cg-end") for at, t in zip(lines, decimal(y.ticks(rows)), strict=True)
        )
        + "".join(label(float(at), bottom + 18, t, "cg-middle") for at, t in zip(columns, named(ticks), strict=True))
        + label(16, 22, y_label)
        + label(x.end, bottom + 40, x_label, "cg-end")
    )


def decimal(ticks: Sequence[float]) -> list[str]:
    """Return ticks as text, with as many decimals as are needed to distinguish them."""
    gap = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    digits = max(0, -math.floor(math.log10(gap) + 1e-9))
    return [(f"{t:,.{digits}f}" if digits < 7 and abs(t) < 1e7 else f"{t:.6g}").replace("-", "−") for t in ticks]


def power(tick: float) -> str:
    """Return a learning rate as text, 10⁻³ or 2·10⁻³."""
    exponent = math.floor(math.log10(tick) + 1e-9)
    digits = f"{tick / 10.0**exponent:.3g}"
    power = "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if digits == "1" else f"{digits}·{power}"
