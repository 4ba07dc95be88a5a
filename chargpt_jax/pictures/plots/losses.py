"""Plots of a run as SVG: the learning-rate range test and the losses.

A plot is a pure function of numbers, so it can be updated live and stored unchanged.
"""

import math
from collections.abc import Sequence

import numpy as np

from chargpt_jax.pictures.plots.axes import (
    BOTTOM,
    LIMIT,
    MARGIN,
    TOP,
    WIDTH,
    Axis,
    decimal,
    dots,
    finite,
    frame,
    line_path,
    power,
    span,
    thinned,
)
from chargpt_jax.pictures.svg import Entry, clip_path, escaped, figure, label, legend, number, text_width, viridis

HEIGHT = 300.0
SMOOTH_FROM = 60  # number of training points from which a moving average is plotted
MAX_DOTS = 60  # number of validation points up to which each gets a dot

LOSS_ENTRIES = [
    Entry(f'<path class="cg-curve cg-{name}" d="M0 0H16"/>', 16, name) for name in ("training", "validation")
]


BAND_ENTRY = Entry('<rect class="cg-band" x="0" y="-4" width="16" height="8"/>', 16, "seeds, last zoom")


def lr_finder_plot(
    zooms: Sequence[tuple[Sequence[float], Sequence[float]]],
    steepest: Sequence[float],
    suggestion: float | None,
    method: str = "steepest",
    *,
    width: float = WIDTH,
    unit: str = "character",
    band: tuple[Sequence[float], Sequence[float], Sequence[float]] | None = None,
) -> str:
    """Plot a learning-rate range test, complete or not, as a self-contained SVG.

    Points that are not finite are omitted. Losses far above the first ones, where training diverged, leave the frame.

    Args:
        zooms: for each zoom its learning rates and losses (nats per unit).
        steepest: for each zoom the learning rate at the steepest descent.
        suggestion: the learning rate to use; None: not known yet.
        method: how it was chosen, for its label.
        width: in pixels.
        unit: what a token is, 'character' or 'byte'.
        band: learning rates, and the lowest and highest loss of several seeds at each, in the last zoom.
    """
    for i, (lrs, losses) in enumerate(zooms):
        if len(lrs) != len(losses):
            raise ValueError(
                f"Zoom {i + 1} has {len(lrs)} learning rates, but {len(losses)} losses: give equal numbers."
            )
    curves = [finite(zip(lrs, losses, strict=True), positive=True) for lrs, losses in zooms]
    x = _rate_axis([p[0] for c in curves for p in c], suggestion, width)
    y = _loss_axis([p[1] for c in curves for p in c], top=_divergence(curves))
    clip, clipped = clip_path((curves, x, y), x.start, TOP, x.end, BOTTOM)
    parts = [
        frame(x, y, "learning rate", f"loss, nats per {unit}", lambda ticks: list(map(power, ticks))),
        clip,
        f'<g clip-path="{clipped}">',
        _band_path(band, x, y) if band else "",
        *(line_path(curve, x, y, "cg-zoom", _shade(i, len(curves))) for i, curve in enumerate(curves)),
        _steepest_path(curves, steepest, x, y),
        "</g>",
    ]
    more = [BAND_ENTRY] if band else []
    key, height = _key([*_zoom_entries(len(curves)), *more], x) if any(curves) else _no_data(x)
    if suggestion is not None and x.low <= suggestion <= x.high:
        parts.append(_guide(x(suggestion), BOTTOM, f"{suggestion:.3g}", f"suggested ({method})", width))
    best = "no suggestion yet" if suggestion is None else f"suggested learning rate {suggestion:.3g} ({method})"
    description = f"Loss against learning rate on a log axis in {len(curves)} zooms; {best}."
    return figure(width, height, "".join([*parts, key]), name="Learning-rate search", description=description)


def loss_plot(
    train: Sequence[tuple[float, float]],
    validation: Sequence[tuple[float, float]],
    *,
    x_label: str = "step",
    x_range: tuple[float, float] | None = None,
    width: float = WIDTH,
    unit: str = "character",
) -> str:
    """Plot training and validation losses as a self-contained SVG, in nats on the left and bits on the right.

    Points that are not finite are omitted. Many training points are plotted faintly, with their moving average on top.

    Args:
        train: (x, loss) pairs, losses in nats per unit.
        validation: the same for the validation set.
        x_label: name of the x axis.
        x_range: lowest and highest x of the axis; None: of the points.
        width: in pixels.
        unit: what a token is, 'character' or 'byte'.
    """
    seen, held = (sorted(finite(points), key=lambda p: p[0]) for points in (train, validation))
    x = Axis(*(x_range or span([p[0] for p in (*seen, *held)], (0.0, 1.0))), MARGIN, width - MARGIN)
    y = _loss_axis([p[1] for p in (*seen, *held)])
    many = len(seen) > SMOOTH_FROM
    parts = [
        frame(x, y, x_label, f"loss, nats per {unit}", decimal),
        _bits(y, x, unit),
        line_path(thinned(seen), x, y, "cg-raw") if many else "",
        line_path(thinned(_smoothed(seen)) if many else seen, x, y, "cg-training"),
        line_path(held, x, y, "cg-validation"),
        dots(held, x, y, "cg-dot") if len(held) <= MAX_DOTS else "",
    ]
    key, height = _key(LOSS_ENTRIES, x) if seen or held else _no_data(x)
    description = "Training and validation loss over the run; no validation yet."
    if held:
        at, best = min(held, key=lambda p: p[1])
        bits = best / math.log(2)
        parts.append(_guide(x(at), y(best), f"{best:.3f} nats", f"= {bits:.3f} bits, best validation", width))
        parts.append(dots([(at, best)], x, y, "cg-ring", 3.6))
        description = f"Training and validation loss; best validation {best:.3f} nats ({bits:.3f} bits) per {unit}."
    return figure(width, height, "".join([*parts, key]), name="Training and validation loss", description=description)


