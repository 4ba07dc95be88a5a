"""Invalid arguments for a trained run: one sentence and an exit code, no traceback, no file changed."""

import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import chargpt_jax
from chargpt_jax import main
from chargpt_jax.cli import terminal
from chargpt_jax.cli.terminal import as_json
from chargpt_jax.config.sections import MAX_TEXT
from chargpt_jax.errors import UserError
from chargpt_jax.results.curves import training_curves
from chargpt_jax.storage import checkpoint_record
from chargpt_jax.storage.workdir import Workdir
from tests.corpus_text import small_config, write_words

SIZES = {"n_embd": 8, "n_head": 2, "n_head_dim": 4, "n_ff": 16, "dropout": 0.0}
STEPS = 4
Asked = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a trained run with a relative workdir; the reader of its events changes the current folder."""
    folder = tmp_path_factory.mktemp("bad input é 漢 with spaces")
    config = small_config(write_words(folder / "words.txt", 1_000), **SIZES)
    config.scheduler.max_steps, config.train.steps_per_dispatch, config.sample.max_new_tokens = STEPS, 2, 10
    before, elsewhere = os.getcwd(), [tmp_path_factory.mktemp(f"elsewhere{n}") for n in range(3)]
    try:
        os.chdir(folder)
        for _, place in zip(chargpt_jax.run(config, "a run", lambda text: None), itertools.cycle(elsewhere)):
            os.chdir(place)
    finally:
        os.chdir(before)
    assert not [path for place in elsewhere for path in place.iterdir()]
    return folder / "a run"


@pytest.fixture(scope="module")
def model(run: Path) -> chargpt_jax.Model:
    return chargpt_jax.load(run)


@pytest.fixture
def asked(run: Path, capsys: pytest.CaptureFixture[str]) -> Asked:
    """Return a function that runs a command line on the run, or another, and returns exit code, output and errors."""

    def ask(*words: str, workdir: Path = run) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main.main(["chargpt", f"--workdir={workdir}", *words])
        return code, *capsys.readouterr()

    return ask


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """Return a copy of the run, to be damaged."""
    return shutil.copytree(run, tmp_path / "copy")


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.slow
def test_a_relative_workdir_stays_where_it_was_whatever_folder_the_reader_of_events_goes_to(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "corpus", "checkpoints", "metrics.jsonl", "samples", "report.html", "loss.svg"} <= names


# Arguments of a model


MISTAKES = [
    ("generate --prompt=ab --temperature=nan", 2, "temperature is nan"),
    ("generate --prompt=ab --temperature=inf", 2, "temperature is inf"),
    ("generate --prompt=ab --temperature=-inf", 2, "temperature is -inf"),
    ("generate --prompt=ab --temperature=-0.5", 2, "temperature is -0.5"),
    ("generate --prompt=ab --temperature=1e9", 2, "between 0 (greedy) and 1000"),
    ("generate --prompt=ab --max_new_tokens=0", 2, "max_new_tokens is 0, but it must be between 1 and 1,000,000"),
    ("generate --prompt=ab --max_new_tokens=-5", 2, "max_new_tokens is -5"),
    ("generate --prompt=ab --max_new_tokens=1000001", 2, "max_new_tokens is 1000001"),
    (f"generate --prompt=ab --max_new_tokens={10**40}", 2, "max_new_tokens is an integer of more than 18 digits"),
    ("generate --prompt=ab --top_k=0", 2, "top_k is 0"),
    ("generate --prompt=ab --top_k=-3", 2, "top_k is -3"),
    ("generate --prompt=ab --top_p=nan", 2, "top_p is nan"),
    ("generate --prompt=ab --top_p=inf", 2, "top_p is inf"),
    ("generate --prompt=ab --top_p=0", 2, "top_p is 0.0"),
    ("generate --prompt=ab --top_p=-1", 2, "top_p is -1.0"),
    ("generate --prompt=ab --seed=-1", 2, "seed is -1"),
    ("generate --prompt=ab --seed=2147483648", 2, "seed is 2147483648"),
    (f"generate --prompt=ab --seed={10**40}", 2, "seed is an integer of more than 18 digits"),
    (f"generate --prompt=ab --seed={'9' * 5000}", 2, "--seed="),
    ("generate --prompt=", 2, "The text is empty"),
    ("generate --prompt=ab --prompt=", 2, "The text is empty"),
    ("generate --prompt=€€€", 2, "The text has '€' (U+20AC) at character 0"),
    ("generate --prompt=€€€ --skip_unknown", 2, "No character of the text is in the vocabulary"),
    ("generate --prompt=ab --step=1", 3, f"holds no checkpoint of step 1: it has 3, {STEPS}"),
    ("generate --prompt=ab --step=-1", 2, "--step is '-1'"),
    (f"generate --prompt=ab --step={'9' * 5000}", 2, "but it must be 'best', 'latest' or a number"),
    ("eval --step=99", 3, "holds no checkpoint of step 99: it has"),
    ("score --text=", 2, "The text is empty"),
    ("score --text=a", 2, "The text has 1 character"),
    ("score --text=€€€", 2, "The text has '€'"),
    ("score --text=€€€ --skip_unknown", 2, "No character of the text is in the vocabulary"),
    ("score --text=abab --stride=0", 2, "stride is 0"),
    ("score --text=abab --stride=-1", 2, "stride is -1"),
    ("score --text=abab --stride=33", 2, "stride is 33"),
    ("score --text_file=.", 2, "cannot be read (Is a directory)"),
    ("score --text_file=empty.txt", 2, "The text is empty"),
    ("score --text_file=large.txt", 2, "large.txt is binary (NUL at byte 0)"),
    ("score --text_file=gone.txt", 2, "cannot be read (No such file or directory)"),
    ("'generate\x1b[2J' --prompt=ab", 2, "--mode"),
    ("generate --prompt=ab '--step=\x1b]0;x\a'", 2, "--step is"),
    ("'score' '--text_file=gone\x1b[31m\n.txt'", 2, "cannot be read"),
]


@pytest.mark.parametrize(("line", "code", "said"), MISTAKES, ids=[line[:60] for line, _, _ in MISTAKES])
def test_a_mistake_costs_a_sentence_and_leaves_the_run_alone(
    asked: Asked, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "large.txt").touch()
    os.truncate(tmp_path / "large.txt", 10**10)
    before = tree(run)
    mode, *words = shlex.split(line)
    found, out, err = asked(f"--mode={mode}", *words)
    assert (found, out) == (code, "")
    assert said in err
    assert err.count("\n") == 1
    assert err[:-1].isprintable()
    assert tree(run) == before


def test_a_step_of_a_newer_format_is_refused(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_record, "FORMAT", 0)
    code, out, err = asked("--mode=generate", "--prompt=ab")
    assert (code, out) == (3, "")
    messages = [line for line in err.splitlines() if line.startswith("chargpt: ")]
    assert len(messages) == 1, "in addition to a warning for each unusable checkpoint"
    assert "newer" in messages[0]


@pytest.mark.slow
def test_of_a_prompt_longer_than_the_context_the_end_is_read(model: chargpt_jax.Model) -> None:
    prompt = "ab cde fghi jk " * 3
    (whole,), (end,) = (model.generate(p, 5, temperature=0) for p in (prompt, prompt[-32:]))
    assert whole.text[len(prompt) :] == end.text[32:]


def test_a_text_beyond_what_is_read_in_one_go_is_refused(model: chargpt_jax.Model) -> None:
    for call in (lambda: model.generate("a" * (MAX_TEXT + 1)), lambda: model.score("a" * (MAX_TEXT + 1))):
        with pytest.raises(UserError, match="1,000,000 is the maximum"):
            call()
    with pytest.raises(UserError, match="are more than 32,000,000 in total"):
        model.generate(["ab"] * 50, MAX_TEXT)
    with pytest.raises(UserError, match="No prompt was given"):
        model.generate([])


@pytest.mark.slow
def test_samplers_at_the_edge_of_what_float32_holds_still_write_characters(model: chargpt_jax.Model) -> None:
    greedy = model.generate("ab", 10, temperature=0)[0].text
    assert model.generate("ab", 10, temperature=1e-300)[0].text == greedy
    assert model.generate("ab", 10, temperature=1e-40)[0].text == greedy
    assert model.generate("ab", 10, top_p=1e-300)[0].text == greedy
    assert model.generate("ab", 10, top_k=10**30)[0].text == model.generate("ab", 10, top_k=64)[0].text
    for _ in range(3):
        assert len(model.generate("ab", 10, temperature=1_000)[0].text) == 12, "an unused token id was sampled"


def test_json_has_no_nan_and_no_control_character() -> None:
    value = {"loss": math.nan, "all": [1.5, math.inf, (-math.inf, "a\x7f\x1b\u202e\ud800")], "n": 1, "none": None}
    text = as_json(value)
    again = json.loads(text, parse_constant=pytest.fail)
    assert again == {"loss": None, "all": [1.5, None, [None, "a\x7f\x1b\u202e\ud800"]], "n": 1, "none": None}
    assert text.isascii()
    assert text.isprintable()


def test_a_run_that_cannot_be_written_is_still_read_from(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Workdir, "write", refuse)
    code, out, err = asked("--mode=generate", "--prompt=ab", "--max_new_tokens=10")
    assert code == 0
    assert out.startswith("ab")
    assert "Cannot save the samples" in err
    assert "Read-only file system" in err


def test_a_terminal_of_ascii_takes_every_text(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder has non-ASCII letters in its name, which is printed after a picture was written."""
    raw = io.BytesIO()
    monkeypatch.setattr(terminal, "guard", lambda: sys.stdout.reconfigure(errors="backslashreplace"))  # type: ignore[union-attr]
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    monkeypatch.setattr(sys, "argv", ["chargpt", f"--workdir={run}", "--mode=score", "--text=ab cde"])
    with pytest.raises(SystemExit) as left:
        main.console()
    assert left.value.code == 0
    assert b"\\xe9 \\u6f22" in raw.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", ""])
