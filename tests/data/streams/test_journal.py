"""A killed preparation resumes: its corpus is that of an uninterrupted one, and finished texts are not repaired."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from chargpt_jax.config import Config, DataConfig
from chargpt_jax.data.corpus import Corpus, read_corpus
from chargpt_jax.data.streams import journal, parts
from chargpt_jax.data.streams.journal import FOLDER, LINES, TEXT, Journal
from chargpt_jax.data.streams.text_file import TextFile
from chargpt_jax.errors import UserError
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training import stages

KILLED = """
import os, signal, sys
from pathlib import Path
from chargpt_jax.config import DataConfig
from chargpt_jax.data.corpus import read_corpus
from chargpt_jax.data.streams import journal, text_file
folder, source, name, left = sys.argv[1:]
owner = text_file.TextFile if name == "append" else journal.Journal
original, left = getattr(owner, name), int(left)
def killing(*args, **options):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **options)
setattr(owner, name, killing)
config = DataConfig(source=source)
read_corpus(config, folder=Path(folder), journal=journal.Journal(Path(folder), config))
"""


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(4):
        lines = [f"Text {i}, line {n}: cafÃ© — naïve 日本" for n in range(200)]
        (folder / f"{i}.txt").write_text("\n".join(lines) + "\n" * (i % 2), encoding="utf-8")
    return folder


def read(folder: Path, texts: Path) -> tuple[Corpus, list[str]]:
    """Return the corpus, and the titles of the texts that were repaired."""
    made, original = [], parts.Parts._make
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.Parts, "_make", lambda self, *page: (made.append(page[1].url), original(self, *page))[1])
        config = DataConfig(source=str(texts))
        found = read_corpus(config, folder=folder, journal=Journal(folder, config))
    return found, [Path(url).stem for url in made]


@pytest.mark.parametrize(
    ("name", "at", "again"),
    [("add", 1, "0123"), ("add", 3, "23"), ("append", 5, "123"), ("append", 1, "0123")],
)
def test_killed_preparation_resumes_after_the_last_finished_text(tmp_path, texts, name, at, again):
    whole, made = read(tmp_path, texts)
    assert made == list("0123")
    folder = tmp_path / "killed"
    folder.mkdir()
    command = [sys.executable, "-c", KILLED, str(folder), str(texts), name, str(at)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    assert subprocess.run(command, env=environment, timeout=300).returncode == -signal.SIGKILL
    found, made = read(folder, texts)
    assert "".join(made) == again
    assert found.text.text() == whole.text.text()
    assert (found.characters, found.sources) == (whole.characters, whole.sources)
    assert read(folder, texts)[1] == []  # now all are finished


def damage_text(folder, texts):
    path = folder / FOLDER / TEXT
    path.write_bytes(path.read_bytes()[:-1000] + b"\0" * 1000)


def truncate_lines(folder, texts):
    path = folder / FOLDER / LINES
    path.write_bytes(path.read_bytes()[:-10])


def edit_a_text(folder, texts):
    (texts / "3.txt").write_text("Another text.\n" * 100, encoding="utf-8")


def edit_a_record(folder, texts):
    path = folder / FOLDER / LINES
    lines = path.read_text(encoding="utf-8").splitlines()
    record = json.loads(lines[3])
    record["source"]["unknown"] = 1
    path.write_text("\n".join([*lines[:3], json.dumps(record)]) + "\n", encoding="utf-8")


@pytest.mark.parametrize("change", [damage_text, truncate_lines, edit_a_text, edit_a_record])
def test_text_that_is_not_intact_is_made_again(tmp_path, texts, change):
    read(tmp_path, texts)
    change(tmp_path, texts)
    found, made = read(tmp_path, texts)
    assert made == ["3"]
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    whole, _ = read(fresh, texts)
    assert found.text.text() == whole.text.text()
    assert found.sources == whole.sources
    assert read(tmp_path, texts)[1] == []


def test_texts_of_another_config_are_made_again(tmp_path, texts):
    read(tmp_path, texts)
    config = DataConfig(source=str(texts), repair="none")
    found = read_corpus(config, folder=tmp_path, journal=Journal(tmp_path, config))
    assert "cafÃ©" in found.text.text()


def test_prepared_run_and_an_error_leave_no_text_behind(tmp_path, texts):
    config = Config()
    config.data.source, config.model.block_size = str(texts), 16
    list(stages.prepare(config, tmp_path / "run", print))
    assert not (tmp_path / "run" / FOLDER).exists()
    assert Workdir(tmp_path / "run").load_tokens().size
    config.data.source = f"{texts},{tmp_path / 'empty.txt'}"
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="is empty"):
        list(stages.prepare(config, tmp_path / "other", print))
    assert not (tmp_path / "other" / FOLDER).exists()


def test_something_else_of_that_name_is_refused(tmp_path):
    (tmp_path / FOLDER).write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="must be a folder, but is something else"):
        Journal(tmp_path, DataConfig())


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_adopted_text_is_that_of_the_file(tmp_path, monkeypatch, size):
    monkeypatch.setattr("chargpt_jax.data.streams.text_file.PIECE", size)
    text = "naïve 日本 \ud800 line\n" * 50
    first = TextFile(tmp_path, tmp_path / "text")
    data = first.append(text)
    first.flush()
    again = TextFile(tmp_path, tmp_path / "text")
    pieces = list(again.adopt(len(data)))
    assert "".join(piece for piece, _ in pieces) == text == again.text()
    assert b"".join(part for _, part in pieces) == data
    assert again.line_ends_before(len(again)) == 50
    assert journal.FORMAT == 1
