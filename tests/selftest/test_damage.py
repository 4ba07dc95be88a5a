"""Damage to checkpoints is of every kind, and arrays are compared bit by bit."""

import random
import shutil

import numpy as np

from chargpt_jax.selftest.damage import mutate, same


def test_every_kind_of_mutation_occurs_and_changes_files(tmp_path):
    steps, seen = [tmp_path / "whole" / name for name in ("4", "8")], set()
    for step in steps:
        (step / "deep").mkdir(parents=True)
        for i in range(3):
            (step / "deep" / str(i)).write_bytes(bytes([i, int(step.name)]) * 40)
    draw = random.Random(0)

    def tree(folder):
        return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}

    unchanged = 0
    for i in range(200):
        place = tmp_path / f"copy-{i}"
        shutil.copytree(tmp_path / "whole", place)
        seen.add(mutate(place, steps, draw).partition(" of ")[0])
        unchanged += tree(place) == tree(tmp_path / "whole")
    assert seen == {"flip", "truncate", "delete", "zero", "rename", "swap", "delete folder", "rename step"}
    assert unchanged < 20  # a swap can select the same file twice


def test_equal_numbers_with_other_bits_differ():
    zero, minus = np.float32([0.0]), np.float32([-0.0])
    assert same({"x": zero}, {"x": zero.copy()})
    assert not same({"x": zero}, {"x": minus})
    assert not same({"x": zero}, {"x": zero.astype(np.float64)})
    assert not same({"x": zero}, {})
