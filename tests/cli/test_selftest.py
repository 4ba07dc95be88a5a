"""The self-test passes here, and reports a failure."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from chargpt_jax.cli import selftest, selftest_damage
from chargpt_jax.config import validate
from chargpt_jax.config_io import load_config

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


def run(folder, *flags):
    command = [sys.executable, "-m", "chargpt_jax.main", "--mode=selftest", f"--workdir={folder}", "--json", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_selftest_passes_here(tmp_path):
    """A short version of the self-test that docs/reliability.md quotes."""
    code, found, said = run(tmp_path, "--kills=20", "--signals=3", "--corruptions=200")
    assert found["broken"] == [], said
    assert code == 0
    kills, signals, damage = found["kills"], found["signals"], found["corruptions"]
    assert kills["tried"] == kills["bit_identical"] == 23
    assert kills["most_steps_lost"] <= selftest.INTERVAL
    assert signals["tried"] == signals["right_exit_code"] == signals["verified_saves"] > 3
    assert max(signals["seconds"]) < 5 + 2
    assert damage["tried"] == 200
    assert damage["silent_wrong"] == damage["unclear"] == damage["hangs"] == kills["hangs"] == 0
    assert os.listdir(tmp_path) == []


def test_failed_check_is_reported_and_its_files_stay(tmp_path, monkeypatch):
    def broken(bench, whole, plan):
        bench.fail("It broke.")

    monkeypatch.setattr(selftest, "_uninterrupted", lambda bench: None)
    monkeypatch.setattr(selftest, "_stop_trainings", broken)
    messages = []
    result = selftest.check(tmp_path, kills=0, signals=0, corruptions=0, tell=messages.append)
    (left,) = tmp_path.iterdir()
    assert messages == ["FAILED: It broke."]
    assert "FAILED: It broke.\nFAILED: Its files are in " in result.table()
    assert str(left) in result.table()


@pytest.mark.parametrize("name", ["tiny", "small", "nanogpt_cpu", "nanogpt_baby"])
def test_shrunk_config_keeps_its_settings(name, tmp_path):
    config = load_config(name)
    small = validate(selftest.shrunk(config, tmp_path / "text.txt"))
    assert small.model.dropout == config.model.dropout
    assert small.data.padding_chance == config.data.padding_chance
    assert small.optimizer.clip_norm == config.optimizer.clip_norm
    assert small.scheduler.min_lr_factor == config.scheduler.min_lr_factor
    assert (small.model.n_layer, small.model.n_embd) == (2, 8)
    assert config == load_config(name)


def test_every_kind_of_mutation_occurs_and_changes_files(tmp_path):
    steps, seen = [tmp_path / "whole" / name for name in ("4", "8")], set()
    for step in steps:
        (step / "deep").mkdir(parents=True)
        for i in range(3):
            (step / "deep" / str(i)).write_bytes(bytes([i, int(step.name)]) * 40)
    draw = random.Random(0)

    def tree(folder):
        return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}

    import shutil

    same = 0
    for i in range(200):
        place = tmp_path / f"copy-{i}"
        shutil.copytree(tmp_path / "whole", place)
        seen.add(selftest_damage.mutate(place, steps, draw).partition(" of ")[0])
        same += tree(place) == tree(tmp_path / "whole")
    assert seen == {"flip", "truncate", "delete", "zero", "rename", "swap", "delete folder", "rename step"}
    assert same < 20  # a swap can select the same file twice


def test_equal_numbers_with_other_bits_differ():
    zero, minus = np.float32([0.0]), np.float32([-0.0])
    assert selftest_damage.same({"x": zero}, {"x": zero.copy()})
    assert not selftest_damage.same({"x": zero}, {"x": minus})
    assert not selftest_damage.same({"x": zero}, {"x": zero.astype(np.float64)})
    assert not selftest_damage.same({"x": zero}, {})
