"""A trace of a few dispatches of training, to be looked at in Perfetto or xprof."""

from collections.abc import Iterator
from pathlib import Path

import jax

from chargpt_jax.events import Event, Steps

FIRST, COUNT = 2, 2
"""The trace begins after so many dispatches, when everything is compiled, and spans so many."""


def profiled(events: Iterator[Event], folder: str | Path) -> Iterator[Event]:
    """Pass a run's events on, and write what happens between some of them as a trace.

    Work is done between two events, so the trace holds the dispatches that follow the first ones. A folder
    plugins/profile/TIME is made in `folder`: *.xplane.pb is for xprof, perfetto_trace.json.gz for
    https://ui.perfetto.dev.
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
