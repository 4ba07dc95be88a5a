"""Run all cells again: after a killed kernel, and on a new machine from the copy on a (fake) Google Drive."""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

from chargpt_jax.storage.checkpoint import Checkpoints  # noqa: E402
from chargpt_jax.storage.workdir import Workdir  # noqa: E402
from tests.notebook_kernels import NOWHERE, ROOT, client, environment, index, output, read  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")]

STEPS, KILL_AT = 200, 60
CHANGES = {
    "config.scheduler.max_steps = 40": f"config.scheduler.max_steps = {STEPS}\n    config.train.steps_per_dispatch = 5",
    "config.lr_finder.num_zooms = 3": "config.lr_finder.num_zooms = 4\n    config.lr_finder.steps_per_zoom = 40",
}
"""Changes of the notebook that make its test run long enough to be killed in the middle."""


def notebook(drive: Path) -> nbformat.NotebookNode:
    """Return the notebook for Colab, with a longer test run and a folder in the place of Google Drive."""
    notebook = read(ROOT / "notebooks" / "chargpt_colab.ipynb")
    config, places = index(notebook, "TEST_RUN = "), [cell for cell in notebook.cells if "MyDrive" in cell.source]
    assert len(places) >= 2
    for cell in places:
        cell.source = cell.source.replace("/content/drive/MyDrive", str(drive))
    for old, new in CHANGES.items():
        assert old in notebook.cells[config].source
        notebook.cells[config].source = notebook.cells[config].source.replace(old, new)
    return notebook


def running(notebook: nbformat.NotebookNode, folder: Path) -> tuple[nbclient.NotebookClient, dict[str, str]]:
    """Return a client for a notebook in a folder, and its environment."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**NOWHERE, "CHARGPT_TEST_RUN": "1", "PYTHONPATH": str(ROOT)}
    return client(notebook, folder, sys.executable), environment(folder, **settings)


def run_all(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    kernel, variables = running(notebook, folder)
    kernel.execute(env=variables)
    assert output(notebook, "stderr") == ""
    return notebook


def run_until_killed(notebook: nbformat.NotebookNode, folder: Path, is_time: Callable[[], bool]) -> None:
    """Run all cells, and send SIGKILL to the kernel at a chosen time."""
    kernel, variables = running(notebook, folder)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            if is_time():
                os.kill(kernel.km.provisioner.pid, signal.SIGKILL)
                return

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with pytest.raises(nbclient.exceptions.DeadKernelError):
            kernel.execute(env=variables)
    finally:
        ended.set()
        watching.join()


def shown(notebook: nbformat.NotebookNode, text: str) -> str:
    """Return the words of the figure below the cell that contains a text."""
    outputs = notebook.cells[index(notebook, text)].get("outputs", ())
    return "\n".join(one.data.get("text/plain", "") for one in outputs if "data" in one)


def steps(run: Path) -> list[int]:
    store = Checkpoints(run / "checkpoints")
    with contextlib.closing(store):
        assert store.steps() == store.valid_steps()
        return store.steps()


def digest(run: Path) -> str:
    """Return the digest of the parameters and the optimizer state at the end of a run."""
    assert steps(run)[-1] == STEPS
    return json.loads((run / "checkpoints" / str(STEPS) / "record.json").read_text())["digest"]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> str:
    """The digest at the end of a training that was never interrupted, without Drive."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    whole = notebook(folder / "not mounted")
    whole.cells = whole.cells[: index(whole, "chargpt_jax.train(") + 1]
    run_all(whole, folder / "here")
    assert "Google Drive is not mounted" in output(whole)
    assert not (folder / "not mounted").exists()
    return digest(folder / "here" / "runs" / "test_run")


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A folder with a run whose kernel was killed in the middle of training, in `here`, and its copy in `drive`."""
    folder = tmp_path_factory.mktemp("killed")
    run = folder / "here" / "runs" / "test_run"
    (folder / "drive").mkdir()

    def is_time() -> bool:
        return any(path.name.isdecimal() and int(path.name) >= KILL_AT for path in (run / "checkpoints").glob("*"))

    run_until_killed(notebook(folder / "drive"), folder / "here", is_time)
    assert (run / "lock.json").exists()
    assert KILL_AT <= steps(run)[-1] < STEPS
    return folder


def test_run_all_resumes_after_a_kill_in_training(killed, uninterrupted, tmp_path):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    run, again = tmp_path / "here" / "runs" / "test_run", notebook(tmp_path / "drive")
    before = steps(run)[-1]
    run_all(again, tmp_path / "here")
    assert f"resuming after step {before} of {STEPS}" in shown(again, "chargpt_jax.train(")
    assert digest(run) == uninterrupted
    assert tree(tmp_path / "drive" / "chargpt_jax" / "test_run") == tree(run)


def test_run_all_resumes_on_a_new_machine_from_drive(killed, uninterrupted, tmp_path):
    """Only the copy is left: it may lack the checkpoint that was copied when the kernel was killed."""
    shutil.copytree(killed / "drive", tmp_path / "drive")
    run, copy = tmp_path / "here" / "runs" / "test_run", tmp_path / "drive" / "chargpt_jax" / "test_run"
    before, again = steps(copy)[-1], notebook(tmp_path / "drive")
    assert before >= KILL_AT - 10
    run_all(again, tmp_path / "here")
    assert f"resuming after step {before} of {STEPS}" in shown(again, "chargpt_jax.train(")
    assert shown(again, "chargpt_jax.find_lr(") == ""  # the learning rate is in the copy
    assert digest(run) == uninterrupted
    assert tree(copy) == tree(run)


def test_run_all_works_after_a_kill_in_the_range_test(uninterrupted, tmp_path):
    run, first = tmp_path / "here" / "runs" / "test_run", notebook(tmp_path / "not mounted")
    search = first.cells[index(first, "chargpt_jax.find_lr(")]

    def is_time() -> bool:
        texts = [output["data"].get("text/plain", "") for output in search.get("outputs", ()) if "data" in output]
        return any("range test: step" in text for text in texts)

    run_until_killed(first, tmp_path / "here", is_time)
    assert Workdir(run).load_config().optimizer.learning_rate is None
    assert (run / "lock.json").exists()
    again = run_all(notebook(tmp_path / "not mounted"), tmp_path / "here")
    assert "learning rate" in shown(again, "chargpt_jax.find_lr(")
    assert digest(run) == uninterrupted
