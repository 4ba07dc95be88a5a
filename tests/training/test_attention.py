"""The attention of a run's training steps: tried once, saved in the run, kept when it resumes.

A CPU has one attention. Here it has two: `choose` is told that it has a kernel, which is interpreted.
"""

import contextlib
import dataclasses
import json
import signal

import jax
import numpy as np
import pytest

from chargpt_jax.devices import layout
from chargpt_jax.errors import UserError
from chargpt_jax.events import AttentionChosen, Prepared, Steps
from chargpt_jax.ops import choose
from chargpt_jax.ops.kernels.trial import Shape, Tried
from chargpt_jax.results import info
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training import attention, stages
from chargpt_jax.training.setup import training_mesh
from tests.corpus_text import small_config, write_words
from tests.training.test_stages import final, same_bits

KERNEL_IS_FASTER = (Tried("blocks", 1e-7, 2e-3), Tried("kernel", 2e-7, 1e-3))
BLOCKS_ARE_FASTER = (Tried("blocks", 1e-7, 1e-3), Tried("kernel", 2e-7, 2e-3))


@pytest.fixture
def config(tmp_path):
    config = small_config(write_words(tmp_path / "words.txt", 300), n_layer=1, block_size=16, n_head=1)
    config.scheduler.max_steps, config.data.batch_size, config.train.validate_every = 4, 2, 1e6
    config.train.steps_per_dispatch = 1
    return config


@pytest.fixture
def trials(monkeypatch):
    """Make a device with two attentions; return its next results, and the shapes that it was asked for."""
    results, shapes = [KERNEL_IS_FASTER], []

    def tried(names, shape, dtype, query_block, mesh):
        shapes.append(shape)
        return results.pop(0)

    monkeypatch.setattr(choose, "attentions_for", lambda *given: ("blocks", "kernel"))
    monkeypatch.setattr(choose, "try_attentions", tried)
    return results, shapes


def chosen(config, workdir, warn=pytest.fail, stage=stages.train):
    """Begin a training; return the event that reports its attention, or None if another event comes first."""
    with contextlib.closing(stage(config, workdir, warn)) as events:
        assert isinstance(next(events), Prepared)
        event = next(events)
    return event if isinstance(event, AttentionChosen) else None


class Built(Exception):
    """Stops a stage when it builds the model."""


@pytest.fixture
def built(monkeypatch):
    """Return the list of the attentions that a model is built with; each stage stops at the first."""
    attentions = []

    def of(run):
        attentions.append(run.attention)
        raise Built

    monkeypatch.setattr(stages.Setup, "of", of)
    return attentions


def test_a_device_with_one_attention_tries_and_saves_nothing(config, built, tmp_path):
    with pytest.raises(Built):
        chosen(config, tmp_path / "run")
    assert built == ["blocks"]
    assert not Workdir(tmp_path / "run").attention.exists()


@pytest.mark.parametrize("stage", [stages.find_lr, stages.train])
@pytest.mark.parametrize("learning_rate", [None, 1e-2])
def test_model_is_built_with_the_chosen_attention(stage, learning_rate, config, trials, built, tmp_path):
    config.optimizer.learning_rate = learning_rate
    with pytest.raises(Built):
        list(stage(config, tmp_path / "run", pytest.fail))
    assert built == ["kernel"]


def test_trial_is_run_once_and_its_choice_kept(config, trials, tmp_path):
    first, *later = (chosen(config, tmp_path / "run", stage=stage) for stage in (stages.find_lr, *[stages.train] * 2))
    assert (first.name, first.source) == ("kernel", "trial")
    assert later == [AttentionChosen("kernel", "run")] * 2
    assert [(one.name, one.seconds) for one in first.tried] == [("blocks", 2e-3), ("kernel", 1e-3)]
    assert trials[1] == [Shape(sequences=2, heads=1, length=16, width=8, rate=0.1, remat=True)]


def test_shape_of_the_trial_is_that_of_one_device_and_microbatch(config):
    config.data.batch_size, config.optimizer.accumulation_steps = 12, 3
    assert attention.shape_of(config, training_mesh(config)).sequences == 4


