"""The examples: the Modal app trains through its local call path, the other recipes call what they should."""

import importlib.util
import os
import pickle
import subprocess
import tomllib
from pathlib import Path

import pytest

from chargpt_jax.events import Ended, Prepared, Sampled
from tests.corpus_text import small_config, write_words

EXAMPLES = Path(__file__).parents[1] / "examples"
PATH = EXAMPLES / "modal_app.py"


@pytest.fixture(scope="module")
def modal_app():
    """The example as a module."""
    pytest.importorskip("modal")
    spec = importlib.util.spec_from_file_location("modal_app", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_modal_function_yields_the_events_of_a_run(modal_app, tmp_path):
    text = Path(write_words(tmp_path / "words.txt")).read_bytes()
    config = small_config("elsewhere.txt")
    config.scheduler.max_steps = 4
    config = pickle.loads(pickle.dumps(config))
    found = list(modal_app.train.local(config, "mine", text, str(tmp_path)))
    assert [type(found[0]), type(found[-2]), type(found[-1])] == [Prepared, Ended, Sampled]
    assert found[0].characters == len(text)
    assert pickle.loads(pickle.dumps(found)) == found, "events travel"
    assert (tmp_path / "mine" / "report.html").is_file()


def test_modal_image_has_every_dependency_of_the_package(modal_app):
    project = tomllib.loads((PATH.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    source = PATH.read_text(encoding="utf-8")
    names = [line.split(">")[0] for line in project["dependencies"]]
    missing = [name for name in names if f'"{name}' not in source]
    assert set(missing) <= {"numpy", "urllib3"}, "these two come with jax and requests"


def test_skypilot_reads_the_task():
    sky = pytest.importorskip("sky")
    task = sky.Task.from_yaml(str(EXAMPLES / "skypilot.yaml"))
    assert {name for resources in task.resources for name in resources.accelerators} == {"L4", "A100", "H100"}
    assert "chargpt_jax.main --config=$CONFIG" in task.run


GCLOUD = """#!/usr/bin/env bash
printf '%s ' "$@" >> "$CALLS"; echo >> "$CALLS"
[[ "$4" != describe ]] || exit 1
[[ "$*" != *"$FAIL"* ]]
"""
"""A stand-in for gcloud: it writes its arguments to a file. There is no TPU yet, and a call with $FAIL fails."""


@pytest.mark.parametrize("fail", ["nothing fails", "chargpt_jax.main"])
def test_tpu_script_deletes_its_tpu_also_after_an_error(tmp_path, fail):
    program, calls = tmp_path / "bin" / "gcloud", tmp_path / "calls"
    program.parent.mkdir()
    program.write_text(GCLOUD, encoding="utf-8")
    program.chmod(0o755)
    git = tmp_path / "bin" / "git"
    git.write_text("#!/bin/sh\n", encoding="utf-8")
    git.chmod(0o755)
    root = tmp_path / "examples"
    root.mkdir()
    script = root / "tpu_vm.sh"
    script.write_text((EXAMPLES / "tpu_vm.sh").read_text(encoding="utf-8"), encoding="utf-8")
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "CALLS": str(calls), "FAIL": fail}
    environment |= {"PROJECT": "my-project"}
    command = ["bash", str(script), "--config=small", "--config.data.source=a b.txt"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    lines = calls.read_text(encoding="utf-8").splitlines()
    kinds = [line.split()[3] for line in lines]
    copied = [] if fail == "chargpt_jax.main" else ["scp"]
    assert kinds == ["describe", "create", "scp", "ssh", "ssh", *copied, "delete"]
    assert "--config.data.source=a\\ b.txt" in lines[4], "arguments keep their spaces"
    assert (done.returncode == 0) == (fail == "nothing fails"), done.stderr


def test_tpu_script_needs_a_project(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PROJECT"}
    command = ["bash", str(EXAMPLES / "tpu_vm.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode
    assert "set PROJECT to your Google Cloud project" in done.stderr
