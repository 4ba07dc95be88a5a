"""Hostile or damaged files of a run are rejected with one sentence, before memory is allocated."""

import contextlib
import io
import json
import math
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chargpt_jax.config import Config
from chargpt_jax.config import validate as validated
from chargpt_jax.config.files import load_config
from chargpt_jax.config.json_file import MAX_JSON, read_json
from chargpt_jax.config.rules import min_memory
from chargpt_jax.config.saved import from_dict, to_json
from chargpt_jax.data.corpus import MAX_SCORED, load_corpus, read_text
from chargpt_jax.data.tokenizer import CharTokenizer
from chargpt_jax.errors import UserError
from chargpt_jax.generation.sample import Samples
from chargpt_jax.interop.safetensors_file import read_npz
from chargpt_jax.storage import manifest
from chargpt_jax.storage.metrics_log import MAX_LINE, MAX_METRICS, Log
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training.optimizer import total_steps
from chargpt_jax.training.range_test.saved import result_from


@pytest.fixture
def folder(tmp_path: Path) -> Workdir:
    """Return a workdir with a small corpus."""
    folder = Workdir(tmp_path / "run")
    folder.save_corpus(CharTokenizer("abc"), np.tile(np.int32([1, 2, 3]), 100), [source("A book")])
    return folder


def source(title: Any, characters: Any = 300) -> dict[str, Any]:
    return {"title": title, "characters": characters, "stand_in_for": None}


def one_sentence(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 1_000
    assert message.endswith(".")
    return message


def header(description: str, version: bytes = b"\x01\x00") -> bytes:
    """Return the header of a .npy file with any content."""
    text = description.encode("latin-1") + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2 if version[0] == 1 else 4, "little") + text


def npy(array: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **how)
    return file.getvalue()


CLAIM = "{'descr': '<i4', 'fortran_order': False, 'shape': (%s,)}"
TOKENS = {
    "nothing": b"",
    "text": b"once upon a time",
    "a header alone": header(CLAIM % 300),
    "a terabyte that is not there": header(CLAIM % 10**12) + bytes(1200),
    "more than any number": header(CLAIM % 10**400) + bytes(1200),
    "fewer than follow": header(CLAIM % 100) + bytes(1200),
    "less than nothing": header(CLAIM % -300) + bytes(1200),
    "another type": npy(np.ones(300, np.int64)),
    "floats": npy(np.ones(300, np.float32)),
    "two axes": npy(np.ones((3, 100), np.int32)),
    "no axis": npy(np.int32(1)),
    "objects": npy(np.array([{}], dtype=object), allow_pickle=True),
    "fields": npy(np.zeros(3, [("a", "<i4")])),
    "an id beyond the vocabulary": npy(np.int32([1, 2, 3, 4])),
    "padding": npy(np.int32([1, 0, 3])),
    "an id below zero": npy(np.int32([1, -1, 3])),
    "an unknown version": header(CLAIM % 1, b"\x09\x00"),
    "no dictionary": header("[1, 2, 3]") + bytes(4),
    "a program": header("{'descr': __import__('os').system('x'), 'fortran_order': False, 'shape': (1,)}") + bytes(4),
    "brackets": header("(" * 5_000) + bytes(4),
    "a bracket without its pair": header("{'descr': '<i4', 'shape': (1,") + bytes(4),
    "a long header": header(CLAIM % 1 + " " * 60_000) + bytes(4),
}


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_that_are_not_what_their_header_says_are_refused(folder, name):
    (folder.corpus / "tokens.npy").write_bytes(TOKENS[name])
    tracemalloc.start()
    with pytest.raises(UserError, match=r"tokens\.npy") as error:
        folder.load_tokens()
    assert tracemalloc.get_traced_memory()[1] < 50e6, "memory was allocated for a size that only the header states"
    tracemalloc.stop()
    one_sentence(error)


