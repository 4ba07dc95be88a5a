"""Caches of the suite's own, made for one session: nothing of a user's is read or written, and no program is compiled
twice, however often a test starts a run afresh. Set before JAX is imported, so that child processes share them."""

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

FOLDER = tempfile.mkdtemp(prefix="chargpt-tests-")
os.environ["CHARGPT_CACHE"] = os.path.join(FOLDER, "downloads")
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(FOLDER, "programs")
# One device, whichever test comes first and however many cores there are; those that want more say so.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


@pytest.fixture(scope="session", autouse=True)
def own_caches() -> Iterator[None]:
    """Remove the caches when the session is over."""
    yield
    shutil.rmtree(FOLDER, ignore_errors=True)
