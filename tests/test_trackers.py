"""Trackers get the numbers of events; each is tested against the real package, if that is installed."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.calls import SIZES
from chargpt_jax import trackers
from chargpt_jax.config import Config
from chargpt_jax.errors import UserError
from chargpt_jax.events import LRFinderStep, Saved, Steps, Validated
from chargpt_jax.main import main
from tests.corpus_text import write_words

EVENTS = [
    LRFinderStep(1, 2, 1, 1e-3, 4.0),
    LRFinderStep(2, 2, 1, 2e-3, 3.5),
    Steps(1, 0.1, 3.0, 1e-3, 0.5, 100.0, 1.0, 9.0),
    Saved(1, "somewhere"),
    Steps(2, 0.2, 2.5, 2e-3, 0.25, 110.0, 2.0, 8.0),
    Validated(2, 0.2, 2.75, 3.97, True, 3.0),
]
LOSSES = {"search/loss": [(1, 4.0), (2, 3.5)], "training/loss": [(1, 3.0), (2, 2.5)], "validation/loss": [(2, 2.75)]}


def records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file of W&B: LevelDB's log format, in blocks of 32 KiB, after a header of 7 bytes."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block that is too short for a record
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # complete, or the last part
            yield parts
            parts = b""


def send_all(name: str, folder: Path) -> None:
    """Send all events to a tracker, which then ends."""
    with trackers.opened([name], folder / "run", Config()) as log:
        for event in EVENTS:
            log(event)


def test_scalars_are_finite_numbers_with_a_step():
    found = [trackers.scalars(event) for event in EVENTS]
    assert found[3] is None
    for numbers, step in filter(None, found):
        assert step in (1, 2)
        assert all(isinstance(value, float) for value in numbers.values())
    assert found[2][0]["training/grad_norm"] == 0.5


def test_tensorboard_files_have_the_losses(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    send_all("tensorboard", tmp_path)
    (path,) = (tmp_path / "run" / "tracking").glob("events.out.tfevents.*")
    data, found, at = path.read_bytes(), {}, 0
    while at < len(data):  # a record: length, its checksum, content, its checksum
        length = int.from_bytes(data[at : at + 8], "little")
        content = data[at + 12 : at + 12 + length]
        assert int.from_bytes(data[at + 12 + length : at + 16 + length], "little") == masked_crc32c(content)
        event = event_pb2.Event.FromString(content)
        for value in event.summary.value:
            if value.tag.endswith("/loss"):
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
        at += 16 + length
    assert found == LOSSES


def test_wandb_run_has_the_losses_of_each_axis(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    send_all("wandb", tmp_path)
    (path,) = (tmp_path / "run" / "tracking").glob("wandb/offline-run-*/*.wandb")

    def written():
        return [wandb_internal_pb2.Record.FromString(data) for data in records(path.read_bytes())]

    for _ in range(100):  # W&B's own process may write the end of the file after `finish` has returned
        if any(record.WhichOneof("record_type") == "exit" for record in written()):
            break
        time.sleep(0.1)
    found = {}
    for record in written():
        if record.WhichOneof("record_type") != "history":
            continue
        numbers = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name in LOSSES:
            if name in numbers:
                step = numbers[f"{name.partition('/')[0]}/step"]
                found.setdefault(name, []).append((step, numbers[name]))
    assert found == LOSSES


def test_trackio_database_has_the_losses(tmp_path):
    pytest.importorskip("trackio")
    code = "import sys, pathlib, tests.test_trackers as t; t.send_all('trackio', pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}  # read when trackio is imported
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True, timeout=120)
    with sqlite3.connect(tmp_path / "trackio" / "chargpt_jax.db") as database:
        rows = database.execute("select step, metrics from metrics order by id").fetchall()
    found: dict[str, list[tuple[int, float]]] = {}
    for step, metrics in rows:
        for name, value in json.loads(metrics).items():
            if name.endswith("/loss"):
                found.setdefault(name, []).append((step, value))
    assert found == LOSSES


@pytest.mark.slow
def test_no_tracker_imports_tensorflow(tmp_path):
    code = (
        "import sys\nfrom chargpt_jax import trackers\nfrom chargpt_jax.config import Config\n"
        f"with trackers.opened(['tensorboard'], {str(tmp_path)!r}, Config()):\n"
        "    assert 'tensorflow' not in sys.modules\n"
    )
    pytest.importorskip("tensorboardX")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_unknown_tracker_is_rejected(tmp_path):
    with pytest.raises(
        UserError, match="There is no tracker 'mlflow': give one or more of tensorboard, wandb, trackio"
    ):
        trackers.opened(["mlflow"], tmp_path, Config()).__enter__()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_missing_package_names_its_extra(name, tmp_path, monkeypatch):
    package = {"tensorboard": "tensorboardX"}.get(name, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs the package {package}, .*chargpt_jax\[{name}\]"):
        trackers.opened([name], tmp_path, Config()).__enter__()


def test_tracker_that_fails_does_not_end_the_run(tmp_path, monkeypatch):
    calls: list[int] = []

    def log(numbers: object, step: int) -> None:
        calls.append(step)
        raise OSError("no space left")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda folder, config: contextlib.nullcontext(log))
    warnings: list[str] = []
    with trackers.opened(["wandb"], tmp_path, Config(), warnings.append) as send:
        for event in EVENTS:
            send(event)
    assert calls == [1]
    assert warnings == ["The tracker wandb failed (no space left): the run continues without it."]


def test_command_sends_a_runs_numbers(tmp_path, monkeypatch, capsys):
    got: dict[str, int] = {}

    def log(numbers: dict[str, float], step: int) -> None:
        got.update(dict.fromkeys(numbers, step))

    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda folder, config: contextlib.nullcontext(log))
    fields = {f"model.{name}": size for name, size in SIZES.items()} | {
        **{"data.source": write_words(tmp_path / "words.txt"), "data.batch_size": 2, "scheduler.max_steps": 2},
        **{"optimizer.learning_rate": 0.01},
    }
    flags = ["--config=tiny", "--mode=train", f"--workdir={tmp_path / 'run'}"]
    flags += [f"--config.{name}={value}" for name, value in fields.items()]
    assert main(["chargpt", "--track=wandb", *flags]) == 0
    assert got["training/loss"] == got["validation/loss"] == 2
    assert main(["chargpt", "--track=x", *flags]) == 2
    assert "There is no tracker 'x'" in capsys.readouterr().err