def test_a_sparse_file_of_terabytes_is_not_read(folder):
    """The file has the size that its header states, but takes no space on the disk."""
    claim = header(CLAIM % 10**12)
    path = folder.corpus / "tokens.npy"
    path.write_bytes(claim)
    try:
        os.truncate(path, len(claim) + 4 * 10**12)
    except OSError:
        pytest.skip("this disk has no sparse files of that size")
    with pytest.raises(UserError, match="its header states 1,000,000,000,000 characters"):
        folder.load_tokens()


VOCABULARIES = {
    "another order": ["", "b", "a", "c"],
    "a character twice": ["", "a", "a", "b"],
    "no padding": ["a", "b", "c"],
    "padding twice": ["", "", "a"],
    "words": ["", "ab", "c"],
    "numbers": ["", 1, 2],
    "a text": "abc",
    "an object": {"": 0, "a": 1},
    "nothing": None,
    "an empty list": [],
    "lists": ["", ["a"]],
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_vocabulary_is_padding_and_then_characters_in_order(folder, name):
    (folder.corpus / "vocabulary.json").write_text(json.dumps(VOCABULARIES[name]), encoding="utf-8")
    with pytest.raises(UserError, match=r"vocabulary\.json cannot be used") as error:
        folder.load_tokenizer()
    one_sentence(error)


SOURCES = [{}, [1], [{}], [source(1)], [source("a", -1)], [source("a", 1.5)], [source("a", 10**30)], [{"title": "a"}]]


@pytest.mark.parametrize("saved", [*SOURCES, [{**source("a"), "stand_in_for": {}}]])
def test_sources_without_a_title_and_a_size_are_refused(folder, saved):
    (folder.corpus / "sources.json").write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(UserError, match=r"sources\.json cannot be used"):
        folder.load_sources()


JSON = {
    "nothing": "",
    "half": '{"model": {',
    "NaN": '{"scheduler": {"epochs": NaN}}',
    "infinity": '{"scheduler": {"epochs": Infinity}}',
    "less than infinity": '{"scheduler": {"epochs": -Infinity}}',
    "a number that overflows": '{"scheduler": {"epochs": 1e999}}',
    "a name twice": '{"seed": 1, "seed": 2}',
    "a name twice within": '{"model": {"n_layer": 1, "n_layer": 2}}',
    "brackets": "[" * 100_000,
    "objects in objects": '{"model":' * 50_000,
    "nested within reason": '{"seed": ' + "[" * 300 + "]" * 300 + "}",
    "digits": '{"seed": ' + "9" * 5_000 + "}",
    "fewer digits": '{"seed": ' + "9" * 4_000 + "}",
    "a long text": '{"amp": {"dtype": "' + "x" * 100_000 + '"}}',
    "a long name": '{"' + "x" * 100_000 + '": 1}',
    "another encoding": '{"seed": 1}'.encode("utf-16"),
    "no encoding": b'{"seed": "\xff"}',
    "a program": "import os\nos.system('x')",
    "a list": "[]",
    "a section that is a number": '{"model": 3}',
}


@pytest.mark.parametrize("name", JSON)
def test_a_config_that_makes_no_sense_is_refused_in_a_sentence(folder, name):
    data = JSON[name]
    folder.config.write_bytes(data.encode() if isinstance(data, str) else data)
    for read in (folder.load_config, lambda: load_config(str(folder.config))):
        with pytest.raises(UserError) as error:
            read()
        one_sentence(error)


def test_json_of_absurd_size_is_not_read(tmp_path):
    path = tmp_path / "large.json"
    path.touch()
    os.truncate(path, 100 * MAX_JSON)
    with pytest.raises(ValueError, match="larger than 32 MiB"):
        read_json(path)


def test_a_pipe_is_not_waited_for(folder):
    os.mkfifo(folder.config)
    with pytest.raises(UserError, match="not a regular file"):
        folder.load_config()
    with pytest.raises(UserError, match="not a regular file"):
        load_config(str(folder.config))


def test_a_config_of_a_run_is_never_run(tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "config.json").write_text(f"open({str(marker)!r}, 'w')\n", encoding="utf-8")
    with pytest.raises(UserError):
        load_config(str(tmp_path / "config.json"))
    assert not marker.exists()


HUGE = [
    *("model.n_embd", "model.n_ff", "model.n_head", "model.n_head_dim", "model.block_size", "model.vocab_size"),
    *("model.n_layer", "data.batch_size"),
]


@pytest.mark.parametrize("field", HUGE)
@pytest.mark.parametrize("size", [64 * 10**9, 64 * 10**15, 64 * 10**30])
def test_a_config_that_takes_terabytes_is_refused_before_anything_is_allocated(field, size):
    section, _, name = field.partition(".")
    config = Config()
    setattr(getattr(config, section), name, size)
    with pytest.raises(UserError, match="GB of memory|at most 18 digits") as error:
        validated(config)
    one_sentence(error)


def test_the_least_memory_is_that_of_the_state_and_less_than_what_is_measured():
    """The config small has 264,000 parameters; its training needs a few hundred megabytes."""
    small = load_config("small")
    assert 16 * 200_000 < min_memory(small) < 200e6
    assert min_memory(load_config("nanogpt_baby")) > 16 * 10e6


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("sample.max_new_tokens", 10**7), ("sample.temperature", 1e10), ("sample.prompts", ("x" * 2_000_000,))),
        *(("scheduler.epochs", 1e300), ("scheduler.warmup_epochs", 1e300), ("scheduler.max_steps", 2**40)),
        *(("data.oversample", 1e300), ("data.timeout", 1e300), ("lr_finder.steps_per_zoom", 10**12)),
        *(("lr_finder.num_zooms", 10**12), ("train.validate_every", 1e308), ("seed", 10**4_000)),
    ],
)
def test_a_length_beyond_reason_is_refused_before_the_run(field, value):
    section, _, name = field.rpartition(".")
    config = Config()
    setattr(getattr(config, section) if section else config, name, value)
    with pytest.raises(UserError, match=field) as error:
        validated(config)
    one_sentence(error)


