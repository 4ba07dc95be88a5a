"""Plots of a run as SVG: the learning-rate range test and the losses.

A plot is a pure function of numbers, so it can be updated live and stored unchanged.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from chargpt_jax.pictures.svg import Entry, clip_path, escaped, figure, label, legend, number, text_width, viridis

WIDTH, HEIGHT = 720.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 672.0, 50.0, 246.0
"""Frame of the plot within the picture, in pixels."""

MAX_POINTS = 600
"""Number of segments of a long training curve; the lowest and the highest loss of each are plotted."""

LIMIT = 1e30  # larger values count as infinite; on a log axis, values below 1 / LIMIT count as 0
SMOOTH_FROM = 60  # number of training points from which a moving average is plotted
MAX_DOTS = 60  # number of validation points up to which each gets a dot

NO_DATA = label((LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2, "no data yet", "cg-middle")
LOSS_ENTRIES = [
    Entry(f'<path class="cg-curve cg-{name}" d="M0 0H16"/>', 16, name) for name in ("training", "validation")
]


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


def lr_finder_plot(
    zooms: Sequence[tuple[Sequence[float], Sequence[float]]],
    steepest: Sequence[float],
    suggestion: float | None,
    method: str = "steepest",
) -> str:
    """Plot a learning-rate range test, complete or not, as a self-contained SVG.

    Points that are not finite are omitted. Losses far above the first ones, where training diverged, leave the frame.

    Args:
        zooms: for each zoom its learning rates and losses (nats per character).
        steepest: for each zoom the learning rate at the steepest descent.
        suggestion: the learning rate to use; None: not known yet.
        method: how it was chosen, for its label.
    """
    for i, (lrs, losses) in enumerate(zooms):
        if len(lrs) != len(losses):
            raise ValueError(
                f"Zoom {i + 1} has {len(lrs)} learning rates, but {len(losses)} losses: give equal numbers."
            )
    curves = [_finite(zip(lrs, losses, strict=True), positive=True) for lrs, losses in zooms]
    x = _rate_axis([p[0] for c in curves for p in c], suggestion)
    y = _loss_axis([p[1] for c in curves for p in c], top=_divergence(curves))
    clip, clipped = clip_path((curves, x, y), LEFT, TOP, RIGHT, BOTTOM)
    parts = [
        _frame(x, y, "learning rate", "loss, nats per character", [_power(t) for t in x.ticks()]),
        clip,
        f'<g clip-path="{clipped}">',
        *(_line(curve, x, y, "cg-zoom", _shade(i, len(curves))) for i, curve in enumerate(curves)),
        _steepest_path(curves, steepest, x, y),
        "</g>",
        _key(_zoom_entries(len(curves))) if any(curves) else NO_DATA,
    ]
    if suggestion is not None and x.low <= suggestion <= x.high:
        parts.append(_guide(x(suggestion), BOTTOM, f"{suggestion:.3g}", f"suggested ({method})"))
    best = "no suggestion yet" if suggestion is None else f"suggested learning rate {suggestion:.3g} ({method})"
    description = f"Loss against learning rate on a log axis in {len(curves)} zooms; {best}."
    return figure(WIDTH, HEIGHT, "".join(parts), name="Learning-rate search", description=description)


def loss_plot(
    train: Sequence[tuple[float, float]],
    validation: Sequence[tuple[float, float]],
    *,
    x_label: str = "step",
) -> str:
    """Plot training and validation losses as a self-contained SVG, in nats on the left and bits on the right.

    Points that are not finite are omitted. Many training points are plotted faintly, with their moving average on top.

    Args:
        train: (x, loss) pairs, losses in nats per character.
        validation: the same for the validation set.
        x_label: name of the x axis.
    """
    seen, held = (sorted(_finite(points), key=lambda p: p[0]) for points in (train, validation))
    x = Axis(*_span([p[0] for p in (*seen, *held)], (0.0, 1.0)), LEFT, RIGHT)
    y = _loss_axis([p[1] for p in (*seen, *held)])
    many = len(seen) > SMOOTH_FROM
    parts = [
        _frame(x, y, x_label, "loss, nats per character", _decimal(x.ticks())),
        _bits(y),
        _line(_thinned(seen), x, y, "cg-raw") if many else "",
        _line(_thinned(_smoothed(seen)) if many else seen, x, y, "cg-training"),
        _line(held, x, y, "cg-validation"),
        _dots(held, x, y, "cg-dot") if len(held) <= MAX_DOTS else "",
        _key(LOSS_ENTRIES) if seen or held else NO_DATA,
    ]
    description = "Training and validation loss over the run; no validation yet."
    if held:
        at, best = min(held, key=lambda p: p[1])
        bits = best / math.log(2)
        parts.append(_guide(x(at), y(best), f"{best:.3f} nats", f"= {bits:.3f} bits, best validation"))
        parts.append(_dots([(at, best)], x, y, "cg-ring", 3.6))
        description = f"Training and validation loss; best validation {best:.3f} nats ({bits:.3f} bits) per character."
    return figure(WIDTH, HEIGHT, "".join(parts), name="Training and validation loss", description=description)


def _finite(points: Iterable[tuple[float, float]], positive: bool = False) -> list[tuple[float, float]]:
    """Return the points that can be plotted: no NaN, no infinite value and, on a log axis, no x that counts as 0."""
    pairs = [(float(x), float(y)) for x, y in points]
    return [(x, y) for x, y in pairs if abs(x) < LIMIT and abs(y) < LIMIT and (x > 1 / LIMIT or not positive)]


def _span(values: Sequence[float], default: tuple[float, float]) -> tuple[float, float]:
    """Return the lowest and the highest value, moved apart if they are equal."""
    if not values:
        return default
    low, high = min(values), max(values)
    size = max(abs(low), abs(high), 1.0)
    spare = 0.5 * size if high - low <= 1e-9 * size else 0.0
    return low - spare, high + spare


def _rate_axis(rates: Sequence[float], suggestion: float | None) -> Axis:
    shown = [*rates, suggestion] if suggestion is not None and 1 / LIMIT < suggestion < LIMIT else rates
    low, high = _span([math.log10(rate) for rate in shown], (-5.0, 0.0))
    return Axis(10.0**low, 10.0**high, LEFT, RIGHT, log=True)


def _divergence(curves: Sequence[Sequence[tuple[float, float]]]) -> float:
    """Return the loss above which training counts as diverged; the axis ends there."""
    first = [curve[0][1] for curve in curves if curve]
    if not first:
        return math.inf
    start, least = float(np.median(first)), min(p[1] for curve in curves for p in curve)
    return start + max(0.5 * (start - least), 0.05 * abs(start))


def _loss_axis(losses: Sequence[float], top: float = math.inf) -> Axis:
    low, high = _span([min(loss, top) for loss in losses], (0.0, 5.0))
    pad = 0.06 * (high - low)
    return Axis(low - pad, high + pad, BOTTOM, TOP)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the lowest and the highest point of each of MAX_POINTS segments, in order; the plot looks the same."""
    if len(points) <= 2 * MAX_POINTS:
        return list(points)
    losses = np.array([p[1] for p in points])
    segments = np.array_split(np.arange(len(points)), MAX_POINTS)
    shown = {int(part[pick(losses[part])]) for part in segments for pick in (np.argmin, np.argmax)}
    return [points[i] for i in sorted(shown)]


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the centred moving average over 1/40 of the points; over fewer near the ends."""
    total = np.concatenate([[0.0], np.cumsum([p[1] for p in points])])
    i = np.arange(len(points))
    half = np.minimum(np.minimum(i, i[::-1]), len(points) // 80)
    mean = (total[i + half + 1] - total[i - half]) / (2 * half + 1)
    return [(x, float(m)) for (x, _), m in zip(points, mean, strict=True)]


def _line(points: Sequence[tuple[float, float]], x: Axis, y: Axis, kind: str, style: str = "") -> str:
    if not points:
        return ""
    path = "L".join(f"{number(x(px))} {number(y(py))}" for px, py in points)
    styled = f' style="{style}"' if style else ""
    return f'<path class="cg-curve {kind}"{styled} d="M{path}{"h0" if len(points) == 1 else ""}"/>'


def _dots(points: Sequence[tuple[float, float]], x: Axis, y: Axis, kind: str, radius: float = 2.0) -> str:
    at = ((number(x(px)), number(y(py))) for px, py in points)
    return "".join(f'<circle class="{kind}" cx="{cx}" cy="{cy}" r="{radius}"/>' for cx, cy in at)


def _frame(x: Axis, y: Axis, x_label: str, y_label: str, x_ticks: Sequence[str]) -> str:
    """Return the grid, the tick labels (`x_ticks` for x.ticks()) and the names of the axes."""
    rows = [number(y(t)) for t in y.ticks(5)]
    columns = [number(x(t)) for t in x.ticks()]
    grid = "".join(f"M{LEFT:g} {at}H{RIGHT:g}" for at in rows)
    marks = f"M{LEFT:g} {BOTTOM:g}H{RIGHT:g}" + "".join(f"M{at} {BOTTOM:g}v4" for at in columns)
    return (
        f'<path class="cg-grid" d="{grid}"/><path class="cg-axis" d="{marks}"/>'
        + "".join(label(LEFT - 8, float(at) + 4, t, "cg-end") for at, t in zip(rows, _decimal(y.ticks(5)), strict=True))
        + "".join(label(float(at), BOTTOM + 18, t, "cg-middle") for at, t in zip(columns, x_ticks, strict=True))
        + label(16, 22, y_label)
        + label(RIGHT, HEIGHT - 14, x_label, "cg-end")
    )


def _bits(y: Axis) -> str:
    """Return the right axis: the nats of the left one in bits."""
    bits = Axis(y.low / math.log(2), y.high / math.log(2), y.start, y.end)
    ticks = bits.ticks(7)
    labels = [label(RIGHT + 8, bits(t) + 4, text) for t, text in zip(ticks, _decimal(ticks), strict=True)]
    return "".join(labels) + label(WIDTH - 16, 22, "bits per character", "cg-end")


def _guide(x: float, y: float, value: str, note: str) -> str:
    """Return a dashed line from a point to the top, labelled with a value and a note."""
    right = x + text_width(value + note) + 24 > WIDTH
    text = f'<tspan class="cg-value">{escaped(value)}</tspan> {escaped(note)}'
    return (
        f'<path class="cg-guide" d="M{number(x)} {number(y)}V{TOP - 4:g}"/>'
        f'<text class="cg-label cg-{"end" if right else "start"}" x="{number(x + (2 if right else -2))}" '
        f'y="{TOP - 9:g}">{text}</text>'
    )


def _key(entries: Sequence[Entry]) -> str:
    return legend(entries, LEFT, HEIGHT - 14, RIGHT - LEFT - 60)[0]


def _zoom_entries(n: int) -> list[Entry]:
    width = min(12.0, 96.0 / n)
    lines = "".join(
        f'<path class="cg-curve cg-zoom" style="{_shade(i, n)}" d="M{number(i * width)} 0h{number(width - 3)}"/>'
        for i in range(n)
    )
    ring = Entry('<circle class="cg-step" cx="4" cy="0" r="2.6"/>', 8, "steepest descent")
    return [Entry(lines, n * width - 3, f"zooms 1 to {n}" if n > 1 else "zoom 1"), ring]


def _shade(i: int, n: int) -> str:
    """Return the style of zoom i of n: later ones are thicker, and darker on a light page or lighter on a dark one."""
    late = i / (n - 1) if n > 1 else 1.0
    return (
        f"--cg-on-light:{viridis(0.75 - 0.7 * late)};--cg-on-dark:{viridis(0.4 + 0.55 * late)};"
        f"stroke-width:{1 + late:.2g};stroke-opacity:{0.65 + 0.35 * late:.2g}"
    )


def _steepest_path(curves: Sequence[Sequence[tuple[float, float]]], steepest: Sequence[float], x: Axis, y: Axis) -> str:
    """Return rings at the steepest descent of each zoom's curve, joined in the order of the zooms."""
    points = []
    for curve, rate in zip(curves, steepest, strict=False):
        if curve and 1 / LIMIT < rate < LIMIT:
            rates, losses = np.array(sorted(curve)).T
            points.append((rate, float(np.interp(math.log(rate), np.log(rates), losses))))
    return _line(points, x, y, "cg-path") + _dots(points, x, y, "cg-step", 2.6)


def _decimal(ticks: Sequence[float]) -> list[str]:
    """Return ticks as text, with as many decimals as are needed to distinguish them."""
    gap = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    digits = max(0, -math.floor(math.log10(gap) + 1e-9))
    return [(f"{t:,.{digits}f}" if digits < 7 and abs(t) < 1e7 else f"{t:.6g}").replace("-", "−") for t in ticks]


def _power(tick: float) -> str:
    """Return a learning rate as text, 10⁻³ or 2·10⁻³."""
    exponent = math.floor(math.log10(tick) + 1e-9)
    digits = f"{tick / 10.0**exponent:.3g}"
    power = "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if digits == "1" else f"{digits}·{power}"
