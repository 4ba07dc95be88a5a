"""A save that fails or is killed at any file operation does not change the older checkpoints."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.reliability import operations
from benchmarks.stored import RECORD, Store, bits, faults, filled, refuse, state_at
from chargpt_jax.errors import SaveFailed

ROOT = Path(__file__).parents[1]
ERRORS = [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the checkpoints 1, 2 and 3, to be copied."""
    folder = tmp_path_factory.mktemp("faults")
    filled(folder / "store").close()
    return folder


def check_whole(folder, saved):
    """Check that all checkpoints are valid, and that the newest is the one that was saved last."""
    store = Store(folder)
    step, _, state = store.load("latest", lambda record: state_at(1))
    assert step in ((4,) if saved else (3, 4))
    assert bits(state) == bits(state_at(step))
    for older in store.steps():
        assert bits(store.restore(older, state_at(1))) == bits(state_at(older))
    assert {2, 3} <= set(store.steps())
    assert not store.heard
    store.close()


@pytest.mark.slow
def test_os_error_at_any_operation_is_handled(home, tmp_path):
    """Every twelfth operation; `python -m benchmarks.reliability` tests all of them."""
    refused, total = 0, operations(home)
    for at in range(0, total, 12):
        folder = tmp_path / str(at)
        shutil.copytree(home / "store", folder)
        store, number, saved = Store(folder), ERRORS[at // 12 % len(ERRORS)], True
        with faults().within(folder, at, refuse(number)):
            try:
                store.save(state_at(4), RECORD, 0.5)
            except SaveFailed as error:
                saved, sentence = False, str(error)
        if not saved:
            refused += 1
            # Orbax ignores some OS errors; then verification after the save fails.
            assert os.strerror(number) in sentence or "the written files cannot be read back" in sentence
            assert "\n" not in sentence
            assert "The checkpoint of step 3 is still valid" in sentence
            assert not list(folder.glob(".saving*"))
        check_whole(folder, saved)
        store.save(state_at(4), RECORD, 0.5)  # the disk works again
        check_whole(folder, True)
        store.close()
        shutil.rmtree(folder)
    assert refused >= 2  # many other operations only read or clean up


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_in_the_middle_leaves_what_was_saved_before(home):
    numbers = list(range(0, operations(home), 16))
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks.stored", str(home), *map(str, numbers)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=200)
    statuses = {int(number): status for number, status in json.loads(done.stdout).items()}
    killed = [number for number, status in statuses.items() if status == -9]
    assert len(killed) >= len(numbers) - 2  # a save can need a few operations fewer
    for number in numbers:
        folder = home / f"killed-{number}"
        check_whole(folder, saved=statuses[number] == 0)
        store = Store(folder)
        store.sweep()
        assert not list(folder.glob(".*"))
        store.close()


def child(code, folder):
    """Save checkpoint 4 in another process, after some code; return its output about SaveFailed."""
    save = (
        "import sys; from pathlib import Path\n"
        "from benchmarks.stored import RECORD, Store, state_at\n"
        "from chargpt_jax.errors import SaveFailed\n"
        f"{code}\n"
        "store = Store(Path(sys.argv[1]))\n"
        "try:\n    store.save(state_at(4), RECORD, 0.5)\n    print('saved')\n"
        "except SaveFailed as error:\n    print(error)\n"
    )
    return subprocess.run([sys.executable, "-c", save, str(folder)], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_file_size_limit_stops_a_save(home, tmp_path):
    """Like a quota: the OS error occurs in the middle of a write, also in C++."""
    shutil.copytree(home / "store", tmp_path / "store")
    largest = max(path.stat().st_size for path in (tmp_path / "store" / "3").rglob("*") if path.is_file())
    code = (
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({largest // 2}, {resource.RLIM_INFINITY}))"
    )
    done = child(code, tmp_path / "store")
    assert "Cannot write the checkpoint of step 4" in done.stdout, done.stderr
    assert "The checkpoint of step 3 is still valid" in done.stdout
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "store").glob(".saving*"))
    check_whole(tmp_path / "store", saved=False)


def mounted(options, script, folder):
    """Run a shell script with a small file system or a read-only view mounted on a folder; skip if that fails."""
    words = ["unshare", "-rm", "sh", "-ec", f"mount {options} {folder} || exit 77\n{script}"]
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    return done


SAVE = """
import sys; from pathlib import Path
from benchmarks.stored import RECORD, Store, bits, state_at
from chargpt_jax.errors import SaveFailed
store = Store(Path(sys.argv[1]))
try:
    for step in range(4, 99):
        store.save(state_at(step), RECORD, 1.0 / step)
    print("saved")
except SaveFailed as error:
    print(error)
step, _, state = store.load("latest", lambda record: state_at(1))
print(step, bits(state) == bits(state_at(step)), store.heard, [path.name for path in store.folder.glob(".*")])
"""


@pytest.mark.slow
def test_full_disk_keeps_the_previous_checkpoint(home, tmp_path):
    """A real file system, filled until only some files of a checkpoint fit."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "save.py").write_text(SAVE)
    script = (
        f"cp -r {home / 'store'} {tmp_path / 'disk' / 'store'}\n"
        f"left=$(df --output=avail -k {tmp_path / 'disk'} | tail -1)\n"
        f"head -c $(( (left - 30) * 1024 )) /dev/zero > {tmp_path / 'disk' / 'filler'}\n"
        f"PYTHONPATH={ROOT} {sys.executable} {tmp_path / 'save.py'} {tmp_path / 'disk' / 'store'}"
    )
    done = mounted("-t tmpfs -o size=3m tmpfs", script, tmp_path / "disk")
    first, second = done.stdout.splitlines()
    assert "(No space left on device). The checkpoint of step 3 is still valid: make room on the disk" in first
    assert second == "3 True [] []"


@pytest.mark.slow
def test_a_read_only_disk_stops_with_one_sentence(home, tmp_path):
    shutil.copytree(home / "store", tmp_path / "disk" / "store")
    (tmp_path / "save.py").write_text(SAVE)
    script = (
        f"mount -o remount,bind,ro {tmp_path / 'disk'} || exit 77\n"
        f"PYTHONPATH={ROOT} {sys.executable} -B {tmp_path / 'save.py'} {tmp_path / 'disk' / 'store'}"
    )
    done = mounted(f"--bind {tmp_path / 'disk'}", script, tmp_path / "disk")
    first, second = done.stdout.splitlines()
    assert "(Read-only file system). The checkpoint of step 3 is still valid: make the disk writable" in first
    assert second == "3 True [] []"
