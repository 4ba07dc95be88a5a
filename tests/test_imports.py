"""Allowed imports between the folders of the package, and forbidden code; the source is parsed with ast."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import chargpt_jax

PACKAGE = Path(chargpt_jax.__file__).parent
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
"""Every file by its dotted name below the package: 'config', 'data.corpus'; a folder's own __init__ is the folder."""

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Yield every module that a file imports, dotted, and whether that happens when the file is loaded."""

    def visit(node: ast.AST, now: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, now) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.split(".")[0] == "chargpt_jax":  # a name imported from a folder may be a file in it
                files = {f"{module}.{alias.name}".removeprefix("chargpt_jax.") for alias in node.names} & set(FILES)
                yield from ((f"chargpt_jax.{file}", now) for file in files)
            if module != "chargpt_jax":
                yield module, now
        for child in ast.iter_child_nodes(node):
            later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
                isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and child in node.body
            )
            yield from visit(child, now and not later)

    yield from visit(tree, True)


@functools.cache
def own(name: str, when_loaded: bool) -> set[str]:
    """Return the files of the package that a file imports when loaded, or later."""
    return {
        module.removeprefix("chargpt_jax.")
        for module, now in imports(TREES[name])
        if module.startswith("chargpt_jax.") and now == when_loaded
    }


def test_imports_at_load_time_and_later_are_distinguished():
    code = "import a\nfrom b.c import d\nfrom chargpt_jax import config, main\n"
    code += "if TYPE_CHECKING:\n    import g\nelse:\n    import h\n"
    code += "def one():\n    import i\n"
    code += "class Two:\n    import j\n    def three(self):\n        from chargpt_jax.k import l\n"
    found = list(imports(ast.parse(code)))
    assert {name for name, now in found if now} == {"a", "b.c", "chargpt_jax.config", "chargpt_jax.main", "h", "j"}
    assert {name for name, now in found if not now} == {"g", "i", "chargpt_jax.k"}


MAY_IMPORT = {
    **dict.fromkeys(("errors", "events", "hash_rng", "atomic"), ""),
    "config": "errors",
    "data": "atomic config errors hash_rng",
    "devices": "config errors",
    "pictures": "errors events",
    "ops": "devices hash_rng",
    "model": "config hash_rng ops",
    "storage": "atomic config data errors",
    "training": "config data devices errors events hash_rng model ops storage",
    "generation": "config data devices errors events hash_rng model ops pictures storage training",
    "interop": "atomic config data devices errors pictures storage training",
    "analysis": "config errors generation model ops pictures",
    "results": "config data devices errors events generation model pictures storage training",
    "lab": "config data devices errors events generation interop model ops pictures results storage training",
    "trackers": "config errors events",
    "fine_tuning": "config data devices errors generation storage training",
    "backups": "config errors events storage training",
    "api": "analysis backups config data devices errors events fine_tuning generation interop lab results storage "
    "training",
    "selftest": "config data errors storage training",
    "compile": "config devices errors generation model ops training",
    "cli": "api compile config data devices errors events generation lab pictures results selftest storage "
    "trackers training",
    "main": "cli devices errors",
    "__init__": "api cli config devices errors",
}
"""The folders, or files at the top, that a folder may import, at any time: docs/architecture.md explains the order."""


def folder(name: str) -> str:
    """Return the folder of a file, or the file itself at the top of the package."""
    return name.split(".")[0]


def test_folders_import_only_what_the_table_allows():
    assert set(MAY_IMPORT) == {folder(name) for name in FILES}
    found = {(name, folder(other)) for name in FILES for other in own(name, True) | own(name, False)}
    against = {(name, other) for name, other in found if other not in (folder(name), *MAY_IMPORT[folder(name)].split())}
    assert against == set()


def test_import_table_has_no_cycle():
    order = list(MAY_IMPORT)
    for name, others in MAY_IMPORT.items():
        assert all(order.index(other) < order.index(name) for other in others.split())


def test_folders_have_at_most_ten_files():
    folders = [path.parent for path in FILES.values()]
    assert max(folders.count(name) - 1 for name in set(folders)) <= 10


DEVICE_WORDS = re.compile(r"platform|on_cpu|default_backend|custom_vjp|.*\bxla_.*", re.DOTALL)
"""Names in code that queries the device, or is written for one device."""

DEVICE_FREE = ("model", "data", "training", "generation", "storage", "pictures")
DEVICE_WORDS_TO_REMOVE: set[str] = set()
"""Files that still have such names."""


def device_words(tree: ast.AST) -> set[str]:
    """Return the names and strings of a file that depend on the device.

    Docstrings, module paths and `sys.platform`, the operating system, do not count.
    """
    found: set[object] = set()
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.platform":
            continue
        names = [getattr(node, key, None) for key in ("id", "attr", "arg", "name", "asname")]
        found.update(names)
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            found.add(node.value)
    return {word for word in found if isinstance(word, str) and DEVICE_WORDS.fullmatch(word)}


def test_device_words_are_found_in_code_and_not_in_docstrings():
    code = (
        'def f(platform): return jax.default_backend(), {"xla_cpu_x": 1}, g(on_cpu=1)\n@jax.custom_vjp\ndef g(): pass\n'
    )
    assert device_words(ast.parse(code)) == {"platform", "default_backend", "xla_cpu_x", "on_cpu", "custom_vjp"}
    assert device_words(ast.parse("from jax import custom_vjp")) == {"custom_vjp"}
    code = '"""platform"""\nfrom chargpt_jax.devices.platform import compute_dtype\nplatforms = sys.platform\n'
    assert device_words(ast.parse(code)) == set()


def test_only_ops_and_devices_ask_for_the_device():
    found = {name for name, tree in TREES.items() if folder(name) in DEVICE_FREE and device_words(tree)}
    assert found <= DEVICE_WORDS_TO_REMOVE


@pytest.mark.parametrize("name", FILES)
def test_imports_have_no_cycle(name):
    """Imports inside functions count as well, except the lazy names of the package itself."""
    reached: set[str] = set()
    ahead = [name]
    while ahead:
        new = (own(file := ahead.pop(), True) | own(file, False)) & set(FILES) - {"__init__"} - reached
        reached |= new
        ahead += new
    assert name not in reached


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("main", "__init__")])
def test_no_file_imports_main_or_the_package(name):
    modules = {module for module, _ in imports(TREES[name])}
    assert not modules & {"chargpt_jax", "chargpt_jax.main"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_file_imports_config_and_nothing_else(path):
    assert {name for name, _ in imports(ast.parse(path.read_text(encoding="utf-8")))} <= {"chargpt_jax.config"}


def test_there_is_no_utils():
    assert not {"utils", "util", "helpers", "common", "misc"} & {part for name in FILES for part in name.split(".")}


@pytest.mark.parametrize("name", FILES)
def test_no_import_is_relative(name):
    assert not [node for node in ast.walk(TREES[name]) if isinstance(node, ast.ImportFrom) and node.level]


FOREIGN = {"tensorflow", "torch", "equinox"}
RUNNERS = {
    *("pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "yaml"),
    *("ctypes", "cffi", "code", "codeop", "pty", "imp", "pkgutil", "zipimport"),
}
"""Modules that can run code from their input."""

RUNS = re.compile(
    r"(eval|exec|compile|__import__|breakpoint|os\.(system|popen|exec\w+|spawn\w+|posix_spawn\w*)"
    r"|runpy\..*|subprocess\.get\w*output|torch\.load|builtins\..*|__builtins__\b.*|importlib\.(?!metadata\b).*)"
)
"""Functions that run or import something by name."""

HIDDEN = {"__builtins__", "__globals__", "__subclasses__", "__loader__", "__code__", "__reduce__", "exec_module"}
"""Attributes through which these functions can be reached."""

MAY_RUN = {
    # The lazy names of the package, and the user's own --config.
    "__init__": {"importlib.import_module"},
    "config.files": {"importlib.util.spec_from_file_location", "importlib.util.module_from_spec", ".exec_module"},
    "compile.topology": {"importlib.util.find_spec"},  # whether libtpu is installed
    "selftest.bench": {"runpy.run_module"},  # the command itself, in a child
}


def running(tree: ast.AST) -> set[str]:
    """Return the code in a file that could run or import something by name, or load an unsafe format."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            name = ast.unparse(node)
            # A method or module may have the name compile; a call of the builtin is forbidden.
            if RUNS.fullmatch(name) and not (name == "compile" and "compile" in _imported(tree)):
                found.add(name)
            if isinstance(node, ast.Attribute) and node.attr in HIDDEN:
                found.add(f".{node.attr}")
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{a.name}" for a in node.names if RUNS.fullmatch(f"{node.module}.{a.name}")}
        if isinstance(node, ast.Call):
            found |= _dangerous_call(node)
    return found - {"importlib.util"}


