"""The public functions on a trained run: loading, generation, scoring, the command line, written files."""

import copy
import dataclasses
import io
import json
import math
import pickle
import re
import shutil
import sys
import webbrowser
import xml.etree.ElementTree as ET

import jax
import numpy as np
import pytest

import chargpt_jax
from chargpt_jax.errors import NoCheckpoint, UserError
from chargpt_jax.events import TrainStarted
from chargpt_jax.generation import generate, trained_model
from chargpt_jax.generation.samplers.chain import chain_of
from chargpt_jax.main import main
from chargpt_jax.model.flops import peak_flops
from chargpt_jax.results.info import INFO, all_facts
from chargpt_jax.results.samples import known_prompts
from chargpt_jax.storage.workdir import Workdir
from tests.corpus_text import FLOOR, small_config, write_words


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A complete run, with samples and report."""
    folder = tmp_path_factory.mktemp("a run with spaces é")
    config = small_config(write_words(folder / "words.txt"))
    config.scheduler.max_steps = 60
    events = list(chargpt_jax.run(config, folder / "run", lambda text: None))
    assert events
    return folder / "run"


@pytest.fixture(scope="module")
def model(workdir):
    return chargpt_jax.load(workdir)


def test_a_run_leaves_what_the_readme_promises(workdir):
    names = {str(path.relative_to(workdir)) for path in workdir.rglob("*") if path.is_file()}
    expected = {"config.json", "metrics.jsonl", "report.html", "loss.svg"}
    expected |= {f"corpus/{name}" for name in ("tokens.npy", "vocabulary.json", "sources.json")}
    assert expected <= names
    assert any(name.startswith("samples/step-") and name.endswith(".json") for name in names)
    assert not [name for name in names if name.endswith(".partial")]
    report = (workdir / "report.html").read_text(encoding="utf-8")
    assert report.count("<svg") >= 2
    known = peak_flops(jax.devices()[0], "bfloat16") is not None
    assert ("the device&#x27;s peak is not known" in report) == (not known)


def test_the_functions_of_the_package_stay_functions():
    """A submodule of the same name must not replace a function after its import."""
    for name in chargpt_jax.__all__:
        assert callable(getattr(chargpt_jax, name)), name


def test_the_corpus_is_the_file(workdir):
    written = (workdir.parent / "words.txt").read_text(encoding="utf-8")
    assert chargpt_jax.corpus_text(workdir) == written


def test_parts_of_the_corpus_add_up_to_it(workdir):
    training, validation = (chargpt_jax.corpus_text(workdir, part) for part in ("training", "validation"))
    assert training + validation == chargpt_jax.corpus_text(workdir, "all")
    split = Workdir(workdir).load_config().data.train_split
    assert len(training) / len(training + validation) == pytest.approx(split, abs=0.01)
    with pytest.raises(UserError, match="part is 'unseen', but it must be"):
        chargpt_jax.corpus_text(workdir, "unseen")


def test_notebooks_show_the_sentence_of_a_mistake_and_no_traceback():
    assert UserError("a is 1: try 2.")._render_traceback_() == ["UserError: a is 1: try 2."]


def test_sources_say_where_the_text_came_from(workdir):
    (source,) = json.loads((workdir / "corpus" / "sources.json").read_text(encoding="utf-8"))
    assert source["title"] == "words"
    assert source["url"].endswith("words.txt")
    assert len(source["sha256"]) == 64
    tokens = np.load(workdir / "corpus" / "tokens.npy")
    assert source["characters"] == len(tokens)


def test_sample_continues_its_prompt_and_has_metrics(model):
    samples = model.generate(["ab", "cde fghi"], 50, temperature=0.7)
    for sample, prompt in zip(samples, ["ab", "cde fghi"], strict=True):
        assert sample.prompt == prompt
        assert sample.text.startswith(prompt)
        assert len(sample.text) == len(sample.tokens) == len(prompt) + 50
        assert np.isnan(sample.surprisal[0])
        for series in (sample.surprisal, sample.entropy, sample.surprise_surprise):
            assert len(series) == len(sample.tokens)
            assert np.isfinite(series[1:]).all()
        expected = (sample.surprisal - sample.entropy) / math.log(sample.vocab_size)
        np.testing.assert_array_equal(sample.surprise_surprise, expected)


def test_score_of_a_sample_equals_its_metrics(model):
    (sample,) = model.generate("ab cde", 40, temperature=1.0, seed=3)
    scored = model.score(sample.text, stride=1)
    np.testing.assert_allclose(scored.surprisal, sample.surprisal, atol=1e-4)
    np.testing.assert_allclose(scored.entropy, sample.entropy, atol=1e-4)


@pytest.mark.slow
def test_a_prompt_longer_than_the_window_is_measured_whole(model):
    prompt = "ab cde fghi jk " * 4
    (sample,) = model.generate(prompt, 5)
    assert np.isfinite(sample.surprisal[1:]).all()
    assert sample.text.startswith(prompt)


def test_training_text_has_a_lower_loss_than_nonsense(model):
    assert model.score("ab fghi cde jk ab").loss + 1 < model.score("bjki gahe cfd  kk").loss


def test_evaluation_agrees_with_the_log(workdir):
    result = chargpt_jax.evaluate(workdir)
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    best = min(line["loss"] for line in logged if line["event"] == "validation")
    assert result["loss"] == pytest.approx(best, rel=1e-6)
    assert result["bits_per_character"] == pytest.approx(best / math.log(2), rel=1e-6)
    assert result["loss"] > FLOOR
    assert result["split"] == "validation"


@pytest.mark.slow
def test_streamed_pieces_are_the_text(model):
    pieces = []
    (sample,) = model.generate("ab", 40, on_text=lambda i, text: pieces.append(text))
    assert len(pieces) > 1
    assert "ab" + "".join(pieces) == sample.text
    assert sample.text == model.generate("ab", 40)[0].text


def test_samples_draw_themselves_in_a_notebook(model):
    samples = model.generate(["ab", "cd"], 5)
    assert samples._repr_html_().count("<svg") == samples._repr_html_().count("data-sample=") == 2
    assert samples[0].svg() in samples[0]._repr_html_()
    ET.fromstring(samples[0].svg())


@pytest.mark.parametrize("alternatives", [3, pytest.param(0, marks=pytest.mark.slow)])
def test_parts_on_the_way_add_up_to_the_samples(model, alternatives):
    prompts = ["ab", "cde fghi " * 9, "c"]
    parts: dict[int, list[chargpt_jax.Sample]] = {}
    texts: dict[int, str] = dict.fromkeys(range(len(prompts)), "")

    def on_text(i, text):
        texts[i] += text

    on_sample = {"on_sample": lambda i, part: parts.setdefault(i, []).append(part)}
    samples = model.generate(prompts, 40, alternatives=alternatives, on_text=on_text, **on_sample)
    assert samples == model.generate(prompts, 40, alternatives=alternatives)
    for i, sample in enumerate(samples):
        first, *rest = parts[i]
        assert (first.text, first.prompt) == (prompts[i], prompts[i])
        assert [len(part) for part in rest] == [16, 16, 8]
        assert sum(rest, start=first) == sample
        assert texts[i] == sample.text[len(prompts[i]) :]


def test_prompts_that_are_not_repaired_stay_as_they_are(model):
    assert model.generate("ab\r\ncd", 1, skip_unknown=True)[0].prompt == "abcd"
    with pytest.raises(UserError, match=r"'\\r'"):
        model.generate("ab\rcd", 1, repair=False)
    assert model.generate("ab\rcd", 1, repair=False, skip_unknown=True)[0].prompt == "abcd"
    assert model.generate("ab", 9, repair=False) == model.generate("ab", 9)


# Branching


@pytest.mark.parametrize("at", [1, 2, 20, 41])
@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"temperature": 0.7, "seed": 3}])
def test_branching_with_the_samples_own_character_repeats_it(model, how, at):
    (sample,) = model.generate("ab", 40, **how)
    branch = model.branch(sample, at, sample.text[at], **how)
    assert branch.text[: len(sample)] == sample.text
    assert branch.prompt == sample.text[: at + 1]


def test_branch_has_the_prompt_and_the_length_of_its_sample(model):
    (sample,) = model.generate("ab", 40)
    branch = model.branch(sample, 30, "j", seed=1)
    assert branch.prompt == sample.text[:30] + "j"
    assert len(branch) == len(sample) == 42
    assert branch == model.branch(sample, 30, "j", seed=1)
    assert len(model.branch(sample, 41, "j")) == 43
    assert len(model.branch(sample, 30, "j", 5)) == 36


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ab", 0, "a"), "sample is 'ab', but it must be a Sample"),
        ((3, "a"), "at is 3, but the sample has 3 characters: give an index of at least 0 and below 3"),
        ((-1, "a"), "at is -1, but the sample has 3 characters"),
        ((1.0, "a"), "at is 1.0, but it must be an integer"),
        ((0, "ab"), "alternative is 'ab', but it must be one character"),
        ((0, ""), "alternative is '', but it must be one character"),
        ((0, 3), "alternative is 3, but it must be a string"),
        ((0, "€"), r"alternative is '€' \(U\+20AC\), which is not in the vocabulary of this model"),
        ((0, "a", 0), "max_new_tokens is 0, but"),
    ],
)
def test_branch_rejects_invalid_arguments(model, arguments, message):
    sample = model.score("abc")
    given = arguments if isinstance(arguments[0], str) else (sample, *arguments)
    with pytest.raises(UserError, match=message):
        model.branch(*given)


@pytest.mark.parametrize("at", [1, 32, 33, 79])
@pytest.mark.parametrize(
    ("had", "asked"), [(5, 3), *(pytest.param(*counts, marks=pytest.mark.slow) for counts in ((3, 5), (0, 3), (3, 0)))]
)
def test_branch_keeps_the_metrics_before_its_character(model, at, had, asked):
    """The context is 32 characters: beyond it, a prompt is measured in windows, but a sample by one character."""
    (sample,) = model.generate("ab", 78, alternatives=had)
    parts = []
    branch = model.branch(
        sample, at, "j", alternatives=asked, on_sample=lambda i, part: parts.append(part), temperature=0.5
    )
    for name in ("surprisal", "entropy", "surprise_surprise"):
        np.testing.assert_array_equal(getattr(branch, name)[:at], getattr(sample, name)[:at])
    assert sum(parts[1:], start=parts[0]) == branch
    if not asked:
        assert branch.alternatives is None
        return
    assert branch.alternatives.characters.shape == (len(branch), asked)
    assert np.isnan(branch.sampled_probability[: at + 1]).all()
    if had >= asked:
        np.testing.assert_array_equal(branch.rank[:at], sample.rank[:at])
        np.testing.assert_array_equal(
            branch.alternatives.probability[:at], sample.alternatives.most(asked).probability[:at]
        )


def test_branch_of_another_models_sample_is_refused(model):
    sample = model.score("abc")
    other = dataclasses.replace(sample, tokens=("a", "€", "c"))
    for at in (0, 2):
        with pytest.raises(UserError, match=r"The sample is of another model: it has '€' \(U\+20AC\), not in the voc"):
            model.branch(other, at, "a")
    with pytest.raises(UserError, match="of another model: it has vocab_size 128, and this model has 64"):
        model.branch(dataclasses.replace(sample, vocab_size=128), 1, "a")


@pytest.mark.parametrize("token", ["", "\ufffd"])
def test_branch_after_a_token_without_character_is_refused(model, token):
    sample = dataclasses.replace(model.score("abc"), tokens=("a", token, "c"))
    assert model.branch(sample, 1, "a", 1).prompt == "aa"
    with pytest.raises(UserError, match="without a character at position 1, .*: give a position of at most 1"):
        model.branch(sample, 2, "a")


@pytest.mark.parametrize("option", ["skip_unknown", "repair", "foo"])
def test_branch_has_no_options_that_change_its_prompt(model, option):
    with pytest.raises(TypeError, match=rf"branch\(\) got an unexpected keyword argument '{option}'"):
        model.branch(model.score("abc"), 1, "a", **{option: True})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "ab\x07"}, r"has '\\x07' \(U\+0007\) at character 2"),
        ({"prompts": "ab€"}, r"has '€' \(U\+20AC\).*--skip_unknown \(in Python, skip_unknown=True\)"),
        ({"prompts": "ab\ud800"}, r"has '\\ud800' \(U\+D800\) at character 2, which is half of a surrogate pair"),
        ({"prompts": ""}, "empty"),
        ({"prompts": "€", "skip_unknown": True}, "No character"),
        ({"prompts": "ab", "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompts": "ab", "max_new_tokens": 10**9}, "max_new_tokens is 1000000000"),
        ({"prompts": "ab", "temperature": -1.0}, "temperature is -1.0"),
        ({"prompts": "ab", "top_k": 0}, "top_k is 0"),
        ({"prompts": "ab", "top_p": 0.0}, "top_p is 0.0"),
        ({"prompts": "ab", "max_new_tokens": 20.0}, "max_new_tokens is 20.0, but it must be an integer: try 500"),
        ({"prompts": "ab", "max_new_tokens": True}, "max_new_tokens is True, but it must be an integer"),
        ({"prompts": "ab", "max_new_tokens": None}, "max_new_tokens is None, but it must be an integer"),
        ({"prompts": "ab", "temperature": "hot"}, "temperature is 'hot', but it must be a number: try 0.8"),
        ({"prompts": "ab", "temperature": None}, "temperature is None, but it must be a number"),
        ({"prompts": "ab", "top_k": 2.5}, "top_k is 2.5, but it must be an integer"),
        ({"prompts": "ab", "top_p": "0.5"}, "top_p is '0.5', but it must be a number"),
        ({"prompts": "ab", "seed": 1.5}, "seed is 1.5, but it must be an integer"),
        ({"prompts": "ab", "seed": np.int64(-1)}, "seed is -1, but it must be at least 0"),
        ({"prompts": "ab", "skip_unknown": "no"}, "skip_unknown is 'no', but it must be True or False"),
        ({"prompts": "ab", "on_text": "print"}, "on_text is 'print', but it must be a function"),
        ({"prompts": "ab", "on_sample": 3}, "on_sample is 3, but it must be a function of an index and a sample"),
        ({"prompts": "ab", "repair": 1}, "repair is 1, but it must be True or False"),
        ({"prompts": 7}, "prompts is 7, but it must be a string, or a list of strings"),
        ({"prompts": b"ab"}, "prompts is b'ab', but it must be a string"),
        ({"prompts": None}, "prompts is None"),
        ({"prompts": ["ab", 7]}, "A prompt is 7, but it must be a string"),
    ],
)
def test_invalid_arguments_are_rejected_with_one_sentence(model, arguments, message):
    with pytest.raises(UserError, match=message):
        model.generate(**arguments)


@pytest.mark.slow
def test_numpy_numbers_are_arguments_like_pythons(model):
    plain = model.generate(["ab"], 5, temperature=0.5, top_k=3, top_p=0.5, seed=1)
    numbers = {"temperature": np.float32(0.5), "top_k": np.int32(3), "top_p": np.float64(0.5), "seed": np.int64(1)}
    assert model.generate(np.array(["ab"]), np.int64(5), **numbers)[0].text == plain[0].text
    assert model.score("abab" * 20, stride=np.int64(4)).loss == model.score("abab" * 20, stride=4).loss


@pytest.mark.slow
def test_numbers_of_prompts_share_a_compilation(model):
    prompts = ["a", "b", "cd", "e", "ab", "ce", "d", "be"]
    eight = model.generate(prompts, 6, seed=3)
    before = generate.prefill._cache_size()
    pieces: list[tuple[int, str]] = []
    for count in (5, 6, 7):
        assert [s.text for s in model.generate(prompts[:count], 6, seed=3)] == [s.text for s in eight[:count]]
    assert generate.prefill._cache_size() == before
    streamed = model.generate(prompts[:5], 40, seed=3, on_text=lambda i, text: pieces.append((i, text)))
    assert [s.text for s in streamed] == [s.text for s in model.generate(prompts[:5], 40, seed=3)]
    assert {i for i, _ in pieces} == set(range(5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": None}, "text is None, but it must be a string"),
        ({"text": 5}, "text is 5, but it must be a string"),
        ({"text": "ab", "stride": 1.0}, "stride is 1.0, but it must be an integer"),
        ({"text": "ab", "skip_unknown": 1}, "skip_unknown is 1, but it must be True or False"),
    ],
)
def test_score_rejects_a_wrong_kind(model, arguments, message):
    with pytest.raises(UserError, match=message):
        model.score(**arguments)


def test_load_rejects_a_step_of_a_wrong_kind(workdir):
    latest = chargpt_jax.load(workdir, "latest").step
    assert chargpt_jax.load(workdir, np.int64(latest)).step == latest
    for step in (1.5, None, True):
        with pytest.raises(UserError, match="step is .*, but it must be an integer: give 'best', 'latest'"):
            chargpt_jax.load(workdir, step)


def test_load_takes_a_step_in_digits_and_rejects_other_words(workdir):
    assert chargpt_jax.load(workdir, "60").step == 60
    for step in ("Best", "", "-1", "1" * 30):
        with pytest.raises(UserError, match="step is .*: give 'best', 'latest' or the step of a checkpoint"):
            chargpt_jax.load(workdir, step)


@pytest.mark.parametrize("given", [None, 3, b"run"])
def test_workdir_that_is_no_path_is_refused(given):
    for function in (chargpt_jax.load, chargpt_jax.evaluate, lambda it: list(chargpt_jax.run(small_config(it), it))):
        with pytest.raises(UserError, match="The workdir is .*, but it must be a path"):
            function(given)


@pytest.mark.parametrize("pieces", [None, 3, b"ab cde", [b"ab cde"], ["ab", None]])
def test_score_long_rejects_what_is_not_text(model, pieces):
    with pytest.raises(UserError, match=r"(pieces|A piece of the text) is .*, but it must be a"):
        model.score_long(pieces)


def test_unknown_characters_can_be_dropped(model):
    (sample,) = model.generate("a€\ud800b", 3, skip_unknown=True)
    assert sample.prompt == "ab"
    assert model.unknown("a€b\ud800€c") == ["\ud800", "€"]


def test_model_survives_copying_and_pickling(model):
    expected = model.generate("ab", 9)
    for again in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert (again.step, again.config) == (model.step, model.config)
        assert again.generate("ab", 9) == expected


# Prompts of the config that the vocabulary does not have


@pytest.mark.parametrize(
    ("prompts", "used", "said"),
    [
        (("ab", "cd"), ["ab", "cd"], []),
        (("a€b", "§"), ["ab"], ["'a€b' .* has '€' .*: the sample continues 'ab'", "'§' .*: there is no sample of it"]),
        (
            ("§",),
            [" "],
            ["'§' .* has '§' .*U.00A7", "No prompt of sample.prompts is left, so .* continues ' '"],
        ),
    ],
)
def test_config_prompts_lose_unknown_characters_with_a_warning(model, prompts, used, said):
    warnings: list[str] = []
    assert known_prompts(prompts, model.tokenizer, model.repairs, warnings.append) == used
    assert len(warnings) == len(said)
    for warning, pattern in zip(warnings, said, strict=True):
        assert re.search(pattern, warning), warning


def test_run_warns_of_changed_prompts_before_training_and_once(workdir):
    config = small_config(workdir.parent / "words.txt")
    config.scheduler.max_steps, config.sample.prompts = 60, ("ab€ cd",)
    before, seen = [], []
    for event in chargpt_jax.run(config, workdir, seen.append):
        before += seen if isinstance(event, TrainStarted) else []
    (warning,) = [line for line in seen if "sample.prompts" in line]
    assert before == [warning]
    saved = json.loads((workdir / "samples" / "step-60.json").read_text(encoding="utf-8"))
    assert [sample["prompt"] for sample in saved["samples"]] == ["ab cd"]


@pytest.mark.slow
def test_unused_ids_are_replacement_characters(model):
    config = copy.deepcopy(model.config)
    config.model.mask_unused_ids = False
    graphdef, _ = trained_model.state_shapes_of(config, np.float32)
    params = jax.tree.map(lambda x: 0 * x, model.params)  # all ids are equally likely
    other = chargpt_jax.Model(config, model.tokenizer, graphdef, params, 0)
    pieces: list[str] = []
    (sample,) = other.generate("ab", 40, on_text=lambda i, text: pieces.append(text))
    assert len(sample.text) == len(sample.tokens) == len(sample.surprisal) == 42
    assert set(map(len, sample.tokens)) == {1}
    assert "\ufffd" in sample.text
    assert "ab" + "".join(pieces) == sample.text
    with pytest.raises(UserError, match=r"U\+FFFD"):
        other.score(sample.text)


def test_steps_can_be_chosen(workdir):
    latest = chargpt_jax.load(workdir, "latest")
    assert latest.step == 60
    with pytest.raises(NoCheckpoint, match="holds no checkpoint of step 61: it has .*60"):
        chargpt_jax.load(workdir, 61)


# The command line


def command(capsys, workdir, *flags: str):
    code = main(["chargpt", f"--workdir={workdir}", *flags])
    out, err = capsys.readouterr()
    return code, out, err


def test_generate_prints_one_json_object(capsys, workdir):
    flags = ("--prompt=ab", "--prompt=jk ", "--max_new_tokens=7", "--temperature=0", "--json")
    code, out, _ = command(capsys, workdir, "--mode=generate", *flags)
    samples = json.loads(out)["samples"]
    assert code == 0
    assert [sample["prompt"] for sample in samples] == ["ab", "jk "]
    for sample in samples:
        assert "".join(sample["tokens"]) == sample["text"]
        assert set(sample) == {
            *("prompt", "text", "tokens", "surprisal", "entropy", "surprise_surprise", "vocab_size"),
            *("rank", "alternatives", "sampled_probability"),
        }
        assert sample["rank"] == [None, *sample["rank"][1:]]
        assert [len(pairs or []) for pairs in sample["alternatives"]] == [0] + [5] * (len(sample["tokens"]) - 1)
        written = len(sample["prompt"])
        assert sample["sampled_probability"] == [None] * written + [1.0] * 7  # greedy
        assert all(
            pairs[0][0] == token
            for pairs, token in zip(sample["alternatives"][written:], sample["tokens"][written:], strict=True)
        )
        assert sample["surprisal"][0] is None
        assert all(isinstance(x, float) for x in sample["surprisal"][1:])
        assert sample["vocab_size"] == 64


def test_generate_repeats_for_a_seed_and_streams_the_same_text(capsys, workdir):
    flags = ("--mode=generate", "--prompt=ab", "--max_new_tokens=20", "--seed=4")
    _, first, _ = command(capsys, workdir, *flags)
    _, streamed, _ = command(capsys, workdir, *flags, "--stream")
    text = first.split("\n\n")[0].rstrip("\n")
    assert len(text) >= 20
    assert streamed.startswith(text)


@pytest.mark.parametrize("prompt", ["€ab", "ab\r\ncd€"])
def test_plain_stream_prints_the_prompt_that_is_continued(capsys, workdir, prompt):
    flags = ("--mode=generate", f"--prompt={prompt}", "--max_new_tokens=40", "--skip_unknown")
    code, out, _ = command(capsys, workdir, *flags)
    streamed = command(capsys, workdir, *flags, "--stream")[1]
    assert code == 0
    assert streamed == out.replace("\n\nloss", "\nloss")


@pytest.mark.parametrize(
    "wrong",
    [
        "--prompt=a€",
        "--prompt=ab --temperature=-1",
        "--prompt=ab --top_k=0",
        "--branch=999:a",
        "--branch=3:a --seed=-1",
    ],
)
def test_stream_prints_no_text_before_an_error(capsys, workdir, wrong):
    assert command(capsys, workdir, "--mode=generate", "--prompt=ab", "--max_new_tokens=9")[0] == 0
    code, out, err = command(capsys, workdir, "--mode=generate", "--stream", *wrong.split())
    assert (code, out) == (2, "")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        *(
            (f"--mode=generate --prompt=ab --{flag}={value}", flag)
            for flag, value in (
                *(("max_new_tokens", 0), ("temperature", -1), ("temperature", "nan"), ("top_k", 0), ("top_p", 2)),
                *(("seed", -1), ("alternatives", -1)),
            )
        ),
        ("--mode=score --text=abc --alternatives=99", "alternatives"),
        ("--mode=score --text=abc --stride=0", "stride"),
        (f"--mode=score --text={'ab ' * 2000} --stride=999", "stride"),
    ],
)
def test_command_line_errors_name_the_flag(capsys, workdir, flags, flag):
    mode, text, *rest = flags.split(" --")
    code, out, err = command(capsys, workdir, mode, f"--{text}", *(f"--{word}" for word in rest))
    assert (code, out) == (2, "")
    assert err.startswith(f"chargpt: --{flag} is ")
    assert err.count("\n") == 1


def test_score_prints_json_and_draws(capsys, workdir):
    code, out, err = command(capsys, workdir, "--mode=score", "--text=ab cde", "--json")
    (sample,) = json.loads(out)["samples"]
    assert code == 0
    assert len(sample["surprisal"]) == 6
    assert "scored-0.svg" in err
    ET.parse(workdir / "samples" / "scored-0.svg")


def test_score_prints_the_loss_once(capsys, workdir):
    code, out, err = command(capsys, workdir, "--mode=score", "--text=ab cde")
    assert (code, err, out.count("loss")) == (0, "", 1)
    assert "\nplot: " in out


@pytest.mark.parametrize("flags", [("--mode=generate", "--prompt=a€b"), ("--mode=score", "--text=a€b§")])
def test_dropped_characters_are_named_on_stderr(capsys, workdir, flags):
    code, _, err = command(capsys, workdir, *flags, "--skip_unknown")
    assert code == 0
    assert err.strip().startswith("*** Dropped the characters that are not in the vocabulary: '€' (U+20AC)")
    assert len(err.split("\n\n")) == 2


def test_dropped_characters_of_a_long_text_are_named(capsys, workdir, tmp_path):
    (path := tmp_path / "long.txt").write_text("ab cde€ " * 1000, encoding="utf-8")
    code, _, err = command(capsys, workdir, "--mode=score", f"--text_file={path}", "--skip_unknown", "--json")
    assert code == 0
    assert err.count("not in the vocabulary: '€' (U+20AC).") == 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--mode=score", "--text=ab cd"],
        ["--mode=generate", "--prompt=ab", "--max_new_tokens=40"],
        ["--mode=generate", "--prompt=ab", "--max_new_tokens=40", "--stream"],
    ],
)
def test_a_terminal_gets_the_text_of_a_pipe_in_colours(workdir, monkeypatch, flags):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    seen = []
    for is_terminal in (False, True):
        out = io.StringIO()
        monkeypatch.setattr(out, "isatty", lambda is_terminal=is_terminal: is_terminal)
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["chargpt", *flags, f"--workdir={workdir}"]) == 0
        seen.append(out.getvalue())
    pipe, terminal = seen
    bare = re.sub("\x1b\\[[0-9;]+m", "", terminal)
    legend = next(line for line in bare.split("\n") if line.startswith("colour: surprisal in nats, 0 to "))
    assert "\x1b" not in pipe
    assert bare != terminal
    text = bare.replace(f"\n{legend}\n", "")
    assert (text.replace("\n\nloss", "\nloss") if "--stream" in flags else text) == pipe


def test_branch_continues_the_chosen_sample_and_keeps_it(capsys, workdir):
    flags = ("--mode=generate", "--temperature=0")
    assert command(capsys, workdir, *flags, "--prompt=ab", "--prompt=jk ", "--max_new_tokens=20")[0] == 0
    saved = workdir / "samples" / "generated.json"
    samples = json.loads(saved.read_text(encoding="utf-8"))["samples"]
    for index, sample in enumerate(samples):
        at, text = 9, sample["text"]
        code, out, _ = command(capsys, workdir, *flags, f"--branch={at}:{text[at]}", f"--sample={index}")
        assert code == 0
        assert out.startswith(f"{text}\n\nloss ")
        assert "samples/branch-0.svg" in out
    code, out, _ = command(capsys, workdir, *flags, "--branch=9:j", "--max_new_tokens=3", "--json")
    (branch,) = json.loads(out)["samples"]
    assert branch["prompt"] == samples[0]["text"][:9] + "j"
    assert len(branch["text"]) == 13
    assert json.loads((workdir / "samples" / "branch.json").read_text(encoding="utf-8"))["samples"] == [branch]
    streamed = command(capsys, workdir, *flags, "--branch=9:j", "--max_new_tokens=3", "--stream")[1]
    assert streamed.startswith(branch["text"] + "\nloss ")
    assert json.loads(saved.read_text(encoding="utf-8"))["samples"] == samples


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        *(
            (f"--branch={word}", "must be POSITION:CHARACTER")
            for word in ("3", "3:", ":a", "-1:a", "a:b", "3:ab", "²:a")
        ),
        ("--branch=99:a", "chargpt: The position of --branch is 99, but the sample has 12 characters"),
        ("--branch=3:€", "chargpt: The character of --branch is '€' (U+20AC), which is not in the vocabulary"),
        ("--branch=3:a --sample=1", "generated.json has 1 sample: leave --sample out."),
        ("--branch=3:a --sample=-1", "--sample is -1, but"),
        *(
            (f"--branch=3:a --sample={word}", "must be an index or 'branch': leave")
            for word in ("a", "1.5", "²", "+1", "")
        ),
        ("--branch=3:a --prompt=ab", "--prompt does not apply to --branch"),
        ("--branch=3:a --skip_unknown", "--skip_unknown does not apply to --branch"),
        ("--branch=3:a --max_new_tokens=0", "chargpt: --max_new_tokens is 0"),
        ("--sample=0", "--sample chooses the sample that --branch continues"),
    ],
)
def test_branch_answers_a_mistake_in_one_sentence(capsys, workdir, flags, message):
    generate = ("--mode=generate", "--prompt=ab", "--max_new_tokens=10")
    assert command(capsys, workdir, *generate)[0] == 0
    code, out, err = command(capsys, workdir, "--mode=generate", *flags.split())
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist, so there is no sample to branch: run --mode=generate first."),
        ("[", "cannot be read"),
        ('{"samples": [{}]}', "cannot be used (a sample must have a prompt): run --mode=generate again."),
        ('{"samples": []}', "has no sample to branch: run --mode=generate again."),
    ],
)
def test_branch_refuses_a_file_without_its_sample(capsys, workdir, content, message):
    saved = workdir / "samples" / "generated.json"
    saved.unlink(missing_ok=True)
    if content is not None:
        saved.write_text(content, encoding="utf-8")
    code, _, err = command(capsys, workdir, "--mode=generate", "--branch=0:a")
    assert code == 2
    assert message in err


def test_branch_repairs_its_character_like_a_prompt(capsys, workdir):
    assert command(capsys, workdir, "--mode=generate", "--prompt=ab", "--max_new_tokens=20")[0] == 0
    for typed, known in (("e\u0301", "'é' (U+00E9)"), ("\u212b", "'Å' (U+00C5)"), ("\r", r"'\n' (U+000A)")):
        code, _, err = command(capsys, workdir, "--mode=generate", f"--branch=5:{typed}")
        assert code == 2
        assert f"The character of --branch is {known}, which is not in the vocabulary" in err
    assert "must be POSITION:CHARACTER" in command(capsys, workdir, "--mode=generate", "--branch=5:x\u0301")[2]


def test_branch_of_a_branch_continues_it(capsys, workdir):
    flags, saved = ("--mode=generate", "--temperature=0"), workdir / "samples" / "branch.json"
    saved.unlink(missing_ok=True)
    code, _, err = command(capsys, workdir, *flags, "--branch=0:a", "--sample=branch")
    assert (code, "does not exist, so there is no sample to branch: run --branch without --sample first." in err) == (
        2,
        True,
    )
    assert command(capsys, workdir, *flags, "--prompt=ab", "--prompt=c", "--max_new_tokens=20")[0] == 0
    text = command(capsys, workdir, *flags, "--branch=5:j", "--sample=1")[1].split("\n")[0]
    assert text[5] == "j"
    assert command(capsys, workdir, *flags, "--branch=9:k", "--sample=branch")[1].startswith(text[:9] + "k")
    assert command(capsys, workdir, *flags, "--branch=9:k", "--sample=7")[2].endswith(
        "are 0 to 1: leave it out, for example.\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [["ab"], ["ab", "c", "jk"]])
def test_each_sample_is_followed_by_its_loss(capsys, workdir, prompts):
    flags = ("--mode=generate", *(f"--prompt={prompt}" for prompt in prompts), "--max_new_tokens=9")
    out = command(capsys, workdir, *flags)[1]
    samples = json.loads(command(capsys, workdir, *flags, "--json")[1])["samples"]
    blocks = []
    for i, sample in enumerate(samples):
        loss = np.mean(sample["surprisal"][1:])
        path = workdir / "samples" / f"generated-{i}.svg"
        blocks.append(f"{sample['text']}\n\nloss {loss:.4f} nats per character; plot: {path}\n")
    assert out == "\n".join(blocks)


def test_generate_uses_the_configs_chain_unless_a_flag_sets_one(capsys, workdir, tmp_path, monkeypatch):
    """The order of precedence: --sampler, or --temperature, --top_k and --top_p; then the config's chain."""
    own = shutil.copytree(workdir, tmp_path / "run")
    saved = json.loads((own / "config.json").read_text(encoding="utf-8"))
    saved["sample"]["sampler"] = "mirostat=1.5"
    (own / "config.json").write_text(json.dumps(saved), encoding="utf-8")

    seen = []

    def generate(_model, _prompts, _count, **how):
        seen.append({name: how.get(name) for name in ("sampler", "temperature", "top_k")})
        raise UserError("Only its arguments matter.")

    monkeypatch.setattr(chargpt_jax.Model, "generate", generate)
    for flags in ((), ("--sampler=min_p=0.3",), ("--top_k=2",), ("--temperature=0.5",)):
        assert command(capsys, own, "--mode=generate", *flags)[0] == 2
    assert seen == [
        {"sampler": chain_of("mirostat=1.5"), "temperature": None, "top_k": None},
        {"sampler": "min_p=0.3", "temperature": None, "top_k": None},
        {"sampler": None, "temperature": 0.8, "top_k": 2},
        {"sampler": None, "temperature": 0.5, "top_k": None},
    ]


