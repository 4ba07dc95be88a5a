"""Count the package's files, imports, long functions and loose types, to compare two checkouts.

    python -m benchmarks.house              # this checkout
    python -m benchmarks.house A B          # two checkouts, side by side

The source is only parsed, never imported, so a checkout needs no environment of its own. An arrow is one file (or one
folder) that imports another, also where the import is inside a function or for types only. A file directly in
chargpt_jax/ counts as a folder of its own. A signature is loose if an annotation of its arguments or of its result
contains `Any`.
"""

import argparse
import ast
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "chargpt_jax"
ROOT = Path(__file__).parent.parent
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 60
SHOWN = 5
"""How many of the longest files and functions are listed."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class House:
    """What was counted in one checkout; files and functions by their names within the package."""

    files: dict[str, int]  # file -> lines
    functions: dict[str, int]  # file:function -> lines
    arrows: frozenset[tuple[str, str]]  # (importing file, imported file)
    signatures: int
    loose: tuple[str, ...]  # file:function of the signatures that contain Any

    @property
    def folders(self) -> dict[str, int]:
        """Number of files by folder; the files directly in the package are under ''."""
        return dict(sorted(Counter(name.rpartition("/")[0] for name in self.files).items()))

    @property
    def folder_arrows(self) -> frozenset[tuple[str, str]]:
        """Pairs of folders (importing, imported) that differ."""
        pairs = {(_folder(one), _folder(other)) for one, other in self.arrows}
        return frozenset(pair for pair in pairs if pair[0] != pair[1])


def _folder(name: str) -> str:
    """Return the first folder of a file's name, or the name of a file that is in none."""
    return name.partition("/")[0]


def imported(tree: ast.Module, package: list[str]) -> Iterator[list[str]]:
    """Yield the dotted names, as lists, that a module of `package` (its folder) imports from chargpt_jax.

    For `from chargpt_jax.x import y` both x.y and x are candidates: y may be a module or an object in x.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                yield [*base, alias.name]


def functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """Yield every def with its dotted name, methods and inner functions included."""

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}{child.name}"
                if not isinstance(child, ast.ClassDef):
                    yield name, child
                yield from visit(child, f"{name}.")
            else:
                yield from visit(child, prefix)

    yield from visit(tree, "")


def is_loose(function: Function) -> bool:
    """Whether an annotation of the arguments or of the result contains Any, also inside a string annotation."""
    spec = function.args
    arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
    annotations = [annotation for annotation in (*(a.annotation for a in arguments), function.returns) if annotation]
    for node in (node for annotation in annotations for node in ast.walk(annotation)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if "Any" in {n.id for n in ast.walk(ast.parse(node.value)) if isinstance(n, ast.Name)}:
                return True
        elif isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in ("Any", "typing.Any"):
            return True
    return False


def count(root: Path) -> House:
    """Count the package of the checkout in `root`."""
    folder = root / PACKAGE
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.py"))}
    if not paths:
        raise SystemExit(f"{root} is no checkout: it has no {PACKAGE}/*.py.")
    modules = {tuple(_parts(name)): name for name in paths}
    files, lengths, arrows, signatures, loose = {}, {}, set(), 0, []
    for name, path in paths.items():
        text = path.read_text(encoding="utf-8")
        files[name] = text.count("\n")
        tree = ast.parse(text, name)
        for found in imported(tree, [PACKAGE, *name.split("/")[:-1]]):
            target = modules.get(tuple(found)) or modules.get(tuple(found[:-1]))
            if target and target not in (name, "__init__.py"):
                arrows.add((name, target))
        for label, function in functions(tree):
            signatures += 1
            lengths[f"{name}:{label}"] = (function.end_lineno or 0) - function.lineno + 1
            if is_loose(function):
                loose.append(f"{name}:{label}")
    return House(files, lengths, frozenset(arrows), signatures, tuple(loose))


def _parts(name: str) -> list[str]:
    """Return the dotted name of a file's module, as a list."""
    parts = name.removesuffix(".py").split("/")
    return [PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)]


def report(house: House) -> dict[str, str]:
    """Return the figures to show, by their labels."""
    inside = {name: n for name, n in house.folders.items() if name}
    return {
        "files": str(len(house.files)),
        "folders": str(len(inside)),
        "files directly in the package": str(house.folders.get("", 0)),
        "most files in a folder": str(max(house.folders.values())),
        "arrows between files": str(len(house.arrows)),
        "arrows between folders": str(len(house.folder_arrows)),
        "lines": f"{sum(house.files.values()):,}",
        f"files over {MAX_FILE_LINES} lines": str(sum(n > MAX_FILE_LINES for n in house.files.values())),
        "functions": str(house.signatures),
        f"functions over {MAX_FUNCTION_LINES} lines": str(
            sum(n > MAX_FUNCTION_LINES for n in house.functions.values())
        ),
        "signatures with Any": f"{len(house.loose)} of {house.signatures}",
    }


def longest(lengths: dict[str, int]) -> list[str]:
    """Return lines that name the longest, longest first."""
    return [f"- {name}: {lengths[name]}" for name in sorted(lengths, key=lambda name: -lengths[name])[:SHOWN]]


def details(house: House) -> list[str]:
    """Return lines with the files of each folder and the longest files and functions."""
    folders = [f"- {name or 'directly in the package'}: {n}" for name, n in house.folders.items()]
    loose = Counter(name.partition(":")[0] for name in house.loose)
    return [
        *("", "Files in each folder:", *folders),
        *("", "Longest files, in lines:", *longest(house.files)),
        *("", "Longest functions, in lines:", *longest(house.functions)),
        *("", "Most signatures with Any:", *longest(loose)),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table with a column for each checkout, then the details of the last one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkouts", nargs="*", type=Path, default=[ROOT], help="folders of checkouts; default: this one"
    )
    folders: list[Path] = parser.parse_args(argv).checkouts
    houses = [count(folder) for folder in folders]
    columns = [report(house) for house in houses]
    print("| | " + " | ".join(folder.resolve().name for folder in folders) + " |")
    print("|---|" + "---:|" * len(folders))
    for label in columns[0]:
        print(f"| {label} | " + " | ".join(column[label] for column in columns) + " |")
    print("\n".join(details(houses[-1])))


if __name__ == "__main__":
    main()