@pytest.mark.slow
def test_resumed_run_is_bit_identical_with_a_kernel(config, trials, tmp_path):
    trials[0].append(KERNEL_IS_FASTER)
    list(stages.train(config, tmp_path / "whole", pytest.fail))
    made = []
    for event in stages.train(config, tmp_path / "parts", pytest.fail, stop=lambda: signal.SIGTERM if made else None):
        if isinstance(event, Steps):
            made.append(event.step)
    assert made == [1]
    list(stages.train(config, tmp_path / "parts", pytest.fail))
    assert trials[0] == []
    assert same_bits(final(tmp_path / "whole"), final(tmp_path / "parts"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("device", "another"), ("jax", "0.0.1"), ("dtype", "float16"), ("sequences", 3), ("rate", 0.5)],
)
def test_another_device_or_shape_is_tried_again(field, value, config, trials, tmp_path):
    trials[0].append(BLOCKS_ARE_FASTER)
    chosen(config, tmp_path / "run")
    path = Workdir(tmp_path / "run").attention
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["conditions"]["device"] == jax.devices()[0].device_kind
    path.write_text(json.dumps({**saved, "conditions": {**saved["conditions"], field: value}}), encoding="utf-8")
    event = chosen(config, tmp_path / "run")
    assert (event.name, event.source) == ("blocks", "trial")
    assert json.loads(path.read_text(encoding="utf-8"))["attention"] == "blocks"


def test_a_run_that_trained_without_a_choice_keeps_blocks(config, trials, tmp_path):
    """A run of an earlier version: its bits must not change. A checkpoint of step 0 is a run not yet trained."""
    for step, expected in ((1, AttentionChosen("blocks", "run")), (0, "trial")):
        run = tmp_path / f"from-{step}"
        (run / "checkpoints" / str(step)).mkdir(parents=True)
        event = chosen(config, run)
        assert expected in (event, event.source)
        assert Workdir(run).attention.exists() == (step == 0)


def test_config_overrides_the_trial(config, trials, built, tmp_path):
    config.train.attention = "kernel"
    assert chosen(config, tmp_path / "run") == AttentionChosen("kernel", "config")
    config.train.attention = "blocks"
    with pytest.raises(Built):
        chosen(config, tmp_path / "run")
    assert (built, trials[1]) == (["blocks"], [])


@pytest.mark.parametrize("stage", [stages.train, stages.find_lr])
def test_attention_that_the_device_lacks_is_refused_first(stage, config, tmp_path):
    config.train.attention = "kernel"
    with pytest.raises(UserError) as error:
        list(stage(config, tmp_path / "run", pytest.fail))
    assert str(error.value) == (
        "train.attention is 'kernel', but on 1 x cpu with heads of width 8, 16 characters and dropout 0.1 it must be "
        "blocks: set one of these, or auto."
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"attention": 1, "conditions": {}}', '{"attention": "kernel"}'])
def test_damaged_choice_is_a_warning_and_a_new_trial(content, config, trials, tmp_path):
    trials[0].append(BLOCKS_ARE_FASTER)
    chosen(config, tmp_path / "run")
    Workdir(tmp_path / "run").attention.write_text(content, encoding="utf-8")
    warnings = []
    event = chosen(config, tmp_path / "run", warnings.append)
    assert (event.name, event.source) == ("blocks", "trial")
    assert len(warnings) == 1
    assert "attention.json" in warnings[0]


def test_unknown_attention_in_the_file_is_tried_again(config, trials, tmp_path):
    trials[0].append(BLOCKS_ARE_FASTER)
    chosen(config, tmp_path / "run")
    path = Workdir(tmp_path / "run").attention
    path.write_text(path.read_text(encoding="utf-8").replace('"kernel"', '"other"', 1), encoding="utf-8")
    assert chosen(config, tmp_path / "run").source == "trial"


def test_a_choice_that_cannot_be_saved_is_a_warning(config, trials, tmp_path, monkeypatch):
    def full(self, chosen):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Workdir, "save_attention", full)
    warnings = []
    event = chosen(config, tmp_path / "run", warnings.append)
    assert event.name == "kernel"
    assert "attention.json" in warnings[0]


