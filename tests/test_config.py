"""Configs: validation, JSON round trip, and finding config files."""

import contextlib
import copy
import dataclasses
import json
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chargpt_jax.config import Config, validate
from chargpt_jax.config.files import find_config, load_config
from chargpt_jax.config.saved import differences, flatten, from_dict, to_json
from chargpt_jax.config.sections import unknown_field
from chargpt_jax.errors import UserError

SHIPPED = sorted(p.stem for p in (Path(__file__).parents[1] / "configs").glob("*.py") if p.stem != "__init__")
MAY_DIFFER = (
    *(
        "scheduler.epochs",
        "scheduler.max_steps",
        "scheduler.minutes",
        "data.timeout",
        "data.max_megabytes",
        "data.mirrors",
    ),
    *("model.remat", "model.attention_block", "optimizer.accumulation_steps"),
)
RESOLVED = {"model.vocab_size": 0, "model.used_ids": 0, "optimizer.learning_rate": None}


def fields() -> dict[str, dataclasses.Field]:
    """Return every field of a config by its dotted name."""
    found = {}
    for top in dataclasses.fields(Config):
        section = getattr(Config(), top.name)
        inner = dataclasses.fields(section) if dataclasses.is_dataclass(section) else ()
        found |= {f"{top.name}.{item.name}": item for item in inner} or {top.name: top}
    return found


FIELDS = fields()
WHOLE = [name for name, item in FIELDS.items() if item.type in (int, int | None)]
REAL = [name for name, item in FIELDS.items() if item.type in (float, float | None)]
PAIRS = [name for name, item in FIELDS.items() if item.type == tuple[float, float]]


def changed(name: str, value: Any) -> Config:
    config = Config()
    section, _, item = name.rpartition(".")
    setattr(getattr(config, section) if section else config, item, value)
    return config


def another(name: str) -> Any:
    """Return a valid value of a field that differs from its default."""
    if name in ("model.vocab_size", "model.used_ids"):
        return 64
    value, kind = FIELDS[name].default, FIELDS[name].type
    if name == "data.test_split":  # with the default train_split, the validation set must keep a part
        return 0.1
    if "choices" in FIELDS[name].metadata:
        return FIELDS[name].metadata["choices"][-1]
    if name in ("optimizer.accumulation_steps", "optimizer.muon_steps"):
        return 4
    if name == "lr_finder.stop_factor":  # above 1
        return 4.0
    if value is None:
        return 3 if kind == int | None else 0.25
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (0.5, 0.5) if name in PAIRS or name == "sweep.learning_rates" else ("x",)
    if isinstance(value, str):
        return "x"
    return value + 2 if isinstance(value, int) else value / 2 or 0.25


def test_the_helpers_cover_every_field_of_a_config():
    assert set(FIELDS) == set(flatten(Config()))
    assert len(WHOLE) > 15
    assert len(REAL) > 12
    assert PAIRS == ["optimizer.betas"]
    for name in FIELDS:
        assert another(name) != FIELDS[name].default


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_is_valid(name):
    assert validate(load_config(name)) == load_config(name)


def test_small_keeps_the_notebooks_values():
    flat = flatten(load_config("small"))
    assert flat["model.block_size"] == 512
    assert flat["model.n_layer"] == 15
    assert flat["model.n_embd"] == 32
    assert flat["optimizer.learning_rate"] is None
    assert flat["scheduler.epochs"] == 100


@pytest.mark.parametrize("name", SHIPPED)
def test_a_config_survives_json(name):
    config = load_config(name)
    again = from_dict(json.loads(to_json(config)))
    assert again == config
    assert flatten(again) == flatten(config)


@pytest.mark.parametrize("name", FIELDS)
def test_a_changed_field_survives_json_and_changes_nothing_else(name):
    config = validate(changed(name, another(name)))
    flat = flatten(config)
    assert from_dict(json.loads(to_json(config))) == config
    assert json.loads(json.dumps(flat)) == flat
    assert {key for key, value in flatten(Config()).items() if value != flat[key]} == {name}


def test_an_older_file_without_some_fields_gets_their_defaults():
    config = from_dict({"model": {"n_layer": 3}, "seed": 7})
    assert (config.model.n_layer, config.seed) == (3, 7)
    assert config.data == Config().data