def test_more_steps_than_can_be_counted_are_refused():
    scheduler = Config().scheduler
    scheduler.epochs = 1e6
    with pytest.raises(UserError, match="too many to count"):
        total_steps(scheduler, 10**6)


# The log


GOOD = [{"event": "step", "step": n, "loss": 3.0} for n in (1, 2)]
VALIDATION = {"event": "validation", "step": 2, "loss": 2.5, "bits_per_character": 3.6, "seconds": 1.0}
GARBAGE = [
    *(b"", b"\xff\xfe\x00", b"[", b"1", b"null", b"[]", b"{}", b'"text"', b"[" * 60_000, b'{"a":' * 10_000),
    *(b'{"event": "step"}', b'{"event": "step", "step": 3}', b'{"event": ["step"], "step": 3, "loss": 1}'),
    b'{"event": "step", "step": "3", "loss": 1}',
    b'{"event": "step", "step": true, "loss": 1}',
    b'{"event": "step", "step": -1, "loss": 1}',
    b'{"event": "step", "step": 3.5, "loss": 1}',
    b'{"event": "step", "step": 1' + b"0" * 400 + b', "loss": 1}',
    b'{"event": "step", "step": 3, "loss": NaN}',
    b'{"event": "step", "step": 3, "loss": 1, "seconds": "long"}',
    b'{"event": "step", "step": 3, "loss": 1, "seconds": NaN}',
    b'{"event": "step", "step": 3, "loss": Infinity}',
    b'{"event": "step", "step": 3, "loss": 1e40}',
    b'{"event": "step", "step": 3, "loss": 1' + b"0" * 400 + b"}",
    b'{"event": "step", "step": 3, "loss": "low"}',
    b'{"event": "step", "step": 3, "loss": null}',
    b'{"event": "validation", "step": 3, "loss": 1.0}',
    b'{"event": "validation", "step": 3, "loss": 1.0, "bits_per_character": [], "seconds": 1}',
    b"x" * (3 * MAX_LINE),
    b'{"event": "step", "step": 3',
]


