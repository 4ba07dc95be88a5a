"""The grid of a sweep, and the configs that a sweep refuses."""

import pytest

from chargpt_jax.config import Config
from chargpt_jax.config.saved import as_saved, flatten, from_dict
from chargpt_jax.errors import UserError
from chargpt_jax.lab.grid import Member, check, config_of, members


def config(rates=(), seeds=2, seed=5):
    found = Config()
    found.sweep.learning_rates, found.sweep.seeds, found.seed = rates, seeds, seed
    return found


def test_every_rate_has_every_seed_from_the_configs_seed_on():
    runs = members(config((1e-2, 1e-3)))
    assert runs == (Member(5, 1e-2), Member(6, 1e-2), Member(5, 1e-3), Member(6, 1e-3))


def test_without_rates_a_sweep_has_that_of_the_optimizer():
    found = config()
    found.optimizer.learning_rate = 3e-3
    assert members(found) == (Member(5, 3e-3), Member(6, 3e-3))


def test_a_runs_config_differs_from_the_defaults_in_seed_and_rate_only():
    found = flatten(config_of(config((1e-2,)), Member(6, 1e-2)))
    assert {name for name, value in flatten(Config()).items() if value != found[name]} == {
        "seed",
        "optimizer.learning_rate",
    }


def test_the_section_is_saved_only_if_it_is_used():
    assert "sweep" not in as_saved(Config())
    saved = as_saved(config((1e-2,)))
    assert saved["sweep"] == {"seeds": 2, "learning_rates": (1e-2,)}
    assert from_dict(saved).sweep.learning_rates == (1e-2,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give --config.sweep.learning_rates"),
        ({"sweep.learning_rates": (1e-2, 1e-2)}, "has 0.01 twice"),
        ({"sweep.learning_rates": (1e-2, 1e-3), "sweep.seeds": 1000}, "makes 2,000 runs"),
        ({"sweep.learning_rates": (1e-2,), "seed": 2**31 - 2, "sweep.seeds": 3}, "the last seed must be at most"),
    ],
)
def test_members_refuses_an_impossible_grid(changes, message):
    found = Config()
    for path, value in changes.items():
        section, _, name = path.rpartition(".")
        setattr(getattr(found, section) if section else found, name, value)
    with pytest.raises(UserError, match=message):
        members(found)


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("mesh", "fsdp", 2, "gives each device whole runs"),
        ("train", "stream", "always", "keeps its training set on the devices"),
        ("ancestor", "random_validation", True, "full validation set"),
        ("scheduler", "minutes", 2.0, "scheduler.minutes is 2, but the length"),
    ],
)
def test_check_refuses_what_a_sweep_does_not_do(section, name, value, message):
    found = config((1e-2,))
    check(found)
    setattr(getattr(found, section), name, value)
    with pytest.raises(UserError, match=message):
        check(found)