@pytest.mark.parametrize("name", FIELDS)
def test_differences_lists_a_changed_field_unless_it_may_change(name):
    free = name.startswith(("train.", "sample.", "mesh.", "sweep.")) or name in MAY_DIFFER
    lines = differences(Config(), changed(name, another(name)))
    assert [line.partition(":")[0] for line in lines] == ([] if free or name in RESOLVED else [name])


@pytest.mark.parametrize("name", RESOLVED)
def test_differences_ignores_resolved_fields_left_open(name):
    value, unset = another(name), RESOLVED[name]
    assert differences(changed(name, value), changed(name, unset)) == []
    assert differences(changed(name, unset), changed(name, value)) == []
    assert differences(changed(name, value), changed(name, value)) == []
    (line,) = differences(changed(name, value), changed(name, 2 * value))
    assert line == f"{name}: saved {value!r}, given {2 * value!r}"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", WHOLE + REAL + PAIRS)
def test_no_numeric_field_takes_nan_or_infinity(name, value):
    with pytest.raises(UserError, match=rf"^{name} is .*must be"):
        validate(changed(name, (0.5, value) if name in PAIRS else value))


@pytest.mark.parametrize("value", [True, 3.0, "3", (3,)])
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_number_is_not_a_bool_a_float_or_a_text(name, value):
    with pytest.raises(UserError, match=rf"^{name} is .*must be an integer"):
        validate(changed(name, value))


@pytest.mark.parametrize("value", [False, "0.5", (0.5,)])
@pytest.mark.parametrize("name", REAL)
def test_a_number_is_not_a_bool_or_a_text(name, value):
    with pytest.raises(UserError, match=rf"^{name} is .*must be a number"):
        validate(changed(name, value))


@pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if f.default is not None])
def test_only_an_optional_field_takes_none(name):
    with pytest.raises(UserError, match=rf"^{name} is None"):
        validate(changed(name, None))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.block_size", 0),
        ("model.n_head_dim", 7),
        ("model.dropout", 1.0),
        ("model.dropout", -0.1),
        ("model.vocab_size", 65),
        ("model.mask_unused_ids", 1),
        ("data.source", 60),
        ("data.train_split", 0.0),
        ("data.train_split", 1.0),
        ("data.padding_chance", 1.1),
        ("data.oversample", 0.0),
        ("data.mirrors", "https://example.org"),
        ("optimizer.learning_rate", 0.0),
        ("optimizer.betas", (0.9,)),
        ("optimizer.betas", (0.9, 1.0)),
        ("optimizer.betas", 0.9),
        ("optimizer.accumulation_steps", 3),
        ("scheduler.epochs", 0.0),
        ("scheduler.max_steps", 0),
        ("scheduler.min_lr_factor", 1.5),
        ("amp.dtype", "float8"),
        ("lr_finder.start_lr", 10.0),
        ("lr_finder.steps_per_zoom", 1),
        ("lr_finder.zoom_factor", 1.0),
        ("lr_finder.method", "fastest"),
        ("sample.prompts", ()),
        ("sample.prompts", ("a", "")),
        ("sample.prompts", "a"),
        ("sample.top_p", 0.0),
        ("sample.sampler", None),
        ("sample.stop", ("a", "")),
        ("sample.stop", ("a" * 257,)),
        ("sample.stop", ("a",) * 65),
        ("sample.stop", "a"),
        ("seed", -1),
        ("seed", 2**31),
    ],
)
def test_a_value_outside_the_limits_is_refused_by_its_name(name, value):
    with pytest.raises(UserError) as error:
        validate(changed(name, value))
    assert str(error.value).startswith(name)
    assert "must be" in str(error.value) or "must divide" in str(error.value) or "needs" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("other", [{"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.9}])
def test_chain_of_samplers_has_no_settings_beside_it(other):
    ((name, value),) = other.items()
    config = changed("sample.sampler", "min_p=0.1")
    validate(config)
    setattr(config.sample, name, value)
    with pytest.raises(UserError, match=f"^sample.{name} is {value}, but it must be .* if sample.sampler is set"):
        validate(config)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ({"model": {"n_layers": 3}}, "model.n_layer"),
        ({"modle": {"n_layer": 3}}, "model.n_layer"),
        ({"optimizer": {"learnig_rate": 3}}, "optimizer.learning_rate"),
        ({"scheduler": {"epoch": 3}}, "scheduler.epochs"),
        ({"sead": 3}, "seed"),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_known_one(given, nearest):
    with pytest.raises(UserError, match=f"did you mean {nearest}"):
        from_dict(given)


def test_a_field_given_in_the_wrong_section_is_sent_to_its_own():
    assert "did you mean model.dropout?" in str(unknown_field("train.dropout"))


def test_unknown_field_is_answered_with_the_sections():
    assert "the sections are model, data, optimizer" in str(unknown_field("zzz"))


OLD_NAMES = {
    "data.short_epochs": (True, "ancestor.short_epochs"),
    "data.random_validation": (True, "ancestor.random_validation"),
    "scheduler.decay": ("none", "ancestor.decay"),
    "model.dropout_bits": ("hash", None),
}
"""Fields of earlier versions: a value, and the present name."""


@pytest.mark.parametrize("name", OLD_NAMES)
def test_old_field_name_in_code_is_answered_with_the_new_one(name, tmp_path):
    value, new = OLD_NAMES[name]
    section, _, item = name.partition(".")
    sentence = f"{name} was renamed: use {new}" if new else f"{name} was removed"
    with pytest.raises(UserError, match=sentence):
        validate(changed(name, value))
    kind = type(getattr(Config(), section)).__name__
    (path := tmp_path / "old.py").write_text(
        f"from chargpt_jax.config import *\ndef get_config():\n  return Config({section}={kind}({item}={value!r}))\n"
    )
    with pytest.raises(UserError, match=sentence):
        load_config(str(path))
    path.write_text(f"from chargpt_jax.config import *\ndef get_config():\n  return Config().{name}\n")
    with pytest.raises(UserError, match=sentence):
        load_config(str(path))


def test_saved_config_with_old_field_names_is_mapped():
    saved: dict[str, Any] = {"seed": 7}
    for name, (value, _) in OLD_NAMES.items():
        section, _, item = name.partition(".")
        saved.setdefault(section, {})[item] = value
    before = json.dumps(saved)
    config = from_dict(saved)
    expected = Config(seed=7)
    expected.ancestor.short_epochs, expected.ancestor.random_validation, expected.ancestor.decay = True, True, "none"
    assert config == expected
    assert json.dumps(saved) == before


def test_saved_config_with_dropout_bits_jax_is_refused():
    with pytest.raises(UserError, match=r"^model\.dropout_bits is 'jax', but this version supports only 'hash'"):
        from_dict({"model": {"dropout_bits": "jax"}})


@pytest.mark.parametrize("given", [{"seed": {"x": 1}}, {"model": 3}, {"model": None}, []])
def test_a_damaged_file_is_the_users_mistake_not_a_crash(given):
    with pytest.raises(UserError):
        from_dict(given)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_is_found_by_bare_name_and_by_path(name):
    path = find_config(name)
    assert path.name == f"{name}.py"
    assert find_config(f"{name}.py").samefile(path)
    assert load_config(str(path)) == load_config(name)


def test_config_path_may_have_spaces_and_non_ascii_letters(tmp_path):
    path = tmp_path / "my config é.py"
    path.write_text(
        "from chargpt_jax.config import Config\n\n\ndef get_config():\n    return Config(seed=7)\n", encoding="utf-8"
    )
    assert load_config(str(path)).seed == 7


@pytest.mark.parametrize("code", ["def get_config():\n    return Config(seed=7)\n", "raise ValueError\n"])
def test_a_config_file_leaves_no_bytecode_beside_it(tmp_path, monkeypatch, code):
    path = tmp_path / "mine.py"
    path.write_text(f"from chargpt_jax.config import Config\n\n\n{code}", encoding="utf-8")
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    with contextlib.suppress(UserError):
        assert load_config(str(path)).seed == 7
    assert list(tmp_path.iterdir()) == [path]
    assert not sys.dont_write_bytecode


def test_a_config_file_may_use_a_dataclass_and_deferred_annotations(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n"
        "from chargpt_jax.config import Config\n\n"
        "@dataclass\nclass Size:\n    layers: int = 2\n    most: ClassVar[int] = 9\n\n"
        "def get_config() -> Config:\n    config = Config()\n"
        "    config.model.n_layer = Size().layers\n    return config\n"
    )
    assert load_config(str(tmp_path / "mine.py")).model.n_layer == 2


def test_a_config_file_may_import_modules_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, layers in (("a", 3), ("b", 4)):
        (tmp_path / folder / "parts").mkdir(parents=True)
        (tmp_path / folder / "sizes_of_mine.py").write_text(f"LAYERS = {layers}\n")
        (tmp_path / folder / "parts" / "__init__.py").write_text(f"HEADS = {layers}\n")
        (tmp_path / folder / "c.py").write_text(
            "from sizes_of_mine import LAYERS\nfrom chargpt_jax.config import Config\n"
            "def get_config():\n    from parts import HEADS\n    config = Config()\n"
            "    config.model.n_layer, config.model.n_head = LAYERS, HEADS\n    return config\n"
        )
    before = list(sys.path), set(sys.modules)
    for name, layers in (("a/c.py", 3), ("b/c.py", 4), (str(tmp_path / "a" / "c.py"), 3)):
        config = load_config(name)
        assert (config.model.n_layer, config.model.n_head) == (layers, layers)
    assert (sys.path, set(sys.modules)) == before
    assert not list(tmp_path.rglob("__pycache__"))


def test_two_loads_of_a_config_share_nothing():
    first = load_config("small")
    first.model.n_layer = 99
    assert load_config("small").model.n_layer == 15


@pytest.mark.parametrize("name", ["smal", "nowhere/small.py", "", "__init__", "."])
def test_missing_config_is_rejected_with_the_known_names(name):
    with pytest.raises(UserError) as error:
        load_config(name)
    assert all(shipped in str(error.value) for shipped in SHIPPED)


@pytest.mark.parametrize("code", ["", "get_config = lambda: {}", "get_config = lambda: None", "config = 3"])
def test_a_file_whose_get_config_gives_no_config_is_refused(tmp_path, code):
    path = tmp_path / "wrong.py"
    path.write_text(code, encoding="utf-8")
    with pytest.raises(UserError, match=r"wrong\.py does not define get_config\(\)"):
        load_config(str(path))


def test_a_file_that_is_not_python_is_refused(tmp_path):
    path = tmp_path / "config.txt"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="not a Python file"):
        load_config(str(path))


def test_the_config_of_a_run_is_a_config_file_too(tmp_path):
    path, config = tmp_path / "config.json", load_config("nanogpt_cpu")
    path.write_text(to_json(config), encoding="utf-8")
    assert load_config(str(path)) == config
    for text in ("", "[", "[1]", '{"model": {"n_layer": "many"}}', '{"nodel": {}}', "[" * 100_000):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError):
            load_config(str(path))


# Rates beyond float32


@pytest.mark.parametrize("value", [1e39, 1e300, 1e-39, 5e-324])
@pytest.mark.parametrize("name", ["optimizer.learning_rate", "optimizer.clip_norm", "lr_finder.end_lr"])
def test_a_rate_beyond_float32_is_refused(name, value):
    with pytest.raises(UserError, match=rf"{name} is .* must be within the range of float32, 1.2e-38 to 1.7e\+38"):
        validate(changed(name, value))


def test_a_rate_of_muon_beyond_float32_is_refused():
    config = changed("optimizer.learning_rate", 1e38)
    validate(config)
    config.optimizer.kind = "muon"
    with pytest.raises(UserError, match=r"rate is 1e\+38, but times muon_factor \(10\) it must be at most 1.7e\+38"):
        validate(config)


# NumPy's numbers, and sections of a wrong kind


def test_numpy_scalars_in_a_config_become_pythons_numbers():
    config = Config()
    config.model.n_layer, config.optimizer.learning_rate = np.int64(2), np.float32(0.5)
    config.optimizer.betas, config.seed = (np.float64(0.5), np.float64(0.75)), np.int32(3)
    config.amp.enabled, config.data.source = np.bool_(False), np.str_("stdlib")
    validate(config)
    values = (config.model.n_layer, config.optimizer.learning_rate, *config.optimizer.betas, config.amp.enabled)
    assert [type(value) for value in values] == [int, float, float, float, bool]
    assert from_dict(json.loads(to_json(config))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: setattr(config, "model", None), "model is None, but it must be a ModelConfig"),
        (
            lambda config: setattr(config, "data", {"source": "60"}),
            "data is {'source': '60'}, but it must be a DataCon",
        ),
        (lambda config: setattr(config, "seed", np.float64(1)), "seed is 1.0, but it must be an integer"),
        (lambda config: setattr(config.model, "n_layer", np.arange(2)), "n_layer is array.* must be an integer"),
    ],
)
def test_a_wrong_kind_in_a_config_is_refused(change, message):
    config = Config()
    change(config)
    with pytest.raises(UserError, match=message):
        validate(config)