def test_lines_of_a_log_that_make_no_sense_are_left_out(folder):
    lines = [json.dumps(line).encode() for line in (*GOOD, VALIDATION)]
    folder.metrics.write_bytes(b"\n".join([*GARBAGE, lines[0], *GARBAGE, *lines[1:], *GARBAGE]))
    assert folder.load_metrics() == [*GOOD, VALIDATION]
    assert Log(folder.metrics, 1, pytest.fail).lines == GOOD[:1]
    assert folder.load_metrics() == GOOD[:1]


def test_overflowed_gradient_norm_stays_in_the_log(folder):
    Log(folder.metrics, 0, pytest.fail).add([{**GOOD[0], "grad_norm": math.inf}])
    assert folder.load_metrics()[0]["grad_norm"] == math.inf


def test_a_log_of_absurd_size_or_no_file_is_refused(folder):
    folder.metrics.touch()
    os.truncate(folder.metrics, MAX_METRICS + 1)
    with pytest.raises(UserError, match="a regular file, not a link, of at most 1024 MiB"):
        folder.load_metrics()
    folder.metrics.unlink()
    folder.metrics.mkdir()
    with pytest.raises(UserError, match="a regular file, not a link, of at most"):
        folder.load_metrics()


@pytest.mark.parametrize("saved", [[], 1, {"mfu": []}, {"device": {"a": 1}}])
def test_a_speed_that_is_no_object_of_numbers_and_words_is_left_out(folder, saved):
    warnings = []
    folder.speed.write_text(json.dumps(saved), encoding="utf-8")
    assert folder.load_speed(warnings.append) == {}
    assert "speed.json cannot be used" in warnings[0]
    assert "remove it" in warnings[0]


# Input of the report


ZOOM = {"number": 1, "low": 1e-6, "high": 1.0, "lrs": [1e-3, 1e-2], "losses": [4.0, 3.0]}
ZOOM |= {"steepest": 3e-3, "lowest": 1e-2, "best": 3e-3}
FOUND = {"learning_rate": 3e-3, "method": "steepest", "start_lr": 1e-6, "end_lr": 1.0, "zooms": [ZOOM]}


def test_range_test_round_trip():
    assert result_from(json.loads(json.dumps(FOUND))).zooms[0].losses == (4.0, 3.0)


@pytest.mark.parametrize(
    "change",
    [
        *({"learning_rate": None}, {"learning_rate": "1"}, {"learning_rate": -1}, {"learning_rate": 1e99}),
        *({"method": "$\\frac"}, {"method": []}, {"zooms": None}, {"zooms": [1]}, {"zooms": [{}]}, {"zooms": {"a": 1}}),
        *({"zooms": [{**ZOOM, "lrs": [1.0]}]}, {"zooms": [{**ZOOM, "lrs": "ab"}]}, {"zooms": [{**ZOOM, "x": 1}]}),
        *({"zooms": [{**ZOOM, "losses": [1, None]}]}, {"zooms": [{**ZOOM, "number": "1"}]}),
        *({"zooms": [{**ZOOM, name: [1.0]}]} for name in ("lowest_losses", "highest_losses")),
        *({"zooms": [{**ZOOM, "seed_falls": value}]} for value in ("ab", 1, [None], [[1]], [1e99], [-1e99])),
        *({"zooms": [{**ZOOM, "seed_rates": value}]} for value in ("ab", [None], [-1.0], {"a": 1})),
        *({"seeds": 0}, {"seeds": "2"}, {"seeds": 1.5}, {"seeds": True}, {"seeds": 10**9}),
    ],
)
def test_a_range_test_that_somebody_else_wrote_is_no_result(change):
    with pytest.raises(ValueError, match="."):
        result_from({**FOUND, **change})
    with pytest.raises(ValueError, match="."):
        result_from([])


