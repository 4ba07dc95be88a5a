"""Means, intervals and bands of a sweep; diverged runs are left out."""

import math

import numpy as np
import pytest

from chargpt_jax.events import SweepValidated
from chargpt_jax.lab.grid import Member
from chargpt_jax.lab.summary import bands, interval, rows, t_975
from chargpt_jax.lab.text import sweep_table

RUNS = (Member(0, 1e-2), Member(1, 1e-2), Member(2, 1e-2), Member(0, 1e-1), Member(1, 1e-1))


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706), (7, 2.365), (15, 2.131), (40, 2.0211), (200, 1.9719)])
def test_t_quantiles_are_those_of_the_tables(degrees, quantile):
    assert t_975(degrees) == pytest.approx(quantile, abs=6e-4)


def test_interval_of_the_mean():
    mean, deviation, low, high = interval(np.array([1.0, 2.0, 3.0]))
    assert (mean, deviation) == (2.0, 1.0)
    assert high - mean == pytest.approx(4.3027 / math.sqrt(3))
    assert mean - low == pytest.approx(high - mean)
    assert math.isnan(interval(np.array([1.0]))[2])
    assert math.isnan(interval(np.array([]))[0])


def test_interval_covers_the_mean_in_95_percent_of_draws():
    draws = np.random.default_rng(0).normal(size=(4000, 5))
    covered = np.mean([low <= 0 <= high for _, _, low, high in map(interval, draws)])
    assert covered == pytest.approx(0.95, abs=0.012)


def test_rows_leave_diverged_runs_out():
    first, second = rows(RUNS, np.array([1.0, np.nan, 3.0, np.nan, np.inf]), np.array([0, 7, 0, 3, 9]))
    assert (first.runs, first.diverged, first.mean, first.best, first.best_seed) == (2, 1, 2.0, 1.0, 0)
    assert (second.runs, second.diverged, second.best_seed) == (0, 2, None)
    assert math.isnan(second.mean)


def test_bands_leave_diverged_runs_out_at_every_step():
    log = [
        {"event": "sweep_validation", "step": 5, "losses": [1.0, 100.0, 3.0, 2.0, None]},
        {"event": "sweep_step", "step": 6, "losses": [0.0] * 5},
        {"event": "sweep_validation", "step": 10, "losses": [1.0, None, 2.0, None, None]},
    ]
    first, second = bands(RUNS, log, np.array([0, 7, 0, 8, 3]))
    assert [(x, mean) for x, mean, *_ in first.points] == [(5, 2.0), (10, 1.5)]
    assert first.name == "0.01, 1 diverged"
    assert (second.name, second.points) == ("0.1: all runs diverged", ())


def test_the_table_fits_into_80_columns():
    found = rows(RUNS, np.array([1.0, 2.0, 3.0, np.nan, np.nan]), np.array([0, 0, 0, 3, 9]))
    table = sweep_table(SweepValidated(10, 0.5, (), found, 1.0, True))
    header, first, second = table.splitlines()
    assert max(map(len, table.splitlines())) <= 80
    assert header.split()[:3] == ["rate", "runs", "mean,"]
    assert first.split()[:3] == ["0.01", "3", "2.0000"]
    assert second.split()[:5] == ["0.1", "0", "of", "2", "-"]