@pytest.mark.parametrize(("text", "shown"), [((0.9, 1.0), r"\(0.9, 1.0\)"), ((-1.0, 0.9), r"\(-1.0, 0.9\)")])
def test_wrong_element_of_a_tuple_is_shown_with_the_tuple(text, shown):
    with pytest.raises(UserError, match=rf"^optimizer.betas is {shown}, but each value must be"):
        validate(changed("optimizer.betas", text))


# Names that are not fields, and subclasses


@pytest.mark.parametrize(
    ("section", "name", "hint"),
    [("model", "n_layers", "did you mean model.n_layer"), ("", "newsec", "the sections are"), ("", "sead", "seed")],
)
def test_assigning_to_an_unknown_field_is_refused(section, name, hint):
    config = Config()
    holder = getattr(config, section) if section else config
    with pytest.raises(UserError, match=rf"no field '{f'{section}.{name}'.strip('.')}': .*{hint}"):
        setattr(holder, name, 3)
    assert config == Config()


def test_config_survives_copying_and_pickling():
    config = changed("model.n_layer", 3)
    for again in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config
    again = copy.deepcopy(config)
    again.model.n_layer = 4
    assert config.model.n_layer == 3


@pytest.mark.parametrize("deferred", ["", "from __future__ import annotations\n"])
def test_subclass_of_config_may_have_fields_of_its_own(tmp_path, deferred):
    (path := tmp_path / "mine.py").write_text(
        f"{deferred}from dataclasses import dataclass\nfrom chargpt_jax.config import Config, ModelConfig\n"
        "@dataclass\nclass Mine(Config):\n    extra: int = 3\n"
        "@dataclass\nclass Shape(ModelConfig):\n    more: int = 3\n"
        "def get_config():\n    config = Mine(extra=2, model=Shape(n_layer=4, more=1))\n    config.extra += 1\n"
        "    return config\n"
    )
    config = validate(load_config(path))
    again = from_dict(json.loads(to_json(config)))
    assert (type(again), again.model.n_layer) == (Config, 4)
    assert differences(again, config) == []
    assert set(flatten(config)) == set(FIELDS)


