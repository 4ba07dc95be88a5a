"""Checkpoints keep what they are given, keep the right ones, and say what is wrong with a bad one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chargpt_jax.checkpoint import FORMAT, Checkpoints, NoCheckpoint
from chargpt_jax.config import ModelConfig, OptimizerConfig
from chargpt_jax.model import create
from chargpt_jax.optimizer import adamw
from chargpt_jax.step import create_state

CONFIG = ModelConfig(vocab_size=64, used_ids=30, block_size=12, n_embd=8, n_head=2, n_head_dim=4, n_ff=16, n_layer=2)
TX = adamw(OptimizerConfig(), 1e-2)


def state_at(step: int, dtype=jnp.float32):
    _, params = create(CONFIG, step)
    return create_state(params, TX, seed=7, dtype=dtype).replace(step=jnp.int32(step))


@pytest.fixture
def store(tmp_path):
    store = Checkpoints(tmp_path / "checkpoints", keep_last=2)
    yield store
    store.close()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_a_state_comes_back_bit_for_bit(store, dtype):
    state = state_at(5, dtype)
    store.save(state, {"vocabulary": ["", "\n", "é", "😀"]}, 1.0)
    back = store.restore(5, state_at(1, dtype))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        if jnp.issubdtype(theirs.dtype, jax.dtypes.prng_key):
            ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert store.record(5)["vocabulary"] == ["", "\n", "é", "😀"]


def test_the_newest_and_the_best_are_kept_also_after_a_restart(store, tmp_path):
    for step, loss in enumerate([3.0, 1.0, 2.0, 4.0, 5.0], start=1):
        store.save(state_at(step), {}, loss)
    assert store.steps() == [2, 4, 5]
    store.close()
    again = Checkpoints(tmp_path / "checkpoints", keep_last=2)
    again.save(state_at(6), {}, 9.0)
    assert again.steps() == [2, 5, 6]
    assert (again.choose("best"), again.choose("latest"), again.choose(5)) == (2, 6, 5)
    again.close()


def test_an_empty_folder_and_an_absent_step_are_named(store):
    with pytest.raises(NoCheckpoint, match="holds no checkpoint: train first"):
        store.choose()
    store.save(state_at(3), {}, 1.0)
    with pytest.raises(NoCheckpoint, match="holds no step 4: it has 3"):
        store.choose(4)


def test_a_newer_format_is_refused(store):
    store.save(state_at(3), {"format": FORMAT + 1}, 1.0)
    with pytest.raises(NoCheckpoint, match="has format 2, but this version reads up to 1"):
        store.record(3)


def test_a_damaged_step_is_named_and_left_alone(store, tmp_path):
    folder = store.save(state_at(3), {}, 1.0)
    for path in (folder / "state").rglob("manifest.ocdbt"):
        path.write_bytes(b"junk")
    with pytest.raises(NoCheckpoint, match="3 cannot be restored"):
        store.restore(3, state_at(1))
    assert folder.exists()


def test_a_relative_folder_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Checkpoints(tmp_path.__class__("relative folder é"))
    path = store.save(state_at(1), {}, 1.0)
    store.close()
    assert path.is_absolute()
    assert path.is_dir()
