"""The curves of a run from the lines of its log."""

import pytest

from chargpt_jax.results.curves import training_curves

LOG = [
    {"event": "step", "step": 10, "loss": 4.0, "learning_rate": 0.1, "grad_norm": 1.0, "seconds": 2.0},
    {"event": "step", "step": 20, "loss": 3.0, "learning_rate": 0.2, "grad_norm": 0.5, "seconds": 4.0},
    {"event": "validation", "step": 20, "loss": 3.5, "bits_per_character": 5.0, "seconds": 9.0},
    {"event": "step", "step": 30, "loss": 2.0, "learning_rate": 0.1, "grad_norm": None, "seconds": 11.0},
]


def test_each_curve_has_its_name_from_the_log():
    found = {curve.name: curve.points for curve in training_curves(LOG, 100)}
    assert found["training loss"] == ((10, 4.0), (20, 3.0), (30, 2.0))
    assert found["validation loss"] == ((20, 3.5),)
    assert found["learning rate"] == ((10, 0.1), (20, 0.2), (30, 0.1))
    assert found["gradient norm"] == ((10, 1.0), (20, 0.5)), "a value that is not a number is left out"


def test_throughput_leaves_out_the_time_of_validations():
    (speed,) = [curve for curve in training_curves(LOG, 100) if curve.name == "throughput"]
    assert speed.points == ((20, pytest.approx(500.0)), (30, pytest.approx(500.0)))


def test_log_of_a_resumed_run_gives_one_point_per_step():
    again = [*LOG, {**LOG[1], "loss": 2.5}]
    assert dict(training_curves(again, 100)[0].points) == {10: 4.0, 20: 2.5, 30: 2.0}


def test_empty_log_gives_empty_curves():
    assert all(curve.points == () for curve in training_curves([], 100))
