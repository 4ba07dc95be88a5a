"""Runs a test file as a script on eight virtual CPU devices, in another process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_on_eight(file: str, workdir: Path, **settings: str) -> tuple[Any, str]:
    """Run a file with a workdir as its argument; return what it prints, as JSON, and its standard error."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # halves the compile time
        **settings,
    }
    command = [sys.executable, file, str(workdir)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), done.stderr
