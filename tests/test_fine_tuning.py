"""Fine-tuning: a run that starts from another run's parameters, on a text of its own."""

import json
import shutil

import jax
import numpy as np
import pytest

import chargpt_jax
from benchmarks.processes import Training, prepared, result
from chargpt_jax import fine_tuning
from chargpt_jax.data.tokenizer import CharTokenizer
from chargpt_jax.errors import NoCheckpoint, UserError
from chargpt_jax.events import LRFinderStep, TrainStarted
from chargpt_jax.fine_tuning import RATE, inherited, start_from
from chargpt_jax.main import main
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training.run import Run
from chargpt_jax.training.setup import Setup
from tests.corpus_text import small_config, write_words


def quiet(text: str) -> None:
    """Drop a message."""


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A trained run and its text."""
    folder = tmp_path_factory.mktemp("parent")
    config = small_config(write_words(folder / "words.txt"))
    config.scheduler.max_steps = 60
    list(chargpt_jax.train(config, folder / "run", quiet))
    return folder


def config_for(folder, text: str | None = None):
    """Return a config for the parent's text, or for another one."""
    source = folder / "words.txt"
    if text is not None:
        source = folder / "other.txt"
        source.write_text(text, encoding="utf-8")
    config = small_config(str(source))
    config.scheduler.max_steps = 4
    return config


def test_inherited_embeddings_follow_their_characters():
    theirs, own = CharTokenizer("bdf"), CharTokenizer("abcdef")
    table = np.arange(8.0).reshape(4, 2)
    initial = {"wte": {"embedding": np.full((64, 2), -1.0)}, "ln_f": {"scale": np.zeros(2)}}
    found = inherited(initial, {"wte": {"embedding": table}, "ln_f": {"scale": np.ones(2)}}, own, theirs)
    embedding = found["wte"]["embedding"]
    for character in ("", *"bdf"):
        at, there = own.vocabulary.index(character), theirs.vocabulary.index(character)
        np.testing.assert_array_equal(embedding[at], table[there])
    for character in "ace":
        assert (embedding[own.vocabulary.index(character)] == -1).all()
    assert (found["ln_f"]["scale"] == 1).all()
    assert (initial["wte"]["embedding"] == -1).all(), "the arguments are not changed"


def test_same_text_starts_with_the_parents_loss(parent, tmp_path):
    start_from(parent / "run", config_for(parent), tmp_path / "run", quiet)
    started, trained = (chargpt_jax.evaluate(folder)["loss"] for folder in (tmp_path / "run", parent / "run"))
    assert started == trained


