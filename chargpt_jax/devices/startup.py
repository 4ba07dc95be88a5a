"""Quick starts: every core as a device, the compilation cache, no garbage collection during imports."""

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path

MOST_CORES = 8
"""A CPU counts as one device a core, up to so many; the rest serve them all."""


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Leave garbage lying while much is made that stays: what imports and tracing make.

    Python looks for cycles of garbage each time a quarter more is there than the last time, and looks at everything
    each time: a tenth of the time until the first update, for a few MiB. Afterwards it looks again, if it did before.
    """
    looked = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # What was made counts as old at once.
            gc.freeze()
            gc.unfreeze()
        if looked:
            gc.enable()


def use_every_core() -> None:
    """Let a CPU count as one device a core, which share a batch: a core works faster on rows of its own.

    Without effect once JAX has started its devices, or where XLA_FLAGS or JAX_NUM_CPU_DEVICES say how many there are.
    """
    import jax

    said = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if said or getattr(jax.config, "jax_num_cpu_devices", -1) >= 0:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Refused where JAX has started: then there are as many as there are.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", min(cores, MOST_CORES))


def use_compilation_cache(folder: Path) -> None:
    """Keep compiled programs in a folder, so that the next start is quick; JAX_COMPILATION_CACHE_DIR goes first."""
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR") or getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # The small ones too: each is quicker read than compiled.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
