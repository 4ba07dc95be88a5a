"""A copy of a run is that run, at every moment; it resumes with the same bits, and no other run is overwritten."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import chargpt_jax
from benchmarks.stored import faults, refuse
from chargpt_jax import backups
from chargpt_jax.config import Config
from chargpt_jax.errors import UserError
from chargpt_jax.events import Ended, LRFinderResult, Saved, TrainStarted
from chargpt_jax.storage import manifest
from chargpt_jax.storage.checkpoint import Checkpoints
from chargpt_jax.storage.copies import copy_run
from chargpt_jax.storage.workdir import Workdir
from tests.corpus_text import small_config, write_words

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 50, 10


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """A config with five checkpoints, of which a run keeps the newest two."""
    config = small_config(write_words(tmp_path_factory.mktemp("text") / "words.txt"))
    config.scheduler.max_steps = STEPS
    config.train.validate_every = EVERY / 47  # of the 47 training steps of an epoch
    return config


@pytest.fixture(scope="module")
def states(config, tmp_path_factory) -> list[Path]:
    """The folder of one run after each of its checkpoints; the last one is complete, with samples and report."""
    folder = tmp_path_factory.mktemp("states")
    states = []
    for event in chargpt_jax.run(config, folder / "run", quiet):
        if isinstance(event, Saved):
            states.append(folder / str(event.step))
            shutil.copytree(folder / "run", states[-1])
    shutil.rmtree(states[-1])
    shutil.copytree(folder / "run", states[-1])
    assert [state.name for state in states] == ["10", "20", "30", "40", "50"]
    return states


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "disk é" / "a copy"


def tree(folder: Path, without: tuple[str, ...] = ("lock.json",)) -> dict[str, bytes]:
    """Return the content of every file below a folder, by its relative path."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in sorted(files.items()) if not name.startswith(without)}


def steps(folder: Path) -> list[int]:
    """Return the checkpoints of a run, after checking that all of them are valid."""
    store = Checkpoints(folder / "checkpoints", warn=quiet)
    valid = store.valid_steps()
    assert valid == store.steps()
    store.close()
    return valid


def inodes(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_ino for path in folder.rglob("*") if path.is_file()}


# What is copied


@pytest.mark.slow
def test_copy_equals_the_run_and_a_copy_of_it_equals_both(states, target, tmp_path):
    copy_run(states[-1], target)
    copy_run(target, tmp_path / "again")
    assert tree(states[-1]) == tree(target) == tree(tmp_path / "again")
    assert steps(target) == [40, 50]
    assert os.listdir(target.parent) == [target.name]


@pytest.mark.parametrize(("old", "new"), [(0, 1), (0, 2), (1, 4), (3, 4), (4, 4)])
def test_copy_of_any_age_is_brought_up_to_date(states, target, old, new):
    copy_run(states[old], target)
    copy_run(states[new], target)
    assert tree(target) == tree(states[new])


