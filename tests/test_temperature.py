"""benchmarks/temperature.py: statistics of texts, calibration, likelihood, and the tables and plots of its results."""

import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest

import chargpt_jax
from benchmarks import temperature, temperature_report, text_statistics
from benchmarks.temperature_subject import SETTLED, SHARE, Subject, surprisal
from tests.corpus_text import small_config, write_words


def test_words_are_runs_of_letters_that_end_inside_the_text():
    assert text_statistics.words("Don't stop, Percy's 3 'old' friends") == ["don't", "stop", "percy's", "old"]
    assert text_statistics.unknown_words(["a b c ", "d a "], {"a", "b"}) == 2 / 5


def test_repetitions_are_counted_within_a_text():
    assert text_statistics.repeated(["abcabc", "xyz"], 3) == 1 / 5
    assert text_statistics.repeated(["abc", "abc"], 3) == 0
    assert text_statistics.copied(["abcd", "bcde"], {"bcd"}, 3) == 2 / 4


@pytest.mark.parametrize(("text", "length"), [("abcabcx", 3), ("aaaa", 3), ("abc", 0), ("", 0), ("xabyabz", 2)])
def test_longest_repetition_may_overlap_itself(text, length):
    assert text_statistics.longest_repetition(text) == length


def test_similar_texts_are_less_diverse():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh "), 200)) + "." for _ in range(20)]
    for diversity in (text_statistics.compressed_bits, text_statistics.distinct_words):
        assert diversity([texts[0]] * 20) < 0.3 * diversity(texts)


@pytest.mark.parametrize("log", [False, True])
def test_calibration_finds_the_setting_of_a_value(log):
    kind, seen = temperature.Kind("", 0.01, 4.0, log=log), []

    def value_of(x):
        seen.append(x)
        return 3 / (1 + x**1.5)

    known: dict[float, float] = {}
    for target in (2.5, 1.0):
        found = temperature.calibrated(value_of, target, kind, known)
        assert 3 / (1 + found**1.5) == pytest.approx(target, rel=temperature.TOLERANCE)
    assert len(seen) == len(set(seen)) == len(known) < 20
    assert temperature.calibrated(value_of, 3.1, kind, known) is None


def test_interval_is_that_of_student():
    mean, half = temperature_report.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.303 / math.sqrt(3)))


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = tmp_path_factory.mktemp("temperature")
    config = small_config(write_words(folder / "words.txt"), block_size=256)
    list(chargpt_jax.train(config, folder / "run"))
    model = chargpt_jax.load(folder / "run")
    training, held_out = (chargpt_jax.corpus_text(folder / "run", part) for part in ("training", "validation"))
    return Subject(model, model, training, held_out, sets=2, texts=4)


@pytest.mark.slow
def test_prompts_are_the_starts_of_held_out_passages(subject):
    assert len(set(subject.passages)) == len(subject.prompts) == 4
    for prompt, passage in zip(subject.prompts, subject.passages, strict=True):
        assert passage in subject.held_out
        assert passage.startswith(prompt)
        assert prompt[-1] == " "
    start = len(subject.prompts[0])
    scored = [subject.model.score(passage).surprisal[start:] for passage in subject.passages]
    np.testing.assert_allclose(surprisal(subject.model, subject.passages), scored, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_sets_continue_the_same_prompts(subject):
    sets, means = subject.generate("min_p=0.1")
    assert [len(texts) for texts in sets] == [4, 4]
    assert sets[0] != sets[1]
    for texts, mean in zip(sets, means, strict=True):
        both = [prompt + text for prompt, text in zip(subject.prompts, texts, strict=True)]
        assert surprisal(subject.model, both).mean() == pytest.approx(mean, rel=1e-4)


@pytest.mark.slow
def test_likelihood_of_a_temperature_is_that_of_scaled_logits(subject):
    """A temperature of 0.5 squares the probabilities; a sampler with a state follows the held-out text."""
    plain, colder = (subject.likelihood(f"temperature={t}")["held_out"] for t in (1, 0.5))
    scored = [subject.model.score(passage).surprisal[SETTLED + 1 :] for passage in subject.passages]
    assert plain == pytest.approx(np.mean(scored), rel=1e-5)
    assert colder != pytest.approx(plain, rel=1e-3)
    assert subject.likelihood("top_k=1")["excluded"] > 5
    assert subject.likelihood("top_k=1")["held_out"] < plain - math.log(SHARE)
    assert subject.likelihood("budget")["held_out"] != pytest.approx(plain, rel=1e-4)


@pytest.mark.slow
def test_likelihood_of_mirostat_survives_excluded_characters(subject):
    """With a learning rate of 0, μ stays at 2 tau: the sampler is a filter without a state."""
    moving, still = (subject.likelihood(f"mirostat=0.5:eta={eta}") for eta in (1e-6, 0))
    assert 0 < still["excluded"] < 100
    assert moving["excluded"] == pytest.approx(still["excluded"], abs=0.5)


@pytest.mark.slow
def test_a_cell_has_texts_of_the_wanted_surprisal(subject):
    kind, known = temperature.SAMPLERS["temperature"], dict[float, float]()
    target = 0.7 * subject.generate("temperature=1")[1].mean()
    found = temperature.cell(lambda: subject, kind, target, known)
    assert len(found["figures"]["unknown"]) == 2
    assert np.mean(found["figures"]["surprisal"]) == pytest.approx(known[found["setting"]])
    assert temperature.cell(lambda: subject, temperature.SAMPLERS["top-p"], 9.0, {}).keys() == {"range"}


def test_results_of_other_settings_are_not_mixed(tmp_path):
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "settings.json").write_text(json.dumps({"sets": 3}), encoding="utf-8")
    with pytest.raises(SystemExit, match="other settings"):
        temperature.measure({}, tmp_path, 2, 4, [])


