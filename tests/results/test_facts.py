"""The facts of a run are words and numbers with units, for every state that a run can be in."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chargpt_jax.results.facts import duration, facts_in_words, rate, scaled

TRAINED = {
    "sources": ["The Scarlet Pimpernel", "Python help topics"],
    "source_notes": [["repaired 3 lines (mojibake)", "downloaded on 2026-01-02"], []],
    "characters": 464_473,
    "vocabulary": 94,
    "n_train": 418_025,
    "parameters": 158_272,
    "block_size": 128,
    "n_layer": 3,
    "n_embd": 64,
    "n_head": 4,
    "n_head_dim": 16,
    "characters_per_step": 2048,
    "steps_per_epoch": 204,
    "total_steps": 1020,
    "learning_rate": 0.01670745593659557,
    "learning_rate_method": "balanced",
    "step": 1020,
    "seconds": 40.759,
    "best_step": 816,
    "best_loss": 1.2923271555018516,
    "best_bits_per_character": 1.8644339784486617,
    "devices": "2 x cpu",
    "dtype": "float32",
    "trained_on": "2 x cpu",
    "compile_seconds": 2.7835909910000396,
    "seconds_per_step": 0.033620351333332736,
    "flops_per_step": 2516582400.0,
    "flops_per_second": 28_040_000_000.0,
    "mfu": None,
    "attention": "blocks",
    "attention_source": "device",
    "attention_device": None,
    "attention_trial": [],
    "checkpoints": [408, 816, 1020],
    "report": "runs/tiny/report.html",
}
NEW = {
    **TRAINED,
    **dict.fromkeys(("learning_rate", "learning_rate_method", "seconds", "best_step", "best_loss"), None),
    **dict.fromkeys(("best_bits_per_character", "trained_on", "compile_seconds", "seconds_per_step"), None),
    **dict.fromkeys(("attention", "attention_source"), None),
    **{"flops_per_second": None, "step": 0, "checkpoints": [], "report": None},
}


def words(info):
    """Return the facts as {'Group name': value}."""
    return {f"{group} {name}": value for group, rows in facts_in_words(info) for name, value in rows}


def test_facts_of_a_trained_run_are_sentences_with_units():
    assert words(TRAINED) == {
        "Text titles": "The Scarlet Pimpernel (repaired 3 lines (mojibake); downloaded on 2026-01-02), "
        "Python help topics",
        "Text length": "464,473 characters, 94 distinct: 418,025 for training, 46,448 for validation",
        "Model shape": "3 layers of width 64, 4 heads of 16, context 128 characters: 158,272 parameters",
        "Training progress": "complete: 1,020 steps (5 epochs of 204 steps) in 41 s",
        "Training best loss": "1.2923 nats = 1.8644 bits per character on the validation set, after step 816",
        "Training learning rate": "0.0167, found by the range test (balanced)",
        "Speed training": "at best 33.6 ms per step, 60,900 characters per second; compiled in 2.78 s",
        "Speed arithmetic": "2.52 GFLOP per step, 28 GFLOP per second; the device's peak is not known",
        "Speed attention": "blocks, the only one of these devices",
        "Devices used": "2 x cpu in float32",
        "Files checkpoints": "steps 408, 816 and 1,020; best: 816",
        "Files report": "runs/tiny/report.html",
    }


def test_facts_of_a_new_run_say_what_is_missing():
    found = words(NEW)
    assert found["Training progress"] == "not started: 0 of 1,020 steps (5 epochs of 204 steps)"
    assert found["Training best loss"] == found["Speed training"] == "not measured yet"
    assert found["Training learning rate"] == "not found yet: the range test finds it before training"
    assert found["Speed arithmetic"] == "2.52 GFLOP per step; per second: not measured yet"
    assert found["Files checkpoints"] == "none yet"
    assert found["Files report"] == "not written yet"
    assert not [value for value in found.values() if "None" in value]


def test_facts_of_a_stopped_run_give_progress():
    found = words({**TRAINED, "step": 1, "total_steps": 3, "steps_per_epoch": 1, "seconds": None, "checkpoints": [1]})
    assert found["Training progress"] == "1 of 3 steps (3 epochs of 1 step) after a time that is not known"
    assert found["Files checkpoints"] == "step 1; best: 816"


def test_facts_of_a_model_imported_without_a_text():
    found = words({**NEW, "sources": [], "source_notes": [], "characters": 0, "n_train": 0, "checkpoints": [0]})
    assert "Text titles" not in found
    assert found["Text length"] == "no text; the vocabulary has 94 characters"
    assert found["Training progress"] == "imported without a text to train on"
    assert found["Files checkpoints"] == "step 0"


def test_facts_name_a_set_rate_the_peak_and_other_devices():
    found = words({**TRAINED, "learning_rate_method": None, "mfu": 0.3141, "trained_on": "8 x TPU v5 lite"})
    assert found["Training learning rate"] == "0.0167, set in the config"
    assert found["Speed arithmetic"].endswith("28 GFLOP per second; 31 % of the device's peak")
    assert found["Devices used"] == "2 x cpu in float32; trained on 8 x TPU v5 lite"


TRIED = [
    {"name": "blocks", "error": 1e-7, "seconds": 1.25e-3},
    {"name": "kernel", "error": 2e-7, "seconds": 4e-4, "fault": ""},
    {"name": "cudnn", "error": None, "seconds": None, "fault": "it does not compile"},
]


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({"attention": None, "attention_source": None}, "not chosen yet: a trial before training chooses it"),
        ({"attention": "kernel", "attention_source": "config"}, "kernel, set in the config"),
        ({"attention_source": "run"}, "blocks, as since the run began"),
        (
            {"attention": "kernel", "attention_source": "trial", "attention_device": "L4", "attention_trial": TRIED},
            "kernel, the fastest in a trial on L4: blocks 1.25 ms per layer, kernel 0.4 ms per layer, "
            "cudnn it does not compile",
        ),
        (
            {"attention_source": "trial", "attention_trial": [1, {}, {"name": "blocks", "seconds": "fast"}]},
            "blocks, the fastest in a trial on a device that is not known: blocks not measured yet",
        ),
        (
            {"attention_source": "trial", "attention_trial": 3},
            "blocks, the fastest in a trial on a device that is not known",
        ),
    ],
)
def test_facts_say_which_attention_trains_and_why(facts, text):
    assert words({**TRAINED, **facts})["Speed attention"] == text


def test_long_lists_of_titles_and_notes_are_counted():
    found = words({**TRAINED, "sources": ["a"] * 9, "source_notes": [["n"] * 8] * 9})["Text titles"]
    assert found.count("n; n; n; n; n; n; 2 more notes in corpus/sources.json") == 6
    assert found.endswith(", and 3 more")


@given(st.sets(st.sampled_from(sorted(TRAINED))))
def test_facts_that_are_missing_are_left_out(left_out):
    for info in (TRAINED, NEW):
        values = words({name: value for name, value in info.items() if name not in left_out}).values()
        assert all(value and "None" not in value for value in values)


def test_no_facts_give_no_groups():
    assert facts_in_words({}) == []


@pytest.mark.parametrize("broken", ["fast", float("nan"), -1.0, True, 10**400])
@pytest.mark.parametrize("name", ["seconds_per_step", "flops_per_second", "compile_seconds", "mfu"])
def test_a_speed_that_is_no_number_is_not_shown(name, broken):
    assert str(broken) not in " ".join(words({**TRAINED, name: broken}).values())


@given(st.floats(1e-9, 1e22))
def test_scaled_quantity_reads_back_within_half_a_digit(value):
    text = scaled(value, "X")
    number, prefix = re.fullmatch(r"([\d,.]+) ([kMGTPE]?)X", text).groups()
    back = float(number.replace(",", "")) * 1000.0 ** " kMGTPE".index(prefix or " ")
    assert back == pytest.approx(value, rel=0.0051)
    assert "e" not in number


@given(st.floats(1e-30, 1e30))
def test_rate_reads_back(value):
    assert float(rate(value).replace(",", "")) == pytest.approx(value, rel=0.0051)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (48, "48 s"),
        (99, "99 s"),
        (100, "2 min"),
        (720, "12 min"),
        (5900, "98 min"),
        (6000, "1 h 40 min"),
        (11_100, "3 h 05 min"),
        (7200, "2 h 00 min"),
        (100 * 3600, "100 h 00 min"),
    ],
)
def test_duration_has_a_readable_form(seconds, text):
    assert duration(seconds) == text
