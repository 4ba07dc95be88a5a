"""Only one process writes to a run: a second one is rejected, and a stale lock is ignored."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from chargpt_jax.errors import SaveFailed, UserError
from chargpt_jax.storage import lock

OLD_BOOT = "5d7f5d8c-7a0c-4f0e-9a39-1f1d6f3d0c11"
"""A boot time in the format of version 0.1.0."""

HOLDER = """
import sys
from pathlib import Path
from chargpt_jax.storage.lock import writer
with writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "deep" / "a run of Ærø"


@pytest.fixture
def holder(folder):
    """Return another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def left_over(folder, **changed):
    """Write the lock file of a process that has ended."""
    folder.mkdir(parents=True, exist_ok=True)
    boot = psutil.boot_time()
    said = {"pid": 2**22 + 1, "host": socket.gethostname(), "process_started": 1.5, "boot": boot, **changed}
    (folder / lock.NAME).write_text(json.dumps(said))


def take(folder):
    with lock.writer(folder):
        return json.loads((folder / lock.NAME).read_text())


def test_the_file_names_its_holder_and_goes_with_it(folder):
    assert take(folder)["pid"] == os.getpid()
    assert not folder.parent.exists()  # it was created only for the lock


def test_existing_folders_are_not_removed(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    take(folder)
    assert os.listdir(folder) == ["config.json"]


def test_an_error_releases_it(folder):
    with pytest.raises(KeyError), lock.writer(folder):
        raise KeyError
    take(folder)


def test_second_writer_is_rejected_with_pid_and_host(folder, holder):
    before = (folder / lock.NAME).read_bytes()
    with pytest.raises(UserError) as error, lock.writer(folder):
        pass
    assert f"Process {holder.pid} on {socket.gethostname()} is writing to the run in {folder}: wait for it" in str(
        error.value
    )
    assert (folder / lock.NAME).read_bytes() == before
    holder.communicate("")
    take(folder)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_the_lock_of_a_killed_process_is_reclaimed_at_once(folder, holder):
    holder.kill()
    holder.wait()
    assert (folder / lock.NAME).exists()
    assert take(folder)["pid"] == os.getpid()


@pytest.mark.parametrize("without_kernel", [False, True])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"boot": 1.0},
        {"pid": os.getpid(), "process_started": 1.5},
        {"pid": 1, "process_started": None},
        {"pid": 2**80},
        {"boot": OLD_BOOT, "process_started": "1"},
    ],
)
def test_lock_of_an_ended_process_is_reclaimed(folder, monkeypatch, changed, without_kernel):
    if without_kernel:
        monkeypatch.setattr(lock, "_lock", lambda file: None)
    left_over(folder, **changed)
    assert take(folder)["pid"] == os.getpid()


def test_disk_without_locks_checks_the_process(folder, monkeypatch):
    monkeypatch.setattr(lock, "_lock", lambda file: None)
    left_over(folder, pid=os.getpid(), process_started=lock._started(os.getpid()))
    with pytest.raises(UserError, match=f"Process {os.getpid()} on .* is writing to the run"):
        take(folder)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="version 0.1.0 wrote this on Linux only")
def test_a_lock_of_version_0_1_0_is_understood(folder, monkeypatch):
    monkeypatch.setattr(lock, "_lock", lambda file: None)
    ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    left_over(folder, pid=os.getpid(), process_started=ticks, boot=OLD_BOOT)
    with pytest.raises(UserError, match=f"Process {os.getpid()} on .* is writing to the run"):
        take(folder)
    left_over(folder, pid=os.getpid(), process_started=str(int(ticks) - 100), boot=OLD_BOOT)
    assert take(folder)["pid"] == os.getpid()
    left_over(folder, host="elsewhere", process_started=ticks, boot=OLD_BOOT)
    with pytest.raises(UserError, match="on elsewhere locked the run"):
        take(folder)


def test_lock_of_another_machine_expires(folder):
    left_over(folder, host="elsewhere", boot=1.0)
    with pytest.raises(UserError) as error:
        take(folder)
    path = folder / lock.NAME
    assert (
        f"on elsewhere locked the run in {folder} and was last active 0 s ago; this machine cannot check whether it "
        f"still runs. If it does not, delete {path}, or wait: the lock expires after 15 minutes"
    ) in str(error.value)
    assert "without activity" in str(error.value)
    os.utime(path, (0, time.time() - lock.EXPIRY - 1))
    take(folder)


def test_lock_of_a_restarted_container_is_reclaimed(folder):
    left_over(folder, host="the container before")
    assert take(folder)["pid"] == os.getpid()


@pytest.mark.parametrize("ahead", [100.0, 10_000.0, 2e9])
def test_lock_with_a_time_in_the_future_expires(folder, monkeypatch, ahead):
    left_over(folder, host="elsewhere", boot=1.0)
    path = folder / lock.NAME
    os.utime(path, (0, time.time() + ahead))
    dated = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
    said = (
        f"the file is dated {dated}, in the future, so its time counts from now" if ahead > lock.EXPIRY else "0 s ago"
    )
    with pytest.raises(UserError, match=said):
        take(folder)
    with pytest.raises(UserError, match="was last active [0-9]+ s ago"):
        take(folder)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + ahead % lock.EXPIRY + lock.EXPIRY + 10)
    assert take(folder)["pid"] == os.getpid()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff" * 4000, b'{"pid": "x", "host": "\\u001b[31m"}', b"[" * 2000]
)
def test_damaged_lock_file_is_ignored(folder, content):
    folder.mkdir(parents=True)
    (folder / lock.NAME).write_bytes(content)
    assert take(folder)["pid"] == os.getpid()


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_lock_that_is_not_a_file_is_rejected(folder, kind):
    folder.mkdir(parents=True)
    path, target = folder / lock.NAME, folder / "precious"
    target.write_text("precious")
    {"link": lambda: path.symlink_to(target), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    with pytest.raises(UserError, match=r"lock\.json is not a regular file with one name: remove it"):
        take(folder)
    assert target.read_text() == "precious"


def test_a_place_where_no_folder_lasts_is_refused(folder, monkeypatch):
    """For example /proc, where creating a folder fails with "no such file" instead of "permission denied"."""

    def mkdir(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(lock.Path, "mkdir", mkdir)
    said = r"Cannot write .*lock\.json .*: choose another --workdir"
    with pytest.raises(UserError, match=said), lock.writer(folder):
        pass
    assert not folder.exists()


def test_later_training_of_the_process_takes_over(folder):
    """In a notebook, the traceback of an interrupted run keeps its generator alive."""
    with lock.writer(folder) as earlier, lock.writer(folder) as later:
        later.alive()
        with pytest.raises(UserError, match="A newer training in this process has taken over"):
            earlier.alive()
        earlier.release()
        assert (folder / lock.NAME).exists()
    take(folder)


def test_holder_updates_the_heartbeat(folder, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.0)
    with lock.writer(folder) as held:
        os.utime(folder / lock.NAME, (0, 0))
        held.alive()
        assert time.time() - (folder / lock.NAME).stat().st_mtime < 100


def test_on_a_full_disk_the_lock_is_held_without_a_name(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", full)
    with lock.writer(folder):
        assert (folder / lock.NAME).read_bytes() == b""
    assert not folder.exists()


@pytest.mark.parametrize("how", ["moved", "replaced", "removed", "emptied"])
def test_a_folder_that_is_moved_or_removed_ends_training(tmp_path, how):
    folder = tmp_path / "run"
    with lock.writer(folder) as held:
        held.alive()
        if how in ("moved", "replaced"):
            folder.rename(tmp_path / "elsewhere")
        else:
            (folder / lock.NAME).unlink()
        if how == "replaced":
            folder.mkdir()
        if how == "removed":
            folder.rmdir()
        with pytest.raises(SaveFailed, match="was moved or removed during training"):
            held.alive()
