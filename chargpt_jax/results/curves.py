"""The range test and the training of a run as plots and curves."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from chargpt_jax.events import LRFinderResult
from chargpt_jax.pictures.plots.axes import WIDTH
from chargpt_jax.pictures.plots.curves import Curve
from chargpt_jax.pictures.plots.losses import lr_finder_plot


def range_test_plot(result: LRFinderResult, width: float = WIDTH, unit: str = "character") -> str:
    """Plot the result of a range test, as SVG of a width in pixels; unit: 'character' or 'byte'."""
    zooms = [(zoom.lrs, zoom.losses) for zoom in result.zooms]
    steepest = [zoom.steepest for zoom in result.zooms]
    last = result.zooms[-1] if result.zooms else None
    band = (last.lrs, last.lowest_losses, last.highest_losses) if last and last.lowest_losses else None
    return lr_finder_plot(zooms, steepest, result.learning_rate, result.method, width=width, unit=unit, band=band)


def training_curves(log: Sequence[Mapping[str, Any]], tokens_per_step: int) -> list[Curve]:
    """Return what the lines of metrics.jsonl say about training, over its steps."""
    return [
        Curve("training loss", "nats", _points(log, "step", "loss"), 4),
        Curve("validation loss", "nats", _points(log, "validation", "loss"), 4),
        Curve("learning rate", "", _points(log, "step", "learning_rate")),
        Curve("gradient norm", "", _points(log, "step", "grad_norm")),
        Curve("throughput", "tokens/s", tuple(_throughput(log, tokens_per_step))),
    ]


def _points(log: Sequence[Mapping[str, Any]], event: str, name: str) -> tuple[tuple[int, float], ...]:
    found = {line["step"]: float(line[name]) for line in log if line["event"] == event and _is_number(line.get(name))}
    return tuple(sorted(found.items()))


def _throughput(log: Sequence[Mapping[str, Any]], tokens_per_step: int) -> list[tuple[int, float]]:
    """Return the training speed between consecutive lines; a validation's line ends the time that it took."""
    timed = sorted(
        (line["step"], line["event"] == "validation", line["seconds"])
        for line in log
        if _is_number(line.get("seconds"))
    )
    return [
        (step, (step - before) * tokens_per_step / (seconds - start))
        for (before, _, start), (step, validated, seconds) in itertools.pairwise(timed)
        if not validated and step > before and seconds > start
    ]


def _is_number(value: object) -> bool:
    return type(value) in (int, float)
