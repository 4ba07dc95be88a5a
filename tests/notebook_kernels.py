"""Runs the shipped notebooks in real kernels, for the tests of notebooks."""

import json
import os
from pathlib import Path

import nbclient
import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

ROOT = Path(__file__).parents[1]
NOWHERE = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
"""Settings with which any download fails immediately."""


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def index(notebook: nbformat.NotebookNode, text: str) -> int:
    """Return the index of the only code cell that contains a text."""
    (found,) = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and text in cell.source]
    return found


def output(notebook: nbformat.NotebookNode, kind: str = "stdout") -> str:
    """Return what the cells printed to a stream."""
    outputs = [one for cell in notebook.cells for one in cell.get("outputs", ())]
    return "".join(one.text for one in outputs if one.output_type == "stream" and one.name == kind)


def client(notebook: nbformat.NotebookNode, folder: Path, python: str | Path) -> nbclient.NotebookClient:
    """Return a client that runs a notebook in a folder, in a kernel of a Python of its own."""
    spec = folder.parent / "kernels" / "fresh"
    spec.mkdir(parents=True, exist_ok=True)
    words = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": words, "display_name": "fresh", "language": "python"}))
    specs = KernelSpecManager(kernel_dirs=[str(spec.parent)], ensure_native_kernel=False)
    manager = AsyncKernelManager(kernel_name="fresh", kernel_spec_manager=specs)
    return nbclient.NotebookClient(notebook, km=manager, timeout=600, resources={"metadata": {"path": str(folder)}})


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Return the environment of a kernel: without an accelerator and a user's settings of Python."""
    left_out = ("TPU_", "COLAB_", "PYTHON", "PIP_NO_INDEX", "PIP_FIND_LINKS")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    own = {"JAX_PLATFORMS": "cpu", "IPYTHONDIR": str(folder.parent / "ipython"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return {**inherited, **own, **more}
