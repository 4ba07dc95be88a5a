"""The first cells of the notebooks, in a fresh environment that has all dependencies but not chargpt_jax."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

from tests.notebook_kernels import NOWHERE, ROOT, client, environment, index, output, read  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")]

OWN = ("chargpt_jax", "__editable__")
"""How the names of this package begin in site-packages."""

PROBE = """
import chargpt_jax
print(chargpt_jax.load_config("tiny").model.n_layer, chargpt_jax.load_config("small").model.n_layer)
print(chargpt_jax.__file__)
"""


def copied_checkout(folder: Path) -> Path:
    """Copy the files of the checkout that git tracks, or would track, to a new folder."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this is not a git checkout: {error}")
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the checkout, alone in a folder."""
    folder = tmp_path_factory.mktemp("wheel")
    source, wheels = copied_checkout(folder / "source"), folder / "wheels"
    words = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(wheels), str(source)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"building a wheel needs the package index, for setuptools: {done.stderr.strip()[-300:]}")
    (made,) = wheels.iterdir()
    return made


@pytest.fixture
def python(tmp_path) -> Path:
    """The Python of a new environment, in which everything that this one has can be imported but chargpt_jax.

    Its site-packages folder names a folder of links in a .pth file.
    """
    venv.create(tmp_path / "venv", with_pip=True, symlinks=True)
    links = tmp_path / "dependencies"
    links.mkdir()
    for folder in [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]:
        for path in folder.iterdir():
            if not path.name.startswith(OWN) and not (links / path.name).exists():
                (links / path.name).symlink_to(path)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{links}\n")
    python = tmp_path / "venv" / "bin" / "python"
    here = {"cwd": tmp_path, "env": environment(tmp_path), "capture_output": True}
    if subprocess.run([python, "-c", "import chargpt_jax"], **here).returncode == 0:
        pytest.skip("chargpt_jax is installed outside of this environment, so that any other one has it too")
    subprocess.run([python, "-c", "import ipykernel, jax"], **here, check=True)
    return python


def start(path: Path, folder: Path, python: Path, **more: str) -> nbformat.NotebookNode:
    """Run a notebook in a folder up to the cell that checks the machine, and then PROBE."""
    notebook = read(path)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, folder)
    notebook.cells = notebook.cells[: index(notebook, "JAX cannot see it") + 1]
    notebook.cells.append(nbformat.v4.new_code_cell(PROBE))
    client(notebook, folder, python).execute(env=environment(folder, **more))
    return notebook


def check_started(notebook: nbformat.NotebookNode, environment: Path) -> None:
    """Check what the machine is said to have, and that the package was installed into an environment."""
    *machine, layers, file = output(notebook).splitlines()
    assert "1 x cpu" in machine[0]
    assert any("chargpt_jax 0." in line for line in machine)
    assert layers == "3 15"
    assert Path(file).is_relative_to(environment)
    assert output(notebook, "stderr") == ""


COLAB, KAGGLE = (ROOT / "notebooks" / f"{name}.ipynb" for name in ("chargpt_colab", "what_the_model_knows_kaggle"))
"""One notebook of each platform and of each source; all begin with the cells of start.py."""


def test_notebook_alone_installs_from_an_index(python, wheel, tmp_path):
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent)}
    check_started(start(KAGGLE, tmp_path / "alone", python, **NOWHERE, **index), tmp_path / "venv")


def test_notebook_beside_a_wheel_installs_it(python, wheel, tmp_path):
    folder, empty = tmp_path / "beside", tmp_path / "empty"
    for new in (folder, empty):
        new.mkdir()
    shutil.copy(wheel, folder)
    no_index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(empty)}
    check_started(start(COLAB, folder, python, **NOWHERE, **no_index), tmp_path / "venv")


@pytest.mark.usefixtures("wheel")  # if a wheel can be built here, a checkout can be installed
def test_notebook_in_a_checkout_installs_that(python, tmp_path):
    folder = copied_checkout(tmp_path / "checkout") / "notebooks"
    check_started(start(KAGGLE, folder, python), tmp_path / "venv")


def test_notebook_without_any_source_names_the_fix(python, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(nbclient.exceptions.CellExecutionError) as failed:
        start(COLAB, tmp_path / "alone", python, **NOWHERE, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(empty))
    assert failed.value.ename == "RuntimeError"
    assert failed.value.evalue.startswith("chargpt_jax could not be installed: ")
    assert failed.value.evalue.endswith(", then run this cell again.")
    assert "ModuleNotFoundError" not in failed.value.traceback
    assert "another exception" not in failed.value.traceback
