"""What a run leaves: samples along the training, the scored validation set, the report."""

import json
import re
import shutil

import numpy as np
import pytest

import chargpt_jax
from chargpt_jax.errors import NoCheckpoint, UserError
from chargpt_jax.events import Ended, Sampled, Saved, Validated
from chargpt_jax.generation.sample import Sample, Samples
from chargpt_jax.results import samples as results_samples
from chargpt_jax.results.report import MAX_STAGES, content
from chargpt_jax.results.samples import TimeForSamples, sample_files, save_samples
from chargpt_jax.results.validation import MAX_SCORED, load_validation, path_of
from chargpt_jax.storage.workdir import Workdir
from tests.corpus_text import small_config, write_words


def config_of(folder, **sample):
    config = small_config(write_words(folder / "words.txt"))
    config.scheduler.max_steps = 60
    config.train.validate_every = 20 / config.scheduler.max_steps
    for name, value in sample.items():
        setattr(config.sample, name, value)
    return config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A complete run: its folder and its events."""
    folder = tmp_path_factory.mktemp("results")
    return folder / "run", list(chargpt_jax.run(config_of(folder), folder / "run", lambda text: None))


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run, to be changed."""
    return Workdir(shutil.copytree(made[0], tmp_path / "run"))


def sample_of(text):
    return Sample("", tuple(text), np.ones(len(text), np.float32), np.ones(len(text), np.float32), 64)


def test_saved_samples_leave_no_pictures_of_earlier_ones(tmp_path):
    folder = Workdir(tmp_path)
    three = save_samples(folder, Samples(map(sample_of, ("ab", "cd", "ef"))), "generated")
    others = ["generated-01.svg", "generated-2.svg.bak", "generated-x.svg", "generated-.svg", "my-generated-1.svg"]
    others += ["generated-1-1.svg", "generated_1.svg", "scored-1.svg", "generated-².svg", "generated-2.json"]
    for name in others:
        (folder.samples / name).write_text("kept", encoding="utf-8")
    (folder.samples / "generated-7.svg").mkdir()
    (folder.samples / "generated-8.svg").symlink_to(folder.samples / "scored-1.svg")
    (folder.samples / "generated-12.svg").touch()
    (one,) = save_samples(folder, Samples([sample_of("xyz")]), "generated")
    kept = {"generated.json", one.name, "generated-7.svg", "generated-8.svg", *others}
    assert {path.name for path in folder.samples.iterdir()} == kept
    assert one == three[0]
    assert save_samples(folder, Samples(map(sample_of, ("ab", "cd", "ef"))), "generated") == three
    assert all(path.exists() for path in three)


@pytest.mark.slow
def test_every_validation_is_followed_by_its_samples(made):
    events = made[1]
    validated = [event.step for event in events if isinstance(event, Validated)]
    assert len(validated) > 1
    kinds = [type(event) for event in events]
    for i, event in enumerate(events):
        if isinstance(event, Validated):
            assert kinds[i + 1 : i + 3] == [Saved, Sampled]
            assert events[i + 2].step == event.step
    assert kinds[-2:] == [Ended, Sampled], "the samples of the best checkpoint come last"
    assert sorted(sample_files(Workdir(made[0]))) == validated


def test_samples_along_the_training_are_those_of_their_checkpoint(made):
    last = [event for event in made[1] if isinstance(event, Sampled)][-1]
    saved = Samples.from_dict(json.loads(sample_files(Workdir(made[0]))[last.step].read_text(encoding="utf-8")))
    assert last.samples == tuple(sample.text for sample in saved)
    assert last.svgs == tuple(sample.svg() for sample in saved)
    fresh = chargpt_jax.write_samples(made[0], step=last.step)
    assert fresh.to_dict() == saved.to_dict()


@pytest.mark.slow
def test_samples_along_the_training_use_the_chain_of_samplers(tmp_path):
    chain = "temperature=0.9,budget=3"
    list(chargpt_jax.run(config_of(tmp_path, sampler=chain), tmp_path / "run", lambda text: None))
    files = sample_files(Workdir(tmp_path / "run"))
    saved = {step: Samples.from_dict(json.loads(path.read_text(encoding="utf-8")))[0] for step, path in files.items()}
    assert all(list(sample.series) == ["budget"] for sample in saved.values())
    last = saved[60]
    assert last.text == chargpt_jax.load(tmp_path / "run", 60).generate(last.prompt, 20, sampler=chain)[0].text


@pytest.mark.slow
def test_samples_along_the_training_end_at_the_stop_strings(tmp_path):
    warnings: list[str] = []
    config = config_of(tmp_path, temperature=0.0, stop=("h", "a☃", " "), max_new_tokens=200)
    events = list(chargpt_jax.run(config, tmp_path / "run", warnings.append))
    for sampled in (event for event in events if isinstance(event, Sampled)):
        (text,) = sampled.samples
        new = text.removeprefix("ab c")
        assert len(new) == len(re.match("[^h ]*[h ]?", new)[0])
        assert len(new) == 200 or new[-1] in "h "
    (warning,) = {one for one in warnings if "sample.stop" in one}
    assert re.match("'a☃' of sample.stop has '☃' .*, not in the vocabulary: no sample ends there", warning)


