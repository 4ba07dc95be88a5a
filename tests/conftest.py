"""Caches of the suite's own, made for one session: nothing of a user's is read or written, and no program is compiled
twice, however often a test starts a run afresh. Set before JAX is imported, so that child processes share them."""

import os
import shutil
import tempfile
from collections import Counter

import pytest

FIRST = "CHARGPT_TESTS" not in os.environ
"""Whether this is the session's first process; where tests run side by side, the others share its caches."""

FOLDER = tempfile.mkdtemp(prefix="chargpt-tests-") if FIRST else os.environ["CHARGPT_TESTS"]
os.environ["CHARGPT_TESTS"] = FOLDER
os.environ["CHARGPT_CACHE"] = os.path.join(FOLDER, "downloads")
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(FOLDER, "programs")
# One device, whichever test comes first and however many cores there are; those that want more say so.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have most to do, so that where files run side by side none is left over at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the caches when the session is over."""
    if FIRST:
        shutil.rmtree(FOLDER, ignore_errors=True)
