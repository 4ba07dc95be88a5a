"""A trace spans the documented dispatches, has the format of Perfetto, and is closed when a run ends or fails."""

import gzip
import json
from dataclasses import fields

import jax
import jax.numpy as jnp
import pytest

from chargpt_jax.cli.profiler import COUNT, FIRST, profiled
from chargpt_jax.events import Ended, Steps


def dispatches(count, marks):
    """Yield `count` dispatches, each with a matrix product under its own name."""
    for number in range(1, count + 1):
        with jax.profiler.TraceAnnotation(f"dispatch-{number}"):
            jnp.ones((8, 8)).dot(jnp.ones((8, 8))).block_until_ready()
        marks.append(number)
        yield Steps(**{field.name: number for field in fields(Steps)})
    yield Ended(count, 0.0, 0.0)


def traced(folder):
    (path,) = folder.glob("plugins/profile/*/perfetto_trace.json.gz")
    assert list(path.parent.glob("*.xplane.pb"))
    with gzip.open(path) as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    return sorted(int(name.removeprefix("dispatch-")) for name in names if name.startswith("dispatch-"))


def test_the_trace_spans_the_dispatches_after_the_first_ones(tmp_path):
    marks = []
    assert len(list(profiled(dispatches(7, marks), tmp_path))) == 8
    assert marks == list(range(1, 8))
    assert traced(tmp_path) == list(range(FIRST + 1, FIRST + COUNT + 1))


def test_trace_is_complete_if_the_run_ends_or_fails(tmp_path):
    list(profiled(dispatches(FIRST + 1, []), tmp_path / "short"))
    assert traced(tmp_path / "short") == [FIRST + 1]

    def breaking():
        yield from list(dispatches(FIRST, []))[:-1]
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        list(profiled(breaking(), tmp_path / "broken"))
    assert traced(tmp_path / "broken") == []
    list(profiled(dispatches(FIRST + 1, []), tmp_path / "again"))  # the profiler can be started again


def test_run_too_short_for_a_trace_writes_none(tmp_path):
    list(profiled(dispatches(FIRST - 1, []), tmp_path))
    assert list(tmp_path.iterdir()) == []
