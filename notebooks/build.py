"""Write the notebooks from their sources: python notebooks/build.py.

A source is a percent script, which jupytext opens as a notebook. Each one becomes a notebook for Colab and one for
Kaggle. A cell tagged `colab` or `kaggle` is only in that notebook; every other cell is in both. A cell tagged `include`
names a file whose cells take its place. The notebooks have no outputs, and the result is deterministic.
"""

import tomllib
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat

HERE = Path(__file__).parent
METADATA = {
    ("chargpt", "colab"): {"accelerator": "TPU", "colab": {"gpuType": "V5E1"}},
    ("chargpt", "kaggle"): {"kaggle": {"accelerator": "tpuV5e8", "isInternetEnabled": True}},
    ("what_the_model_knows", "colab"): {"colab": {}},
    ("what_the_model_knows", "kaggle"): {"kaggle": {"accelerator": "none", "isInternetEnabled": True}},
}
"""The notebooks: (source, platform), and what the platform reads: the accelerator to start with, internet access."""

KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def address() -> str:
    """Return the address of the repository from pyproject.toml; '' while it has none."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project.get("urls", {}).get("Repository", ""))


def cells_of(source: Path, platform: str) -> Iterator[nbformat.NotebookNode]:
    """Yield the cells of a source for a platform, included files in their place."""
    for cell in jupytext.read(source, fmt="py:percent").cells:
        tags = cell.metadata.pop("tags", [platform])
        if "include" in tags:
            yield from cells_of(HERE / cell.source, platform)
        elif platform in tags:
            yield cell


def notebook(source: str, platform: str) -> nbformat.NotebookNode:
    """Return the notebook of a source for a platform, 'colab' or 'kaggle'."""
    cells = []
    for cell in cells_of(HERE / f"{source}.py", platform):
        cell.source = cell.source.replace('ADDRESS = ""', f'ADDRESS = "{address()}"')
        cells.append({**cell, "id": f"cell-{len(cells) + 1}"})
    metadata = {**METADATA[source, platform], **KERNEL}
    made = nbformat.from_dict({"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": cells})
    nbformat.validate(made)
    return made


def path(source: str, platform: str) -> Path:
    """Return the path of a notebook."""
    return HERE / f"{source}_{platform}.ipynb"


def text(source: str, platform: str) -> str:
    """Return the file content of a notebook."""
    return nbformat.writes(notebook(source, platform)) + "\n"


if __name__ == "__main__":
    for source, platform in METADATA:
        path(source, platform).write_text(text(source, platform), encoding="utf-8")
