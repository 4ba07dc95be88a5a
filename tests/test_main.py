"""The command line: invalid arguments give one sentence and exit code 2, and change no file.

Except the tests of imports and signals, all tests run in this process.
"""

import contextlib
import importlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.monitoring
import pytest

from chargpt_jax import events
from chargpt_jax.cli import commands, progress
from chargpt_jax.cli.command_line import parse
from chargpt_jax.cli.flags import MODES, define_flags
from chargpt_jax.cli.signals import Signals
from chargpt_jax.config import Config, validate
from chargpt_jax.config.saved import flatten, to_json
from chargpt_jax.data.batches import windows_per_pass
from chargpt_jax.errors import UserError
from chargpt_jax.main import DISK_ERRORS, main
from chargpt_jax.selftest import bench
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training import run as run_module
from chargpt_jax.training.dispatch.pacing import StopCondition

PREPARE = "--mode=prepare --config=tiny --config.data.source=text.txt --workdir=run"
SENTENCE = "The quick brown fox jumps over the lazy dog.\n"
Refused = Callable[..., str]

compiled: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def compilations() -> Iterator[None]:
    """Record all compilations of this process while the tests of this file run."""
    listening = True

    def note(event: str, seconds: float, **_: object) -> None:
        if listening and "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield
    listening = False


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with one valid text; the caches are there too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHARGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))  # then main does not change JAX's setting
    (tmp_path / "text.txt").write_text(SENTENCE * 100)
    (tmp_path / "broken.json").write_text('{"model": ')
    return tmp_path


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Return a function that runs an invalid command line, checks that no file changed, and returns the message."""

    def run(line: str, code: int = 2) -> str:
        capsys.readouterr()
        before, n_compiled = tree(here), len(compiled)
        assert main(["chargpt", *shlex.split(line)]) == code
        assert tree(here) == before, "something was written"
        assert len(compiled) == n_compiled, "something was compiled"
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("chargpt: ")
        assert shown.err.count("\n") == 1, "the message is not one line"
        assert shown.err.endswith((".\n", "?\n"))
        return shown.err

    return run


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return every path below a folder, with the content of files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def prepare(here: Path) -> None:
    """Create a run, without training, in the folder `run`."""
    assert main(["chargpt", *shlex.split(PREPARE)]) == 0
    assert (here / "run" / "config.json").exists()


# Controls: the checks of this file can fail


def test_valid_command_line_succeeds(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(here)
    first = tree(here / "run")
    prepare(here)
    assert tree(here / "run") == first
    assert {"corpus/tokens.npy", "corpus/sources.json", "corpus/vocabulary.json"} <= set(first)
    assert capsys.readouterr().err == ""


def test_a_compilation_is_noticed() -> None:
    before = len(compiled)
    jax.jit(lambda x: x + 41)(1)
    assert len(compiled) > before


def test_help_names_all_modes_and_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chargpt", "--help"]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert all(any(line.startswith(f"  {mode} ") for line in lines) for mode in MODES)
    assert all(any(line.startswith(f"  --{name}: ") for line in lines) for name in define_flags() if name != "h")
    assert all(any(line.startswith(f"    {field}=") for line in lines) for field in flatten(Config()))
    assert all(any(line.startswith(f"  {code} ") for line in lines) for code in (0, 1, 2, 3, 4, 5, 130, 143))
    assert shown.err == ""


# Flags


FLAG_MISTAKES = [
    ("", "needs a config: give --config=small"),
    ("--mode=train", "--mode=train needs a config"),
    ("--mode=compile", "--mode=compile needs a config"),
    (
        "--config",
        "billion, book, enwik8, gpt2_124m, nanogpt_baby, nanogpt_cpu, ngpt, shakespeare, sized, small, text8, tiny",
    ),
    (
        "--config=",
        "billion, book, enwik8, gpt2_124m, nanogpt_baby, nanogpt_cpu, ngpt, shakespeare, sized, small, text8, tiny",
    ),
    (
        "--config=smal",
        "'smal', but there is no such file: give a path, or one of billion, book, enwik8, gpt2_124m",
    ),
    (
        "--config=/no/such/file.py",
        "billion, book, enwik8, gpt2_124m, nanogpt_baby, nanogpt_cpu, ngpt, shakespeare, sized, small, text8, tiny",
    ),
    (
        "--config=.",
        "billion, book, enwik8, gpt2_124m, nanogpt_baby, nanogpt_cpu, ngpt, shakespeare, sized, small, text8, tiny",
    ),
    ("--config=text.txt", "'text.txt', but that is not a Python file"),
    ("--config=broken.json", "broken.json is not a valid run config"),
    ("--workdir=elsewhere", "needs a config: give --config=small"),
    ("--config.model.n_layer=3", "needs a --config to change"),
    ("--config.x.y=3 --mode=info", "needs a --config to change"),
    ("--config=tiny --mode=trian", "|".join(MODES)),
    ("--config=tiny --mode", "--mode"),
    ("--config=tiny --tempature=1", "temperature"),
    ("--config=tiny --wrokdir=there", "workdir"),
    ("--config=tiny --data.source=60", "data.source"),
    ("--config=tiny --temperature=warm", "--temperature=warm"),
    ("--config=tiny --max_new_tokens=2.5", "--max_new_tokens=2.5"),
    ("--config=tiny --json=perhaps", "--json=perhaps"),
    ("prepare", "'prepare' is not a flag"),
    ("--config=tiny small", "'small' is not a flag"),
    ("--mode=generate --workdir=run --prompt=one two", "'two' is not a flag"),
    ("--config=tiny -- --mode=prepare", "'--mode=prepare' is not a flag"),
    ("--mode=generate", "--mode=generate needs the folder of a run: give --workdir"),
    ("--mode=score --text=hello", "--mode=score needs the folder of a run: give --workdir"),
    ("--mode=eval", "give --workdir"),
    ("--mode=info", "give --workdir"),
    ("--mode=generate --workdir=", "give --workdir"),
    ("--mode=score --workdir=run", "give either --text or --text_file"),
    (
        "--mode=score --workdir=run --text=a --text_file=text.txt",
        "--text and --text_file are both given: leave one of them out.",
    ),
    ("--mode=score --workdir=run --text_file=gone.txt", "'gone.txt' cannot be read"),
    ("--config=tiny --workdir=a --workdir=b", "--workdir is given as 'a' and as 'b': give one of them"),
    ("--config=tiny --workdir a --workdir=b", "--workdir is given as 'a' and as 'b'"),
    ("--config=tiny --config small", "--config is given as 'tiny' and as 'small'"),
    ("--config=tiny --mode=info --mode=train", "--mode is given as 'info' and as 'train'"),
    ("--config=tiny --config.seed=1 --config.seed=2", "--config.seed is given as '1' and as '2'"),
    ("--config=tiny --profile --noprofile", "--profile is given as 'true' and as 'false'"),
    ("--config=tiny --max_minutes=0", "--max_minutes is 0, but it must be a finite number of minutes above 0"),
    ("--config=tiny --max_minutes=-1", "--max_minutes is -1,"),
    ("--config=tiny --max_minutes=nan", "--max_minutes is nan"),
    ("--config=tiny --max_minutes=inf", "--max_minutes is inf, but it must be a finite number"),
    ("--config=tiny --max_minutes=soon", "--max_minutes=soon"),
    ("--config=tiny --mode=prepare --max_minutes=5", "--max_minutes does not apply to --mode=prepare"),
    ("--config=tiny --kills=5", "--kills does not apply to --mode=run"),
    ("--mode=sweep --config=tiny", "needs a learning rate: give --config.sweep.learning_rates=1e-3,3e-3"),
    ("--mode=sweep --config=tiny --config.sweep.learning_rates=0", "each value must be above 0"),
    ("--mode=sweep --config=tiny --config.sweep.learning_rates=1e-3,1e-3", "has 0.001 twice"),
    ("--mode=export --workdir=none --format=run --out=new", "needs the run of a sweep to write: give --seed=0"),
    ("--mode=export --workdir=none --out=new --seed=0", "--seed does not apply to --format=hf"),
    ("--mode=selftest --kills=-1", "--kills is -1, but it must be between 0 and"),
    ("--mode=selftest --corruptions=many", "--corruptions=many"),
]


@pytest.mark.parametrize(("line", "said"), FLAG_MISTAKES)
def test_a_mistake_in_the_flags_is_answered_in_a_sentence(refused: Refused, line: str, said: str) -> None:
    assert said in refused(line)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "does not define get_config()"),
        ("def get_config():\n    return {'n_layer': 3}\n", "does not define get_config()"),
        ("def get_config(:\n", "mine.py"),
        ("import no_such_module\n", "no_such_module"),
        ("def get_config():\n    return Confog()\n", "Confog"),
    ],
)
def test_a_config_file_that_gives_no_config_is_named(refused: Refused, here: Path, content: str, said: str) -> None:
    (here / "mine.py").write_text(content)
    message = refused("--config=mine.py --workdir=run")
    assert "mine.py" in message
    assert said in message


# Fields of the config


SIZES = [
    *("model.block_size", "model.n_embd", "model.n_head", "model.n_head_dim", "model.n_ff", "model.n_layer"),
    *("data.batch_size", "optimizer.accumulation_steps", "scheduler.max_steps", "lr_finder.num_zooms"),
    *("train.log_every", "train.keep_last", "sample.max_new_tokens", "sample.top_k"),
]
RATES = [
    *("optimizer.learning_rate", "optimizer.clip_norm", "data.oversample", "data.train_split", "data.timeout"),
    *("scheduler.epochs", "lr_finder.start_lr", "lr_finder.end_lr", "train.validate_every", "sample.top_p"),
]
FIELD_MISTAKES = [
    ("model.n_layers=3", "did you mean model.n_layer?"),
    ("modle.n_layer=3", "did you mean model.n_layer?"),
    ("learning_rate=0.1", "did you mean optimizer.learning_rate?"),
    ("nothing.at.all=3", "the sections are model, data, optimizer"),
    ("=3", "the sections are model, data, optimizer"),
    ("model=3", "names a section"),
    ("model.n_layer=abc", "model.n_layer"),
    ("model.n_layer=2.5", "model.n_layer"),
    ("model.n_layer=", "model.n_layer"),
    ("data.batch_size=1e3", "data.batch_size"),
    ("optimizer.learning_rate=fast", "optimizer.learning_rate"),
    ("model.mask_unused_ids=perhaps", "model.mask_unused_ids"),
    ("model.n_head_dim=7", "model.n_head_dim is 7, but it must be even"),
    ("model.vocab_size=100", "multiple of 64"),
    ("model.used_ids=3", "model.used_ids"),
    ("model.dropout=1.0", "model.dropout is 1.0, but it must be below 1"),
    ("model.dropout=-0.1", "model.dropout is -0.1, but it must be at least 0"),
    ("model.dropout=1.5", "model.dropout is 1.5, but it must be below 1"),
    ("model.dropout=nan", "model.dropout is nan"),
    ("data.train_split=0", "data.train_split is 0.0, but it must be above 0"),
    ("data.train_split=1", "data.train_split is 1.0, but it must be below 1"),
    ("data.padding_chance=1.5", "data.padding_chance is 1.5, but it must be at most 1"),
    ("optimizer.betas=0.9", "it must be 2 values"),
    ("'optimizer.betas=(0.9, 1.0)'", "optimizer.betas"),
    ("optimizer.weight_decay=-1", "optimizer.weight_decay is -1.0"),
    ("optimizer.accumulation_steps=3", "must divide data.batch_size (16)"),
    ("lr_finder.start_lr=10", "must be less than lr_finder.end_lr (10)"),
    ("amp.dtype=float8", "one of auto, float32, bfloat16, float16"),
    ("seed=-1", "seed is -1"),
    ("data.short_epochs=true", "data.short_epochs was renamed: use ancestor.short_epochs."),
    ("data.random_validation=true", "data.random_validation was renamed: use ancestor.random_validation."),
    ("scheduler.decay=none", "scheduler.decay was renamed: use ancestor.decay."),
    ("model.dropout_bits=hash", "model.dropout_bits was removed"),
    ("sample.temperature=-1", "sample.temperature is -1.0"),
    ("sample.top_p=1.5", "sample.top_p is 1.5, but it must be at most 1"),
    ("\"sample.prompts=('a', '')\"", "sample.prompts holds an empty prompt"),
    ("sample.prompts=", "sample.prompts holds an empty prompt"),
    ("'sample.prompts=()'", "sample.prompts holds an empty prompt"),
    ("\"sample.prompts=('a', 1)\"", "sample.prompts is ('a', 1), but each value must be a string"),
]


def test_config_file_may_change_the_working_directory(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "elsewhere").mkdir()
    (here / "mine.py").write_text(
        f"import os\nfrom chargpt_jax.config import Config\ndef get_config():\n    os.chdir('elsewhere')\n"
        f"    config = Config()\n    config.data.source = {str(here / 'text.txt')!r}\n"
        "    config.model.block_size = 16\n    return config\n"
    )
    (here / "text.txt").write_text("some words " * 200)
    assert main(["chargpt", "--config=mine.py", "--workdir=run", "--mode=prepare"]) == 0, capsys.readouterr().err
    assert (here / "run" / "config.json").is_file()


@pytest.mark.parametrize(
    ("value", "prompts"),
    [
        *(
            (text, (text,))
            for text in ('"Yes"', "Yes", "1", "True", "None", "hello, world", "it's", "[", "1,2", "a\nb")
        ),
        ("['a', 'b']", ("a", "b")),
        ("'a','b'", ("a", "b")),
        ('("a, b",)', ("a, b",)),
    ],
)
def test_bare_text_of_a_field_of_strings_is_taken_as_written(value: str, prompts: tuple[str, ...]) -> None:
    for words in ([f"--config.sample.prompts={value}"], ["--config.sample.prompts", value]):
        _, config, _ = parse(["chargpt", "--config=tiny", *words, "--config.data.mirrors=https://example.org/{number}"])
        assert config is not None
        assert validate(config).sample.prompts == prompts
        assert config.data.mirrors == ("https://example.org/{number}",)


@pytest.mark.parametrize(("override", "said"), FIELD_MISTAKES)
def test_a_mistake_in_the_config_is_answered_in_a_sentence(refused: Refused, override: str, said: str) -> None:
    assert said in refused(f"{PREPARE} --config.{override}")


@pytest.mark.parametrize("value", ["0", "-1"])
@pytest.mark.parametrize("field", SIZES)
def test_a_size_is_at_least_one(refused: Refused, field: str, value: str) -> None:
    assert f"{field} is {value}, but it must be at least" in refused(f"{PREPARE} --config.{field}={value}")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("field", RATES)
def test_a_rate_is_finite(refused: Refused, field: str, value: str) -> None:
    assert f"{field} is {value}, but it must be a finite number" in refused(f"{PREPARE} --config.{field}={value}")


@pytest.mark.parametrize("value", ["0", "-1"])
@pytest.mark.parametrize("field", RATES)
def test_a_rate_is_above_zero(refused: Refused, field: str, value: str) -> None:
    assert f"{field} is {float(value)}, but it must be above 0" in refused(f"{PREPARE} --config.{field}={value}")


# Words of Python or of a library that must not appear in messages


@pytest.mark.parametrize(
    "line",
    [
        "--config=tiny --tempature=1",
        "--config=tiny --temperature=warm",
        "--config=tiny --max_new_tokens=2.5",
        "--config=tiny --json=perhaps",
        f"{PREPARE} --config.model.n_layer=abc",
        f"{PREPARE} --config.model.n_layer=2.5",
        f"{PREPARE} --config.optimizer.learning_rate=fast",
        f"{PREPARE} --config.model.mask_unused_ids=perhaps",
        f"{PREPARE} --config.seed=2147483648",
        "--flagfile=/no/such/file",
        "--mode=generate --workdir=text.txt",
        "--mode=info --workdir=text.txt",
    ],
)
def test_a_message_is_free_of_jargon(refused: Refused, line: str) -> None:
    message = refused(line)
    for word in ("literal", "int()", "convert", "Errno", "ERROR", "argument to", "('", "e+09", " ?", "?:"):
        assert word not in message


def test_a_flag_may_be_repeated_with_one_value_and_prompt_with_any(here: Path) -> None:
    line = "--config=tiny --config tiny --workdir=run --workdir run --prompt=a --prompt=b --mode=generate --json --json"
    values, *_ = parse(["chargpt", *shlex.split(line)])
    assert values.prompt == ["a", "b"]
    assert values.workdir == "run"
    assert parse(["chargpt", "--mode=score", "--text", "--workdir=a", "--workdir=b"])[0].text == "--workdir=a"


@pytest.mark.parametrize(
    ("content", "said"),
    [('{"name": "my npm project"}', "no field 'name'"), ("[]", "a JSON object"), ('{"seed": -1}', "seed is -1")],
)
@pytest.mark.parametrize("line", ["--mode=info --workdir=run", "--workdir=run", "--config=run/config.json"])
def test_a_config_of_something_else_is_named(refused: Refused, here: Path, line: str, content: str, said: str) -> None:
    (here / "run").mkdir()
    (here / "run" / "config.json").write_text(content)
    message = refused(line)
    assert "run/config.json is not a valid config (" in message
    assert said in message
    assert message.endswith(("start a new --workdir.\n", "give another --config or --workdir.\n"))


def test_a_program_that_gives_an_invalid_config_is_named(refused: Refused, here: Path) -> None:
    text = "from chargpt_jax.config import Config\ndef get_config():\n    return Config(seed=-1)\n"
    (here / "mine.py").write_text(text)
    assert "mine.py is not a valid config (seed is -1" in refused("--config=mine.py")
    assert refused("--config=mine.py --config.seed=-2").startswith("chargpt: seed is -2")


@pytest.mark.parametrize("mode", ["run", "train", "prepare"])
def test_a_run_that_cannot_be_read_is_not_taken_for_none(refused: Refused, here: Path, monkeypatch, mode: str) -> None:
    prepare(here)
    own, found = here / "run" / "config.json", os.stat

    def forbidden(path: object, **how: object) -> os.stat_result:
        if str(path).endswith("run/config.json"):
            raise PermissionError(13, "Permission denied", str(path))
        return found(path, **how)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", forbidden)
        with pytest.raises(UserError, match=r"run/config\.json cannot be read \(Permission denied\): make it readable"):
            parse(["chargpt", f"--mode={mode}", "--workdir=run"])
    own.unlink()
    own.mkdir()
    assert "run/config.json is not a regular file: remove it" in refused(f"--mode={mode} --workdir=run")


# Texts


@pytest.mark.parametrize("mode", ["run", "prepare", "find_lr", "train"])
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b" \n\t\r\n", "has only white space"),
        (b"abc\0def", "binary (NUL at byte 3)"),
        (b"caf\xe9 cr\xe8me", "cannot be read as utf-8 at byte 3"),
        (b"a" * 9_000, "one distinct character, 'a'"),
        (SENTENCE.encode(), "training part has 40 characters, but model.block_size 128 needs at least 129"),
        (SENTENCE.encode() * 5, "validation part has 23 characters, but model.block_size 128 needs at least 129"),
    ],
)
def test_a_text_that_will_not_do_is_refused_before_anything_is_made(
    refused: Refused, here: Path, mode: str, data: bytes | None, said: str
) -> None:
    if data is not None:
        (here / "bad.txt").write_bytes(data)
    assert said in refused(f"--config=tiny --mode={mode} --workdir=run --config.data.source=bad.txt")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.source=", "must name a text"),
        ("data.source=ftp://127.0.0.1/a.txt", "not an http or https URL"),
        ("data.source=.", "training part"),
        ("data.start_at=NOWHERE", "has no match"),
        ("'data.start_at=('", "regular expression"),
        ("data.train_split=0.001", "The training part has 4 characters"),
        ("data.train_split=0.999", "The validation part has 5 characters"),
        ("model.block_size=4096", "needs at least 4097: use a longer text"),
    ],
)
def test_a_text_must_suit_the_config(refused: Refused, here: Path, override: str, said: str) -> None:
    if override == "data.source=.":  # a folder is the concatenation of its texts
        (here / "text.txt").write_text(SENTENCE)
    line = PREPARE.replace(" --config.data.source=text.txt", "") if "data.source" in override else PREPARE
    assert said in refused(f"{line} --config.{override}")


@pytest.mark.parametrize("mode", ["run", "prepare", "find_lr", "train"])
@pytest.mark.parametrize(
    ("source", "workdir"),
    [
        ("texts", "texts"),
        ("texts/../texts", "texts"),
        ("text.txt,run", "new"),
        ("run/corpus", "new"),
        ("run", "run/new"),
    ],
)
def test_the_files_of_a_run_are_no_text(refused: Refused, here: Path, mode: str, source: str, workdir: str) -> None:
    (here / "texts").mkdir()
    (here / "texts" / "text.txt").write_text(SENTENCE * 100)
    prepare(here)
    said = refused(f"--config=tiny --mode={mode} --config.data.source={source} --workdir={workdir}")
    assert "the files of a run are no text: give another --workdir" in said


def test_a_run_may_lie_in_the_folder_of_its_texts(here: Path) -> None:
    (here / "texts").mkdir()
    (here / "texts" / "text.txt").write_text(SENTENCE * 100)
    line = "--mode=prepare --config=tiny --config.data.source=texts --workdir=texts/run"
    for _ in range(2):
        assert main(["chargpt", *shlex.split(line)]) == 0
    assert Workdir(here / "texts" / "run").load_sources()[0]["characters"] == len(SENTENCE) * 100


# Workdirs


@pytest.mark.parametrize("mode", ["run", "prepare", "find_lr", "train"])
@pytest.mark.parametrize(
    ("workdir", "said"),
    [
        ("text.txt", "that is not a folder"),
        ("text.txt/deeper", "text.txt is not a folder"),
        ("~nobody-of-that-name/run", "home"),
    ],
)
def test_a_place_that_cannot_be_a_folder_is_refused(refused: Refused, mode: str, workdir: str, said: str) -> None:
    message = refused(f"--config=tiny --mode={mode} --workdir={workdir}")
    assert "--workdir" in message
    assert said in message


@pytest.mark.parametrize("workdir", ["run", "deep/down/run"])
def test_a_read_only_place_is_refused(refused: Refused, monkeypatch: pytest.MonkeyPatch, workdir: str) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode, **_: not mode & os.W_OK)  # root can write everywhere
    assert "is not writable: choose another folder" in refused(f"--config=tiny --workdir={workdir}")


def test_a_run_made_with_another_config_is_not_touched(refused: Refused, here: Path) -> None:
    prepare(here)
    message = refused(f"{PREPARE} --config.model.n_layer=7 --config.model.dropout=0.5 --config.sample.temperature=0.1")
    assert "model.n_layer: saved 3, given 7" in message
    assert "model.dropout: saved 0.0, given 0.5" in message
    assert "temperature" not in message
    assert "model.block_size: saved 128, given 512" in refused("--config=small --workdir=run")


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"model": {"n_layers": 3}}', '{"model": 3}'])
@pytest.mark.parametrize("mode", ["train --config=tiny", "info", "generate"])
def test_a_damaged_config_is_refused(refused: Refused, here: Path, mode: str, damage: str) -> None:
    prepare(here)
    (here / "run" / "config.json").write_text(damage)
    assert "config" in refused(f"--mode={mode} --workdir=run")


@pytest.mark.parametrize("mode", ["generate --prompt=a", "score --text=abc", "eval", "info"])
@pytest.mark.parametrize("workdir", ["nowhere", "text.txt", "empty"])
def test_a_run_that_is_not_there_is_asked_for(refused: Refused, here: Path, mode: str, workdir: str) -> None:
    if workdir == "empty":
        (here / "empty").mkdir()
    assert workdir in refused(f"--mode={mode} --workdir={workdir}")


@pytest.mark.parametrize("mode", ["generate --prompt=a", "score --text=abc", "eval", "eval --step=latest"])
@pytest.mark.parametrize("folder", [None, "checkpoints"])
def test_a_run_without_a_checkpoint_has_an_exit_code_of_its_own(
    refused: Refused, here: Path, mode: str, folder: str | None
) -> None:
    prepare(here)
    if folder is not None:
        (here / "run" / folder).mkdir()
    assert "holds no checkpoint: train first" in refused(f"--mode={mode} --workdir=run", code=3)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--mode=generate --stream --prompt=a --prompt=b", "--stream prints one sequence, but there are 2 prompts"),
        (
            "--mode=generate --stream",
            "--stream prints one sequence, but there are 2 prompts",
        ),  # tiny has two prompts
        ("--mode=generate --step=first", "'best', 'latest' or a number"),
        ("--mode=score --text_file=latin.txt", "cannot be read as utf-8 at byte 3"),
        ("--mode=score --text_file=nul.txt", "binary (NUL at byte 3)"),
    ],
)
def test_invalid_arguments_are_rejected_before_loading(refused: Refused, here: Path, line: str, said: str) -> None:
    prepare(here)
    (here / "latin.txt").write_bytes(b"caf\xe9")
    (here / "nul.txt").write_bytes(b"abc\0def")
    assert said in refused(f"{line} --workdir=run")


# Signals, and closed output


ENDING = [(name, code) for name, code in (("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 143)) if hasattr(signal, name)]


@pytest.mark.parametrize(("name", "code"), ENDING)
def test_signal_ends_a_command_without_state(
    refused: Refused, here: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    prepare(here)
    before = signal.getsignal(getattr(signal, name))
    monkeypatch.setitem(commands.MODES, "info", lambda _: os.kill(os.getpid(), getattr(signal, name)) or time.sleep(5))
    assert refused("--mode=info --workdir=run", code) == f"chargpt: Stopped by {name}.\n"
    assert signal.getsignal(getattr(signal, name)) == before


@pytest.mark.parametrize(("name", "code"), ENDING)
def test_signal_during_prepare_leaves_no_file(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    monkeypatch.setattr(run_module, "read_corpus", lambda *_, **__: os.kill(os.getpid(), getattr(signal, name)))
    said = refused(PREPARE, code)
    assert said == f"chargpt: Stopped by {name}: run the same command again.\n"


def test_a_stopped_training_says_whether_there_is_a_checkpoint(refused: Refused, here: Path, monkeypatch) -> None:
    def stop(*_: object, **__: object) -> Iterator[object]:
        yield events.Prepared(("a",), 2, 1, 1, 2, 64, None)
        yield from saved
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    prepare(here)
    monkeypatch.setattr("chargpt_jax.api.train", stop)
    monkeypatch.setattr(progress, "sentence", lambda _: None)
    line = "--mode=train --workdir=run"
    saved: list[events.Event] = []
    assert refused(line, 143).endswith("run the same command again; no checkpoint was saved yet.\n")
    saved = [events.Saved(5, "run/checkpoints/5")]
    assert refused(line, 143).endswith("run the same command again to continue from the newest checkpoint.\n")
    saved = []
    (here / "run" / "checkpoints" / "5").mkdir(parents=True)
    assert refused(line, 143).endswith("run the same command again to continue from the newest checkpoint.\n")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="timers of POSIX")
@pytest.mark.parametrize("source", ["pipe", "server", "pattern"])
def test_the_time_limit_ends_every_wait(refused: Refused, here: Path, source: str) -> None:
    os.mkfifo(here / "pipe")
    (here / "text.txt").write_text("a" * 40 + "!" + "b c d " * 2000)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts a connection, and never answers
        where = {"pipe": "pipe", "pattern": "text.txt", "server": f"http://127.0.0.1:{server.getsockname()[1]}/"}[
            source
        ]
        start = "(a+)+$" if source == "pattern" else ""
        line = f"--config=tiny --workdir=run --config.data.source={where} --config.data.start_at={start}"
        began = time.monotonic()
        said = refused(f"{line} --max_minutes=0.005", 0)
    assert time.monotonic() - began < 5
    assert said == "chargpt: Time limit reached: run the same command again; no checkpoint was saved yet.\n"
    assert not (here / "run" / "config.json").exists()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_time_limit_ends_a_body_that_trickles(refused: Refused, here: Path) -> None:
    def trickle(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection, _ = server.accept()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 100000\r\n\r\n")
            while True:
                connection.sendall(b"x")
                time.sleep(0.02)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=trickle, args=(server,), daemon=True).start()
        line = f"--config=tiny --workdir=run --config.data.source=http://127.0.0.1:{server.getsockname()[1]}/"
        said = refused(f"{line} --max_minutes=0.005", 0)
    assert said.startswith("chargpt: Time limit reached: ")


def test_two_signals_within_a_millisecond_are_one_message(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(5)
        finally:  # a second signal must not end a clean-up
            signal.raise_signal(signal.SIGTERM)
            cleaned.append(True)
        return 0

    cleaned: list[bool] = []
    monkeypatch.setitem(commands.MODES, "selftest", interrupted)
    assert refused("--mode=selftest", 143) == "chargpt: Stopped by SIGTERM.\n"
    assert cleaned == [True]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="timers of POSIX")
def test_a_signal_waits_for_an_import(refused: Refused, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "slow_module.py").write_text(
        "import signal, time\nsignal.raise_signal(signal.SIGTERM)\ntime.sleep(0.2)\nDONE = True\n"
    )
    monkeypatch.syspath_prepend(str(here))

    def importing(_: object) -> int:
        importlib.import_module("slow_module")
        time.sleep(5)
        return 0

    monkeypatch.setitem(commands.MODES, "selftest", importing)
    assert refused("--mode=selftest", 143) == "chargpt: Stopped by SIGTERM.\n"
    assert sys.modules.pop("slow_module").DONE


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="timers of POSIX")
def test_a_signal_in_a_callback_is_not_lost(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def interrupted(_: object) -> int:
        Dying()
        time.sleep(5)
        return 0

    before = sys.unraisablehook
    monkeypatch.setitem(commands.MODES, "selftest", interrupted)
    assert refused("--mode=selftest", 143) == "chargpt: Stopped by SIGTERM.\n"
    assert sys.unraisablehook is before


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("seconds", [0.1, 0.2, 0.4, 0.8, 1.6, 2.2, 2.6])
def test_a_signal_at_any_time_gives_one_line(here: Path, seconds: float) -> None:
    command = [sys.executable, "-m", "chargpt_jax.main", *train_line(here)[1:]]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGHUP)
        said = process.communicate(timeout=60)[1]
    assert process.returncode in (0, 143)
    assert "Traceback" not in said
    assert said.count("\n") <= 1


def test_library_errors_after_an_interrupt_are_not_shown(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except BaseException as error:
            raise ImportError("half a module") from error

    monkeypatch.setitem(commands.MODES, "selftest", convert)
    assert "half a module" not in refused("--mode=selftest", 143)


def test_signals_are_deferred_and_only_in_the_main_thread() -> None:
    with Signals() as signals:
        signals.deferred = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received() == signal.SIGTERM
        assert (signals.name, signals.code) == ("SIGTERM", 143)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["chargpt", "--help"])))
    thread.start()
    thread.join()
    assert codes == [0]


def train_line(here: Path, *more: str) -> list[str]:
    """Return a command line that trains a tiny model for twelve steps, with a checkpoint every three steps."""
    (here / "words.txt").write_text(SENTENCE * 100)
    config = bench.shrunk(bench.everything(), here / "words.txt")
    config.scheduler.max_steps, config.train.validate_every = 12, 3 / (windows_per_pass(4050, 16) / 4)
    (here / "small.json").write_text(to_json(config))
    return ["chargpt", "--mode=train", "--config=small.json", "--workdir=run", *more]


def test_a_reader_that_goes_away_does_not_end_a_training(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(train_line(here)) == 0
    assert Workdir("run").load_metrics()[-1]["step"] == 12


def test_a_time_limit_ends_in_time_and_the_same_command_goes_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = train_line(here, "--max_minutes=30")
    made = lambda: max((x["step"] for x in Workdir("run").load_metrics()), default=0)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(StopCondition, "seconds_left", lambda self: 0.0 if made() >= 4 else 1e9)
        assert main(line) == 0
    first = made()
    assert 4 <= first < 12
    assert f"time limit reached after step {first}; run the same command again to resume" in capsys.readouterr().out
    assert main(line) == 0
    assert f"resuming after step {first} of 12" in capsys.readouterr().out
    assert [x["step"] for x in Workdir("run").load_metrics() if x["event"] == "step"] == list(range(1, 13))


def test_second_training_is_rejected_with_pid_and_host(refused: Refused, here: Path) -> None:
    prepare(here)
    program = "import sys; from pathlib import Path; from chargpt_jax.storage.lock import writer\n"
    program += "with writer(Path('run').absolute()): print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        for mode in ("prepare", "find_lr", "train", "run"):
            said = refused(f"--mode={mode} --workdir=run")
            assert f"Process {holder.pid} on {socket.gethostname()} is writing to the run" in said
        assert main(["chargpt", "--mode=info", "--workdir=run"]) == 0
        holder.communicate()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_second_interrupt_exits_immediately(here: Path) -> None:
    line = train_line(here, "--config.scheduler.max_steps=100000", "--config.train.validate_every=1000.0")
    line += ["--config.train.steps_per_dispatch=256", "--config.model.n_layer=30", "--config.model.block_size=256"]
    line += ["--config.model.attention_block=64"]  # few blocks compile faster
    command = [sys.executable, "-m", "chargpt_jax.main", *line[1:]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert next((x for x in process.stdout if x.startswith("compiled")), None)
        time.sleep(0.5)  # within a dispatch of many seconds
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=5)[1]
    assert process.returncode == 130
    assert "Exited immediately; files saved earlier are intact." in said


@pytest.mark.skipif(os.name != "posix", reason="file descriptors of POSIX")
def test_closed_standard_streams_are_not_reused_for_files(here: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", f"exec {shlex.quote(sys.executable)} -m chargpt_jax.main --mode=info --workdir=no >&- 2>&- <&-"]
    )
    assert done.returncode == 2


# Imports


@pytest.mark.slow
def test_a_prompt_is_utf8_in_any_language(here: Path) -> None:
    (here / "zh.txt").write_text("今天天气很好。" * 300, encoding="utf-8")
    sizes = "--config.scheduler.max_steps=1 --config.optimizer.learning_rate=0.001 --config.sample.max_new_tokens=3"
    start = (
        "--config.data.source=zh.txt --config.data.start_at=天 --config.model.block_size=32 --config.model.n_layer=1"
    )
    assert main(f"chargpt --config=tiny --workdir=run {start} {sizes}".split()) == 0
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "chargpt_jax.main", "--workdir=run", "--max_new_tokens=2", "--mode=generate"]
    for prompt in (["--prompt=今天"], ["--prompt", "今天"]):
        done = subprocess.run([*command, *prompt], capture_output=True, timeout=60, env=environment)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.startswith(b"\\u4eca\\u5929")


def test_help_does_not_need_docstrings() -> None:
    command = [sys.executable, "-OO", "-m", "chargpt_jax.main", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "save a checkpoint and exit within this many minutes" in done.stdout


def test_the_bare_command_answers_without_starting_jax() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "chargpt_jax.main"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(said) == 1
    assert said[0].startswith("chargpt: ")
    assert "chargpt_jax.config" in imported
    assert "jax" not in imported


def test_invalid_flags_and_fields_do_not_start_jax(here: Path) -> None:
    lines = [line for line, _ in FLAG_MISTAKES]
    lines += [f"{PREPARE} --config.{override}" for override, _ in FIELD_MISTAKES if "used_ids" not in override]
    lines += ["--config=tiny --workdir=text.txt", "--help"]
    program = (
        "import shlex, sys\nfrom chargpt_jax.main import main\n"
        "for line in sys.stdin.read().splitlines():\n"
        "    main(['chargpt', *shlex.split(line)])\n"
        "    if 'jax' in sys.modules:\n        sys.exit(f'{line!r} imported jax')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input="\n".join(lines), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr.splitlines()[-1]
    assert len(done.stderr.splitlines()) == len(lines) - 1


# Failing machines


FAILURES = {
    "There is not enough memory for this: reduce data.batch_size": [
        MemoryError(),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 67396004656 bytes."),
    ],
    "There is not enough memory to start (libjax_common.so: failed to map segment": [
        ImportError("libjax_common.so: failed to map segment from shared object")
    ],
    "Cannot use there (": [OSError(number, os.strerror(number), "there") for number in DISK_ERRORS],
    "Cannot use the disk (": [OSError(27, "File too large")],
}


@pytest.mark.parametrize(("said", "error"), [(said, error) for said, errors in FAILURES.items() for error in errors])
def test_a_machine_that_fails_is_told_in_a_sentence(refused: Refused, monkeypatch, said: str, error: Exception) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setitem(commands.MODES, "prepare", fail)
    assert said in refused(PREPARE)


def test_a_mistake_in_the_program_keeps_its_traceback(monkeypatch) -> None:
    for kind in (RuntimeError, ImportError):
        error = kind("a bug")
        monkeypatch.setitem(commands.MODES, "prepare", lambda _, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(kind, match="a bug"):
            main(["chargpt", *shlex.split(PREPARE)])


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
@pytest.mark.slow
def test_a_limit_on_the_size_of_files_is_named(here: Path) -> None:
    import resource

    (here / "text.txt").write_text(SENTENCE * 1000)
    done = subprocess.run(
        [sys.executable, "-m", "chargpt_jax.main", *shlex.split(PREPARE)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert re.search(r"Cannot use a temporary file in \S+ \(File too large\): fix this", done.stderr)
    assert not (here / "run" / "config.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_workdir_whose_name_is_not_utf8_is_refused(refused: Refused) -> None:
    assert "its name must be valid UTF-8" in refused(PREPARE.replace("=run", "=ru\udcff"))