def test_a_machine_without_a_language_prepares_a_text_of_any_letters(tmp_path: Path, encoding: str) -> None:
    text = tmp_path / "Ærø 漢 “x”.txt"
    text.write_text("Ærø, 漢字 and “quotes”. " * 100, encoding="utf-8")
    environment = {**os.environ, "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment |= {"PYTHONIOENCODING": encoding} if encoding else {}
    command = [sys.executable, "-m", "chargpt_jax.main"]
    words = ["--mode=prepare", "--config=tiny", f"--config.data.source={text}", f"--workdir={tmp_path / 'ø'}"]
    done = subprocess.run([*command, *words], capture_output=True, timeout=120, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"corpus: " in done.stdout
    assert (tmp_path / "ø" / "config.json").exists()


# A damaged run


def damaged(copy: Path, name: str, content: str | bytes | None) -> None:
    path = copy / name
    if content is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize(
    ("name", "content", "mode", "said"),
    [
        ("corpus", None, "eval", "has no corpus/vocabulary.json"),
        ("corpus", None, "info", "has no corpus/sources.json"),
        ("corpus/tokens.npy", None, "eval", "tokens.npy is missing: restore it"),
        ("corpus/tokens.npy", None, "train", "tokens.npy is missing: restore it"),
        ("corpus/tokens.npy", b"", "eval", "tokens.npy cannot be read"),
        ("corpus/tokens.npy", b"\x93NUMPY\x01\x00garbage", "train", "tokens.npy cannot be read"),
        ("corpus/vocabulary.json", '["", "b", "a"]', "eval", "not sorted and distinct"),
        ("corpus/vocabulary.json", '["", "a", "b"]', "eval", "unused token ids"),
        ("corpus/sources.json", "{}", "info", "sources.json cannot be used"),
        ("config.json", '{"seed": NaN}', "info", "NaN, which JSON does not allow"),
        ("config.json", '{"seed": 1, "seed": 1}', "generate", "twice"),
        ("config.json", "[" * 100_000, "eval", "nested too deeply"),
        ("config.json", '{"model": {"n_embd": 1000000000}}', "train", "GB of memory, but the limit"),
        ("config.json", '{"data": {"batch_size": 1000000000000}}', "info", "GB of memory, but the limit"),
        ("metrics.jsonl", None, "", ""),
    ],
)
def test_a_damaged_run_is_refused_in_a_sentence(
    asked: Asked, copy: Path, name: str, content: str | bytes | None, mode: str, said: str
) -> None:
    damaged(copy, name, content)
    if not mode:  # the log may be missing
        assert asked("--mode=info", workdir=copy)[0] == 0
        return
    before = tree(copy)
    code, out, err = asked(f"--mode={mode}", workdir=copy)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert tree(copy) == before


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("speed.json", "[]", "speed.json cannot be used"),
        ("speed.json", "", "speed.json cannot be read"),
        ("lr_finder.json", "[]", "lr_finder.json cannot be used"),
        (f"samples/step-{STEPS}.json", "{}", f"step-{STEPS}.json cannot be used"),
        ("metrics.jsonl", None, "metrics.jsonl lacks its last lines up to step 4"),
        ("metrics.jsonl", b"\0" * 2_000, "metrics.jsonl lacks its last lines up to step 4"),
    ],
)
def test_a_damaged_file_of_statistics_costs_a_warning(
    asked: Asked, copy: Path, name: str, content: str | bytes | None, said: str
) -> None:
    damaged(copy, name, content)
    warnings: list[str] = []
    list(chargpt_jax.run(chargpt_jax.load_config(str(copy / "config.json")), copy, warnings.append))
    found = [text for text in warnings if name in text]
    # The samples are written again.
    assert [said in text for text in found] == ([] if "samples" in name else [True])
    assert (copy / "report.html").stat().st_mtime_ns > (copy / "corpus" / "tokens.npy").stat().st_mtime_ns
    code, out, _ = asked("--mode=info", "--json", workdir=copy)
    assert (code, json.loads(out)["step"]) == (0, STEPS)