# Errors of config files


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys\nsys.exit(7)\n", r"mine.py fails in line 2 with SystemExit \(7\)"),
        ("\ndef get_config(:\n", r"mine.py fails in line 2 with SyntaxError"),
        (
            "def get_config():\n    return one()\n\ndef one():\n    assert False\n",
            r"in line 5 with AssertionError \(no",
        ),
        ("import json\ndef get_config():\n    json.loads('x')\n", r"in line 3 with JSONDecodeError"),
    ],
)
def test_error_in_a_config_file_names_its_line(tmp_path, monkeypatch, code, message):
    monkeypatch.chdir(tmp_path)
    (path := tmp_path / "mine.py").write_text(code)
    for name in (path, path.name):
        with pytest.raises(UserError, match=message):
            load_config(name)


@pytest.mark.filterwarnings("error")
def test_async_get_config_is_refused_without_a_warning(tmp_path):
    (path := tmp_path / "mine.py").write_text("async def get_config():\n    pass\n")
    with pytest.raises(UserError, match="does not define get_config"):
        load_config(path)


@pytest.mark.parametrize("given", [None, 3, b"small"])
def test_config_that_is_no_name_is_refused(given):
    with pytest.raises(UserError, match="The config is .*, but it must be a path or a name"):
        load_config(given)


def test_config_that_is_no_regular_file_is_called_so(tmp_path):
    for name, fault in ((tmp_path, "a folder without a config.json"), ("/dev/null", "not a regular file")):
        with pytest.raises(UserError, match=f"but that is {fault}: give a path"):
            load_config(str(name))


def test_folder_of_a_run_is_a_config_unless_a_shipped_one_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("run", "small"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(to_json(Config(seed=7)))
    assert (load_config("run").seed, load_config(tmp_path / "small").seed, load_config("small").seed) == (7, 7, 0)


@pytest.mark.parametrize("given", [None, {"seed": 1}, "small"])
def test_something_else_than_a_config_is_refused(given):
    with pytest.raises(UserError, match="The config is .*, but it must be a Config: use chargpt_jax.load_config"):
        validate(given)


def test_a_text_with_the_name_of_a_shipped_config_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "enwik8").write_text("<mediawiki>")
    assert load_config("enwik8").data.unit == "byte"
