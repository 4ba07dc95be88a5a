"""The multi-zoom learning-rate range test (after Smith 2017, "Cyclical Learning Rates"), as events and a typed result.

Each zoom trains a few steps from the initial parameters, with a new optimizer state and increasing learning rates,
and narrows the range for the next zoom around the rates at which the loss fell. With several seeds it does so for
each of them, and uses the mean of their losses. The search does not use JAX: a function returns the losses at a zoom's
learning rates, so tests can use any loss.
"""

import dataclasses
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from chargpt_jax.config import LRFinderConfig
from chargpt_jax.events import LRFinderResult, LRFinderStep, Zoom
from chargpt_jax.training.range_test.methods import (
    Average,
    Range,
    falling,
    log_spaced,
    lowest_rate,
    propose,
    smoothed,
    steepest_rate,
    zoom_in,
)
from chargpt_jax.training.range_test.verdict import check_falls, check_seeds

LossesOf = Callable[[int, Sequence[float]], Iterable[float]]
"""(zoom, rates) -> the loss in nats before each training step, made one after the other from the initial state."""

State = TypeVar("State")


@dataclasses.dataclass(frozen=True)
class Curve:
    """The losses of a zoom."""

    rates: list[float]
    losses: list[float]
    """Nats per character: the mean over the seeds, smoothed."""
    seeds: list[list[float]]
    """Those of each seed, smoothed."""

    def falling(self) -> list[int]:
        """Return the indices of the points whose loss is below all earlier ones."""
        return falling(self.losses)


def search(
    losses_of: LossesOf, config: LRFinderConfig, others: Sequence[LossesOf] = ()
) -> Iterator[LRFinderStep | Zoom | LRFinderResult]:
    """Run the range test; the last event is its result.

    Args:
        losses_of: of the first seed.
        config: of the range test.
        others: of the further seeds.

    Raises:
        NoClearAnswer: if no zoom had two points of falling loss, or the falls of the seeds differ too much.
    """
    span, lowest, zooms, seen = (config.start_lr, config.end_lr), float("inf"), [], list[float]()
    for number in range(config.num_zooms):
        curve = yield from _curve(number, span, [losses_of, *others], config)
        seen += curve.losses
        points = curve.falling()
        if len(points) < 2:
            continue
        lrs, losses = ([values[i] for i in points] for values in (curve.rates, curve.losses))
        steepest, lowest = steepest_rate(lrs, losses), min(lowest, lowest_rate(lrs, losses))
        proposed = propose(config.method, steepest, lowest, curve.rates, curve.losses)
        best = float(np.mean(proposed))
        zoom = Zoom(number + 1, *span, tuple(lrs), tuple(losses), steepest, lowest, best, config.method)
        zooms.append(_with_seeds(zoom, curve, points) if others else zoom)
        yield zooms[-1]
        span = zoom_in(proposed, span, config.zoom_factor)
    check_falls(zooms, seen, config)
    check_seeds(zooms[-1], config)
    yield LRFinderResult(zooms[-1].best, config.method, config.start_lr, config.end_lr, tuple(zooms), 1 + len(others))


def _curve(
    number: int, span: Range, seeds: Sequence[LossesOf], config: LRFinderConfig
) -> Generator[LRFinderStep, None, Curve]:
    """Train in one zoom with each seed."""
    rates, total = log_spaced(span, config.steps_per_zoom).tolist(), config.num_zooms * config.steps_per_zoom
    found = []
    for seed, losses_of in enumerate(seeds):
        losses, average, lowest = list[float](), Average(config.smoothing), math.inf
        for step, (rate, loss) in enumerate(zip(rates, losses_of(number, rates), strict=True)):
            done = (number * len(seeds) + seed) * config.steps_per_zoom + step + 1
            yield LRFinderStep(done, total * len(seeds), number + 1, rate, loss, seed)
            losses.append(loss)
            lowest = min(lowest, now) if math.isfinite(now := average.add(loss)) else lowest
            if config.stop_factor is not None and not now <= config.stop_factor * lowest < math.inf:
                break  # the loss has diverged
        found.append(losses)
    count = min(map(len, found))
    mean = found[0] if len(found) == 1 else [sum(losses) / len(found) for losses in zip(*found, strict=False)]
    each = [smoothed(losses[:count], config.smoothing) for losses in found]
    return Curve(rates[:count], smoothed(mean[:count], config.smoothing), each)


def _with_seeds(zoom: Zoom, curve: Curve, points: Sequence[int]) -> Zoom:
    """Return a zoom with what its seeds say: the band of their losses, their falls, and the rate that each proposes."""
    band = np.array([[losses[i] for i in points] for losses in curve.seeds])
    rates = [rate for losses in curve.seeds if (rate := _proposed(zoom.method, curve.rates, losses)) is not None]
    return dataclasses.replace(
        zoom,
        lowest_losses=tuple(band.min(axis=0).tolist()),
        highest_losses=tuple(band.max(axis=0).tolist()),
        seed_falls=tuple((band[:, 0] - band[:, -1]).tolist()),
        seed_rates=tuple(rates),
    )


def _proposed(method: str, rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """Return the learning rate that a method proposes for the losses of one seed; None if they do not fall."""
    points = falling(losses)
    if len(points) < 2:
        return None
    lrs, below = [rates[i] for i in points], [losses[i] for i in points]
    ends = propose(method, steepest_rate(lrs, below), lowest_rate(lrs, below), rates, losses)
    return float(np.mean(ends))


def trainer_losses(
    start: Callable[[int], State], train: Callable[[State, Sequence[float]], tuple[State, np.ndarray]]
) -> LossesOf:
    """Return the loss function of a real model.

    Args:
        start: zoom -> the initial state with a new optimizer state; its batches continue after those of the last zoom.
        train: (state, rates) -> (new state, losses): one dispatch of at least one step with the first of the learning
            rates, and the loss before each step.
    """

    def losses_of(zoom: int, rates: Sequence[float]) -> Iterator[float]:
        state, done = start(zoom), 0
        while done < len(rates):
            state, losses = train(state, rates[done:])
            done += len(losses)
            yield from map(float, losses)

    return losses_of