SAMPLE = {"prompt": "a", "tokens": ["a", "b"], "surprisal": [None, 1.0], "entropy": [None, 2.0], "vocab_size": 64}


@pytest.mark.parametrize(
    "change",
    [
        *({"prompt": 1}, {"tokens": "ab"}, {"tokens": ["a", 1]}, {"tokens": ["a", "long"]}, {"surprisal": [1.0]}),
        *({"surprisal": [1.0, "2"]}, {"entropy": None}, {"entropy": [1, True]}, {"entropy": [1, 10**400]}),
        *({"vocab_size": 1}, {"vocab_size": None}, {"vocab_size": 10**30}),
        {"rank": [None, -1], "alternatives": [None, [["a", 0.5]]], "sampled_probability": [None, None]},
        {"rank": [1, 1], "alternatives": [None, [["a", 0.5]]], "sampled_probability": [None, None]},
        {"rank": [None, 1.5], "alternatives": [None, [["a", 0.5]]], "sampled_probability": [None, None]},
        {"rank": [None, None], "alternatives": [None, [["a", 0.5]]], "sampled_probability": [None, None]},
    ],
)
def test_a_sample_that_somebody_else_wrote_is_none(change):
    assert Samples.from_dict({"samples": [SAMPLE]})[0].text == "ab"
    with pytest.raises(ValueError, match="."):
        Samples.from_dict({"samples": [{**SAMPLE, **change}]})
    for whole in ([], {}, {"samples": {}}, {"samples": [1]}):
        with pytest.raises(ValueError, match="."):
            Samples.from_dict(whole)


# Texts and paths


def test_a_text_is_read_up_to_the_largest_size_and_no_further(tmp_path):
    path = tmp_path / "large.txt"
    path.touch()
    os.truncate(path, 10**12)
    config = Config().data
    config.source, config.max_megabytes = str(path), 0.5
    with pytest.raises(UserError, match=r"larger than 0.5 MB: increase data.max_megabytes") as error:
        load_corpus(config, cache=tmp_path / "cache")
    one_sentence(error)
    with pytest.raises(UserError, match=f"larger than {MAX_SCORED // 10**6} MB"):
        read_text(path)


def test_a_place_that_is_a_link_to_nothing_is_refused(tmp_path):
    folder = Workdir(tmp_path / "run")
    folder.path.symlink_to(folder.path)
    with pytest.raises(UserError, match="leads nowhere: remove it"):
        folder.check_writable()
    folder.path.unlink()
    folder.path.symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="leads nowhere: remove it"):
        folder.check_writable()
    folder.path.unlink()
    folder.path.mkdir()
    for part in (folder.corpus, folder.checkpoints, folder.samples):
        part.symlink_to(tmp_path / "gone")
        with pytest.raises(UserError, match="leads nowhere: remove it"):
            folder.check_writable()
        part.unlink()
        part.touch()
        with pytest.raises(UserError, match="must be a folder, but is something else: remove it"):
            folder.check_writable()
        part.unlink()
    folder.check_writable()
    with pytest.raises(UserError, match="NUL"):
        Workdir("a\0b")


def test_a_header_of_an_array_in_a_zip_is_believed_no_more(tmp_path):
    import zipfile

    for data in TOKENS.values():
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            archive.writestr("a.npy", data)
        with contextlib.suppress(UserError):
            for stored in read_npz(tmp_path / "x.npz").values():
                assert stored.read().nbytes < 10_000


def test_files_of_a_run_are_below_the_limits(folder):
    config = load_config("small")
    folder.save_config(config)
    assert folder.load_config() == config == from_dict(json.loads(to_json(config)))
    assert len(folder.load_tokens()) == 300
    assert folder.load_sources()[0]["title"] == "A book"


def test_a_small_json_file_takes_little_memory(tmp_path):
    import tracemalloc

    path = tmp_path / "small.json"
    path.write_text("{}")
    tracemalloc.start()
    assert read_json(path) == {}
    assert manifest.read_json(path, 1 << 25) == {}
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
