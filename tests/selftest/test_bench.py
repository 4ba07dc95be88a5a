"""The training of the self-test keeps the settings of the user's config."""

import pytest

from chargpt_jax.config import validate
from chargpt_jax.config.files import load_config
from chargpt_jax.selftest import bench


@pytest.mark.parametrize("name", ["tiny", "small", "nanogpt_cpu", "nanogpt_baby"])
def test_shrunk_config_keeps_its_settings(name, tmp_path):
    config = load_config(name)
    small = validate(bench.shrunk(config, tmp_path / "text.txt"))
    assert small.model.dropout == config.model.dropout
    assert small.data.padding_chance == config.data.padding_chance
    assert small.optimizer.clip_norm == config.optimizer.clip_norm
    assert small.scheduler.min_lr_factor == config.scheduler.min_lr_factor
    assert (small.model.n_layer, small.model.n_embd) == (2, 8)
    assert config == load_config(name)
