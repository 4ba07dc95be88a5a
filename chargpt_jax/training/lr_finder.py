"""The multi-zoom learning-rate range test (after Smith 2017, "Cyclical Learning Rates"), as events and a typed result.

Each zoom trains a few steps from the initial parameters, with a new optimizer state and increasing learning rates,
and narrows the range for the next zoom around the rates at which the loss fell. The search does not use JAX: a function
returns the losses at a zoom's learning rates, so tests can use any loss.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from chargpt_jax.config import LRFinderConfig
from chargpt_jax.errors import UserError
from chargpt_jax.events import LRFinderResult, LRFinderStep, Zoom

LossesOf = Callable[[int, Sequence[float]], Iterable[float]]
"""(zoom, rates) -> the loss in nats before each training step, made one after the other from the initial state."""

Range = tuple[float, float]

State = TypeVar("State")

CLEAR_FALL = 0.1
"""A fall by at most this fraction of a zoom's first loss is not clear: its batches may explain it."""

CLEAR_FACTOR = 4.0
"""A fall must also exceed the differences between the first losses of the zooms by this factor.

The model is the same initial one at each of these losses, so they differ by their batches alone.
"""


def search(losses_of: LossesOf, config: LRFinderConfig) -> Iterator[LRFinderStep | Zoom | LRFinderResult]:
    """Run the range test; the last event is its result.

    Raises:
        UserError: if no zoom had two points of falling loss.
    """
    span, lowest, zooms = (config.start_lr, config.end_lr), float("inf"), []
    for number in range(config.num_zooms):
        lrs: list[float] = []
        losses: list[float] = []
        rates = log_spaced(span, config.steps_per_zoom).tolist()
        for step, (rate, loss) in enumerate(zip(rates, losses_of(number, rates), strict=True)):
            done = number * config.steps_per_zoom + step + 1
            yield LRFinderStep(done, config.num_zooms * config.steps_per_zoom, number + 1, rate, loss)
            if loss < min(losses, default=float("inf")):
                lrs.append(rate)
                losses.append(loss)
        if len(lrs) < 2:
            continue
        steepest, lowest = steepest_rate(lrs, losses), min(lowest, lowest_rate(lrs, losses))
        proposed = propose(config.method, steepest, lowest)
        best = float(np.mean(proposed))
        zooms.append(Zoom(number + 1, *span, tuple(lrs), tuple(losses), steepest, lowest, best, config.method))
        yield zooms[-1]
        span = zoom_in(proposed, span, config.zoom_factor)
    if not zooms:
        raise UserError(
            f"No learning rate between {config.start_lr:g} and {config.end_lr:g} lowers the loss: widen "
            "lr_finder.start_lr and end_lr, or set optimizer.learning_rate."
        )
    yield LRFinderResult(zooms[-1].best, config.method, config.start_lr, config.end_lr, tuple(zooms))


def fall(zoom: Zoom) -> float:
    """Return how far the loss fell in a zoom, nats per character."""
    return zoom.losses[0] - zoom.losses[-1]


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
        UserError: if differences between batches explain half of the fall or more: it then proposes no rate.
    """
    rates = log_spaced((zoom.low, zoom.high), config.steps_per_zoom)
    last = int(np.argmin(np.abs(np.log(rates) - np.log(zoom.lrs[-1]))))
    learned = untrained[last] - zoom.losses[-1]
    if not learned > fall(zoom) / 2:
        raise UserError(
            f"The range test from {config.start_lr:g} to {config.end_lr:g} shows no descent (in zoom {zoom.number} the "
            f"loss falls by {fall(zoom):.3f} nats, and training accounts for {learned:.3f} of it): choose "
            "other lr_finder.start_lr and end_lr, raise data.batch_size or lr_finder.steps_per_zoom, or set "
            "optimizer.learning_rate."
        )


def lowest_at_the_end(result: LRFinderResult) -> bool:
    """Return whether a zoom has its lowest loss at the highest learning rate of the test."""
    return any(zoom.lrs[-1] >= result.end_lr * (1 - 1e-9) for zoom in result.zooms)


def result_from(saved: Any) -> LRFinderResult:
    """Return the range test's result from the content of lr_finder.json.

    Raises:
        ValueError: if the content is invalid: the file is untrusted input.
    """
    try:
        zooms = tuple(_zoom_from(**{**zoom, "method": saved["method"]}) for zoom in saved["zooms"])
        rate, start_lr, end_lr = (_number(saved[name]) for name in ("learning_rate", "start_lr", "end_lr"))
        if saved["method"] not in ("steepest", "lowest", "balanced"):
            raise ValueError("it has no valid method")
        return LRFinderResult(rate, saved["method"], start_lr, end_lr, zooms)
    except (TypeError, LookupError) as error:
        raise ValueError(f"it is not the result of a range test: {type(error).__name__}") from None


def _zoom_from(*, number: int, lrs: Sequence[float], losses: Sequence[float], method: str, **rates: float) -> Zoom:
    if type(number) is not int or not isinstance(lrs, list) or not isinstance(losses, list) or len(lrs) != len(losses):
        raise ValueError("a zoom must have as many losses as learning rates")
    rates = {name: _number(rate) for name, rate in rates.items()}
    return Zoom(number=number, lrs=tuple(map(_number, lrs)), losses=tuple(map(_number, losses)), method=method, **rates)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e30:
        raise ValueError("a learning rate or loss must be a number of at least 0")
    return float(value)


def log_spaced(span: Range, count: int) -> np.ndarray:
    """Return `count` learning rates, evenly spaced over a range in log space; float64 [count]."""
    return np.exp(np.linspace(np.log(span[0]), np.log(span[1]), count))


def steepest_rate(lrs: Sequence[float], losses: Sequence[float]) -> float:
    """Return the learning rate of the steepest descent: a weighted mean, in log space, of the midpoints.

    With g the successive differences of the losses, the weights are max(0, -(g - max g)). If all are 0 (two points, or
    equal differences), the result is the geometric mean of the ends.
    """
    logs, falls = np.log(lrs), np.diff(losses)
    weights = np.maximum(0, -(falls - falls.max()))
    if weights.sum() > 0:
        return float(np.exp(np.average((logs[1:] + logs[:-1]) / 2, weights=weights)))
    return float(np.exp((logs[0] + logs[-1]) / 2))


def lowest_rate(lrs: Sequence[float], losses: Sequence[float]) -> float:
    """Return the learning rate at the lowest loss."""
    return float(lrs[int(np.argmin(losses))])


def propose(method: str, steepest: float, lowest: float) -> Range:
    """Return the range that a method proposes: its learning rate twice, or for 'balanced' those of both methods."""
    return {"steepest": (steepest, steepest), "lowest": (lowest, lowest), "balanced": (steepest, lowest)}[method]


def zoom_in(proposed: Range, current: Range, zoom_factor: float) -> Range:
    """Move each end of the current range towards the proposed one, in log space, by the fraction 1 - zoom_factor."""
    old, new = np.log(current), np.log(proposed)
    low, high = np.exp(old + (1 - zoom_factor) * (new - old))
    return float(low), float(high)


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
