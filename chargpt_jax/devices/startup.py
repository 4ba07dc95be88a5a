"""Fast start-up: one device per CPU core, the compilation cache, no garbage collection during imports."""

import contextlib
import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path

from chargpt_jax.errors import UserError, is_out_of_memory

MAX_CORES = 8
"""Each CPU core counts as one device, up to this number; further cores help all of them."""

MAX_DEVICES = 4096
"""Maximum number of CPU devices that a user may choose."""

DEVICE_COUNTS = {
    "JAX_NUM_CPU_DEVICES": r"\A.*\Z",
    "XLA_FLAGS": r"--xla_force_host_platform_device_count=(\S*)",
}
"""Environment variables that set the number of CPU devices, and the regular expression of the number in each."""


MIN_OPEN_FILES = 64
"""Minimum limit of open files; training on two CPU cores opens up to 24 at once."""

UNSUPPORTED = {
    "jax_enable_x64": "this program computes in float32 and lower precision",
    "jax_disable_jit": "this program cannot run uncompiled",
}
"""Settings of JAX that must be off, and why."""


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Disable the cyclic garbage collector while imports and tracing create many long-lived objects.

    It would take 10 % of the time to the first step and free a few MiB. It is enabled again afterwards if it was
    enabled before.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # moves the new objects to the oldest generation
            gc.freeze()
            gc.unfreeze()
        if enabled:
            gc.enable()


def check_environment() -> None:
    """Check the number of CPU devices in the environment: JAX and XLA end with a traceback if it is invalid.

    Raises:
        UserError: with the variable and its value.
    """
    for variable, pattern in DEVICE_COUNTS.items():
        for value in re.findall(pattern, os.environ.get(variable, "1"), re.DOTALL)[-1:]:
            if not (re.fullmatch(r"\s*\+?\d{1,9}\s*", value, re.ASCII) and 1 <= int(value) <= MAX_DEVICES):
                raise UserError(
                    f"{variable} sets the number of CPU devices to {value[:80]!r}, but it must be an integer from 1 to "
                    f"{MAX_DEVICES:,}: correct it, or unset {variable}."
                )


def check_open_files() -> None:
    """Check the limit of open files: below it, JAX and orbax fail in ways that do not name it.

    Raises:
        UserError: if it is below MIN_OPEN_FILES.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < MIN_OPEN_FILES:
        raise UserError(
            f"The limit of open files is {limit}, but must be at least {MIN_OPEN_FILES}: raise it with ulimit -n 1024."
        )


def check_settings() -> None:
    """Check the settings of JAX under which this package's programs would fail.

    Raises:
        UserError: naming the setting, which an environment variable or a program has set.
    """
    import jax

    for name, effect in UNSUPPORTED.items():
        if getattr(jax.config, name, False):
            raise UserError(
                f"JAX's setting {name} is on, but {effect}: unset {name.upper()}, or call "
                f"jax.config.update({name!r}, False)."
            )


def start() -> None:
    """Start JAX with each CPU core as a device, as `use_every_core` describes, and check that it finds a device.

    Raises:
        UserError: if a setting is invalid or unsupported, or JAX finds no device.
    """
    import jax

    use_every_core()
    try:
        jax.local_devices()
    except Exception as error:  # JAX raises many types, even AssertionError
        if is_out_of_memory(error):
            raise
        found = str(error) or f"it finds no device for JAX_PLATFORMS={getattr(jax.config, 'jax_platforms', None)}"
        raise UserError(f"JAX cannot start ({found}): correct or unset its environment variables.") from error


def use_every_core() -> None:
    """Make each CPU core a device, so that the batch is split over the cores, which is faster.

    This has no effect if JAX is already initialised, or if XLA_FLAGS or JAX_NUM_CPU_DEVICES set the number of devices.

    Raises:
        UserError: if that number is invalid.
    """
    import jax

    check_environment()
    check_open_files()
    is_set = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if is_set or getattr(jax.config, "jax_num_cpu_devices", -1) >= 0:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # RuntimeError: JAX is already initialised; the number of devices stays as it is.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", min(cores, MAX_CORES))


def use_compilation_cache(folder: Path) -> None:
    """Cache compiled programs in a folder, for a faster next start; JAX_COMPILATION_CACHE_DIR has precedence."""
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR") or getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Cache small programs too: reading one is faster than compiling it.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
