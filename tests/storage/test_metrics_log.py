"""metrics.jsonl holds complete lines in the order of their steps, whatever was done to the file."""

import json
import os
from pathlib import Path

import pytest

from chargpt_jax.errors import UserError
from chargpt_jax.storage.metrics_log import Expected, Log, read_metrics, seconds_at


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "a run of Ærøskøbing 日本"
    folder.mkdir()
    return folder / "metrics.jsonl"


def refuse(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def log_at(path: Path, step: int, warnings: list[str] | None = None) -> Log:
    return Log(path, step, (warnings if warnings is not None else []).append)


def test_metrics_come_back_and_lines_are_added_at_the_end(path):
    log = log_at(path, 0)
    lines = [{"event": "step", "step": n, "loss": 4 / n, "note": "é\n\u2028"} for n in (1, 2, 3)]
    log.add(lines[:2])
    log.add(lines[2:], durably=True)
    assert read_metrics(path) == lines
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3


@pytest.mark.parametrize(
    "torn", [b'{"event": "step", "step": 4', b"null\n", b"\0" * 50, b"\xff\n", b"[" * 5000, b'{"step": 1}\n']
)
def test_resuming_drops_later_steps_and_a_line_cut_short(path, torn):
    lines = [{"event": "step", "step": n, "loss": 1.5} for n in (10, 20, 30)]
    log_at(path, 0).add(lines)
    with path.open("ab") as file:
        file.write(torn)
    assert read_metrics(path) == lines
    log = log_at(path, 20)
    assert log.lines == lines[:2]
    log.add([{"event": "step", "step": 25}])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 25]
    assert not list(path.parent.glob("*.partial"))


def test_resuming_before_the_first_line_leaves_an_empty_log(path):
    assert log_at(path, 0).lines == []
    log_at(path, 0).add([{"event": "step", "step": 1}])
    assert log_at(path, 0).lines == []
    assert read_metrics(path) == []


def test_lines_wait_until_the_disk_is_writable(path, monkeypatch):
    warnings: list[str] = []
    log, opened = log_at(path, 0, warnings), open
    log.add([{"event": "step", "step": 1}])

    def full(name: Path, *args: object, **options: object) -> object:
        if name != path:
            return opened(name, *args, **options)
        with opened(path, "ab") as file:
            file.write(b'{"event": "st')  # the disk stores only a part
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.open", full)
    log.add([{"event": "step", "step": 2}])
    log.add([{"event": "step", "step": 3}])
    monkeypatch.undo()
    assert len(warnings) == 1
    assert "metrics.jsonl (No space left on device): training continues" in warnings[0]
    log.add([{"event": "step", "step": 4}])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_log_that_cannot_be_rewritten_keeps_its_lines(path, monkeypatch):
    log_at(path, 0).add([{"event": "step", "step": n, "loss": 1.5} for n in (1, 2)])
    warnings: list[str] = []
    monkeypatch.setattr(os, "replace", refuse)
    log = log_at(path, 1, warnings)
    log.add([{"event": "step", "step": 5, "loss": 1.5}])
    assert len(warnings) == 1
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    monkeypatch.undo()
    log.add([{"event": "step", "step": 6, "loss": 1.5}])
    assert [line["step"] for line in read_metrics(path)] == [1, 5, 6]


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([10, 20, 30, 40], None),
        ([1, 2, 3, 10, 20, 30], None),  # log_every changed
        ([10, 20, 21, 22], None),
        ([10, 20, 40, 50], "no line for some steps before step 40"),
        ([10, 20, 20, 30], "repeats 1 of its lines"),
        ([10, 30, 20, 40], "out of order"),
    ],
)
def test_a_log_with_a_gap_or_a_repeat_is_reported_once(path, steps, said):
    warnings: list[str] = []
    path.write_text("".join(json.dumps({"event": "step", "step": n, "loss": 1.5}) + "\n" for n in steps))
    log = log_at(path, 60, warnings)
    assert [line["step"] for line in log.lines] == sorted(set(steps))
    assert read_metrics(path) == log.lines
    assert len(warnings) == (said is not None)
    assert said is None or said in warnings[0]