def _band_path(band: tuple[Sequence[float], Sequence[float], Sequence[float]], x: Axis, y: Axis) -> str:
    """Return the area between the lowest and the highest losses; points that are not finite are left out."""
    points = [p for p in zip(*band, strict=True) if all(map(math.isfinite, p)) and p[0] > 0]
    edge = [(rate, low) for rate, low, _ in points] + [(rate, high) for rate, _, high in reversed(points)]
    path = "L".join(f"{number(x(rate))} {number(y(min(loss, LIMIT)))}" for rate, loss in edge)
    return f'<path class="cg-band" d="M{path}Z"/>' if len(points) > 1 else ""


def _rate_axis(rates: Sequence[float], suggestion: float | None, width: float) -> Axis:
    shown = [*rates, suggestion] if suggestion is not None and 1 / LIMIT < suggestion < LIMIT else rates
    low, high = span([math.log10(rate) for rate in shown], (-5.0, 0.0))
    return Axis(10.0**low, 10.0**high, MARGIN, width - MARGIN, log=True)


def _divergence(curves: Sequence[Sequence[tuple[float, float]]]) -> float:
    """Return the loss above which training counts as diverged; the axis ends there."""
    first = [curve[0][1] for curve in curves if curve]
    if not first:
        return math.inf
    start, least = float(np.median(first)), min(p[1] for curve in curves for p in curve)
    return start + max(0.5 * (start - least), 0.05 * abs(start))


def _loss_axis(losses: Sequence[float], top: float = math.inf) -> Axis:
    low, high = span([min(loss, top) for loss in losses], (0.0, 5.0))
    pad = 0.06 * (high - low)
    return Axis(low - pad, high + pad, BOTTOM, TOP)


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the centred moving average over 1/40 of the points; over fewer near the ends."""
    total = np.concatenate([[0.0], np.cumsum([p[1] for p in points])])
    i = np.arange(len(points))
    half = np.minimum(np.minimum(i, i[::-1]), len(points) // 80)
    mean = (total[i + half + 1] - total[i - half]) / (2 * half + 1)
    return [(x, float(m)) for (x, _), m in zip(points, mean, strict=True)]


def _bits(y: Axis, x: Axis, unit: str) -> str:
    """Return the right axis: the nats of the left one in bits."""
    bits = Axis(y.low / math.log(2), y.high / math.log(2), y.start, y.end)
    ticks = bits.ticks(7)
    labels = [label(x.end + 8, bits(t) + 4, text) for t, text in zip(ticks, decimal(ticks), strict=True)]
    return "".join(labels) + label(x.end + MARGIN - 16, 22, f"bits per {unit}", "cg-end")


def _guide(x: float, y: float, value: str, note: str, width: float) -> str:
    """Return a dashed line from a point to the top, labelled with a value and a note."""
    size = text_width(value + note) + 24
    right = x + size > width
    at = max(x + 2, size) if right else x - 2
    text = f'<tspan class="cg-value">{escaped(value)}</tspan> {escaped(note)}'
    return (
        f'<path class="cg-guide" d="M{number(x)} {number(y)}V{TOP - 4:g}"/>'
        f'<text class="cg-label cg-{"end" if right else "start"}" x="{number(at)}" '
        f'y="{TOP - 9:g}">{text}</text>'
    )


def _key(entries: Sequence[Entry], x: Axis) -> tuple[str, float]:
    """Return a legend, and the height of the plot with it."""
    key, last = legend(entries, x.start, HEIGHT - 14, x.end - x.start - 60)
    return key, last + 14


def _no_data(x: Axis) -> tuple[str, float]:
    return label((x.start + x.end) / 2, (TOP + BOTTOM) / 2, "no data yet", "cg-middle"), HEIGHT


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
    return line_path(points, x, y, "cg-path") + dots(points, x, y, "cg-step", 2.6)