def test_rows_under_a_line_come_with_the_flag_only(capsys, workdir):
    flags = ("--mode=generate", "--prompt=ab", "--max_new_tokens=9", "--temperature=0")
    code, plain, _ = command(capsys, workdir, *flags)
    assert code == 0
    text, rest = plain.split("\n", 1)
    for more in ((), ("--stream",)):
        code, rows, _ = command(capsys, workdir, *flags, "--subline", *more)
        assert code == 0
        lines = rows.split("\n")
        assert lines[0] == text
        assert len(lines[1]) == len(lines[2]) == len(text) == 11
        assert set(lines[1].lstrip()) <= set("▁▂▃▄▅▆▇█")
        assert rows.endswith(rest)
    assert command(capsys, workdir, *flags, "--subline", "--json")[0] == 2


def test_score_reads_a_file(capsys, workdir, tmp_path):
    path = tmp_path / "text é.txt"
    path.write_text("ab cde fghi", encoding="utf-8")
    code, out, _ = command(capsys, workdir, "--mode=score", f"--text_file={path}", "--json")
    assert code == 0
    assert json.loads(out)["samples"][0]["text"] == "ab cde fghi"


def test_eval_and_info_print_json(capsys, workdir):
    code, out, _ = command(capsys, workdir, "--mode=eval", "--json")
    assert code == 0
    assert {"loss", "bits_per_character", "tokens", "split"} <= set(json.loads(out))
    assert json.loads(out)["bits_per_char"] == json.loads(out)["bits_per_character"]
    code, out, _ = command(capsys, workdir, "--mode=info", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["step"] == facts["total_steps"] == 60
    assert facts["sources"] == ["words"]
    assert facts["compile_seconds"] > 0
    assert facts["flops_per_second"] == pytest.approx(facts["flops_per_step"] / facts["seconds_per_step"])


@pytest.mark.parametrize(("rate", "method"), [(None, None), ("own", "lowest"), (1e-5, None), ("damaged", "")])
def test_all_facts_say_how_the_learning_rate_was_found(workdir, tmp_path, rate, method):
    folder = Workdir(shutil.copytree(workdir, tmp_path / "run"))
    folder.lr_finder.unlink(missing_ok=True)
    if rate is not None:
        own = folder.load_config().optimizer.learning_rate
        found = {"learning_rate": own if rate == "own" else rate, "method": "lowest", "start_lr": 0, "end_lr": 1}
        folder.save_lr_finder({**found, "zooms": []})
    facts = all_facts(folder)
    assert facts["learning_rate_method"] == method
    assert {name: facts[name] for name in INFO} == chargpt_jax.info(folder)


def test_info_prints_words_and_no_keys(capsys, workdir):
    code, out, _ = command(capsys, workdir, "--mode=info")
    assert code == 0
    assert "Text      titles         words\n" in out
    assert "Training  progress       complete: 60 steps (" in out
    assert not [name for name in INFO if "_" in name and name in out]
    assert not re.search(r"\de[+-]?\d", out)


def test_report_is_written_again_and_its_path_printed(capsys, workdir):
    report = workdir / "report.html"
    report.write_text("old", encoding="utf-8")
    code, out, _ = command(capsys, workdir, "--mode=report")
    assert (code, out) == (0, f"report: {report}\n")
    assert "<svg" in report.read_text(encoding="utf-8")
    report.unlink()
    code, out, _ = command(capsys, workdir, "--mode=report", "--json")
    assert json.loads(out) == {"report": str(report)}
    assert report.exists()


@pytest.mark.parametrize(
    ("flags", "terminal", "variables", "opens"),
    [
        ([], True, {"DISPLAY": ":0"}, True),
        ([], True, {"WAYLAND_DISPLAY": "wayland-0"}, True),
        ([], True, {}, False),
        ([], False, {"DISPLAY": ":0"}, False),
        (["--open=false"], True, {"DISPLAY": ":0"}, False),
        (["--json"], True, {"DISPLAY": ":0"}, False),
    ],
)
def test_report_opens_on_a_terminal_with_a_display(workdir, monkeypatch, flags, terminal, variables, opens):
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["chargpt", "--mode=report", f"--workdir={workdir}", *flags]) == 0
    assert opened == ([(workdir / "report.html").as_uri()] if opens else [])