@pytest.mark.parametrize("stage", [chargpt_jax.prepare, chargpt_jax.find_lr, chargpt_jax.train, chargpt_jax.run])
def test_invalid_chain_of_samplers_ends_a_run_before_it_begins(stage, tmp_path):
    with pytest.raises(UserError, match="^sample.sampler is 'budge'"):
        list(stage(config_of(tmp_path, sampler="budge"), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_samples_along_the_training_can_be_turned_off(tmp_path):
    events = list(chargpt_jax.run(config_of(tmp_path, at_validation=False), tmp_path / "run", lambda text: None))
    assert [type(event) for event in events if isinstance(event, Sampled | Ended)] == [Ended, Sampled]


def test_damaged_checkpoint_costs_samples_and_not_the_run(run, monkeypatch):
    def fails(*_: object) -> None:
        raise NoCheckpoint("There is none.")

    monkeypatch.setattr(results_samples, "load", fails)
    warnings: list[str] = []
    assert TimeForSamples(None).sampled(run, 20, warnings.append) == []
    assert warnings == ["There is none; the run continues without samples of this checkpoint."]


def test_time_limit_leaves_out_samples_that_may_take_too_long(run, monkeypatch):
    monkeypatch.setattr(results_samples, "sampled", lambda *_: ["samples"])
    assert TimeForSamples(0.2).sampled(run, 20, print) == []
    assert TimeForSamples(5.0).sampled(run, 20, print) == ["samples"]


def test_validation_set_is_scored_like_the_model_scores_it(made):
    folder = Workdir(made[0])
    found = load_validation(folder).passages
    tokens = folder.load_tokens()
    held_out = tokens[int(folder.load_config().data.train_split * len(tokens)) :][:MAX_SCORED]
    assert found.characters == len(held_out)
    text = folder.load_tokenizer().decode([held_out])[0]
    scored = chargpt_jax.load(folder).score(text)
    assert found.loss == pytest.approx(scored.loss, abs=1e-4)
    assert found.counts.ranks[0] == np.count_nonzero(scored.rank == 1)
    assert sum(found.counts.surprisals) == sum(found.counts.ranks) == len(text) - 1


def test_report_shows_all_that_a_run_has(made):
    found = content(Workdir(made[0]), print)
    assert {"Text", "Model", "Training"} <= {name for name, _ in found.facts}
    assert [stage.step for stage in found.stages] == sorted(sample_files(Workdir(made[0])))
    assert found.samples
    assert found.histograms
    assert found.sources[0][0] == "words"
    assert found.losses(720.0).startswith("<svg")
    assert "Python 3." in dict(found.environment)["report written with"]


def test_report_keeps_paths_of_the_machine_to_the_source(made):
    page = (made[0] / "report.html").read_text(encoding="utf-8")
    assert str(made[0]) not in page


@pytest.mark.parametrize("name", ["lr_finder.json", "samples/validation.json", "samples/step-{}.json"])
def test_report_leaves_out_damaged_files_with_a_warning(run, name):
    last = max(sample_files(run))
    path = run.path / name.format(last)
    path.write_text('{"samples": 1}', encoding="utf-8")
    warnings: list[str] = []
    chargpt_jax.write_report(run, warnings.append)
    assert run.report.is_file()
    assert warnings
    assert f"{path} cannot be used" in warnings[0]
    assert "the report leaves it out" in warnings[0]
    assert len(set(warnings)) == len(warnings)


def test_report_leaves_out_scores_of_another_checkpoint(run):
    saved = json.loads(path_of(run).read_text(encoding="utf-8"))
    path_of(run).write_text(json.dumps({**saved, "step": 7}), encoding="utf-8")
    warnings: list[str] = []
    found = content(run, warnings.append)
    assert found.histograms == found.passages == []
    assert "was scored after step 7, but the samples are of step" in warnings[0]


def test_report_shows_older_samples_if_the_newest_are_damaged(run):
    files = sample_files(run)
    files[max(files)].write_text("{}", encoding="utf-8")
    found = content(run, lambda text: None)
    assert found.samples
    assert f"after step {sorted(files)[-2]:,}" in found.samples[0].caption


def test_report_names_the_samples_that_it_shows(run):
    source = sample_files(run)[max(sample_files(run))].read_text(encoding="utf-8")
    assert content(run, print).along == "The same prompts, continued after each validation."
    for step in range(1000, 1000 + 2 * MAX_STAGES):
        (run.samples / f"step-{step}.json").write_text(source, encoding="utf-8")
    total = len(sample_files(run))
    assert content(run, print).along == f"The same prompts, continued after {MAX_STAGES} of {total} validations."


def test_report_of_a_run_without_results_is_a_page(tmp_path):
    config = config_of(tmp_path)
    list(chargpt_jax.prepare(config, tmp_path / "run"))
    page = chargpt_jax.write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["The run", "The text", "Environment"]


def test_report_shows_evenly_chosen_stages_of_a_long_run(run):
    source = sample_files(run)[max(sample_files(run))].read_text(encoding="utf-8")
    for step in range(1000, 4000, 50):
        (run.samples / f"step-{step}.json").write_text(source, encoding="utf-8")
    steps = [stage.step for stage in content(run, print).stages]
    assert len(steps) == MAX_STAGES
    assert (steps[0], steps[-1]) == (min(sample_files(run)), max(sample_files(run)))


def test_run_without_validation_set_has_no_scores(run, monkeypatch):
    path_of(run).unlink()
    monkeypatch.setattr("chargpt_jax.results.validation.MAX_SCORED", 1)
    assert chargpt_jax.api.write_validation(run) is None
    assert load_validation(run) is None
    assert content(run, print).histograms == []
