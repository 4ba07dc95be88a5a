"""The workdir: files are written atomically, and reading returns what was written."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from chargpt_jax.config import Config
from chargpt_jax.config.files import load_config
from chargpt_jax.data.tokenizer import CharTokenizer
from chargpt_jax.errors import UserError
from chargpt_jax.storage import manifest
from chargpt_jax.storage.workdir import Workdir


@pytest.fixture
def folder(tmp_path: Path) -> Workdir:
    return Workdir(tmp_path / "a run of Ærøskøbing 日本 👩‍👧")


def refuse(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_workdir_write_that_fails_leaves_the_old_file(folder, monkeypatch):
    path = folder.path / "x.json"
    folder.write(path, "old")
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        folder.write(path, "new and longer")
    monkeypatch.undo()
    assert path.read_text(encoding="utf-8") == "old"
    assert os.listdir(folder.path) == ["x.json"]


def test_a_write_replaces_the_file_whole_and_makes_its_folder(folder):
    path = folder.samples / "deep" / "é.json"
    for text in ("first, and rather long", "second"):
        folder.write(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert os.listdir(path.parent) == ["é.json"]


def test_no_folder_is_created_before_the_first_write(folder):
    folder.check_writable()
    folder.check_config(Config())
    assert not folder.has_corpus()
    assert folder.load_metrics() == []
    assert not folder.path.exists()


def test_corpus_round_trip(folder):
    text = "\0a\r\n é\ud800\U0001f600\u2028z"
    tokenizer = CharTokenizer.from_text(text)
    sources = [{"title": "Ænes & «co»", "sha256": "0" * 64, "characters": 10, "stand_in_for": None}]
    folder.save_corpus(tokenizer, tokenizer.encode_text(text), sources)
    again, tokens = folder.load_tokenizer(), folder.load_tokens()
    assert folder.has_corpus()
    assert again.vocabulary == tokenizer.vocabulary
    assert tokens.dtype == np.uint8
    assert again.decode([tokens]) == [text]
    assert folder.load_sources() == sources
    assert sorted(os.listdir(folder.corpus)) == ["manifest.json", "sources.json", "tokens.npy", "vocabulary.json"]
    folder.check_corpus(again, tokens)
    (folder.corpus / "notes of a user.txt").write_text("may stay")
    folder.check_corpus(again, tokens)


@pytest.mark.parametrize("name", ["vocabulary.json", "sources.json"])
def test_a_file_of_another_program_is_not_replaced(folder, name):
    folder.corpus.mkdir(parents=True)
    (folder.corpus / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} is not a file of a run: move it"):
        folder.save_corpus(CharTokenizer("ab"), np.int32([1, 2]), [])
    assert (folder.corpus / name).read_text() == "mine"
    (folder.corpus / "tokens.npy").touch()  # left by a killed run
    folder.save_corpus(CharTokenizer("ab"), np.int32([1, 2]), [])
    assert folder.load_tokens().tolist() == [1, 2]


@pytest.mark.parametrize("name", ["sources.json", "manifest.json"])
def test_a_changed_corpus_is_refused_by_name(folder, name):
    tokenizer, tokens = CharTokenizer("ab"), np.uint8([1, 2])
    folder.save_corpus(tokenizer, tokens, [])
    content = (folder.corpus / name).read_bytes()
    (folder.corpus / name).write_bytes(content[:-2] + b"\1" + content[-1:])
    with pytest.raises(UserError, match=f"has changed \\({name}.*restore the files"):
        folder.check_corpus(tokenizer, tokens)


@pytest.mark.parametrize("name", ["sources.json", "manifest.json"])
def test_a_forbidden_file_of_the_corpus_has_not_changed(folder, monkeypatch, name):
    tokenizer, tokens, opened = CharTokenizer("ab"), np.uint8([1, 2]), Path.open
    folder.save_corpus(tokenizer, tokens, [])

    def forbidden(path: Path, *how: object) -> object:
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *how)

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(UserError, match=rf"cannot be checked \({name} cannot be read .*\): make it readable"):
        folder.check_corpus(tokenizer, tokens)


@pytest.mark.parametrize(
    ("characters", "ids", "name"),
    [("ab", [2, 2], "tokens.npy"), ("ac", [1, 2], "vocabulary.json"), ("ab", [1, 2, 1], "tokens.npy")],
)
def test_tokens_and_vocabulary_are_compared_as_they_were_read(folder, characters, ids, name):
    folder.save_corpus(CharTokenizer("ab"), np.int32([1, 2]), [])
    with pytest.raises(UserError, match=f"has changed \\({name}.*restore the files"):
        folder.check_corpus(CharTokenizer(characters), np.uint8(ids))


@pytest.mark.parametrize("name", ["tokens.npy", "vocabulary.json"])
def test_a_corpus_that_was_changed_on_the_disk_is_refused(folder, name):
    other = Workdir(folder.path.parent / "other")
    folder.save_corpus(CharTokenizer("ab"), np.int32([1, 2, 1, 2]), [])
    other.save_corpus(CharTokenizer("abc"), np.int32([2, 1, 2, 1]), [])
    (folder.corpus / name).write_bytes((other.corpus / name).read_bytes())
    with pytest.raises(UserError, match=f"has changed \\({name}"):
        folder.check_corpus(folder.load_tokenizer(), folder.load_tokens())


def test_a_corpus_of_an_earlier_version_has_no_manifest(folder):
    folder.save_corpus(CharTokenizer("ab"), np.int32([1, 2]), [])
    (folder.corpus / "manifest.json").unlink()
    folder.check_corpus(CharTokenizer("ab"), np.int32([2, 1]))


@pytest.mark.parametrize(
    ("characters", "dtype"), [(255, np.uint8), (256, np.uint16), (65_535, np.uint16), (65_536, np.uint32)]
)
def test_tokens_are_saved_in_the_least_width(folder, characters, dtype):
    tokenizer = CharTokenizer(map(chr, range(characters)))
    tokens = tokenizer.encode_text("".join(tokenizer.vocabulary) * 2)
    folder.save_corpus(tokenizer, tokens, [])
    again = folder.load_tokens()
    assert again.dtype == dtype
    assert np.array_equal(again, tokens)
    folder.check_corpus(tokenizer, again)


def test_tokens_in_pieces_give_the_same_file(folder):
    other, tokenizer, ids = Workdir(folder.path.parent / "other"), CharTokenizer("abc"), np.uint8([1, 2, 3, 3, 2, 1, 1])
    folder.save_corpus(tokenizer, ids, [])
    other.save_corpus_in_pieces(tokenizer, len(ids), iter([ids[:3], ids[3:3], ids[3:].astype(np.int32)]), [])
    for name in ("tokens.npy", "manifest.json"):
        assert (folder.corpus / name).read_bytes() == (other.corpus / name).read_bytes()


def test_tokens_of_32_bits_of_an_earlier_version_are_loaded(folder):
    tokenizer, tokens = CharTokenizer("ab"), np.int32([1, 2, 2])
    folder.save_corpus(tokenizer, tokens, [])
    np.save(folder.corpus / "tokens.npy", tokens)
    (folder.corpus / "manifest.json").unlink()
    manifest.seal(folder.corpus)
    again = folder.load_tokens()
    assert again.dtype == np.int32
    assert again.tolist() == [1, 2, 2]
    folder.check_corpus(tokenizer, again)


def test_tokens_are_written_as_numpy_writes_them(folder, tmp_path):
    tokens = np.arange(1, 5, dtype=np.uint8)
    folder.save_corpus(CharTokenizer("abcd"), tokens, [])
    np.save(tmp_path / "x.npy", tokens)
    assert (folder.corpus / "tokens.npy").read_bytes() == (tmp_path / "x.npy").read_bytes()
    assert (folder.load_tokens() == tokens).all()


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_incomplete_corpus_does_not_count(folder, monkeypatch, fails_at):
    replace, calls = os.replace, []

    def failing(*args: object) -> None:
        calls.append(args)
        refuse() if len(calls) == fails_at else replace(*args)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="No space left"):
        folder.save_corpus(CharTokenizer("ab"), np.int32([1, 2]), [])
    assert len(calls) == fails_at
    assert not folder.has_corpus()
    assert not list(folder.corpus.glob("*.partial"))


def test_config_round_trip(folder):
    config = load_config("small")
    config.optimizer.learning_rate = 1.2345678901234567e-3
    folder.save_config(config)
    assert folder.load_config() == config


def test_leftovers_of_killed_processes_are_swept(folder):
    folder.save_corpus(CharTokenizer("ab"), np.int32([1, 2]), [])
    folder.samples.mkdir()
    left = [part / ".x.0123abcd.partial" for part in (folder.path, folder.corpus, folder.samples)]
    for path in left:
        path.touch()
    folder.sweep()
    assert [path.exists() for path in left] == [False, False, True]  # a sample may be in writing
    os.utime(left[2], (0, 0))
    folder.sweep()
    assert not left[2].exists()


def test_contradicting_config_is_rejected_by_field(folder):
    folder.save_config(Config())
    given = Config()
    given.model.n_layer, given.data.batch_size = 3, 8
    with pytest.raises(UserError) as error:
        folder.check_config(given)
    assert "model.n_layer: saved 15, given 3; data.batch_size: saved 16, given 8" in str(error.value)
    assert str(folder.path) in str(error.value)


def test_resolved_or_changeable_fields_do_not_contradict(folder):
    saved, given = Config(), Config()
    saved.model.vocab_size, saved.model.used_ids, saved.optimizer.learning_rate = 128, 98, 1e-3
    given.train.log_every, given.scheduler.epochs, given.sample.prompts = 1, 7.0, ("x",)
    folder.save_config(saved)
    folder.check_config(given)


def test_many_contradictions_are_counted(folder):
    folder.save_config(Config())
    given = Config()
    for name in ("block_size", "n_embd", "n_head", "n_head_dim", "n_ff", "n_layer", "attention_block"):
        setattr(given.model, name, 2)
    given.seed = 1
    with pytest.raises(UserError, match="and 1 more"):
        folder.check_config(given)


def test_a_relative_path_stays_where_it_pointed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Workdir("runs/é x")
    assert folder.path.is_absolute()
    monkeypatch.chdir("/")
    folder.save_config(Config())
    assert (tmp_path / "runs" / "é x" / "config.json").is_file()


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Workdir("~/run").path == tmp_path / "run"


def test_file_as_workdir_is_rejected(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="that is not a folder"):
        Workdir(file).check_writable()
    with pytest.raises(UserError, match="file is not a folder: choose another"):
        Workdir(file / "run").check_writable()


def test_read_only_folder_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="is not writable"):
        Workdir(tmp_path / "run").check_writable()


def test_a_folder_without_a_run_says_what_is_missing(folder):
    with pytest.raises(UserError, match=r"has no config\.json"):
        folder.load_config()
    with pytest.raises(UserError, match=r"has no corpus.vocabulary\.json"):
        folder.load_tokenizer()
    with pytest.raises(UserError, match=r"tokens\.npy cannot be read"):
        folder.load_tokens()


@pytest.mark.parametrize("content", [b"", b'{"model": {', b"\xff\xfe", b"[]", b'{"seed": {}, "model": 1}', b'"text"'])
def test_a_damaged_config_is_the_users_mistake_not_a_crash(folder, content):
    folder.path.mkdir()
    folder.config.write_bytes(content)
    with pytest.raises(UserError):
        folder.load_config()


@pytest.mark.parametrize("keep", [0, 4, 100, 130])
def test_a_damaged_corpus_is_the_users_mistake_not_a_crash(folder, keep):
    folder.save_corpus(CharTokenizer("ab"), np.ones(20, np.int32), [])
    tokens = folder.corpus / "tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"tokens\.npy cannot be read"):
        folder.load_tokens()


@pytest.mark.parametrize("name", ["tokens.npy", "vocabulary.json"])
def test_a_folder_or_a_forbidden_file_of_the_corpus_is_named_once(folder, monkeypatch, name):
    folder.save_corpus(CharTokenizer("ab"), np.int32([1, 2]), [])
    path, opened = folder.corpus / name, Path.open

    def forbidden(file: Path, *how: object) -> object:
        if file == path:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(file, *how)

    monkeypatch.setattr(Path, "open", forbidden)
    reader = Workdir(folder.path)  # without what the writer remembers
    with pytest.raises(UserError) as error:
        reader.load_tokens()
    assert str(error.value) == f"{path} cannot be read (Permission denied): make it readable."
    monkeypatch.undo()
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError) as error:
        reader.load_tokens()
    assert str(error.value).count(str(path)) == 1
    assert "Errno" not in str(error.value)


def test_a_corpus_is_read_without_running_what_it_holds(folder):
    folder.corpus.mkdir(parents=True)
    np.save(folder.corpus / "tokens.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError):
        folder.load_tokens()


def test_save_lr_finder_writes_json(folder):
    from chargpt_jax.events import LRFinderResult, Zoom

    zoom = Zoom(1, 1e-6, 1.0, (1e-3, 1e-2), (4.0, 3.0), 3e-3, 1e-2, 3e-3)
    folder.save_lr_finder(dataclasses.asdict(LRFinderResult(3e-3, "steepest", 1e-6, 1.0, (zoom,))))
    saved = json.loads(folder.lr_finder.read_text(encoding="utf-8"))
    assert saved["learning_rate"] == 3e-3
    assert saved["zooms"][0]["losses"] == [4.0, 3.0]