def test_report_without_a_browser_or_a_run(capsys, workdir, tmp_path, monkeypatch):
    def fail(address):
        raise webbrowser.Error("could not locate runnable browser")

    monkeypatch.setattr(webbrowser, "open", fail)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert command(capsys, workdir, "--mode=report")[0] == 0
    code, _, err = command(capsys, tmp_path / "none", "--mode=report")
    assert code == 2
    assert err.endswith("has no config.json: give the --workdir of a run, or start one with --config=small.\n")
    copied = shutil.copytree(workdir, tmp_path / "run")
    (copied / "report.html").unlink()
    (copied / "report.html").mkdir()
    code, _, err = command(capsys, copied, "--mode=report")
    assert code == 2
    assert err.count("\n") == 1
    assert "report.html (Is a directory)" in err


@pytest.mark.slow
def test_a_profiled_run_leaves_a_trace_of_its_work(capsys, workdir, tmp_path):
    config = workdir / "config.json"
    fields = [
        "--config.scheduler.max_steps=6",
        "--config.train.steps_per_dispatch=1",
        "--config.train.validate_every=9",
    ]
    command_line = ["chargpt", "--mode=train", f"--config={config}", f"--workdir={tmp_path / 'run'}", "--profile"]
    assert main([*command_line, *fields]) == 0
    (trace,) = (tmp_path / "run").glob("profile/plugins/profile/*/perfetto_trace.json.gz")
    assert str(trace) in capsys.readouterr().out
    assert main([*command_line, *fields]) == 0
    assert main([*command_line[:-1], *fields]) == 0
    shown = capsys.readouterr().out
    assert shown.count("trace: ") == 1, "the trace is reported only if it was requested"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--mode=generate", "--prompt=a\u20acb"), "U+20AC"),
        (("--mode=generate", "--prompt=ab", "--temperature=-1"), "temperature is -1"),
        (("--mode=generate", "--prompt=ab", "--temperature=nan"), "temperature is nan"),
        (("--mode=generate", "--prompt=ab", "--top_k=0"), "top_k is 0"),
        (("--mode=generate", "--prompt=ab", "--top_p=0"), "top_p is 0"),
        (("--mode=generate", "--prompt=ab", "--top_p=1.5"), "top_p is 1.5"),
        (("--mode=generate", "--prompt="), "empty"),
        (("--mode=score", "--text="), "empty"),
        (("--mode=score", "--text=ab cd", "--stride=99"), "stride is 99"),
        (("--mode=generate", "--step=soon"), "--step is 'soon'"),
    ],
)
def test_a_mistake_gets_one_sentence_and_exit_code_2(capsys, workdir, flags, message):
    before = sorted(workdir.rglob("*"))
    code, out, err = command(capsys, workdir, *flags)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert sorted(workdir.rglob("*")) == before


def test_an_absent_step_gives_exit_code_3(capsys, workdir):
    code, _, err = command(capsys, workdir, "--mode=generate", "--step=7")
    assert code == 3
    assert "holds no checkpoint of step 7" in err


@pytest.fixture
def config_file(workdir):
    """The config of the run, as a file."""
    path = workdir.parent / "config.py"
    path.write_text(
        "from tests.corpus_text import small_config\n\n\ndef get_config():\n"
        f"    config = small_config({str(workdir.parent / 'words.txt')!r})\n"
        "    config.scheduler.max_steps = 60\n    return config\n",
        encoding="utf-8",
    )
    return path


def test_second_run_only_writes_samples_and_report(capsys, workdir, config_file):
    code, out, _ = command(capsys, workdir, f"--config={config_file}")
    assert code == 0
    assert "resuming after step 60" in out
    assert "report:" in out


@pytest.mark.slow
def test_a_non_finite_loss_gives_exit_code_4(capsys, config_file, tmp_path):
    flags = ("--mode=train", f"--config={config_file}", "--config.optimizer.learning_rate=1e30")
    code = main(["chargpt", f"--workdir={tmp_path / 'run'}", *flags])
    _, err = capsys.readouterr()
    assert code == 4
    assert "Training diverged" in err
