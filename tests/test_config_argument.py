"""An argument of a config file, after a colon in its name: config/files.py."""

from pathlib import Path

import pytest

from chargpt_jax.config import Config
from chargpt_jax.config.files import find_config, load_config
from chargpt_jax.config.saved import to_json
from chargpt_jax.errors import UserError
from chargpt_jax.main import main
from chargpt_jax.storage.workdir import Workdir
from tests.corpus_text import write_words

HEAD = "from chargpt_jax.config import Config\n\n\n"
WITH = HEAD + "def get_config(seed: str = '7') -> Config:\n    return Config(seed=int(seed))\n"
WITHOUT = HEAD + "def get_config(*, seed: int = 7) -> Config:\n    return Config(seed=seed)\n"
NEEDING = WITH.replace(" = '7'", "")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, code: str) -> Path:
    path = Path(name).absolute()
    path.write_text(code, encoding="utf-8")
    return path


@pytest.mark.parametrize("code", [WITH, NEEDING, HEAD + "def get_config(*all):\n    return Config(seed=int(*all))\n"])
def test_get_config_gets_the_text_after_the_colon(code):
    path = write("mine.py", code)
    for name in ("mine.py:3", f"{path}:3", Path("mine.py:3")):
        assert load_config(name).seed == 3
        assert find_config(name).samefile(path)


def test_without_a_colon_the_default_counts():
    write("mine.py", WITH)
    assert load_config("mine.py").seed == 7


def test_name_of_a_file_may_have_a_colon():
    for name in ("a:1.py", "a"):
        write(name, WITH)
    (Path("run:5")).mkdir()
    write("run:5/config.json", to_json(Config(seed=5)))
    assert load_config("a:1.py").seed == 7
    assert load_config("a:1.py:4").seed == 4
    assert load_config("run:5").seed == 5


def test_argument_counts_from_the_last_colon():
    write("mine.py", HEAD + "def get_config(text):\n    return Config(seed=len(text))\n")
    write("mine.py:22", WITH)
    assert load_config("mine.py:333").seed == 3
    with pytest.raises(UserError, match="'mine.py:1:2', but there is no such file"):
        load_config("mine.py:1:2")


@pytest.mark.parametrize("name", ["mine.py", "small", "run", "run/config.json"])
def test_config_without_an_argument_refuses_one(name):
    write("mine.py", WITHOUT)
    Path("run").mkdir()
    write("run/config.json", to_json(Config(seed=5)))
    with pytest.raises(UserError, match=f"--config is '{name}:3', but that config takes no argument: give '{name}'."):
        load_config(f"{name}:3")
    assert load_config(name)


def test_missing_argument_is_asked_for():
    write("mine.py", NEEDING)
    with pytest.raises(UserError, match=r"--config is 'mine.py', but that config needs an argument: add it after a"):
        load_config("mine.py")


@pytest.mark.parametrize("argument", ["", "three", "3.5"])
def test_argument_that_get_config_rejects_is_named(argument):
    write("mine.py", WITH)
    with pytest.raises(
        UserError, match=rf"^--config is 'mine.py:{argument}', but its argument is invalid \(invalid lit"
    ):
        load_config(f"mine.py:{argument}")


def test_error_outside_of_get_config_is_not_blamed_on_the_argument():
    write("mine.py", "int('x')\n" + WITH)
    with pytest.raises(UserError, match=r"mine.py fails in line 1 with ValueError"):
        load_config("mine.py:3")


@pytest.mark.parametrize("size", ["abc", "0", "-1", "nan", "inf", "1000", "0.049", ""])
@pytest.mark.parametrize("name", ["sized", "sized.py", str(find_config("sized"))])
def test_wrong_size_gives_a_sentence_and_writes_nothing(name, size, tmp_path, capsys):
    assert main(["chargpt", f"--config={name}:{size}", "--workdir=run"]) == 2
    rule = "its argument is invalid (the size must be a number from 0.05 to 100, in million parameters): correct it."
    assert capsys.readouterr().err == f"chargpt: --config is '{name}:{size}', but {rule}\n"
    assert list(tmp_path.iterdir()) == []


def test_same_command_resumes_and_another_size_is_refused(capsys):
    source = write_words(Path("words.txt"))
    words = ["--mode=prepare", f"--config.data.source={source}", "--workdir=run", "--config.scheduler.minutes=2"]
    for _ in range(2):
        assert main(["chargpt", "--config=sized:0.1", *words]) == 0
    saved = Workdir("run").load_config()
    assert (saved.model.n_embd, saved.scheduler.minutes) == (load_config("sized:0.1").model.n_embd, 2.0)
    capsys.readouterr()
    assert main(["chargpt", "--config=sized:0.3", *words]) == 2
    assert "model.n_embd: saved 48, given 80" in capsys.readouterr().err
    assert Workdir("run").load_config() == saved


def test_default_workdir_has_the_name_of_the_config(tmp_path, capsys):
    source = write_words(Path("words.txt"))
    assert main(["chargpt", "--mode=prepare", "--config", "sized:0.1", f"--config.data.source={source}"]) == 0
    assert Workdir(tmp_path / "runs" / "sized").has_corpus()
