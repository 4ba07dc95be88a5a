"""Every package that chargpt_jax imports is declared in pyproject.toml, and every declared one is imported."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    "charset-normalizer": "charset_normalizer",
    "ml-collections": "ml_collections",
    "absl-py": "absl",
    "orbax-checkpoint": "orbax",
}
"""{package: its module, if the names differ}."""

TRACKERS = {"tensorboardX", "trackio", "wandb"}
OPTIONAL = {"IPython", "jax_plugins", "grain", *TRACKERS}
"""Packages that only a notebook imports, where they are always installed, or that are extras: JAX's CUDA plugin, Grain,
and trackers."""


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.split(r"[\s<>=!~\[;]", line)[0] for line in project["dependencies"]]
    return {MODULES.get(name, name) for name in names}


def imported(code: str) -> set[str]:
    """Return the top-level modules that code imports anywhere, without those of Python and of this repository."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found - set(sys.stdlib_module_names) - {"chargpt_jax"}


def test_imported_sees_imports_of_every_kind():
    code = "import a.b, os\nfrom c.d import e\nimport chargpt_jax.config\n"
    code += "def f():\n    import g\n    from h import i as j\n"
    assert imported(code) == {"a", "c", "g", "h"}


def test_every_import_is_declared_and_every_dependency_imported():
    files = [*(ROOT / "chargpt_jax").rglob("*.py"), *(ROOT / "configs").glob("*.py")]
    found = set().union(*(imported(path.read_text(encoding="utf-8")) for path in files))
    assert found - OPTIONAL == declared()


@pytest.mark.parametrize("module", ["grain", *sorted(TRACKERS)])
def test_every_optional_package_is_an_extra(module):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert any(line.startswith(f"{module}>=") for lines in project["optional-dependencies"].values() for line in lines)


@pytest.mark.parametrize("module", sorted(MODULES.values()))
def test_every_renamed_module_is_still_declared(module):
    assert module in declared()


def test_every_folder_of_the_package_is_in_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = [path.parent.relative_to(ROOT) for path in (ROOT / "chargpt_jax").rglob("__init__.py")]
    assert sorted(listed) == sorted([".".join(folder.parts) for folder in folders] + ["chargpt_jax.configs"])


def test_every_file_of_the_package_that_is_not_python_is_in_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    shipped = {
        path for name, globs in listed.items() for each in globs for path in ROOT.joinpath(*name.split(".")).glob(each)
    }
    files = {
        path for path in (ROOT / "chargpt_jax").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert ROOT / "chargpt_jax" / "pictures" / "page" / "model.js" in files
    assert files <= shipped