def test_the_training_time_is_not_known_without_the_log(asked: Asked, run: Path, copy: Path) -> None:
    damaged(copy, "metrics.jsonl", None)
    facts = [json.loads(asked("--mode=info", "--json", workdir=folder)[1]) for folder in (run, copy)]
    assert facts[0]["seconds"] > 0
    assert facts[0] | {"seconds": None} == facts[1]


@pytest.mark.parametrize("name", [f"samples/step-{STEPS}.json", "report.html", "loss.svg"])
def test_a_folder_in_the_way_costs_a_warning(asked: Asked, copy: Path, name: str) -> None:
    for path in (copy / "report.html", copy / name):
        path.unlink(missing_ok=True)
    (copy / name).mkdir()
    code, out, err = asked(workdir=copy)
    assert code == 0
    assert f"Cannot write {'the samples in ' if 'samples' in name else ''}{(copy / name).parent}" in err
    assert ("report: " in out) == (name != "report.html") == (copy / "report.html").is_file()


def test_another_vocabulary_than_the_models_is_no_measure(asked: Asked, copy: Path) -> None:
    """A vocabulary of the same size with one other character."""
    path = copy / "corpus" / "vocabulary.json"
    letters = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps([*letters[:-1], "~"]), encoding="utf-8")
    code, _, err = asked("--mode=eval", workdir=copy)
    assert code == 2
    assert "has changed (vocabulary.json" in err
    (copy / "corpus" / "manifest.json").unlink()  # as in a run of an earlier version
    code, _, err = asked("--mode=eval", workdir=copy)
    assert code == 2
    assert "differs from that of checkpoint 4" in err