@pytest.mark.parametrize(
    ("fault", "name"),
    [(RuntimeError("illegal address"), "blocks"), (SystemExit(1), "blocks"), (KeyboardInterrupt(), None)],
)
def test_start_after_a_fatal_trial_uses_blocks(fault, name, config, trials, tmp_path, monkeypatch):
    """An interrupted trial is repeated."""
    with monkeypatch.context() as patch:
        patch.setattr(choose, "try_attentions", lambda *given: (_ for _ in ()).throw(fault))
        warnings = []
        with pytest.raises(type(fault)):
            chosen(config, tmp_path / "run", warnings.append)
    assert ["run the same command again" in text for text in warnings] == [True] * isinstance(fault, RuntimeError)
    expected = AttentionChosen(name, "run") if name else "trial"
    event = chosen(config, tmp_path / "run")
    assert expected in (event, event.source)


@pytest.mark.slow
def test_real_trial_measures_both_attentions(config, tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "attentions_for", lambda *given: ("blocks", "kernel"))
    event = chosen(config, tmp_path / "run")
    assert [one.fault for one in event.tried] == ["", ""]
    assert all(one.seconds > 0 for one in event.tried)
    saved = json.loads(Workdir(tmp_path / "run").attention.read_text(encoding="utf-8"))
    assert saved["tried"] == [dataclasses.asdict(one) for one in event.tried]
    assert saved["attention"] == event.name == min(event.tried, key=lambda one: one.seconds).name
    assert np.isfinite(saved["tried"][1]["error"])


def test_expected_attention_is_the_configs_or_the_kernel(config, trials, monkeypatch):
    mesh = training_mesh(config)
    assert attention.expected(config, mesh) == "kernel"
    monkeypatch.setattr(choose, "attentions_for", lambda *given: ("blocks", "cudnn"))
    assert attention.expected(config, mesh) == "cudnn"
    config.train.attention = "blocks"
    assert attention.expected(config, mesh) == "blocks"
    config.train.attention = "kernel"
    with pytest.raises(UserError, match="it must be blocks or cudnn"):
        attention.expected(config, mesh)


def test_devices_that_split_parameters_try_their_part_of_the_heads(config):
    config.model.n_head, config.data.batch_size = 8, 16
    mesh = jax.sharding.AbstractMesh((2, 2, 2), layout.AXES)
    shape = attention.shape_of(config, mesh)
    assert (shape.sequences, shape.heads) == (4, 4)


# Facts, for people and scripts


@pytest.mark.parametrize(
    ("asked", "names", "has_trained", "expected"),
    [
        ("auto", ("blocks",), True, ("blocks", "device")),
        ("auto", ("blocks", "kernel"), True, ("blocks", "run")),
        ("auto", ("blocks", "kernel"), False, (None, None)),
        ("kernel", ("blocks", "kernel"), False, ("kernel", "config")),
    ],
)
def test_facts_without_a_trial(config, monkeypatch, asked, names, has_trained, expected):
    monkeypatch.setattr(choose, "attentions_for", lambda *given: names)
    config.train.attention = asked
    facts = attention.facts(config, training_mesh(config), {}, has_trained)
    assert (facts["attention"], facts["attention_source"]) == expected
    assert (facts["attention_device"], facts["attention_trial"]) == (None, [])


def test_facts_of_a_trial_are_those_of_its_file(config, trials, built, tmp_path):
    with pytest.raises(Built):
        list(stages.train(config, tmp_path / "run", pytest.fail))
    facts = info.info(tmp_path / "run", pytest.fail)
    assert (facts["attention"], facts["attention_source"]) == ("kernel", "trial")
    assert facts["attention_device"] == jax.devices()[0].device_kind
    assert [(one["name"], one["seconds"]) for one in facts["attention_trial"]] == [("blocks", 2e-3), ("kernel", 1e-3)]


def test_facts_of_an_unknown_attention_are_those_of_a_run_without_a_trial(config):
    saved = {"attention": "other", "conditions": {}}
    assert attention.facts(config, training_mesh(config), saved, False)["attention_source"] == "device"
