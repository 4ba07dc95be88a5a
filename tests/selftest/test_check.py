"""The self-test passes here, and reports a failure."""

import json
import os
import subprocess
import sys

import pytest

from chargpt_jax.selftest import check
from chargpt_jax.selftest.result import INTERVAL

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
    assert kills["most_steps_lost"] <= INTERVAL
    assert signals["tried"] == signals["right_exit_code"] == signals["verified_saves"] > 3
    assert max(signals["seconds"]) < 5 + 2
    assert damage["tried"] == 200
    assert damage["silent_wrong"] == damage["unclear"] == damage["hangs"] == kills["hangs"] == 0
    assert os.listdir(tmp_path) == []


def test_failed_check_is_reported_and_its_files_stay(tmp_path, monkeypatch):
    def broken(bench, whole, plan):
        bench.fail("It broke.")

    monkeypatch.setattr(check, "_uninterrupted", lambda bench: None)
    monkeypatch.setattr(check, "_stop_trainings", broken)
    messages = []
    result = check.check(tmp_path, kills=0, signals=0, corruptions=0, tell=messages.append)
    (left,) = tmp_path.iterdir()
    assert messages == ["FAILED: It broke."]
    assert "FAILED: It broke.\nFAILED: Its files are in " in result.table()
    assert str(left) in result.table()