def test_another_corpus_than_the_models_is_no_measure(asked: Asked, copy: Path) -> None:
    path = copy / "corpus" / "tokens.npy"
    np.save(path, np.load(path)[::-1].copy())
    for said in ("has changed (tokens.npy", "a different run (corpus_sha256 differs)"):
        before = tree(copy)
        code, out, err = asked("--mode=eval", workdir=copy)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert said in err
        assert tree(copy) == before
        (copy / "corpus" / "manifest.json").unlink(missing_ok=True)


def test_another_config_than_the_models_is_no_measure(asked: Asked, copy: Path) -> None:
    saved = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    saved["data"]["train_split"] = 0.5
    (copy / "config.json").write_text(json.dumps(saved), encoding="utf-8")
    code, out, err = asked("--mode=eval", workdir=copy)
    assert (code, out) == (2, "")
    assert "data.train_split: saved 0.8, given 0.5" in err


def test_a_run_of_an_earlier_version_without_a_manifest_of_its_corpus_is_measured(asked: Asked, copy: Path) -> None:
    first = asked("--mode=eval", workdir=copy)
    (copy / "corpus" / "manifest.json").unlink()
    assert asked("--mode=eval", workdir=copy) == first
    assert first[0] == 0


def test_the_best_loss_is_not_taken_from_the_log(asked: Asked, run: Path, copy: Path) -> None:
    first = json.loads(asked("--mode=info", "--json", workdir=run)[1])
    log = copy / "metrics.jsonl"
    lines = [{**json.loads(line), "loss": 0.001} for line in log.read_text(encoding="utf-8").splitlines()]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    again = json.loads(asked("--mode=info", "--json", workdir=copy)[1])
    assert again["best_loss"] == first["best_loss"] > 1
    assert again["best_bits_per_character"] == first["best_bits_per_character"]


