"""Set up one test session: own caches, one CPU device, fast compilation, the order of the files.

The caches are temporary, so the suite neither reads nor writes a user's files. All processes share them, and no program
is compiled twice. The variables are set before JAX is imported; child processes inherit them.
"""

import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

FIRST = "CHARGPT_TESTS" not in os.environ
"""Whether this is the first process of the session. The others (workers, child processes) use its caches."""

FOLDER = tempfile.mkdtemp(prefix="chargpt-tests-") if FIRST else os.environ["CHARGPT_TESTS"]
os.environ["CHARGPT_TESTS"] = FOLDER
os.environ["CHARGPT_CACHE"] = os.path.join(FOLDER, "downloads")
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(FOLDER, "programs")
# One device on every machine. Tests that need several set this flag for a child process.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
# Without LLVM's optimisations and with XLA's simpler code generator a program compiles much faster, and compiling is
# most of the suite's work. The program computes the same function with other rounding. .ci/run sets
# CHARGPT_TESTS_OPTIMIZED for many slow tests and for ops/, so that these are also tested as users compile them.
if os.environ.get("CHARGPT_TESTS_OPTIMIZED") != "1":
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
    major, minor = map(int, version("jaxlib").split(".")[:2])
    if (major, minor) < (0, 11):  # later ones do not know this flag, and would end the process
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


LONGEST = (
    "test_notebook_resume.py",
    "test_notebooks.py",
    "generation/samplers/test_in_generation.py",
    "generation/test_generate.py",
    "training/test_processes.py",
    "devices/test_ending.py",
    "devices/test_layout.py",
    "training/test_stages.py",
    "model/test_gpt.py",
    "test_api.py",
    "test_benchmarks.py",
)
"""The files that take the longest, longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files: with -n, a long file that begins last would keep one worker busy at the end."""
    folder = Path(__file__).parent
    ranks = {folder / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the caches at the end of the session."""
    if FIRST:
        shutil.rmtree(FOLDER, ignore_errors=True)
