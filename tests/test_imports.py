"""The arrows between the files: who may know whom, read from the source with ast."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import chargpt_jax

PACKAGE = Path(chargpt_jax.__file__).parent
FILES = {path.stem: path for path in sorted(PACKAGE.glob("*.py"))}
CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}

EVERYONE = set(FILES) - {"__init__", "main"}

MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    # text -> tokens -> batches
    "download": {"config"},
    "corpus": {"config", "download"},
    "tokenizer": {"config"},
    "bits": set(),
    "batches": {"bits", "config"},
    # batches -> logits -> TrainState -> checkpoint
    "dropout": {"bits"},
    "attention": {"bits", "devices", "dropout"},
    "model": {"attention", "bits", "dropout", "config"},
    "optimizer": {"config"},
    "step": {"batches", "devices", "dropout"},
    "events": set(),
    "flops": {"config"},
    "profile": {"events"},
    "lr_finder": {"config", "events"},
    "devices": {"config"},
    "checkpoint": {"step"},
    # files of others
    "array_file": {"config"},
    "torch_file": {"array_file", "config"},
    "hugging_face": {"array_file", "config", "tokenizer"},
    "original": {"array_file", "config", "tokenizer", "torch_file"},
    "interchange": {
        *("array_file", "hugging_face", "original", "checkpoint", "config", "corpus"),
        *("devices", "optimizer", "step", "tokenizer", "workdir"),
    },
    # checkpoint -> generation -> metrics -> pictures
    "metrics": {"tokenizer"},
    "generate": {"config", "metrics"},
    "theme": set(),
    "subline": {"theme"},
    "plots": {"theme"},
    "report": set(),
    "workdir": {"config", "tokenizer"},
    "figures": {"config", "workdir"},
    "samples": {"metrics", "subline"},
    "progress": {"plots", "events"},
    "flags": {"config"},
    # where the pieces meet
    "assembly": {"batches", "config", "devices", "model", "optimizer", "step", "workdir"},
    "stages": EVERYONE - {"api", "compile", "profile", "progress", "stages"},
    "compile": {"assembly", "config", "devices", "generate", "model", "optimizer", "step"},
    "api": EVERYONE - {"api"},
    "main": {"config", "flags"},
    "__init__": set(),
}

LATER: dict[str, set[str]] = {
    "main": {"config", "api", "profile", "progress", "events", "devices", "corpus", "workdir", "compile"},
    "__init__": {"api", "config", "progress"},
}
"""What may be imported inside a function, or for the type checker alone, besides."""

SETTLED = sorted(set(FILES) & set(MAY_IMPORT))


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Yield every module that a file imports, dotted, and whether that happens when the file is loaded."""

    def visit(node: ast.AST, now: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, now) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module == "chargpt_jax":
                yield from ((f"chargpt_jax.{alias.name}", now) for alias in node.names)
            else:
                yield node.module or "", now
        for child in ast.iter_child_nodes(node):
            later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
                isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and child in node.body
            )
            yield from visit(child, now and not later)

    yield from visit(tree, True)


def own(name: str, when_loaded: bool) -> set[str]:
    """Return the files of the package that a file imports when loaded, or later."""
    return {
        module.split(".")[1]
        for module, now in imports(TREES[name])
        if module.startswith("chargpt_jax.") and now == when_loaded
    }


def test_the_reader_of_imports_tells_now_from_later():
    code = "import a\nfrom b.c import d\nfrom chargpt_jax import e, f\n"
    code += "if TYPE_CHECKING:\n    import g\nelse:\n    import h\n"
    code += "def one():\n    import i\n"
    code += "class Two:\n    import j\n    def three(self):\n        from chargpt_jax.k import l\n"
    found = list(imports(ast.parse(code)))
    assert {name for name, now in found if now} == {"a", "b.c", "chargpt_jax.e", "chargpt_jax.f", "h", "j"}
    assert {name for name, now in found if not now} == {"g", "i", "chargpt_jax.k"}


def test_every_file_has_its_place_in_the_table():
    assert set(FILES) - set(MAY_IMPORT) == set(), "say in MAY_IMPORT what the new file may know"


@pytest.mark.parametrize("name", SETTLED)
def test_a_file_imports_only_along_the_arrows(name):
    assert own(name, when_loaded=True) <= MAY_IMPORT[name]
    assert own(name, when_loaded=False) <= MAY_IMPORT[name] | LATER.get(name, set())


@pytest.mark.parametrize("name", SETTLED)
def test_no_file_is_reached_from_itself(name):
    """Imports inside functions count as well, but for the lazy names of the package itself."""
    reached: set[str] = set()
    ahead = [name]
    while ahead:
        new = (own(file := ahead.pop(), True) | own(file, False)) & set(FILES) - {"__init__"} - reached
        reached |= new
        ahead += new
    assert name not in reached


@pytest.mark.parametrize("name", [name for name in SETTLED if name not in ("main", "__init__")])
def test_nothing_of_the_package_knows_main_or_the_package_itself(name):
    modules = {module for module, _ in imports(TREES[name])}
    assert not modules & {"chargpt_jax", "chargpt_jax.main"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_file_imports_config_and_nothing_else(path):
    assert {name for name, _ in imports(ast.parse(path.read_text(encoding="utf-8")))} <= {"chargpt_jax.config"}


def test_there_is_no_utils():
    assert not {"utils", "util", "helpers", "common", "misc"} & set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_no_import_is_relative(name):
    assert not [node for node in ast.walk(TREES[name]) if isinstance(node, ast.ImportFrom) and node.level]


@pytest.mark.parametrize("name", FILES)
def test_no_other_framework_and_no_pickle_is_imported(name):
    roots = {module.split(".")[0] for module, _ in imports(TREES[name])}
    assert not roots & {"tensorflow", "torch", "equinox", "pickle", "cloudpickle", "dill", "shelve", "marshal"}


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_evaluated_or_unpickled(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__", "os.system")
            assert not called.startswith(("pickle.", "builtins."))
            allowed = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert allowed.get("allow_pickle", "False") == "False"
            assert allowed.get("shell", "False") == "False"


def test_a_command_line_is_read_without_loading_jax():
    """So that a mistyped command is answered at once."""
    files = "config, download, corpus, tokenizer, workdir, events, lr_finder, plots, progress, main"
    code = f"import sys; from chargpt_jax import {files}; print(*({{'jax', 'flax', 'optax'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
