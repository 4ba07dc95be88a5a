import signal

import pytest

from chargpt_jax.training.dispatch.pacing import StopCondition
from tests.process_group import Group


@pytest.mark.parametrize("reached_by", range(3))
def test_stop_condition_counts_a_signal_to_any_process(monkeypatch, reached_by):
    def stopped(index: int) -> tuple[bool, int | None, bool]:
        condition = StopCondition(lambda: signal.SIGTERM if index == reached_by else None)
        return condition.reached(), condition.signal, condition.out_of_time

    assert Group(3, monkeypatch).results(stopped) == [(True, signal.SIGTERM, False)] * 3


@pytest.mark.parametrize("limited", range(3))
def test_stop_condition_uses_the_clock_of_process_0(monkeypatch, limited):
    def stopped(index: int) -> tuple[bool, int | None, bool]:
        condition = StopCondition(lambda: None, 1e-6 if index == limited else 60.0)
        return condition.reached(), condition.signal, condition.out_of_time

    assert Group(3, monkeypatch).results(stopped) == [(limited == 0, None, limited == 0)] * 3


def test_stop_condition_stays_reached_in_every_process(monkeypatch):
    def stopped(index: int) -> list[bool]:
        signals = iter([None, 2] if index else [None] * 9)
        condition = StopCondition(lambda: next(signals))
        return [condition.reached() for _ in range(4)]

    assert Group(2, monkeypatch).results(stopped) == [[False, True, True, True]] * 2
