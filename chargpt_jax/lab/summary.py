"""What the runs of a sweep have reached: a row and a curve with its interval for each learning rate.

The interval is that of the mean over seeds, mean +- t s / sqrt(n), with the standard deviation s of n runs and the
97.5 % quantile t of Student's t with n - 1 degrees of freedom. Runs that diverged are counted, and left out.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from chargpt_jax.events import SweepRow
from chargpt_jax.lab.grid import Member
from chargpt_jax.pictures.plots.bands import Band

T_975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
"""The 97.5 % quantile of Student's t with 1, 2, ... degrees of freedom."""


def t_975(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t; from 31 degrees on by the first terms of its expansion."""
    if degrees <= len(T_975):
        return T_975[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def interval(values: np.ndarray) -> tuple[float, float, float, float]:
    """Return mean, standard deviation (n - 1), and the 95 % interval of the mean; NaN where there are too few values.

    Args:
        values: float [n].
    """
    if not len(values):
        return (math.nan,) * 4
    mean = float(np.mean(values))
    if len(values) == 1:
        return mean, math.nan, math.nan, math.nan
    deviation = float(np.std(values, ddof=1))
    half = t_975(len(values) - 1) * deviation / math.sqrt(len(values))
    return mean, deviation, mean - half, mean + half


def by_rate(members: Sequence[Member]) -> dict[float, list[int]]:
    """Return the indices of the runs of each learning rate, in the order of the runs."""
    found: dict[float, list[int]] = {}
    for i, member in enumerate(members):
        found.setdefault(member.learning_rate, []).append(i)
    return found


def rows(members: Sequence[Member], losses: np.ndarray, diverged: np.ndarray) -> tuple[SweepRow, ...]:
    """Return a row per learning rate.

    Args:
        members: the K runs.
        losses: float [K], nats.
        diverged: int [K], 0 for a run that did not diverge.
    """
    found = []
    for rate, indices in by_rate(members).items():
        good = [i for i in indices if not diverged[i] and math.isfinite(losses[i])]
        best = min(good, key=lambda i: losses[i], default=None)
        mean, deviation, low, high = interval(losses[good])
        lowest, seed = (math.nan, None) if best is None else (float(losses[best]), members[best].seed)
        bad = len(indices) - len(good)
        found.append(SweepRow(rate, len(good), bad, mean, deviation, low, high, lowest, seed))
    return tuple(found)


def bands(members: Sequence[Member], log: Sequence[Mapping[str, Any]], diverged: np.ndarray) -> list[Band]:
    """Return the validation loss over the steps, with its interval, of each learning rate.

    Args:
        members: the K runs.
        log: the lines of a sweep's log.
        diverged: int [K], 0 for a run that did not diverge.
    """
    lines = [line for line in log if line["event"] == "sweep_validation"]
    found = []
    for rate, indices in by_rate(members).items():
        good = [i for i in indices if not diverged[i]]
        points = []
        for line in lines if good else []:
            mean, _, low, high = interval(np.array([line["losses"][i] for i in good], float))
            points.append((float(line["step"]), mean, low, high))
        note = f", {len(indices) - len(good)} diverged" if good else ": all runs diverged"
        found.append(Band(f"{rate:g}{note if len(good) < len(indices) else ''}", tuple(points)))
    return found