def test_only_what_changed_is_written(states, target, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(states[-1], run)
    copy_run(run, target)
    before = inodes(target)
    copy_run(run, target)
    assert inodes(target) == before
    with (run / "metrics.jsonl").open("a") as file:
        file.write("{}\n")
    speed = run / "speed.json"
    speed.write_text("0" * speed.stat().st_size)  # the size stays
    copy_run(run, target)
    assert tree(target) == tree(run)
    changed = {name for name, inode in inodes(target).items() if before[name] != inode}
    assert changed == {"metrics.jsonl", "speed.json"}


@pytest.mark.parametrize("unit", [10**9, 10**6])
def test_time_in_the_unit_of_the_disk_counts_as_the_same(states, target, tmp_path, unit):
    run = tmp_path / "run"
    shutil.copytree(states[-1], run)
    os.utime(run / "speed.json", ns=(0, 1_700_000_000_987_654_321))
    copy_run(run, target)
    for name in tree(target):
        facts = (target / name).stat()
        os.utime(target / name, ns=(0, facts.st_mtime_ns // unit * unit))
    before = inodes(target)
    copy_run(run, target)
    assert inodes(target) == before
    os.utime(run / "speed.json", ns=(0, 1_700_000_002_987_654_321))
    copy_run(run, target)
    assert [name for name, inode in inodes(target).items() if before[name] != inode] == ["speed.json"]


def test_disk_that_stores_no_times_gets_the_same_copy(states, target, monkeypatch):
    def utime(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "utime", utime)
    for state in states[-2:]:
        copy_run(state, target)
    assert tree(target) == tree(states[-1])


def test_lock_traces_and_temporary_files_are_not_copied(states, target, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(states[-1], run)
    (run / "lock.json").write_text("{}")
    for name in ("profile/plugins", ".x.01234567.partial", "checkpoints/.saving-60", "checkpoints/50.damaged-1"):
        (run / name).mkdir(parents=True)
        (run / name / "trace").write_text("")
    (run / "samples" / ".y.json.01234567.partial").write_text("")
    (run / "tracking").mkdir()
    (run / "tracking" / "events").write_text("numbers")
    (run / "link").symlink_to(tmp_path)
    copy_run(run, target)
    assert tree(target) == {**tree(states[-1]), "tracking/events": b"numbers"}


def test_files_that_only_the_copy_has_stay(states, target):
    copy_run(states[0], target)
    (target / "notes.txt").write_text("mine")
    copy_run(states[1], target)
    assert tree(target) == {**tree(states[1]), "notes.txt": b"mine"}


def test_checkpoint_of_the_same_step_is_replaced_if_it_differs(states, target):
    copy_run(states[0], target)
    path = target / "checkpoints" / "10" / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "loss": 1e30}))
    (path.parent / manifest.NAME).unlink()
    manifest.seal(path.parent)
    copy_run(states[0], target)
    assert tree(target) == tree(states[0])


@pytest.mark.parametrize("name", ["record.json", "manifest.json", "arrays/_METADATA"])
def test_damaged_checkpoint_of_the_copy_is_copied_again(states, target, name):
    copy_run(states[1], target)
    with (target / "checkpoints" / "20" / name).open("ab") as file:
        file.truncate(1)
    copy_run(states[1], target)
    assert tree(target) == tree(states[1])


def test_damaged_checkpoint_of_the_run_replaces_nothing(states, target, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(states[-1], run)
    for step in ("40", "50"):
        (run / "checkpoints" / step / "record.json").write_text("{}")
    copy_run(states[1], target)
    copy_run(run, target)
    assert steps(target) == [10, 20]
    copy_run(states[-1], target)
    copy_run(run, target)
    assert steps(target) == [40, 50]


def test_checkpoint_that_is_deleted_meanwhile_is_left_out(states, target, tmp_path, monkeypatch):
    """Another process may train the run. Checkpoint 20 is copied first."""
    run, copyfile = tmp_path / "run", shutil.copyfile
    shutil.copytree(states[1], run)

    def delete(source: Path, copy: Path, **options: object) -> None:
        if source.is_relative_to(run / "checkpoints" / "10"):
            shutil.rmtree(run / "checkpoints" / "10", ignore_errors=True)
        copyfile(source, copy, **options)

    monkeypatch.setattr(shutil, "copyfile", delete)
    copy_run(run, target)
    assert tree(target) == tree(run)
    assert steps(target) == [20]


def test_disk_that_changes_what_is_written_is_an_error(states, target, monkeypatch):
    copy_run(states[1], target)
    monkeypatch.setattr(shutil, "copyfile", lambda source, target, **_: Path(target).write_bytes(b""))
    with pytest.raises(OSError, match="the written files cannot be read back"):
        copy_run(states[2], target)
    assert steps(target) == [10, 20]


# Interruptions

KILLED = """
import os, shutil, sys
from pathlib import Path
from benchmarks.stored import faults, kill
from chargpt_jax.storage.copies import copy_run
home, source = Path(sys.argv[1]), Path(sys.argv[2])
for number in sys.argv[3:]:
    copy = home / f"killed-{number}"
    shutil.copytree(home / "copy", copy, copy_function=shutil.copy2)
    child = os.fork()
    if not child:
        with faults().within(copy, int(number), kill):
            copy_run(source, copy)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
"""Copies a run to copies of a folder, in processes that kill themselves at the file operations of the given numbers."""


def operations(source: Path, home: Path) -> int:
    """Count the file operations with which a run is copied to a copy of `home / 'copy'`."""
    shutil.copytree(home / "copy", home / "counted")
    with faults().within(home / "counted"):
        copy_run(source, home / "counted")
    return len(faults().seen)


def check_interrupted(copy: Path, source: Path) -> None:
    """Check a copy of state 1 that was to become one of the last state: it is valid, and the next attempt succeeds."""
    there = steps(copy)
    assert there
    assert max(there) in (20, 40, 50)
    assert set(there) >= {10, 20} or set(there) >= {40, 50}
    assert Workdir(copy).load_config()
    assert Workdir(copy).load_tokens().size
    logged = [line["step"] for line in Workdir(copy).load_metrics()]
    assert max(logged) >= max(there)
    for path in copy.rglob("*.partial"):
        os.utime(path, (0, 0))  # a young one may belong to a process that writes a sample
    copy_run(source, copy)
    assert tree(copy) == tree(source)


@pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_os_error_at_any_operation_leaves_a_valid_copy(states, tmp_path, every):
    copy_run(states[1], tmp_path / "copy")
    refused, total = 0, operations(states[-1], tmp_path)
    for at in range(0, total, every):
        copy = tmp_path / str(at)
        shutil.copytree(tmp_path / "copy", copy)
        with faults().within(copy, at, refuse(errno.EIO)):
            try:
                copy_run(states[-1], copy)
            except (OSError, UserError):
                refused += 1
        check_interrupted(copy, states[-1])
        shutil.rmtree(copy)
    assert refused > 0.5 * total / every


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_at_any_operation_leaves_a_valid_copy(states, tmp_path, every):
    copy_run(states[1], tmp_path / "copy")
    numbers = [str(at) for at in range(0, operations(states[-1], tmp_path), every)]
    words = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), str(states[-1]), *numbers]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=200)
    assert done.stdout.split() == ["-9"] * len(numbers)
    for number in numbers:
        check_interrupted(tmp_path / f"killed-{number}", states[-1])


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_new_copy_appears_complete_or_not_at_all(states, target, monkeypatch, kind):
    def fail(folder: Path) -> None:
        raise kind

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "verify", fail)  # after the first checkpoint is written
        with pytest.raises(kind):
            copy_run(states[-1], target)
    assert not target.parent.exists() or os.listdir(target.parent) == []
    copy_run(states[-1], target)
    assert tree(target) == tree(states[-1])


# What is refused


def assert_refused(source: Path, target: Path, match: str) -> None:
    """Check that a copy is refused in one sentence, and that nothing changes."""
    before = tree(target)
    with pytest.raises(UserError, match=match) as error:
        copy_run(source, target)
    assert "\n" not in str(error.value)
    assert tree(target) == before


def test_another_config_is_refused(states, target):
    copy_run(states[0], target)
    saved = Workdir(target).load_config()
    saved.model.n_layer = 3
    Workdir(target).save_config(saved)
    assert_refused(
        states[1], target, r"holds another run than .* \(model.n_layer: saved 3, given 2\): choose another folder"
    )


def test_longer_schedule_is_the_same_run(states, target):
    copy_run(states[0], target)
    saved = Workdir(target).load_config()
    saved.scheduler.max_steps = 7
    Workdir(target).save_config(saved)
    copy_run(states[1], target)
    assert tree(target) == tree(states[1])


def test_another_text_is_refused(states, target):
    copy_run(states[0], target)
    folder, tokens = Workdir(target), Workdir(target).load_tokens()
    folder.save_corpus(folder.load_tokenizer(), tokens[:-1], folder.load_sources())
    assert_refused(
        states[1], target, r"holds another run than .* \(the text differs\): choose another folder for the copy"
    )


def test_newer_copy_is_not_replaced_by_an_older_run(states, target):
    copy_run(states[2], target)
    assert_refused(
        states[1], target, r"is at step 30, but the one in .*, which must not replace it, is at step 20: copy the"
    )


def test_folder_of_other_files_is_refused(states, target):
    target.mkdir(parents=True)
    (target / "holiday.jpg").write_text("")
    assert_refused(
        states[0], target, r"cannot hold a copy of .*, because it holds other files: choose a new or an empty folder"
    )


def test_file_is_refused_as_a_folder(states, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="because it is not a folder: choose"):
        copy_run(states[0], tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("inner", [".", "copy", "samples/copy", ".."])
def test_copy_inside_its_run_is_refused(states, tmp_path, inner):
    run = tmp_path / "run"
    shutil.copytree(states[0], run)
    assert_refused(run, run / inner, "must be outside of it, but is .*: choose another folder")


def test_folder_that_is_no_run_is_refused(tmp_path, target):
    with pytest.raises(UserError, match="has no config.json: give the --workdir of a run"):
        copy_run(tmp_path, target)
    assert not target.parent.exists()


def test_empty_folder_is_filled(states, target):
    target.mkdir(parents=True)
    inode = target.stat().st_ino
    copy_run(states[0], target)
    assert tree(target) == tree(states[0])
    assert target.stat().st_ino == inode


# While a run trains


def last_digest(folder: Path) -> str:
    """Return the digest of the arrays of the last checkpoint, after its verification."""
    last = steps(folder)[-1]
    assert last == STEPS
    return json.loads((folder / "checkpoints" / str(last) / "record.json").read_text())["digest"]


def test_restored_run_resumes_with_the_same_bits(states, config, target, tmp_path):
    copy_run(states[1], target)
    copy_run(target, tmp_path / "restored")
    events = list(chargpt_jax.train(config, tmp_path / "restored", quiet))
    assert next(event for event in events if isinstance(event, TrainStarted)).first_step == 20
    assert last_digest(tmp_path / "restored") == last_digest(states[-1])


def test_copy_is_up_to_date_at_each_checkpoint_and_at_the_end(config, states, tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    seen = []
    for event in chargpt_jax.backed_up(chargpt_jax.run(config, run, quiet), run, copy):
        seen.append(event)
        if isinstance(event, Saved):
            assert tree(copy) == tree(run)
            assert event.step in steps(copy)
    assert tree(copy) == tree(run)
    assert (copy / "report.html").exists()
    assert len([event for event in seen if isinstance(event, Saved)]) == len(states)
    assert last_digest(copy) == last_digest(states[-1])


def test_learning_rate_is_in_the_copy_before_training(config, tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    searching = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=None))
    searching.lr_finder = dataclasses.replace(config.lr_finder, num_zooms=1)
    for event in chargpt_jax.backed_up(chargpt_jax.train(searching, run, quiet), run, copy):
        if isinstance(event, LRFinderResult):
            break
    assert Workdir(copy).load_config().optimizer.learning_rate == event.learning_rate
    assert tree(copy) == tree(run)


def test_training_goes_on_without_its_copy_and_warns_once(config, states, tmp_path, monkeypatch):
    run, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    said: list[str] = []
    saves = 0
    for event in chargpt_jax.backed_up(chargpt_jax.train(config, run, quiet), run, disk / "copy", said.append):
        saves += isinstance(event, Saved)
        if saves == 1:
            monkeypatch.setattr(backups, "copy_run", lambda *_: refuse(errno.ENOSPC)())
        if saves == 3:
            monkeypatch.undo()
    assert isinstance(event, Ended)
    assert said == [
        f"Cannot copy the run to {disk / 'copy'} (No space left on device): the run goes on without it, and "
        "tries again later."
    ]
    assert last_digest(run) == last_digest(disk / "copy") == last_digest(states[-1])


def test_disk_that_is_unmounted_meanwhile_is_not_imitated(config, tmp_path):
    run, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    said: list[str] = []
    for event in chargpt_jax.backed_up(chargpt_jax.train(config, run, quiet), run, disk / "copy", said.append):
        if isinstance(event, Saved) and disk.exists():
            disk.rename(tmp_path / "elsewhere")
    assert not disk.exists()
    assert steps(tmp_path / "elsewhere" / "copy") == [10]
    (warning,) = said
    assert f"({disk} does not exist)" in warning
    assert steps(run) == [40, 50]


@pytest.mark.parametrize("wrong", ["missing parent", "other files", "newer"])
def test_folder_that_cannot_hold_the_copy_ends_the_run_at_once(config, states, tmp_path, wrong):
    run, copy = tmp_path / "run", tmp_path / "disk" / "copy"
    if wrong == "newer":
        shutil.copytree(states[0], copy)
    elif wrong == "other files":
        copy.mkdir(parents=True)
        (copy / "x").write_text("")
    events = chargpt_jax.train(config, run, quiet)
    with pytest.raises(
        UserError, match=r"does not exist: create|holds other files: choose|is at step 0: copy the newer"
    ):
        next(chargpt_jax.backed_up(events, run, copy))
    assert not (run / "lock.json").exists()
    assert steps(run) == []


def test_run_that_is_left_in_the_middle_releases_its_lock(config, states, tmp_path):
    """In a notebook, variables and tracebacks keep both generators."""
    run, copy = tmp_path / "run", tmp_path / "copy"
    events = chargpt_jax.train(config, run, quiet)
    backed_up = chargpt_jax.backed_up(events, run, copy)
    next(event for event in backed_up if isinstance(event, Saved))
    assert (run / "lock.json").exists()
    backed_up.close()
    assert not (run / "lock.json").exists()
    list(chargpt_jax.backed_up(chargpt_jax.train(config, run, quiet), run, copy))
    assert last_digest(copy) == last_digest(states[-1])


@pytest.mark.parametrize("events", ["text", None, 3])
def test_what_yields_no_events_is_refused(events, tmp_path):
    with pytest.raises(UserError, match="must be what run, train, prepare or find_lr return"):
        next(chargpt_jax.backed_up(events, tmp_path / "run", tmp_path / "copy"))
