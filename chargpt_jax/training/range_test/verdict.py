"""Whether a range test has a clear answer. If it has none, `NoClearAnswer` says why, and what to do."""

from collections.abc import Sequence

import numpy as np

from chargpt_jax.config import LRFinderConfig
from chargpt_jax.errors import NoClearAnswer
from chargpt_jax.events import LRFinderResult, Zoom
from chargpt_jax.training.range_test.methods import log_spaced

CLEAR_FALL = 0.1
"""A fall by at most this fraction of a zoom's first loss is not clear: its batches may explain it."""

CLEAR_FACTOR = 4.0
"""A fall must also exceed the differences between the first losses of the zooms by this factor.

The model is the same initial one at each of these losses, so they differ by their batches alone.
"""


def fall(zoom: Zoom) -> float:
    """Return how far the loss fell in a zoom, nats per character."""
    return zoom.losses[0] - zoom.losses[-1]


def check_falls(zooms: Sequence[Zoom], losses: Sequence[float], config: LRFinderConfig) -> None:
    """Check that the loss fell in a zoom.

    Args:
        zooms: those with two points of falling loss.
        losses: of all steps.
        config: of the range test.

    Raises:
        NoClearAnswer: if there is no such zoom.
    """
    if zooms:
        return
    finite = bool(np.isfinite(losses).any())
    why = "" if finite else "all losses are NaN or infinite, and "
    raise NoClearAnswer(
        f"No clear answer: {why}no learning rate between {config.start_lr:g} and {config.end_lr:g} lowers the loss: "
        "widen lr_finder.start_lr and end_lr, or set optimizer.learning_rate.",
        "no fall" if finite else "not finite",
    )


def check_seeds(zoom: Zoom, config: LRFinderConfig) -> None:
    """Check that the seeds agree that the loss falls: by more, in the mean, than their falls differ.

    Args:
        zoom: that proposes the learning rate.
        config: of the range test.

    Raises:
        NoClearAnswer: if the standard deviation of the falls is their mean or more.
    """
    if len(zoom.seed_falls) < 2:
        return
    mean, deviation = float(np.mean(zoom.seed_falls)), float(np.std(zoom.seed_falls, ddof=1))
    if not mean > deviation:
        raise NoClearAnswer(
            f"No clear answer: in the range test from {config.start_lr:g} to {config.end_lr:g} the loss falls by "
            f"{mean:.3f} nats in the mean of {config.seeds} seeds, and by {deviation:.3f} more or less in one of them: "
            "raise lr_finder.seeds, data.batch_size or lr_finder.steps_per_zoom, or set optimizer.learning_rate.",
            "seeds",
        )


def unclear(result: LRFinderResult) -> Zoom | None:
    """Return the zoom that proposes the learning rate if its batches could explain its fall; None if it is clear."""
    firsts, zoom = [zoom.losses[0] for zoom in result.zooms], result.zooms[-1]
    by_batches = max(CLEAR_FALL * zoom.losses[0], CLEAR_FACTOR * (max(firsts) - min(firsts)))
    return None if len(firsts) > 2 and fall(zoom) > by_batches else zoom


def check_descent(zoom: Zoom, untrained: Sequence[float], config: LRFinderConfig) -> None:
    """Check that training lowered the loss in a zoom: more than its last batch would have without training.

    Args:
        zoom: that proposes the learning rate.
        untrained: the losses of the initial model on all batches of the zoom. On the same batch, the loss differs from
            these by training alone.
        config: of the range test.

    Raises:
        NoClearAnswer: if differences between batches explain half of the fall or more: it then proposes no rate.
    """
    rates = log_spaced((zoom.low, zoom.high), config.steps_per_zoom)
    last = int(np.argmin(np.abs(np.log(rates) - np.log(zoom.lrs[-1]))))
    learned = untrained[last] - zoom.losses[-1]
    if not learned > fall(zoom) / 2:
        raise NoClearAnswer(
            f"No clear answer: the range test from {config.start_lr:g} to {config.end_lr:g} shows no descent (in zoom "
            f"{zoom.number} the loss falls by {fall(zoom):.3f} nats, and training accounts for {learned:.3f} of it): "
            "choose other lr_finder.start_lr and end_lr, raise data.batch_size or lr_finder.steps_per_zoom, or set "
            "optimizer.learning_rate.",
            "batches",
        )


def lowest_at_the_end(result: LRFinderResult) -> bool:
    """Return whether a zoom has its lowest loss at the highest learning rate of the test."""
    return any(zoom.lrs[-1] >= result.end_lr * (1 - 1e-9) for zoom in result.zooms)
