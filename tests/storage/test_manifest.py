"""A folder is verified file by file: a changed file is named, and no file outside the folder is opened."""

import json
import os
import shutil
import sys

import pytest

from chargpt_jax.storage import manifest
from chargpt_jax.storage.manifest import Damaged, seal, verify


@pytest.fixture
def sealed(tmp_path):
    """A folder with a manifest and three files, one of them empty."""
    folder = tmp_path / "sealed"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "c.bin").write_bytes(bytes(range(256)) * 40)
    (folder / "d.txt").write_text("é\n")
    (folder / "a" / "empty").write_bytes(b"")
    seal(folder)
    return folder


def listed(folder):
    return json.loads((folder / manifest.NAME).read_text())


def relist(folder, files):
    (folder / manifest.NAME).write_text(files if isinstance(files, str) else json.dumps(files))


def test_sealed_folder_is_valid_and_lists_every_file(sealed):
    verify(sealed)
    assert set(listed(sealed)) == {"a/b/c.bin", "d.txt", "a/empty"}
    assert listed(sealed)["a/empty"]["sha256"].startswith("e3b0c442")


@pytest.mark.parametrize("change", ["none", "size", "missing", "added", "manifest", "no manifest", "no folder"])
def test_same_compares_manifests_and_sizes_only(sealed, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(sealed, copy)
    path = copy / "d.txt"
    path.write_bytes(path.read_bytes()[::-1])  # the same size
    match change:
        case "size":
            path.write_bytes(b"")
        case "missing":
            path.unlink()
        case "added":
            (copy / "e").write_bytes(b"")
        case "manifest":
            relist(copy, {**listed(copy), "d.txt": {"sha256": "0" * 64, "bytes": 3}})
        case "no manifest":
            (copy / manifest.NAME).unlink()
        case "no folder":
            shutil.rmtree(copy)
    assert manifest.same(sealed, copy) == manifest.same(copy, sealed) == (change == "none")


def test_a_copy_passes_too(sealed, tmp_path):
    copy = shutil.copytree(sealed, tmp_path / "copy é")
    verify(copy)
    flip(copy / "d.txt")
    with pytest.raises(Damaged, match="d.txt sha256 differs"):
        verify(copy)
    verify(sealed)  # a copy is verified at its own path


def test_every_flipped_bit_is_detected(sealed):
    path = sealed / "a" / "b" / "c.bin"
    whole = path.read_bytes()
    for place in (0, 5000, len(whole) - 1):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            with pytest.raises(Damaged, match="a/b/c.bin sha256 differs"):
                verify(sealed)


def flip(path):
    path.write_bytes(path.read_bytes()[::-1])


DAMAGES = {
    "is missing": lambda folder: (folder / "d.txt").unlink(),
    "has 2 bytes, but 3 were saved": lambda folder: (folder / "d.txt").write_bytes(b"ab"),
    "has 4 bytes": lambda folder: (folder / "d.txt").write_bytes(b"abcd"),
    "e.txt is not in the manifest": lambda folder: (folder / "e.txt").write_bytes(b""),
    "d.txt is missing": lambda folder: (folder / "d.txt").rename(folder / "D.txt2"),
    "is a symbolic link": lambda folder: (folder / "link").symlink_to("d.txt"),
    "a/b is a symbolic link": lambda folder: ((folder / "a" / "b").rename(folder.parent / "b"), link(folder)),
    "pipe is neither a file nor a folder": lambda folder: os.mkfifo(folder / "pipe"),
    "manifest.json is missing": lambda folder: (folder / manifest.NAME).unlink(),
    "manifest.json is not JSON": lambda folder: relist(folder, "{"),
    "manifest.json is not a JSON object": lambda folder: relist(folder, []),
    "manifest.json does not give": lambda folder: relist(folder, {**listed(folder), "d.txt": {"sha256": "0"}}),
    "does not give sha256 and bytes": lambda folder: relist(folder, {"d.txt": {"sha256": "0", "bytes": "3"}}),
}


def link(folder):
    (folder / "a" / "b").symlink_to(folder.parent / "b")


@pytest.mark.parametrize("reason", DAMAGES)
def test_damage_is_named(sealed, reason):
    DAMAGES[reason](sealed)
    with pytest.raises(Damaged, match=reason):
        verify(sealed)


def test_swapped_files_are_found(sealed):
    (sealed / "x").write_bytes(b"one")
    (sealed / "y").write_bytes(b"two")
    (sealed / manifest.NAME).unlink()
    seal(sealed)
    (sealed / "x").rename(sealed / "z")
    (sealed / "y").rename(sealed / "x")
    (sealed / "z").rename(sealed / "y")
    with pytest.raises(Damaged, match="x sha256 differs"):
        verify(sealed)


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/etc/passwd", "a//../x", "", "./d.txt", "a\\b", "C:/x"])
def test_path_outside_the_folder_is_rejected_before_opening(sealed, name, monkeypatch):
    relist(sealed, {**listed(sealed), name: {"sha256": "0" * 64, "bytes": 0}})
    monkeypatch.setattr(manifest, "_described", lambda path: pytest.fail("a file was opened"))
    with pytest.raises(Damaged, match="names a file outside its folder"):
        verify(sealed)


def test_a_manifest_that_is_a_link_or_a_pipe_is_not_opened(sealed):
    (sealed / manifest.NAME).rename(sealed.parent / "elsewhere")
    (sealed / manifest.NAME).symlink_to(sealed.parent / "elsewhere")
    with pytest.raises(Damaged, match="manifest.json is not a regular file"):
        verify(sealed)
    (sealed / manifest.NAME).unlink()
    os.mkfifo(sealed / manifest.NAME)
    with pytest.raises(Damaged, match="manifest.json is not a regular file"):
        verify(sealed)


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**5, "\x00" * 10**5, '{"\\ud800": 1}'])
def test_a_manifest_that_is_made_to_break_the_reader_is_refused(sealed, text):
    relist(sealed, text)
    with pytest.raises(Damaged, match=manifest.NAME) as caught:
        verify(sealed)
    assert str(caught.value).isprintable()


