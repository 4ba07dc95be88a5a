"""Real processes on this machine that train one model: the law is that stops and layouts change no bit."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.processes import Training, free_port, prepared, reasons, result

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEPS = 60

RESTORED = """
import dataclasses, json, sys
from pathlib import Path
from chargpt_jax.config import MeshConfig
from chargpt_jax.devices import processes, sharding
workdir, address = sys.argv[1:]
processes.start(address)
import jax
from chargpt_jax.storage.arrays.state_arrays import digest, on_host
from chargpt_jax.training import optimizer
from chargpt_jax.training.run import Run
from chargpt_jax.training.setup import Setup
from chargpt_jax.training.stages import restored
sharding.MIN_SHARDED_SIZE = 1
run, found = Run.load(workdir), []
for mesh in (MeshConfig(), MeshConfig(fsdp=4), MeshConfig(fsdp=2, tensor=2)):
    config = dataclasses.replace(run.config, mesh=mesh)
    setup = Setup.on(config, run.tokens, run.tokenizer.vocabulary)
    fresh = setup.initial_state(optimizer.empty(config))
    state = restored(setup, fresh, Path(workdir, "checkpoints"), print)
    split = sum(not x.is_fully_replicated for x in jax.tree.leaves(state))
    arrays = processes.on_host(state)
    if processes.is_first():
        found.append([setup.mesh.size, split, digest(on_host(arrays))])
if processes.is_first():
    print(json.dumps(found))
processes.finish()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    prepared(folder, STEPS)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    training = Training(folder / "config.json", folder / "whole", 2)
    assert training.codes() == [0, 0], training.said(0)
    assert training.said(1) == ""  # process 0 alone prints
    return folder / "whole"


def test_processes_stop_together_and_resume_bit_identically(folder, whole):
    workdir = folder / "interrupted"
    training = Training(folder / "config.json", workdir, 2)
    assert training.wait_for("validation: ")
    training.send(1, signal.SIGTERM)
    assert training.codes(30.0) == [143, 143], training.said(0)
    stopped = result(workdir)["step"]
    assert 0 < stopped < STEPS
    assert f"stopped by signal 15 after step {stopped:,}" in training.said(0)

    training = Training(folder / "config.json", workdir, 2)
    assert training.wait_for("\nstep ")
    training.send(0, signal.SIGKILL)
    codes = training.codes(30.0)
    assert reasons(training, 0, codes) == []

    training = Training(folder / "config.json", workdir, 2)
    assert training.codes() == [0, 0], training.said(0)
    assert result(workdir) == result(whole)


def test_processes_reject_different_configs_together(folder):
    training = Training(folder / "config.json", folder / "other", 2, own={1: ["--config.seed=7"]})
    assert training.codes(120.0) == [2, 2]
    for index in range(2):
        assert training.said(index).startswith("chargpt: The config in process 1 differs from that in process 0")
    assert not (folder / "other").exists()


def test_evaluation_by_two_processes_equals_that_by_one(folder, whole):
    both = Training(folder / "config.json", whole, 2, ["--json"], mode="eval")
    assert both.codes(120.0) == [0, 0], both.said(0)
    one = [sys.executable, "-m", "chargpt_jax.main", "--mode=eval", f"--workdir={whole}", "--json"]
    alone = json.loads(subprocess.run(one, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout)
    found = json.loads(both.said(0))
    assert found.pop("loss") == pytest.approx(alone.pop("loss"), rel=1e-6)
    assert (found["step"], found["tokens"]) == (alone["step"], alone["tokens"])
    assert both.said(1) == ""


def test_processes_that_stream_their_parts_train_the_same_bits(folder, whole):
    training = Training(folder / "config.json", folder / "streamed", 2, ["--config.train.stream=always"])
    assert training.codes() == [0, 0], training.said(0)
    assert result(folder / "streamed") == result(whole)


def test_checkpoint_is_the_same_on_every_layout(whole):
    address = f"localhost:{free_port()}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", RESTORED, str(whole)]
    both = [
        subprocess.Popen([*command, f"{address},{i},2"], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    found = json.loads(outputs[0].splitlines()[-1])
    assert [size for size, *_ in found] == [4, 4, 4]
    assert all(split > 0 for _, split, _ in found)
    assert {digest for *_, digest in found} == {result(whole)["digest"]}


LAYOUTS = [["--config.mesh.fsdp=2"], ["--config.mesh.tensor=2"], ["--config.mesh.fsdp=4"], []]
"""Of two processes with two devices each; each process holds a part of an array with the third."""


def test_run_continues_on_other_layouts_and_on_one_process(folder, whole, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    for index, mesh in enumerate(LAYOUTS):
        training = Training(folder / "config.json", folder / "layouts", 2, mesh)
        assert training.wait_for("step " if index == 0 else "resuming after step "), training.said(0)
        training.wait_for("validation: ")
        training.send(index % 2, signal.SIGKILL)
        assert reasons(training, index % 2, training.codes(30.0)) == []
    alone = Training(folder / "config.json", folder / "layouts", 1, ["--config.mesh.fsdp=2"])
    assert alone.codes() == [0], alone.said(0)
    found, expected = result(folder / "layouts"), result(whole)
    assert found["step"] == expected["step"]
    for line, other in zip(found["log"], expected["log"], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_calls_of_the_documentation_train_and_evaluate(folder, tmp_path):
    page = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "processes.start(" in block)
    for word, own in (
        ("10.0.0.1:1234", f"localhost:{free_port()}"),
        ('load_config("small")', f"load_config({str(folder / 'config.json')!r})"),
        ("/shared/small", str(tmp_path / "run")),
    ):
        assert word in code
        code = code.replace(word, own)
    code += "print('loss', loss)"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code.replace(",0,2", f",{i},2")], env=environment, stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    texts = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    outputs = [[line for line in text.splitlines() if "[Gloo]" not in line] for text in texts]
    assert f"Ended(step={STEPS}, " in outputs[0][-2]
    assert outputs[0][-1] == outputs[1][-1]
    assert len(outputs[1]) == 1  # process 0 alone prints the events
    assert float(outputs[0][-1].removeprefix("loss ")) < 4