def _imported(tree: ast.AST) -> set[str]:
    return {a.asname or a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names}


def _dangerous_call(node: ast.Call) -> set[str]:
    called = ast.unparse(node.func)
    given = {k.arg: ast.unparse(k.value) for k in node.keywords}
    found = set()
    if called in ("np.load", "numpy.load", "jnp.load") and given.get("allow_pickle") != "False":
        found.add(called)
    if given.get("allow_pickle", "False") != "False" or given.get("shell", "False") != "False":
        found.add(f"{called} with allow_pickle or shell")
    if called == "getattr" and isinstance(node.args[1], ast.Constant) and str(node.args[1].value).startswith("__"):
        found.add("getattr of a hidden name")
    return found


@pytest.mark.parametrize("name", FILES)
def test_no_framework_or_unsafe_loader_is_imported(name):
    roots = {module.split(".")[0] for module, _ in imports(TREES[name])}
    assert not roots & (FOREIGN | RUNNERS)


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_run_or_imported_by_its_name_but_the_users_own_config(name):
    assert running(TREES[name]) == MAY_RUN.get(name, set())


def test_the_users_config_is_run_in_one_place():
    (function,) = [
        node
        for node in ast.walk(TREES["config.files"])
        if isinstance(node, ast.FunctionDef) and ".exec_module" in running(node)
    ]
    assert function.name == "load_config"
    calls = {name: [n for n in ast.walk(tree) if isinstance(n, ast.Call)] for name, tree in TREES.items()}
    callers = [name for name in calls if any(ast.unparse(call.func) == "load_config" for call in calls[name])]
    assert callers == ["cli.command_line"]