def test_garbage_in_the_log_changes_nothing_that_is_told(asked: Asked, run: Path, copy: Path) -> None:
    from tests.test_hostile_files import GARBAGE

    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(b"\n" + b"\n".join(GARBAGE))
    facts = [json.loads(asked("--mode=info", "--json", workdir=folder)[1]) for folder in (run, copy)]
    assert facts[0] == facts[1]
    curves = [training_curves(Workdir(folder).load_metrics(), 1) for folder in (run, copy)]
    assert curves[0] == curves[1]


def test_what_lies_in_the_folder_of_a_run_does_not_get_into_its_report(copy: Path) -> None:
    """The report is plotted from numbers: an SVG file in the workdir could contain a script."""
    for name in ("lr_finder.svg", "loss.svg", f"samples/step-{STEPS}-0.svg", "samples/step-9-0.svg"):
        (copy / name).write_text("<svg><script>alert(1)</script></svg>", encoding="utf-8")
    (copy / "samples" / "step-9.json").write_text('{"samples": [{"text": "<script>"}]}', encoding="utf-8")
    (copy / "lr_finder.json").write_text("[]", encoding="utf-8")
    page = chargpt_jax.write_report(copy).read_text(encoding="utf-8")
    assert "alert" not in page
    names = re.findall(r'<svg [^>]*aria-label="([^"]+)"', page)
    assert "Learning-rate search" not in names
    assert names.count("Text with its metrics") == 1, "the one sample that can be read"


def test_titles_and_devices_that_steer_a_terminal_do_not(asked: Asked, copy: Path) -> None:
    sources = json.loads((copy / "corpus" / "sources.json").read_text(encoding="utf-8"))
    sources[0]["title"] = "A\x1b]0;x\a\x9b31m\u202e\nbook"
    (copy / "corpus" / "sources.json").write_text(json.dumps(sources), encoding="utf-8")
    (copy / "speed.json").write_text(json.dumps({"device": "\x1b[2J\n"}), encoding="utf-8")
    code, out, _ = asked("--mode=info", workdir=copy)
    assert code == 0
    assert all(line.isprintable() for line in out.splitlines())
    assert [line for line in out.splitlines() if line.startswith("Text      titles         A\ufffd]0;x")]
    assert [line for line in out.splitlines() if line.endswith("per second: not measured yet")]


@pytest.mark.slow
def test_a_clock_that_goes_backwards_disturbs_nothing(
    asked: Asked, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backwards = itertools.count(2e9, -3600.0)
    monkeypatch.setattr(time, "time", lambda: next(backwards))
    new = tmp_path / "new"
    (new / "samples").mkdir(parents=True)
    old = new / "samples" / "step-0.json"
    old.write_text('{"samples": [{"text": "an older text"}]}', encoding="utf-8")
    os.utime(old, (4e9, 4e9))
    code, out, err = asked(f"--config={run / 'config.json'}", workdir=new)
    assert code == 0
    assert "step-0.json cannot be used (a sample must have a prompt)" in err
    assert err.count("***") == 1
    assert "an older text" not in out
    assert (new / "report.html").exists()
    lines = [Workdir(folder).load_metrics() for folder in (run, new)]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    assert all(line.get("seconds", 0.0) >= 0 for line in lines[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_damaged_compile_cache_costs_a_warning_at_most(run: Path, tmp_path: Path) -> None:
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_compilation_cache_dir
    cache = shutil.copytree(before, tmp_path / "programs")
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert files
    rng = np.random.default_rng(0)
    for path in files:
        path.write_bytes(rng.bytes(path.stat().st_size))
    try:
        jax.config.update("jax_compilation_cache_dir", str(cache))
        compilation_cache.reset_cache()
        list(chargpt_jax.train(chargpt_jax.load_config(str(run / "config.json")), tmp_path / "new"))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
    lines = [Workdir(folder).load_metrics() for folder in (run, tmp_path / "new")]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
