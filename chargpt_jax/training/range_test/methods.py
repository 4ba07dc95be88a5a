"""How a learning rate is chosen from the losses of a zoom. Pure functions of NumPy arrays and floats.

'steepest', 'lowest' and 'balanced' are those of the original. They use only the points whose loss is below all earlier
ones. 'valley' and 'slide' are the rules of fastai (fastai/callback/schedule.py), and use the whole curve.
"""

import math
from collections.abc import Sequence

import numpy as np

Range = tuple[float, float]

SLIDE_INTERVAL = 0.15
"""'slide': length of the interval as a fraction of the steps: 15 of fastai's 100."""

SLIDE_THRESHOLD = 0.005
"""'slide': the rule stops where the slopes at the ends of the interval differ by at most this, in nats per step."""


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


def valley_rate(lrs: Sequence[float], losses: Sequence[float]) -> float:
    """Return the learning rate in the middle of the longest valley (fastai's `valley`).

    The valley is the longest sequence of falling losses, in which other losses may lie between. With L points up to
    the index e, the result is at e - L + floor(L / 3) + floor(L / 6). Losses that are NaN or infinite are left out.
    """
    rates, y = _finite(lrs, losses)
    lengths = np.ones(len(y), int)
    for i in range(1, len(y)):
        lengths[i] += np.max(lengths[:i], initial=0, where=y[:i] > y[i])
    end = int(np.argmax(lengths))
    length = int(lengths[end])
    return float(rates[max(0, end - length + length // 3 + length // 6)])


def slide_rate(lrs: Sequence[float], losses: Sequence[float]) -> float:
    """Return the learning rate before the loss shoots up (fastai's `slide`, by A. Chang).

    An interval slides from the highest learning rate down, until the slopes of the loss at its ends differ by at most
    SLIDE_THRESHOLD. The result is the learning rate at its lower end. Losses that are NaN or infinite are left out.
    """
    rates, y = _finite(lrs, losses)
    slopes, interval = np.gradient(y), min(len(y) - 1, max(1, round(SLIDE_INTERVAL * len(y))))
    right = len(y) - 1
    left = found = right - interval
    while left >= 0 and abs(slopes[right] - slopes[left]) > SLIDE_THRESHOLD:
        found = left
        left, right = left - 1, right - 1
    return float(rates[found])


def _finite(lrs: Sequence[float], losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the points whose loss is finite."""
    rates, y = np.asarray(lrs, float), np.asarray(losses, float)
    return rates[np.isfinite(y)], y[np.isfinite(y)]


def propose(method: str, steepest: float, lowest: float, lrs: Sequence[float], losses: Sequence[float]) -> Range:
    """Return the range that a method proposes: its learning rate twice, or for 'balanced' those of two methods.

    Args:
        method: of `LRFinderConfig`.
        steepest: rate of the steepest descent.
        lowest: rate of the lowest loss.
        lrs: all learning rates of the zoom.
        losses: all losses of the zoom.
    """
    if method == "balanced":
        return steepest, lowest
    if method in ("valley", "slide"):
        rate = (valley_rate if method == "valley" else slide_rate)(lrs, losses)
        return rate, rate
    return {"steepest": (steepest, steepest), "lowest": (lowest, lowest)}[method]


def zoom_in(proposed: Range, current: Range, zoom_factor: float) -> Range:
    """Move each end of the current range towards the proposed one, in log space, by the fraction 1 - zoom_factor."""
    old, new = np.log(current), np.log(proposed)
    low, high = np.exp(old + (1 - zoom_factor) * (new - old))
    return float(low), float(high)


class Average:
    """Exponential moving average of losses, with bias correction as in Adam; `beta` 0 keeps them unchanged.

    s_n = beta s_(n-1) + (1 - beta) loss_n, divided by 1 - beta^n.
    """

    def __init__(self, beta: float) -> None:
        self._beta, self._sum, self._count = beta, 0.0, 0

    def add(self, loss: float) -> float:
        """Return the average up to a loss; one that is NaN or infinite is returned, and left out of the average."""
        if self._beta == 0.0 or not math.isfinite(loss):
            return loss
        self._sum, self._count = self._beta * self._sum + (1 - self._beta) * loss, self._count + 1
        return self._sum / (1 - self._beta**self._count)


def smoothed(losses: Sequence[float], beta: float) -> list[float]:
    """Return the average up to each of the losses."""
    average = Average(beta)
    return [average.add(loss) for loss in losses]


def falling(losses: Sequence[float]) -> list[int]:
    """Return the indices of the points whose loss is below all earlier ones."""
    found: list[int] = []
    for i, loss in enumerate(losses):
        if loss < min((losses[j] for j in found[-1:]), default=float("inf")):
            found.append(i)
    return found
