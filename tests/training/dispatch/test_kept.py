"""Compiled functions that are kept: which stages share them, and which do not."""

import dataclasses

import jax
import numpy as np
import pytest

from chargpt_jax.training import stages
from chargpt_jax.training.dispatch import kept, steps
from chargpt_jax.training.run import Run
from chargpt_jax.training.setup import Setup
from tests.corpus_text import small_config, write_words


@pytest.fixture(autouse=True)
def empty():
    kept.forget()
    yield
    kept.forget()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    list(stages.prepare(small_config(write_words(folder / "words.txt")), folder / "run", lambda text: None))
    return Run.load(folder / "run")


def test_a_function_is_made_at_its_first_use():
    made = [kept.kept("a", object), kept.kept("b", object)]
    assert kept.kept("a", object) is made[0] is not made[1]


def test_the_one_that_was_not_used_for_the_longest_time_is_dropped():
    first, second = kept.kept(0, object), kept.kept(1, object)
    for key in range(2, kept.MAX_KEPT):
        kept.kept(key, object)
    assert kept.kept(0, object) is first
    kept.kept(kept.MAX_KEPT, object)
    assert kept.kept(0, object) is first
    assert kept.kept(1, object) is not second


def changed(run: Run, path: str, value: object) -> Setup:
    """Return the setup of a run with a changed field of its config."""
    section, _, name = path.rpartition(".")
    config = run.config
    if section:
        value, name = dataclasses.replace(getattr(config, section), **{name: value}), section
    return Setup.of(dataclasses.replace(run, config=dataclasses.replace(config, **{name: value})))


@pytest.mark.parametrize(("path", "value"), [("train.log_every", 7), ("sample.temperature", 0.3), ("seed", 5)])
def test_settings_of_no_program_do_not_matter(run, path, value):
    assert Setup.of(run).kept("steps", object) is changed(run, path, value).kept("steps", object)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.dropout", 0.2),
        ("model.n_layer", 1),
        ("data.batch_size", 4),
        ("data.train_split", 0.7),
        ("optimizer.learning_rate", 2e-2),
        ("optimizer.kind", "muon"),
        ("scheduler.max_steps", 31),
        ("amp.dtype", "float16"),
    ],
)
def test_other_settings_have_functions_of_their_own(run, path, value):
    assert Setup.of(run).kept("steps", object) is not changed(run, path, value).kept("steps", object)


def test_seeds_have_initial_parameters_of_their_own(run):
    one, other = (np.asarray(changed(run, "seed", seed).initial_params()["wte"]["embedding"]) for seed in (1, 2))
    assert not np.array_equal(one, other)


def test_a_training_that_is_repeated_compiles_no_steps_again(run, tmp_path, monkeypatch):
    traced = []
    original = steps.train_steps

    def counted(*args, **options):
        traced.append(jax.numpy.shape(args[2]))
        return original(*args, **options)

    monkeypatch.setattr(steps, "train_steps", counted)
    config = dataclasses.replace(run.config, scheduler=dataclasses.replace(run.config.scheduler, max_steps=3))
    for folder in ("once", "twice"):
        events = list(stages.train(config, tmp_path / folder, lambda text: None))
        assert events[-1].complete
    assert len(traced) == 1