def test_dynamic_imports_have_constant_names():
    named = {"find_spec": "'libtpu'", "run_module": "'chargpt_jax.main'"}
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in named:
                assert ast.unparse(node.args[0]) == named[node.func.attr]


def test_the_package_gives_only_its_own_names_on_first_use():
    assert set(chargpt_jax._MODULES.values()) <= set(FILES)
    for name in ("os", "api", "__path__", "config.os", "importlib"):
        with pytest.raises(AttributeError):
            chargpt_jax.__getattr__(name)


@pytest.mark.parametrize(
    "code",
    [
        *("eval('1')", "exec(x)", "f = eval", "compile(x, '', 'exec')", "__import__('os')", "breakpoint()"),
        *("os.system('x')", "os.popen('x')", "os.execv('x', [])", "os.spawnl(1)", "from os import system"),
        *("importlib.import_module('x')", "from importlib import import_module", "importlib.reload(x)"),
        *("importlib.util.spec_from_file_location('x', 'y')", "spec.loader.exec_module(m)"),
        *("np.load(path)", "np.load(path, allow_pickle=True)", "np.load(path, allow_pickle=x)", "torch.load(path)"),
        *("subprocess.run('x', shell=True)", "subprocess.getoutput('x')", "subprocess.Popen(x, shell=y)"),
        *("getattr(x, '__globals__')", "f.__globals__", "().__class__.__subclasses__()", "__builtins__['eval']"),
        *("builtins.eval", "getattr(__builtins__, x)", "runpy.run_path(x)"),
    ],
)
def test_code_that_runs_something_is_found(code):
    assert running(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        *("re.compile(x)", "jitted.lower().compile()", "from chargpt_jax import compile\ncompile.for_tpu(x)"),
        *("np.load(path, allow_pickle=False)", "subprocess.run([x])", "importlib.metadata.version('x')"),
        *("evaluate(x)", "model.eval()", "getattr(config, name)", "import importlib.util"),
    ],
)
def test_harmless_code_is_not_reported(code):
    assert not running(ast.parse(code))


def test_a_command_line_is_read_without_loading_jax():
    """A mistyped command is answered without waiting for JAX."""
    files = "config data.download data.corpus data.tokenizer storage.workdir events pictures.plots.losses cli.commands "
    files += "cli.progress main"
    assert set(files.split()) <= set(FILES)
    loads = "; ".join(f"import chargpt_jax.{file}" for file in files.split())
    code = f"import sys; {loads}; print(*({{'jax', 'flax', 'optax'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    code = "import sys, chargpt_jax.cli.commands; print(*({'jax', 'numpy', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
