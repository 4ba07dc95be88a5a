"""The notebooks equal the output of build.py, and every cell runs: at tiny size, offline, in a real kernel."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import chargpt_jax

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

FOLDER = Path(__file__).parents[1] / "notebooks"
PLATFORMS = ("colab", "kaggle")
TRAINING = [("chargpt", platform) for platform in PLATFORMS]
EXPLORING = [("what_the_model_knows", platform) for platform in PLATFORMS]
NOTEBOOKS = [*TRAINING, *EXPLORING]
every_notebook = pytest.mark.parametrize(("source", "platform"), NOTEBOOKS)
REFERENCES = {
    "https://www.gutenberg.org/ebooks/60",
    "https://github.com/karpathy/nanoGPT",
    "https://github.com/z0u/mi-ni",
}


def file_of(source: str, platform: str) -> Path:
    return FOLDER / f"{source}_{platform}.ipynb"


def read(source: str, platform: str) -> nbformat.NotebookNode:
    return nbformat.read(file_of(source, platform), as_version=4)


def code(source: str, platform: str) -> list[str]:
    return [cell.source for cell in read(source, platform).cells if cell.cell_type == "code"]


def install_cell(source: str, platform: str) -> str:
    """Return the code of a notebook up to the cell that installs the package."""
    cells = code(source, platform)
    (last,) = [i for i, source in enumerate(cells) if '"pip", "install"' in source]
    return "\n".join(cells[: last + 1])


# What is on disk


def test_every_notebook_is_tested():
    assert {path.name for path in FOLDER.glob("*.ipynb")} == {file_of(*notebook).name for notebook in NOTEBOOKS}


@every_notebook
def test_notebook_equals_the_output_of_build(source, platform):
    pytest.importorskip("jupytext")
    spec = importlib.util.spec_from_file_location("build", FOLDER / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    assert list(build.METADATA) == NOTEBOOKS
    same = file_of(source, platform).read_text(encoding="utf-8") == build.text(source, platform)
    assert same, "run `python notebooks/build.py` and commit its output"


@every_notebook
def test_a_notebook_is_valid_and_stripped(source, platform):
    notebook = read(source, platform)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.metadata == {}
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    ids = [cell.id for cell in notebook.cells]
    assert ids == [f"cell-{n}" for n in range(1, len(ids) + 1)]


def test_training_asks_for_a_tpu_and_exploring_for_no_accelerator():
    colab, kaggle = (read(*notebook).metadata for notebook in EXPLORING)
    assert "accelerator" not in colab
    assert kaggle["kaggle"] == {"accelerator": "none", "isInternetEnabled": True}
    colab, kaggle = (read(*notebook).metadata for notebook in TRAINING)
    assert colab["accelerator"] == "TPU"
    assert colab["colab"] == {"gpuType": "V5E1"}
    assert kaggle["kaggle"]["accelerator"] == "tpuV5e8"
    assert "kaggle" not in colab
    assert not {"colab", "accelerator"} & set(kaggle)
    assert colab["kernelspec"]["name"] == kaggle["kernelspec"]["name"] == "python3"


@pytest.fixture
def installed(monkeypatch):
    """Return a function that runs a notebook's installation in a folder, and lists what pip was asked to install.

    The package cannot be imported there; pip succeeds for sources that a function accepts.
    """

    def run(notebook: tuple[str, str], folder: Path, accepts, address: str = "") -> list[str]:
        asked: list[str] = []

        def pip(command, **_):
            assert command[1:5] == ["-m", "pip", "install", "-q"]
            asked.append(str(command[5]))
            return subprocess.CompletedProcess(command, 0 if accepts(asked[-1]) else 1)

        with monkeypatch.context() as patch:
            patch.chdir(folder)
            patch.setitem(sys.modules, "chargpt_jax.api", None)
            patch.setattr(subprocess, "run", pip)
            exec(install_cell(*notebook).replace('ADDRESS = ""', f'ADDRESS = "{address}"'), {})
        return asked

    return run


@every_notebook
def test_a_notebook_installs_from_the_nearest_source(source, platform, installed, tmp_path):
    here = tmp_path / "checkout" / "notebooks"
    here.mkdir(parents=True)
    assert installed((source, platform), here, lambda _: True) == ["chargpt_jax"]
    git = "git+https://example.org/a"
    assert installed((source, platform), here, lambda _: True, "https://example.org/a") == [git]
    (here / "chargpt_jax-0.1.0-py3-none-any.whl").touch()
    assert installed((source, platform), here, lambda _: True, "https://example.org/a") == [
        "chargpt_jax-0.1.0-py3-none-any.whl"
    ]
    (tmp_path / "checkout" / "chargpt_jax").mkdir()
    (tmp_path / "checkout" / "chargpt_jax" / "api.py").touch()
    everything = [str(tmp_path / "checkout"), "chargpt_jax-0.1.0-py3-none-any.whl", git, "chargpt_jax"]
    last = installed((source, platform), here, lambda found: found == "chargpt_jax", "https://example.org/a")
    assert last == everything
    with pytest.raises(RuntimeError, match=r"^chargpt_jax could not be installed: .*wheel.*, then run this cell"):
        installed((source, platform), here, lambda _: False)


@every_notebook
def test_a_notebook_installs_nothing_if_the_package_is_there(source, platform, monkeypatch):
    started: list[object] = []
    monkeypatch.setattr(subprocess, "run", lambda *command, **_: started.append(command))
    exec(install_cell(source, platform), {})
    assert started == []


def test_cure_for_a_dead_tpu_on_kaggle_is_a_newer_jax():
    assert 'run %pip install -U "jax[tpu]" in a new cell and restart the session' in install_cell("chargpt", "kaggle")
    assert "jax[tpu]" not in install_cell("chargpt", "colab")


@every_notebook
def test_a_notebook_names_no_address_but_its_references(source, platform):
    text = "\n".join(cell.source for cell in read(source, platform).cells)
    assert set(re.findall(r"https?://[^\s\"')\]]+", text)) == (REFERENCES if source == "chargpt" else set())


@every_notebook
def test_notebook_mentions_only_its_own_platform(source, platform):
    text = "\n".join(cell.source for cell in read(source, platform).cells)
    words = {"colab": ("Runtime > Change runtime type", "/content/drive"), "kaggle": ("Settings >", "/kaggle/working")}
    for name, own in words.items():
        for word in own:
            assert (word in text) == (name == platform)


@every_notebook
def test_a_notebook_calls_the_package_and_repeats_none_of_it(source, platform):
    for cell in code(source, platform):
        tree = ast.parse(re.sub(r"(?m)^%.*$", "", cell))
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.While)]


# What it does


class Client(nbclient.NotebookClient):
    """Counts the SVG updates of live displays, by cell."""

    live: Counter

    def process_message(self, message, cell, index):
        if message["msg_type"] == "update_display_data":
            self.live[index] += "<svg" in message["content"]["data"].get("text/html", "")
        return super().process_message(message, cell, index)


def execute(notebook: nbformat.NotebookNode, folder: Path, **environment: str) -> Client:
    """Run a notebook in a folder, without network: any download fails immediately."""
    client = Client(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.live = Counter()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "COLAB_"))}
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    client.execute(
        env={
            **inherited,
            **nowhere,
            "PIP_NO_INDEX": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "CHARGPT_TEST_RUN": "1",
            "IPYTHONDIR": str(folder / "ipython"),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(Path(chargpt_jax.__file__).parents[1]),
            **environment,
        }
    )
    return client


@pytest.fixture(scope="module", params=TRAINING, ids="-".join)
def executed(request, tmp_path_factory) -> tuple[nbformat.NotebookNode, Client, Path]:
    notebook, folder = read(*request.param), tmp_path_factory.mktemp(request.param[1])
    return notebook, execute(notebook, folder), folder


def pictures(notebook: nbformat.NotebookNode, starts: str) -> list[str]:
    """Return the final SVG output of the code cell that contains a text."""
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and starts in cell.source]
    shown = [output.data.get("text/html", "") for output in cell.outputs if "data" in output]
    return re.findall(r"<svg.*?</svg>", "\n".join(shown), re.DOTALL)


@pytest.mark.slow
def test_every_cell_works_and_shows_its_pictures(executed):
    notebook, client, folder = executed
    (rates,) = pictures(notebook, "find_lr(")
    assert "learning rate" in rates
    (losses,) = pictures(notebook, "chargpt_jax.train(")
    assert "validation" in losses
    prompts = 2
    assert len(pictures(notebook, "chargpt_jax.load(")) == prompts
    assert len(pictures(notebook, "ways = {")) == 4
    assert len(pictures(notebook, "chargpt_jax.Samples(")) == 3
    for picture in pictures(notebook, "ways = {") + pictures(notebook, "chargpt_jax.Samples("):
        assert "Surprisal" in picture

    for stage, at_least in (("find_lr(", 2), ("chargpt_jax.train(", 2)):
        (index,) = [i for i, cell in enumerate(notebook.cells) if stage in cell.source and cell.cell_type == "code"]
        assert client.live[index] >= at_least, f"the plot of {stage} was not updated while it ran"

    (run,) = [path.parent for path in folder.glob("**/config.json")]
    assert (run / "report.html").read_text(encoding="utf-8").count("<svg") >= 3
    assert list((run / "checkpoints").iterdir())


def printed_errors(notebook: nbformat.NotebookNode) -> list[str]:
    streams = [o for cell in notebook.cells for o in cell.get("outputs", ()) if o.output_type == "stream"]
    return [output.text for output in streams if output.name == "stderr"]


@pytest.mark.slow
def test_notebook_prints_nothing_to_stderr(executed):
    assert printed_errors(executed[0]) == []


@pytest.mark.slow
def test_exploring_prints_nothing_to_stderr(explored):
    assert printed_errors(explored) == []


@pytest.fixture(scope="module", params=EXPLORING, ids="-".join)
def explored(request, tmp_path_factory) -> nbformat.NotebookNode:
    """An exploring notebook that has trained its own model."""
    notebook = read(*request.param)
    execute(notebook, tmp_path_factory.mktemp(request.param[1]))
    return notebook


def output_of(notebook: nbformat.NotebookNode, contains: str) -> str:
    """Return all that the code cell with a text printed and displayed."""
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and contains in cell.source]
    texts = [output.get("text") or "".join(output.get("data", {}).values()) for output in cell.outputs]
    return "\n".join(texts)


@pytest.mark.slow
def test_exploring_shows_every_picture_of_its_model(explored):
    assert "runs/tiny: step 40, 3 layers, " in output_of(explored, "chargpt_jax.run(")
    assert len(pictures(explored, "model.score(own")) == 1
    assert output_of(explored, "alternatives.at(i)").count("; expected '") == 10
    assert len(pictures(explored, "model.branch(")) == 4
    assert len(pictures(explored, "ways = {")) == 4
    assert "First letters have" in output_of(explored, "by_letter(")
    (maps,) = pictures(explored, "line = scored")
    assert maps.count("<title>layer ") == 12
    assert 'aria-label="Attention of layer' in output_of(explored, "reach.argmax()")
    (layers,) = pictures(explored, "# the lens")
    assert "row k: after k of 3 layers" in layers
    shares = re.findall(r"settled after +\d layers: +([\d.]+)%", output_of(explored, "settled after"))
    assert sum(map(float, shares)) == pytest.approx(100, abs=0.3)


@pytest.mark.slow
def test_a_mistake_in_a_notebook_is_one_sentence(executed):
    notebook, _, folder = executed
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("import chargpt_jax; chargpt_jax.load('none')")]
    )
    with pytest.raises(nbclient.exceptions.CellExecutionError):
        execute(notebook, folder)
    (error,) = notebook.cells[0].outputs
    assert len(error.traceback) == 1
    assert error.traceback[0].startswith("UserError: ")


@pytest.mark.slow
def test_exploring_takes_the_newest_run_that_it_finds(tmp_path, executed):
    _, _, folder = executed
    notebook = read("what_the_model_knows", "colab")
    (last,) = [i for i, cell in enumerate(notebook.cells) if "model = chargpt_jax.load" in cell.source]
    notebook.cells = notebook.cells[: last + 1]
    execute(notebook, folder)
    assert "test_run: step 40, 2 layers" in output_of(notebook, "chargpt_jax.run(")
    assert "training" not in output_of(notebook, "chargpt_jax.run(")


@pytest.mark.slow
@every_notebook
def test_notebook_stops_with_a_fix_if_jax_sees_no_tpu(source, platform, tmp_path):
    notebook = read(source, platform)
    (check,) = [i for i, cell in enumerate(notebook.cells) if "JAX cannot see it" in cell.source]
    notebook.cells = notebook.cells[: check + 1]
    fix = {"colab": "Runtime > Change runtime type", "kaggle": "Settings > Accelerator"}[platform]
    with pytest.raises(nbclient.exceptions.CellExecutionError, match=f"JAX cannot see it.*{fix}"):
        execute(notebook, tmp_path, TPU_ACCELERATOR_TYPE="v5e-1")
