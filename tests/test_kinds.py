"""The other kinds of model as runs: trained, resumed, fine-tuned, sampled from, scored and inspected, not exported."""

import jax
import numpy as np
import pytest

import chargpt_jax
from chargpt_jax.errors import UserError
from chargpt_jax.main import main
from tests.corpus_text import small_config, write_words


def quiet(text: str) -> None:
    """Drop a message."""


NAMES = {"ngpt": "nGPT, ", "modern": "modern GPT, "}


def config_for(path, kind, steps=30):
    config = small_config(str(path))
    config.model.kind = kind
    config.scheduler.max_steps = steps
    return config


@pytest.fixture(scope="module", params=[pytest.param("ngpt", marks=pytest.mark.slow), "modern"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def parent(kind, tmp_path_factory):
    """A trained model and its text."""
    folder = tmp_path_factory.mktemp(kind)
    list(chargpt_jax.train(config_for(write_words(folder / "words.txt"), kind), folder / "run", quiet))
    return folder


def test_a_run_learns_and_says_what_it_is(parent, kind, capsys):
    found = chargpt_jax.info(parent / "run")
    assert found["best_loss"] < 0.8 * np.log(found["vocabulary"])
    assert main(["main", "--mode=info", f"--workdir={parent / 'run'}"]) == 0
    assert NAMES[kind] in capsys.readouterr().out


def test_a_stopped_run_resumes_with_the_same_bits(parent, kind, tmp_path):
    stopped = 0

    def stop():
        nonlocal stopped
        stopped += 1
        return 15 if stopped > 3 else None

    config = config_for(parent / "words.txt", kind)
    config.train.steps_per_dispatch = 5
    list(chargpt_jax.train(config, tmp_path / "run", quiet, stop=stop))
    assert 0 < chargpt_jax.info(tmp_path / "run")["step"] < 30
    list(chargpt_jax.train(config, tmp_path / "run", quiet))
    one, other = (chargpt_jax.load(folder / "run", "latest") for folder in (tmp_path, parent))
    assert one.step == other.step == 30
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


@pytest.mark.slow
def test_generated_text_has_the_metrics_of_a_scored_one(parent):
    model = chargpt_jax.load(parent / "run")
    (inside,) = model.generate("ab c", max_new_tokens=model.config.model.block_size - 4, seed=1)
    again = model.score(inside.text)
    np.testing.assert_allclose(inside.surprisal[1:], again.surprisal[1:], atol=1e-4)
    (longer,) = model.generate("ab c", max_new_tokens=model.config.model.block_size + 8, seed=1)
    assert longer.text.startswith(inside.text), "the text goes on beyond the context"
    several = model.generate(["ab c", "a"], max_new_tokens=12, seed=1)
    assert [len(sample.text) for sample in several] == [16, 13]


def test_inspection_ends_with_the_scores(parent):
    model = chargpt_jax.load(parent / "run")
    inside, scored = chargpt_jax.inspect(model, "ab cde jk"), model.score("ab cde jk")
    np.testing.assert_allclose(inside.surprisal[-1, 1:], scored.surprisal[1:], atol=1e-4)
    np.testing.assert_allclose(inside.attention.sum(axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize("form", ["hf", "original", "html"])
def test_export_is_refused_in_one_sentence(parent, kind, tmp_path, form):
    out = tmp_path / ("page.html" if form == "html" else "folder")
    with pytest.raises(UserError, match=rf"model\.kind is '{kind}', but only a 'gpt' can be exported"):
        chargpt_jax.export(parent / "run", out, form)
    assert not out.exists()


def test_devices_do_not_split_its_parameters(parent, kind, tmp_path):
    config = config_for(parent / "words.txt", kind)
    config.mesh.fsdp = 2
    with pytest.raises(UserError, match=rf"with model\.kind '{kind}' they must be 1: set mesh\.data"):
        list(chargpt_jax.train(config, tmp_path / "run", quiet))


@pytest.mark.slow
def test_fine_tuning_keeps_every_row_of_known_characters(parent, kind, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Zebras quiz 1234 words. " * 200, encoding="utf-8")
    list(chargpt_jax.train(config_for(other, kind, steps=1), tmp_path / "run", quiet, start_from=parent / "run"))
    first, known = chargpt_jax.load(tmp_path / "run", step=0), chargpt_jax.load(parent / "run")
    tables = [("wte", "embedding"), ("head", "embedding"), ("logit_scale", "scale")]
    for name, leaf in tables if kind == "ngpt" else tables[:1]:
        own, theirs = first.params[name][leaf], known.params[name][leaf]
        for i, character in enumerate(known.tokenizer.vocabulary):
            np.testing.assert_array_equal(own[first.tokenizer.vocabulary.index(character)], theirs[i])
    assert np.array_equal(*(jax.tree.leaves(model.params["blocks"])[0] for model in (first, known)))


def test_the_kinds_are_not_mixed(parent, kind, tmp_path):
    config = small_config(str(parent / "words.txt"))
    with pytest.raises(UserError, match=rf"differs from kind=gpt: set --config\.model\.kind={kind}"):
        list(chargpt_jax.train(config, tmp_path / "run", quiet, start_from=parent / "run"))
    with pytest.raises(UserError, match=rf"model\.kind: saved '{kind}', given 'gpt'"):
        list(chargpt_jax.train(config, parent / "run", quiet))
