"""Profiler trace of a few dispatches of training, for Perfetto or xprof."""

from collections.abc import Iterator
from pathlib import Path

import jax

from chargpt_jax.events import Event, Steps

FIRST, COUNT = 2, 2
"""Number of dispatches before the trace, when everything is compiled, and number of dispatches in it."""


def profiled(events: Iterator[Event], folder: str | Path) -> Iterator[Event]:
    """Yield a run's events, and write a profiler trace of the dispatches between some of them.

    The work of a dispatch is done between two events. The trace is written to plugins/profile/TIME in `folder`:
    *.xplane.pb for xprof, perfetto_trace.json.gz for https://ui.perfetto.dev.
    """
    dispatches, tracing = 0, False
    try:
        for event in events:
            dispatches += isinstance(event, Steps)
            if tracing and dispatches == FIRST + COUNT:
                jax.profiler.stop_trace()
                tracing = False
            elif isinstance(event, Steps) and dispatches == FIRST:
                jax.profiler.start_trace(str(folder), create_perfetto_trace=True)
                tracing = True
            yield event
    finally:
        if tracing:
            jax.profiler.stop_trace()
