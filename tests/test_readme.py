"""The README and the pages of docs/: commands, links, modes, configs, folders and files that they name exist."""

import re
import tomllib
from pathlib import Path

import pytest

from chargpt_jax.cli.flags import MODES, define_flags
from chargpt_jax.config.files import load_config
from chargpt_jax.config.saved import flatten
from tests.test_imports import MAY_IMPORT

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_readme_has_at_most_200_lines():
    assert len(README.splitlines()) <= 200


def test_ci_runs_exactly_the_readmes_test_command():
    (command,) = [block.strip() for block in BLOCKS if "pytest" in block]
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_ci_also_runs_every_slow_test():
    """The README's command leaves them out (addopts in pyproject.toml)."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (folders,) = re.findall(r"^fast_compiled=\(([^)]*)\)$", script, re.MULTILINE)
    assert "generation" in folders.split()
    assert all((ROOT / "tests" / folder).exists() for folder in folders.split())
    elsewhere = "tests/generation/test_generate.py"
    assert [line for line in script.splitlines() if line.startswith("python -m pytest")] == [
        f'python -m pytest -n auto -m slow "${{fast_compiled[@]/#/tests/}}" --ignore={elsewhere}',
        'python -m pytest -n auto -m slow --ignore=tests/ops "${fast_compiled[@]/#/--ignore=tests/}"',
        f'python -m pytest -n auto -m "" tests/ops {elsewhere}',
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files_and_headings(page):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8")):
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}, anchor


def test_every_mode_is_described():
    described = re.findall(r"^\| `(\w+)`(?: \(default\))? \|", README, re.MULTILINE)
    assert [name for name in described if name in MODES] == list(MODES)


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "configs").glob("[a-z]*.py")])
def test_every_config_is_in_the_table_and_opens_with_its_command(name):
    assert f"| `{name}` |" in README
    text = (ROOT / "configs" / f"{name}.py").read_text(encoding="utf-8")
    assert f"--config=configs/{name}.py" in text.split('"""')[1]
    assert load_config(name)


WITH_COMMANDS = [
    "README.md",
    *("docs/recipes.md", "docs/look.md", "docs/export.md", "docs/texts.md", "docs/scaling.md", "docs/devices.md"),
]
OTHER_PROGRAMS = ("pip install ", "tensorboard ", "modal ", "`python -m bench", "python -m bench")


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_flags_and_fields_in_commands_exist(page):
    flags, fields = set(define_flags()) | {"config"}, set(flatten(load_config("small")))
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    own = "\n".join(line for line in lines if not line.startswith(OTHER_PROGRAMS))
    for word in re.findall(r"--([\w.]+)", own):
        name = word.rstrip(".")
        if name.startswith("config."):
            assert name.removeprefix("config.") in fields | {"section.field"}, name
        else:
            assert name in flags, name


def test_no_number_is_left_open():
    names = {"LR_FINDER", "XLA_FLAGS"}  # not placeholders
    assert set(re.findall(r"\b[A-Z]+_[A-Z]+\b", README)) <= names


def test_citation_has_the_version_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {project['version']}\n" in citation


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_architecture_lists_exactly_the_files_of_every_folder():
    block = ARCHITECTURE[ARCHITECTURE.index("    chargpt_jax/\n") : ARCHITECTURE.index("`configs/` holds")]
    listed: dict[str, set[str]] = {}
    for line in block.splitlines()[1:]:
        if found := re.match(r" {6}(\w+)/ ", line):
            top = found[1]
            folder = listed.setdefault(top, set())
        elif found := re.match(r" {8}(\w+)/ ", line):
            folder = listed.setdefault(f"{top}/{found[1]}", set())
        elif re.match(r" {6}\w+\.py ", line) or not line.strip():
            continue
        else:
            folder |= set(re.findall(r"\w+", re.sub(r"\(.*?\)", "", line)))
    package = ROOT / "chargpt_jax"
    there = {
        path.parent.relative_to(package).as_posix(): {file.stem for file in path.parent.glob("[a-z]*.py")}
        for path in package.glob("*/**/__init__.py")
    }
    assert listed == there
    files = set(re.findall(r"^ {6}(\w+)\.py ", block, re.MULTILINE))
    assert files == {path.stem for path in package.glob("[a-z]*.py")}


def test_files_and_names_that_architecture_locates_exist():
    table = ARCHITECTURE[ARCHITECTURE.index("## Where is") : ARCHITECTURE.index("## Who may import")]
    for path, name in re.findall(r"`([\w/]+\.py)`(?:: `(\w+)`)?", table):
        file = ROOT / "chargpt_jax" / path
        assert file.exists(), path
        assert not name or re.search(rf"^(?:def|class) {name}\b", file.read_text(encoding="utf-8"), re.MULTILINE), name


def test_architecture_has_the_table_of_imports():
    rows = re.findall(r"^\| (`.+) \| (.+) \|$", ARCHITECTURE[ARCHITECTURE.index("## Who may import") :], re.MULTILINE)
    words = re.compile(r"`(\w+)`")
    listed = {name: " ".join(words.findall(others)) for names, others in rows for name in words.findall(names)}
    assert listed == MAY_IMPORT
