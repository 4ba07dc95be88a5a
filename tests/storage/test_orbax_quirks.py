"""Process-wide changes during a call of orbax are undone afterwards; its log messages are dropped during it."""

import asyncio
import logging
import sys

import pytest

from chargpt_jax.storage.orbax_quirks import contained


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
