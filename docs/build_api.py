"""Write the page of the Python interface from the docstrings, with pdoc.

pip install -e ".[docs]" && python docs/build_api.py site/
"""

import sys
import warnings
from pathlib import Path

import pdoc

import chargpt_jax


def build(folder: Path) -> Path:
    """Write the page, and return its path; a warning of pdoc is an error."""
    for (
        name
    ) in chargpt_jax.__all__:  # the package loads its names when they are used: pdoc looks for them in the module
        vars(chargpt_jax)[name] = getattr(chargpt_jax, name)
    pdoc.render.configure(docformat="google", include_undocumented=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc("chargpt_jax", output_directory=folder)
    return folder / "chargpt_jax.html"


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
