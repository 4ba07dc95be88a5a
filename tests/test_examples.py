"""The examples: the Modal app trains through its local call path, and its events travel."""

import importlib.util
import pickle
import tomllib
from pathlib import Path

import pytest

from chargpt_jax.events import Ended, Prepared, Sampled
from tests.corpus_text import small_config, write_words

PATH = Path(__file__).parents[1] / "examples" / "modal_app.py"


@pytest.fixture(scope="module")
def modal_app():
    """The example as a module."""
    pytest.importorskip("modal")
    spec = importlib.util.spec_from_file_location("modal_app", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_modal_function_yields_the_events_of_a_run(modal_app, tmp_path):
    text = Path(write_words(tmp_path / "words.txt")).read_bytes()
    config = small_config("elsewhere.txt")
    config.scheduler.max_steps = 4
    config = pickle.loads(pickle.dumps(config))
    found = list(modal_app.train.local(config, "mine", text, str(tmp_path)))
    assert [type(found[0]), type(found[-2]), type(found[-1])] == [Prepared, Ended, Sampled]
    assert found[0].characters == len(text)
    assert pickle.loads(pickle.dumps(found)) == found, "events travel"
    assert (tmp_path / "mine" / "report.html").is_file()


def test_modal_image_has_every_dependency_of_the_package(modal_app):
    project = tomllib.loads((PATH.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    source = PATH.read_text(encoding="utf-8")
    names = [line.split(">")[0] for line in project["dependencies"]]
    missing = [name for name in names if f'"{name}' not in source]
    assert set(missing) <= {"numpy", "urllib3"}, "these two come with jax and requests"
