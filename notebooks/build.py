"""Write the two notebooks from their common source, chargpt.py: python notebooks/build.py.

The source is a percent script, which jupytext opens as a notebook. A cell tagged `colab` or `kaggle` is only in that
notebook; every other cell is in both. The notebooks have no outputs, and the result is deterministic.
"""

import tomllib
from pathlib import Path

import jupytext
import nbformat

HERE = Path(__file__).parent
SOURCE = HERE / "chargpt.py"
METADATA = {
    "colab": {"accelerator": "TPU", "colab": {"gpuType": "V5E1"}},
    "kaggle": {"kaggle": {"accelerator": "tpuV5e8", "isInternetEnabled": True}},
}
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def address() -> str:
    """Return the address of the repository from pyproject.toml; '' while it has none."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project.get("urls", {}).get("Repository", ""))


def notebook(platform: str) -> nbformat.NotebookNode:
    """Return the notebook for a platform, 'colab' or 'kaggle'."""
    cells = []
    for cell in jupytext.read(SOURCE, fmt="py:percent").cells:
        cell.source = cell.source.replace('ADDRESS = ""', f'ADDRESS = "{address()}"')
        if platform in cell.metadata.pop("tags", [platform]):
            cells.append({**cell, "id": f"cell-{len(cells) + 1}"})
    metadata = {**METADATA[platform], **KERNEL}
    made = nbformat.from_dict({"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": cells})
    nbformat.validate(made)
    return made


def path(platform: str) -> Path:
    """Return the path of a platform's notebook."""
    return HERE / f"chargpt_{platform}.ipynb"


def text(platform: str) -> str:
    """Return the file content of a platform's notebook."""
    return nbformat.writes(notebook(platform)) + "\n"


if __name__ == "__main__":
    for platform in METADATA:
        path(platform).write_text(text(platform), encoding="utf-8")
