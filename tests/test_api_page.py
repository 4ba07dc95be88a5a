"""The page of the Python interface is built from the docstrings, without a warning."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import chargpt_jax

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("pdoc") is None, reason="needs pdoc")
def test_page_has_every_public_name_and_builds_without_a_warning(tmp_path):
    command = [sys.executable, str(ROOT / "docs" / "build_api.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "chargpt_jax.html").read_text(encoding="utf-8")
    assert [name for name in chargpt_jax.__all__ if f'id="{name}"' not in page] == []