def test_too_large_folders_are_rejected_before_reading(sealed, monkeypatch):
    monkeypatch.setattr(manifest, "_described", lambda path: pytest.fail("a file was opened"))
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "MAX_FILES", 4)
        with pytest.raises(Damaged, match="more than 4 files"):
            verify(sealed)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "MAX_TOTAL", 1000)
        with pytest.raises(Damaged, match="lists more than 1,000 bytes"):
            verify(sealed)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "MAX_BYTES", 100)
        with pytest.raises(Damaged, match="manifest.json has more than 100 bytes"):
            verify(sealed)


def test_a_huge_file_with_holes_is_refused_by_its_size(sealed):
    os.truncate(sealed / "d.txt", 2**40)
    relist(sealed, {**listed(sealed), "d.txt": {"sha256": "0" * 64, "bytes": 2**40}})
    with pytest.raises(Damaged, match="lists more than"):
        verify(sealed)


def test_a_name_that_could_steer_a_terminal_is_spelled_out(sealed):
    (sealed / "\x1b[2J").write_text("")
    with pytest.raises(Damaged) as caught:
        verify(sealed)
    assert str(caught.value) == r"'\x1b[2J' is not in the manifest"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(sealed):
    (sealed / "d.txt").chmod(0)
    with pytest.raises(Damaged, match="d.txt cannot be read"):
        verify(sealed)


def test_files_are_synced_before_their_folder(sealed, monkeypatch):
    synced, real = [], os.fsync
    (sealed / manifest.NAME).unlink()
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    if not sys.platform.startswith("linux"):
        pytest.skip("needs /proc to tell what was synced")
    seal(sealed)
    names = [os.path.relpath(path, sealed) for path in synced]
    assert sorted(names) == sorted(["a/b/c.bin", "d.txt", "a/empty", manifest.NAME, "a/b", "a", "."])
    assert [name for name in names if name in ("a/b", "a", ".")] == ["a/b", "a", "."]
    assert names[-1] == "."
