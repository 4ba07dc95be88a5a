"""configs/sized.py: one number sets the sizes of a model and how it is trained."""

import dataclasses

import numpy as np
import pytest

from chargpt_jax.config import Config, validate
from chargpt_jax.config.files import load_config
from chargpt_jax.config.saved import flatten
from chargpt_jax.model.init import abstract_model, count_parameters
from chargpt_jax.ops.plain import Ops
from configs import sized

SIZES = (0.05, 0.07, 0.1, 0.15, 0.25, 0.3, 0.5, 1.0, 1.3, 1.9, 3.0, 6.0, 10.0, 30.0, 100.0)
DIAL = [f"{size:.4g}" for size in np.geomspace(0.05, 100, 200)]


def parameters(config: Config) -> int:
    """Count without computing: 96 characters and padding, in a table of a multiple of 64."""
    model = dataclasses.replace(config.model, vocab_size=128, used_ids=97)
    return count_parameters(abstract_model(model, Ops())[1])


@pytest.mark.parametrize("size", SIZES)
def test_number_of_parameters_is_the_size(size):
    assert parameters(load_config(f"sized:{size}")) == pytest.approx(1e6 * size, rel=0.05)


@pytest.mark.parametrize("layers", [-1, 1, 2])
@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_other_numbers_of_layers_have_the_same_size(size, layers):
    config = sized.config_of(size, sized.depth(size) + layers)
    assert parameters(config) == pytest.approx(1e6 * size, rel=0.05)
    assert config.model.n_layer == sized.depth(size) + layers


def test_every_size_is_valid_and_rules_hold_between_neighbours():
    configs = [validate(sized.get_config(size)) for size in DIAL]
    for config in configs:
        model = config.model
        assert model.n_head_dim == (16 if model.n_embd < 128 else 32)
        assert model.n_head == 3 or 0.55 < model.n_head * model.n_head_dim / model.n_embd < 0.8
        assert 1.5 < model.n_ff / model.n_embd < 8
        assert config.optimizer.learning_rate == pytest.approx(4e-3 * (160 / model.n_embd) ** 0.25, rel=2e-3)
        assert config.data.batch_size % 2 == 0
    for name, sign in (("model.n_layer", 1), ("data.batch_size", 1), ("scheduler.epochs", -1)):
        values = [flatten(config)[name] for config in configs]
        assert values == sorted(values, reverse=sign < 0)
        assert len(set(values)) > 3


def test_depths():
    depths = {0.1: 3, 0.3: 5, 0.5: 6, 3.0: 7, 10.0: 7, 100.0: 7}
    assert {size: load_config(f"sized:{size}").model.n_layer for size in depths} == depths


def test_default_is_one_million():
    assert load_config("sized") == load_config("sized:1") == load_config("sized:1.0")


@pytest.mark.parametrize(("recipe", "size"), [("book", 0.25), ("shakespeare", 1.9)])
def test_recipes_are_near_the_dial(recipe, size):
    own, other = flatten(load_config(recipe)), flatten(load_config(f"sized:{size}"))
    length = {"scheduler.epochs", "scheduler.max_steps", "scheduler.warmup_epochs", "train.validate_every"}
    free = length | {"data.source", "sample.max_new_tokens"}
    near = {"optimizer.learning_rate": 0.02, "model.n_ff": 0.03}
    for name, value in own.items():
        if name in near:
            assert other[name] == pytest.approx(value, rel=near[name])
        elif name not in free:
            assert other[name] == value, name


def test_minutes_may_set_the_length():
    config = sized.get_config("0.3")
    config.scheduler.minutes = 10.0
    assert validate(config).scheduler.max_steps is None
