"""The lock of a run, which process 0 holds for all processes."""

from pathlib import Path

import pytest

from chargpt_jax.devices import processes
from chargpt_jax.errors import UserError
from chargpt_jax.storage.lock import NAME, NoLock
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training import run
from tests.process_group import Group


def test_locked_is_held_by_process_0_for_all(monkeypatch, tmp_path):
    def hold(index: int) -> tuple[bool, bool]:
        with run.locked(Workdir(tmp_path / "run")) as lock:
            lock.alive()
            held = isinstance(lock, NoLock), (tmp_path / "run" / NAME).exists()
            processes.gathered(None)  # all have looked, before process 0 releases it
            return held

    assert Group(3, monkeypatch).results(hold) == [(False, True), (True, True), (True, True)]


@pytest.mark.parametrize("content", [None, "{}"], ids=["missing", "of another run"])
def test_locked_rejects_a_folder_that_is_not_shared(monkeypatch, tmp_path, content):
    monkeypatch.setattr(run, "SEEN_TRIES", 1)
    monkeypatch.setattr(run, "SEEN_SECONDS", 0.0)
    folders = [tmp_path / str(index) for index in range(3)]
    if content:
        folders[2].mkdir()
        (folders[2] / NAME).write_text(content)

    def hold(index: int) -> Path:
        with run.locked(Workdir(folders[2 if index == 2 else 0])) as lock:
            return lock.path

    found = Group(3, monkeypatch).results(hold)
    assert {type(error) for error in found} == {UserError}
    assert all("in process 2 is not the folder of process 0" in str(error) for error in found)
    assert not folders[0].exists()  # nothing is left behind
