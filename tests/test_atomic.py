"""Files and folders appear complete or not at all, whatever fails in between."""

import os
import stat
from pathlib import Path

import pytest

from chargpt_jax import atomic


def refuse(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_write_file_creates_and_replaces(tmp_path):
    path = tmp_path / "é.json"
    for content in (b"first, and rather long", b"second", b""):
        atomic.write_file(path, content)
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["é.json"]


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_replacing_that_fails_leaves_the_old_file(tmp_path, kind):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def fail_halfway() -> None:
        with atomic.replacing(path) as file:
            file.write(b"half")
            raise kind

    with pytest.raises(kind):
        fail_halfway()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_write_file_cleans_up_if_the_rename_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space left") as caught:
        atomic.write_file(tmp_path / "x", b"new")
    assert caught.value.filename == str(tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_sweep_removes_what_killed_processes_left_and_nothing_else(tmp_path):
    for name in (".x.0123abcd.partial", "x.partial", ".x.partial", "x.0123abcd.partial"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".y.0123_bcd.partial").mkdir()
    (tmp_path / ".z.0123abcd.partial").symlink_to(tmp_path / "x.partial")
    atomic.sweep(tmp_path, seconds=60)
    assert len(os.listdir(tmp_path)) == 6
    atomic.sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".x.partial", "x.0123abcd.partial", "x.partial"]
    atomic.sweep(tmp_path / "missing")


@pytest.mark.skipif(os.name != "posix", reason="Windows has neither pipes nor links of this kind")
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_no_write_goes_through_what_has_a_name_like_a_temporary_file(tmp_path, kind):
    victim, trap = tmp_path / "victim", tmp_path / "x.partial"
    victim.write_bytes(b"mine")
    {"link": lambda: trap.symlink_to(victim), "pipe": lambda: os.mkfifo(trap), "folder": trap.mkdir}[kind]()
    (tmp_path / "x").symlink_to(victim)
    atomic.write_file(tmp_path / "x", b"new")
    assert victim.read_bytes() == b"mine"
    assert not (tmp_path / "x").is_symlink()
    assert (tmp_path / "x").read_bytes() == b"new"


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    atomic.write_file(tmp_path / "x", b"")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_shared_writers_of_one_path_do_not_meet(tmp_path):
    path = tmp_path / "x"
    with atomic.replacing(path) as one:
        one.write(b"first to begin, last to end")
        atomic.write_file(path, b"in between")
        assert path.read_bytes() == b"in between"
    assert path.read_bytes() == b"first to begin, last to end"
    assert os.listdir(tmp_path) == ["x"]


def test_create_file_refuses_an_existing_file(tmp_path, monkeypatch):
    path, write = tmp_path / "x", os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:3]))  # the system may write a part only
    atomic.create_file(path, b"0123456789")
    with pytest.raises(FileExistsError):
        atomic.create_file(path, b"other")
    assert path.read_bytes() == b"0123456789"


@pytest.mark.parametrize("exists", [False, True])
def test_creating_folder_appears_at_the_end(tmp_path, exists):
    path = tmp_path / "deep" / "folder"
    if exists:
        path.mkdir(parents=True)
    with atomic.creating_folder(path) as partial:
        (partial / "file").write_text("content")
        assert path.exists() == exists
    assert (path / "file").read_text() == "content"
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~atomic._umask()
    assert os.listdir(path.parent) == ["folder"]


def test_creating_folder_works_on_a_disk_without_permissions(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "chmod", refuse)
    with atomic.creating_folder(tmp_path / "folder") as partial:
        (partial / "file").touch()
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("kind", ["file", "folder", "link", "nothing"])
def test_remove_leaves_nothing_and_follows_no_link(tmp_path, kind):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    path = tmp_path / "path"
    match kind:
        case "file":
            path.touch()
        case "folder":
            (path / "deep").mkdir(parents=True)
            (path / "deep" / "file").touch()
        case "link":
            path.symlink_to(tmp_path / "other")
    atomic.remove(path)
    assert os.listdir(tmp_path) == ["other"]
    assert os.listdir(tmp_path / "other") == ["file"]


@pytest.mark.parametrize("exists", [False, True])
def test_creating_folder_that_fails_leaves_nothing(tmp_path, exists):
    path = tmp_path / "deep" / "folder"
    if exists:
        path.mkdir(parents=True)

    def fail_halfway() -> None:
        with atomic.creating_folder(path) as partial:
            (partial / "file").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_halfway()
    assert list(tmp_path.rglob("*")) == ([path.parent, path] if exists else [])


@pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")
@pytest.mark.parametrize("by_link", [False, True])
def test_an_empty_folder_is_filled_and_not_replaced(tmp_path, by_link):
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o700)
    before, path = folder.stat(), tmp_path / "link" if by_link else folder
    if by_link:
        path.symlink_to(folder)
    with atomic.creating_folder(path) as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "file").write_text("content")
    after = folder.stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert [str(item.relative_to(folder)) for item in sorted(folder.rglob("*"))] == ["deep", "deep/file"]


def test_the_last_file_of_a_folder_appears_last(tmp_path, monkeypatch):
    moved, rename = [], os.rename

    def record(old, new):
        moved.append(new.name)
        rename(old, new)

    monkeypatch.setattr(os, "rename", record)
    with atomic.creating_folder(tmp_path, last="b") as partial:
        for name in "abc":
            (partial / name).touch()
    assert sorted(moved) == ["a", "b", "c"]
    assert moved[-1] == "b"


def folder_with(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


def test_replace_folder_moves_the_old_one_aside(tmp_path):
    new, path = folder_with(tmp_path / "new", "new"), folder_with(tmp_path / "path", "old")
    atomic.replace_folder(new, path, tmp_path / "aside")
    assert {p.parent.name: p.read_text() for p in tmp_path.glob("*/file")} == {"path": "new", "aside": "old"}


def test_replace_folder_moves_the_old_one_back_if_it_fails(tmp_path):
    path = folder_with(tmp_path / "path", "old")
    with pytest.raises(FileNotFoundError):
        atomic.replace_folder(tmp_path / "absent", path, tmp_path / "aside")
    assert {p.parent.name: p.read_text() for p in tmp_path.glob("*/file")} == {"path": "old"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
@pytest.mark.parametrize("kind", ["pipe", "link", "file"])
def test_a_file_with_a_likely_temporary_name_does_not_matter(tmp_path, kind):
    partial, other = tmp_path / "a.json.partial", tmp_path / "other"
    other.write_text("kept")
    {"pipe": os.mkfifo, "link": lambda path: path.symlink_to(other), "file": lambda path: path.write_text("x" * 99)}[
        kind
    ](partial)
    atomic.write_file(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"new"
    assert other.read_text() == "kept"