def test_parent_with_another_unit_is_refused(parent, tmp_path):
    config = config_for(parent)
    config.data.unit = "byte"
    with pytest.raises(
        UserError, match=r"are characters, but data\.unit is 'byte': set --config\.data\.unit=character"
    ):
        start_from(parent / "run", config, tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()


def test_new_characters_get_initial_embeddings_and_old_ones_stay(parent, tmp_path):
    config = config_for(parent, "ab ba xyz zyx " * 300)
    start_from(parent / "run", config, tmp_path / "run", quiet)
    new, old = chargpt_jax.load(tmp_path / "run"), chargpt_jax.load(parent / "run")
    assert set(new.tokenizer.vocabulary) == {*old.tokenizer.vocabulary, *"xyz"}
    setup = Setup.of(Run.load(tmp_path / "run"))
    fresh = Setup.on(setup.config, setup.tokens, setup.vocabulary).initial_params()
    table, theirs = (np.asarray(model.params["wte"]["embedding"]) for model in (new, old))
    for character in new.tokenizer.vocabulary:
        row = table[new.tokenizer.vocabulary.index(character)]
        if character in old.tokenizer.vocabulary:
            np.testing.assert_array_equal(row, theirs[old.tokenizer.vocabulary.index(character)])
        else:
            np.testing.assert_array_equal(row, fresh["wte"]["embedding"][new.tokenizer.vocabulary.index(character)])
    kernels = (jax.tree.leaves(model.params["blocks"]) for model in (new, old))
    for mine, other in zip(*kernels, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_learning_rate_is_a_fraction_of_the_parents(parent, tmp_path):
    config, told = config_for(parent), []
    config.optimizer.learning_rate = None
    events = list(chargpt_jax.train(config, tmp_path / "run", told.append, start_from=parent / "run"))
    theirs = Workdir(parent / "run").load_config().optimizer.learning_rate
    assert Workdir(tmp_path / "run").load_config().optimizer.learning_rate == pytest.approx(RATE * theirs)
    assert not [event for event in events if isinstance(event, LRFinderStep)]
    assert any(f"{RATE:g} times that of" in text for text in told)


@pytest.mark.slow
def test_range_test_starts_from_a_parent_without_a_learning_rate(parent, tmp_path, monkeypatch):
    model = chargpt_jax.load(parent / "run")
    model.config.optimizer.learning_rate = None
    monkeypatch.setattr(fine_tuning, "load", lambda *given, **more: model)
    config = config_for(parent)
    config.optimizer.learning_rate = None
    config.lr_finder.num_zooms, config.lr_finder.steps_per_zoom, config.lr_finder.start_lr = 1, 40, 1e-6
    events = list(chargpt_jax.train(config, tmp_path / "run", quiet, start_from=parent / "run"))
    first = next(event for event in events if isinstance(event, LRFinderStep))
    trained = chargpt_jax.evaluate(parent / "run")["loss"]
    assert first.loss == pytest.approx(trained, abs=0.5)
    assert next(event for event in events if isinstance(event, TrainStarted)).first_step == 0


@pytest.mark.slow
def test_resumed_fine_tuning_is_bit_identical(parent, tmp_path):
    config = config_for(parent)
    config.optimizer.learning_rate = 1e-3
    arguments = {"warn": quiet, "start_from": parent / "run"}
    list(chargpt_jax.train(config, tmp_path / "whole", **arguments))
    stops = iter([None, None, 15])
    list(chargpt_jax.train(config, tmp_path / "parts", stop=lambda: next(stops, 15), **arguments))
    list(chargpt_jax.train(config, tmp_path / "parts", **arguments))
    whole, parts = (chargpt_jax.load(tmp_path / name, "latest") for name in ("whole", "parts"))
    assert whole.step == parts.step == 4
    for mine, other in zip(*map(jax.tree.leaves, (whole.params, parts.params)), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.slow
def test_damaged_start_does_not_stop_a_run_that_has_gone_on(parent, tmp_path):
    config = config_for(parent)
    config.optimizer.learning_rate, config.train.validate_every = 1e-3, 2 / config.scheduler.max_steps
    stops = iter([None, None, 15])
    arguments = {"warn": quiet, "start_from": parent / "run"}
    list(chargpt_jax.train(config, tmp_path / "run", stop=lambda: next(stops, 15), **arguments))
    first, *later = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert first == 0
    assert later
    (tmp_path / "run" / "checkpoints" / "0" / "record.json").write_text("{}", encoding="utf-8")
    list(chargpt_jax.train(config, tmp_path / "run", **arguments))
    assert chargpt_jax.load(tmp_path / "run", "latest").step == 4


def test_other_sizes_are_refused_before_anything_is_written(parent, tmp_path):
    config = config_for(parent)
    config.model.n_layer, config.model.n_ff = 5, 24
    with pytest.raises(UserError, match=r"differs from n_layer=5, n_ff=24: set --config.model.n_layer=\d+ --"):
        start_from(parent / "run", config, tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()


def test_text_that_was_prepared_alone_is_refused(parent, tmp_path):
    config = config_for(parent, "ab ba " * 600)
    list(chargpt_jax.prepare(config, tmp_path / "run", quiet))
    with pytest.raises(
        UserError, match="was prepared without 'c', which the vocabulary of .* has: use a new --workdir"
    ):
        start_from(parent / "run", config, tmp_path / "run", quiet)
    assert not Workdir(tmp_path / "run").has_checkpoints()


def test_run_without_a_checkpoint_and_own_folder_are_refused(parent, tmp_path):
    shutil.copytree(parent / "run", tmp_path / "empty")
    shutil.rmtree(tmp_path / "empty" / "checkpoints")
    with pytest.raises(NoCheckpoint, match="holds no checkpoint: train first"):
        start_from(tmp_path / "empty", config_for(parent), tmp_path / "run", quiet)
    with pytest.raises(UserError, match="the run's own --workdir: give the folder of another run"):
        start_from(tmp_path / "empty", config_for(parent), tmp_path / "empty", quiet)


@pytest.mark.slow
def test_command_fine_tunes_a_run(parent, tmp_path, capsys):
    saved = json.loads((parent / "run" / "config.json").read_text(encoding="utf-8"))
    saved["model"] |= {"vocab_size": 0, "used_ids": 0}
    (tmp_path / "config.json").write_text(json.dumps(saved), encoding="utf-8")
    flags = [f"--config={tmp_path / 'config.json'}", f"--workdir={tmp_path / 'run'}", "--config.scheduler.max_steps=2"]
    assert main(["chargpt", *flags, "--mode=train", f"--from={parent / 'run'}"]) == 0
    assert main(["chargpt", *flags, "--mode=train", f"--from={parent / 'nothing'}"]) == 0, "it has started: it resumes"
    new = [flags[0], f"--workdir={tmp_path / 'new'}", "--mode=train"]
    assert main(["chargpt", *new, f"--from={tmp_path / 'nothing'}"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_start_from_a_run_as_one_does(tmp_path):
    config = prepared(tmp_path, 12)
    parent = Training(config, tmp_path / "parent", 1)
    assert parent.codes() == [0], parent.said(0)
    words = [f"--from={tmp_path / 'parent'}", "--config.optimizer.learning_rate=None"]
    for count in (1, 2):
        training = Training(config, tmp_path / f"tuned-{count}", count, words)
        assert training.codes() == [0] * count, training.said(0)
        assert "learning rate: 5.00e-03, 0.5 times that of " in training.said(0)
        assert count == 1 or training.said(1) == ""
    one, two = (result(tmp_path / f"tuned-{count}") for count in (1, 2))
    assert one["step"] == two["step"] == 12
    for line, other in zip(one["log"], two["log"], strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-5)


@pytest.mark.slow
def test_two_processes_report_a_parent_that_does_not_fit(tmp_path):
    config = prepared(tmp_path, 4)
    parent = Training(config, tmp_path / "parent", 1)
    assert parent.codes() == [0], parent.said(0)
    words = [f"--from={tmp_path / 'parent'}", "--config.model.n_layer=3"]
    training = Training(config, tmp_path / "tuned", 2, words)
    assert training.codes(60.0) == [2, 2]
    for index in range(2):
        assert "differs from n_layer=3: set --config.model.n_layer=2." in training.said(index)
        assert training.said(index).count("\n") == 1
    assert not (tmp_path / "tuned").exists()
