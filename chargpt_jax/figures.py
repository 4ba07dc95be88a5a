"""The same curves as matplotlib figures, for papers and slides: `pip install "chargpt_jax[plot]"`.

A run draws its SVGs without matplotlib (plots.py); these figures can be restyled, combined, and saved as PDF or PNG.
"""

import math
from pathlib import Path
from typing import Any

from chargpt_jax.config import UserError
from chargpt_jax.lr_finder import result_from
from chargpt_jax.workdir import Workdir


def loss_figure(workdir: str | Path) -> Any:
    """Draw a run's losses against its steps, in nats per character, with bits on the right.

    Returns:
        A matplotlib Figure.
    """
    log = Workdir(workdir).load_metrics()
    figure, axes = _axes("step", "loss, nats per character")
    for event, style in (("step", {"lw": 0.8, "alpha": 0.6}), ("validation", {"marker": "o", "ms": 3})):
        lines = [line for line in log if line["event"] == event]
        label = "training" if event == "step" else event
        axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], label=label, **style)
    bits = axes.secondary_yaxis("right", functions=(lambda x: x / math.log(2), lambda x: x * math.log(2)))
    bits.set_ylabel("bits per character")
    axes.legend(frameon=False)
    return figure


def lr_finder_figure(workdir: str | Path) -> Any:
    """Draw a run's range test: a curve a zoom, the later the darker, and the rate that was proposed.

    Returns:
        A matplotlib Figure.
    """
    folder = Workdir(workdir)
    try:
        result = result_from(folder.load_json(folder.lr_finder))
    except ValueError as error:
        raise UserError(
            f"{folder.lr_finder} cannot be drawn ({error}): run --mode=find_lr in a new --workdir."
        ) from None
    figure, axes = _axes("learning rate", "loss, nats per character")
    axes.set_xscale("log")
    for i, zoom in enumerate(result.zooms, start=1):
        axes.plot(zoom.lrs, zoom.losses, color="black", alpha=i / len(result.zooms), lw=1)
    rate = result.learning_rate
    axes.axvline(rate, ls="--", color="tab:red", label=f"{rate:.2e} ({result.method})")
    axes.legend(frameon=False)
    return figure


def _axes(x_label: str, y_label: str) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('Figures need matplotlib: pip install "chargpt_jax[plot]".') from None
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