def results(values=(1.0, 2.0, 4.0)):
    """Return results of one model in which every sampler has the same figures but word start, which has 10 more."""

    def figures(more=0.0):
        return {name: [more + value for value in values] for name in (*temperature_report.FIGURES, "surprisal")}

    def cell(more=0.0):
        return {"setting": 0.5, "excluded": 3.0, "held_out": 2.0, "figures": figures(more)}

    cells = {sampler: cell(10.0 * (sampler == "word start")) for sampler in temperature.SAMPLERS}
    own = {"parameters": 1_234, "loss": 1.5, "level": 1.25, "temperature_1": cell(), "outside": [9, 0.5, 0.5]}
    own |= {"held_out_text": dict.fromkeys(figures(), 3.25), "first_letters": 0.375}
    own |= {"entropy": [2.0 / n for n in range(1, 11)], "surprisal": [2.5 / n for n in range(1, 11)]}
    without = cells | {"top-p": {"range": [0.5, 0.75]}}
    chains = {name: kind.chain for name, kind in temperature.SAMPLERS.items()}
    return {"chains": chains, "models": {"larger, book": own | {"cells": {"0.85": cells, "0.7": without}}}}


def test_a_difference_counts_if_its_interval_excludes_0():
    made = temperature_report.tables(results())
    assert "| word start (2) | 0 / 2 | 0 / 2 | 0 / 2 | 0 / 2 | 2 / 0 | 2 / 0 |" in made["scores"]
    assert "| budget (2) | 0 / 0 | 0 / 0 | 0 / 0 | 0 / 0 | 0 / 0 | 0 / 0 |" in made["scores"]
    assert "| top-p (1) |" in made["scores"]
    assert "| word start | +429 to +429 % | +429 to +429 % | +429 to +429 % | +429 to +429 % |" in made["changes"]
    assert "| top-p | +0 to +0 % | +0 to +0 % |  |  |" in made["changes"]
    assert "| word start | 0.5 | **12.3 ± 3.8** |" in made["larger_book_0_85"]
    assert "| min-p | 0.5 | 2.3 ± 3.8 |" in made["larger_book_0_85"]
    assert "| top-p | only 0.50 to 0.75 nats |" in made["larger_book_0_7"]
    assert "| larger, book | 2.00 | 1.00 | 0.67 | 0.50 | 0.40 | 0.33 | 0.50 | 38 % |" in made["letters"]
    assert all(len({row.count("|") for row in text.splitlines()}) == 1 for text in made.values())


def test_page_needs_every_table_once():
    found = results()
    page = "\n\n".join(f"<!-- temperature: {name} -->" for name in temperature_report.tables(found)) + "\n"
    full = temperature_report.renewed(page, found)
    assert temperature_report.renewed(full, found) == full
    assert all(text in full for text in temperature_report.tables(found).values())
    with pytest.raises(ValueError, match="each of them once"):
        temperature_report.renewed(page + "<!-- temperature: models -->\n", found)


def test_pictures_have_a_mark_for_every_measured_cell():
    found = temperature_report.pictures(results())
    assert list(found) == ["temperature_letters.svg", "temperature_unknown.svg", "temperature_distinct.svg"]
    svg = ElementTree.fromstring(found["temperature_unknown.svg"])
    circles = [one for one in svg.iter() if one.tag.endswith("circle")]
    assert len(circles) == 2 * len(temperature.SAMPLERS) - 1 + 2  # two in the legend
    assert "top-p 2.33," in found["temperature_unknown.svg"]


def test_the_committed_page_has_the_committed_results():
    found = temperature_report.load()
    page = temperature_report.PAGE.read_text(encoding="utf-8")
    assert temperature_report.renewed(page, found) == page
    for name, svg in temperature_report.pictures(found).items():
        assert (temperature_report.PAGE.parent / name).read_text(encoding="utf-8") == svg
        assert f"({name})" in page
