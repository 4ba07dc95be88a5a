"""docs/reliability.md: each row of its tables names a test, and the named tests exist."""

import ast
import re
from pathlib import Path

import pytest

from tests.payloads import MARKUP, PAYLOADS, STEERING

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| input |", "| what |"))]


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_test_that_the_page_names_exists(file, name):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_tables_of_input_and_files_names_a_test():
    tables = PAGE[PAGE.index("## Bad input") :]
    rows = [line for line in ROWS if line in tables]
    assert len(rows) > 40
    for row in rows:
        assert "`tests/" in row, row


def test_there_are_enough_payloads_of_either_kind():
    assert len(MARKUP) >= 30
    assert len(STEERING) >= 30
    assert len(set(PAYLOADS.values())) == len(MARKUP) + len(STEERING)
