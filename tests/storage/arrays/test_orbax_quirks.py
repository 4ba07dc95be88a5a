"""Arrays written and read by orbax; process-wide changes during a call of it are undone afterwards."""

import asyncio
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from chargpt_jax.storage.arrays.orbax_quirks import ArrayStore, contained
from chargpt_jax.storage.manifest import Damaged

ROOT = Path(__file__).parents[3]


def process_state() -> tuple[object, ...]:
    return sys.unraisablehook, list(logging.getLogger("asyncio").filters), logging.getLogger("absl").disabled


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_contained_restores_the_process(tmp_path, monkeypatch, error, disabled):
    monkeypatch.setattr(logging.getLogger("absl"), "disabled", disabled)
    before = process_state()

    def run() -> None:
        with contained(tmp_path):
            assert process_state() != before
            if error:
                raise error

    if error:
        with pytest.raises(error):
            run()
    else:
        run()
    assert process_state() == before


def test_contained_drops_late_messages_of_orbax_only(tmp_path, monkeypatch, caplog):
    """A task of a closed event loop reports its error when it is collected, inside the block."""
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: seen.append(str(what.exc_value)))
    logger = logging.getLogger("asyncio")

    async def fail() -> None:
        raise OSError("the second refusal, in orbax")

    async def start() -> None:
        task = asyncio.ensure_future(fail())
        await asyncio.wait([task])

    class Late:
        def __init__(self, message: str) -> None:
            self.message = message

        def __del__(self) -> None:
            raise RuntimeError(self.message)

    def orbax_save() -> None:
        asyncio.run(start())
        late = [Late("Event loop is closed"), Late("something else")]
        logger.error("something else")
        raise ValueError(f"the first refusal, with {len(late)} objects in its frame")

    def save() -> None:
        with contained(tmp_path):
            orbax_save()

    with pytest.raises(ValueError, match="the first refusal"):
        save()
    logger.error("Task exception was never retrieved\nfuture: orbax")  # after the block, messages are logged again
    assert [record.getMessage().splitlines()[0] for record in caplog.records if record.name == "asyncio"] == [
        "something else",
        "Task exception was never retrieved",
    ]
    assert seen == ["something else"]


SAVES = """
import dataclasses, sys
from pathlib import Path
import jax.numpy as jnp
import psutil
from benchmarks.stored import RECORD, Store, state_at

store, state = Store(Path(sys.argv[1])), state_at(1)
for step in range(1, 351):
    store.save(dataclasses.replace(state, step=jnp.int32(step)), RECORD, 1.0 / step)
    if step in (50, 350):
        print(psutil.Process().memory_info().rss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_over_300_checkpoints(tmp_path):
    """Orbax's metadata() would add 97 MB; what remains is lost inside its save()."""
    command = [sys.executable, "-c", SAVES, str(tmp_path / "checkpoints")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    after_50, after_350 = (int(line) for line in ended.stdout.split())
    assert after_350 - after_50 < 20e6


def test_a_checkpoint_without_one_array_is_damaged(tmp_path):
    store, arrays = ArrayStore(), {name: np.arange(6.0, dtype=np.float32).reshape(2, 3) for name in ("a", "b.c")}
    store.save(tmp_path / "arrays", arrays)
    back = store.load(tmp_path / "arrays", arrays)
    assert {name: array.tolist() for name, array in back.items()} == {name: x.tolist() for name, x in arrays.items()}
    for expected in (
        {"a": arrays["a"]},
        {**arrays, "d": arrays["a"]},
        {**arrays, "a": np.zeros((3, 2), np.float32)},
        {**arrays, "a": np.zeros((2, 3), np.int32)},
    ):
        with pytest.raises(Damaged, match="but the model has"):
            store.load(tmp_path / "arrays", expected)
    (tmp_path / "arrays" / "_METADATA").unlink()
    with pytest.raises(Damaged, match="_METADATA"):
        store.load(tmp_path / "arrays", arrays)
    store.close()