@pytest.mark.parametrize(
    ("steps", "validated", "expected", "complete"),
    [
        ([10, 20, 30, 40], [40], Expected(40, True, 10), True),
        ([10, 20, 30], [], Expected(37, False, 10), True),
        ([10, 20, 30], [], Expected(37, False, 5), True),  # log_every was 10 before
        ([], [4], Expected(4, True, 10), True),
        ([], [], Expected(0, False, 10), True),  # an imported run
        ([10, 20, 30, 40], [20], Expected(40, True, 10), False),
        ([10, 20], [20], Expected(37, False, 10), False),
        ([], [], Expected(4, True, 10), False),
        ([], [], Expected(37, False, 10), False),
        ([10, 20, 30, 40, 50, 60], [60], Expected(40, True, 10), False),
    ],
)
def test_a_log_without_its_last_lines_is_reported(path, steps, validated, expected, complete):
    lines = [{"event": "step", "step": n, "loss": 1.5, "seconds": 0.5 * n} for n in steps]
    lines += [
        {"event": "validation", "step": n, "loss": 1.5, "bits_per_character": 2.0, "seconds": 100.0} for n in validated
    ]
    lines.sort(key=lambda line: (line["step"], line["event"] == "validation"))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert (seconds_at(read_metrics(path), expected) is not None) == complete
    warnings: list[str] = []
    Log(path, expected.step, warnings.append, expected)
    assert len(warnings) == (not complete)
    assert complete or f"metrics.jsonl lacks its last lines up to step {expected.step}: only the log" in warnings[0]


def test_the_training_time_is_that_of_the_last_line_before_a_checkpoint():
    lines = [{"event": "step", "step": n, "loss": 1.5, "seconds": float(n)} for n in (10, 20, 30)]
    assert seconds_at(lines, Expected(25, False, 10)) == 20.0
    assert seconds_at([], Expected(0, False, 10)) == 0.0


def test_a_log_without_permission_is_to_be_made_readable(path, monkeypatch):
    path.touch()

    def refuse_to_read(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse_to_read)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\): make it readable"):
        read_metrics(path)


def test_removed_log_is_created_again(path):
    log = log_at(path, 0)
    log.add([{"event": "step", "step": 1}])
    path.unlink()
    log.add([{"event": "step", "step": 2, "loss": 1.5}])
    assert read_metrics(path) == [{"event": "step", "step": 2, "loss": 1.5}]


def test_a_log_that_cannot_be_read_is_named(path):
    path.mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read"):
        read_metrics(path)


@pytest.mark.skipif(os.name != "posix", reason="Windows has neither pipes nor links of this kind")
@pytest.mark.parametrize("kind", ["link", "link to nothing", "pipe"])
def test_a_log_that_is_no_regular_file_is_refused(path, tmp_path, kind):
    victim = tmp_path / "victim"
    if kind == "link":
        victim.write_text("mine")
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(victim)
    with pytest.raises(UserError, match="must be a regular file, not a link"):
        log_at(path, 0)
    assert victim.exists() == (kind == "link")


def test_a_log_that_becomes_a_link_is_not_followed(path, tmp_path):
    warnings: list[str] = []
    log, victim = log_at(path, 0, warnings), tmp_path / "victim"
    victim.write_text("mine")
    path.unlink()
    path.symlink_to(victim)
    log.add([{"event": "step", "step": 1}])
    assert victim.read_text() == "mine"
    assert len(warnings) == 1


def test_log_of_another_process_is_read_and_never_written(path):
    lines = [{"event": "step", "step": n, "loss": 4 / n} for n in (1, 2, 3)]
    log_at(path, 0).add(lines)
    before = path.read_bytes()
    log = Log(path, 2, print, writes=False)
    assert log.lines == lines[:2]
    log.add([{"event": "step", "step": 3, "loss": 1.0}], durably=True)
    assert path.read_bytes() == before
