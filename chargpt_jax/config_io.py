"""Configs in files: read and write JSON, run a config file, compare two configs, suggest the nearest field name."""

import dataclasses
import difflib
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

from chargpt_jax.config import DROPOUT_BITS, RENAMED, Config, renamed_field, shown, validate
from chargpt_jax.errors import UserError

MOST_JSON = 32 << 20
"""Bytes of the largest JSON file that is read, but for those that hold a long text's numbers."""


RESOLVED = ("model.vocab_size", "model.used_ids", "optimizer.learning_rate")
"""Fields that a run fills in for itself when they are left unset."""


MAY_CHANGE = (
    *("train.", "sample."),
    *("scheduler.epochs", "scheduler.max_steps"),
    *("data.timeout", "data.max_megabytes", "data.mirrors"),
    *("model.remat", "model.attention_block", "optimizer.accumulation_steps"),
)
"""Fields, or sections, that a resumed run may change, since what was learned so far stays valid.

Logging, validation, checkpoints and samples; how long the run is, though not shorter than it is already (the rate
follows the new length from there on); how a text is fetched; and what fits a step into the memory of a device, which
may change the order of sums, and so last bits. Which and how many devices there are is no setting, and may change too.
"""


def flatten(config: Config) -> dict[str, Any]:
    """Return {'section.field': value} for every field, in order; tuples become lists as in JSON."""
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        items = {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        flat.update({k: list(v) if isinstance(v, tuple) else v for k, v in items.items()})
    return flat


def differences(saved: Config, given: Config) -> list[str]:
    """List, a line each, the fields in which a given config contradicts the one a workdir was made with.

    Fields that a run resolves for itself count only where both sides give them; fields that may change do not count.
    """
    old, new = flatten(saved), flatten(given)
    lines = []
    for name, value in new.items():
        unset = name in RESOLVED and not (value and old[name])
        if value != old[name] and not unset and not name.startswith(MAY_CHANGE):
            lines.append(f"{name}: {shown(old[name])} there, {shown(value)} given")
    return lines


def to_json(config: Config) -> str:
    """Write a config as indented JSON; `from_json` reads it back."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_dict(saved: dict[str, Any]) -> Config:
    """Build a validated config from `dataclasses.asdict`'s form; fields it lacks keep their defaults.

    Fields that an earlier version saved under another name are accepted.

    Raises:
        UserError: for an unknown section or field, naming the nearest known one.
    """
    config = Config()
    if not isinstance(saved, dict):
        raise UserError(f"A config is an object of sections, but this is a {type(saved).__name__}.")
    for name, value in _with_new_names(saved).items():
        if not isinstance(value, dict):
            if dataclasses.is_dataclass(getattr(config, name, None)):
                raise UserError(
                    f"{name} is {shown(value)}, but it must be a section of the config, an object of fields: "
                    "correct it, or leave it out for the defaults."
                )
            _set(config, name, name, value)
            continue
        if not value and not hasattr(config, name):
            raise unknown_field(name)
        for item, inner in value.items():
            _set(getattr(config, name, None), item, f"{name}.{item}", inner)
    return validate(config)


def _with_new_names(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a saved config with the fields of earlier versions under their present names.

    Raises:
        UserError: if dropout used JAX's own random bits, which no config can choose any more.
    """
    new = {name: dict(value) if isinstance(value, dict) else value for name, value in saved.items()}

    def pop(path: str) -> list[Any]:
        section, _, name = path.partition(".")
        fields = new.get(section)
        return [fields.pop(name)] if isinstance(fields, dict) and name in fields else []

    for value in pop(DROPOUT_BITS):
        if value != "hash":
            raise UserError(
                f"{DROPOUT_BITS} is {shown(value)}, but this version supports only 'hash': start a new run, or use the "
                "version that made this one."
            )
    for old, path in RENAMED.items():
        section, _, name = path.partition(".")
        for value in pop(old):
            if isinstance(fields := new.setdefault(section, {}), dict):
                fields.setdefault(name, value)
    return new


def _set(section: Any, item: str, path: str, value: Any) -> None:
    known = [f.name for f in dataclasses.fields(section)] if dataclasses.is_dataclass(section) else []
    if item not in known:
        raise unknown_field(path)
    setattr(section, item, tuple(value) if isinstance(value, list) else value)


def optional_fields(section: str) -> list[str]:
    """List the fields of a section that may be None."""
    return [f.name for f in dataclasses.fields(getattr(Config(), section)) if isinstance(f.type, types.UnionType)]


def help_lines() -> list[str]:
    """Describe every field in a line: its name, default and meaning."""
    lines = []
    for path, default in flatten(Config()).items():
        section, _, name = path.rpartition(".")
        holder = getattr(Config(), section) if section else Config()
        about = next(f.metadata["about"] for f in dataclasses.fields(holder) if f.name == name)
        lines.append(f"{path}={default}: {about}")
    return lines


def unknown_field(path: str) -> UserError:
    """Return the error for a field that no config has, with the nearest one that it has."""
    if (renamed := renamed_field(path)) is not None:
        return renamed
    known = list(flatten(Config()))
    tails = {name.rpartition(".")[2]: name for name in known}
    path = path[:200]  # to compare is slow
    near = difflib.get_close_matches(path, known, 1, 0.6)
    near = near or [tails[t] for t in difflib.get_close_matches(path.rpartition(".")[2], list(tails), 1, 0.6)]
    hint = f"did you mean {near[0]}?" if near else f"the sections are {', '.join(vars(Config()))}."
    return UserError(f"The config has no field {shown(path)}: {hint}")


def find_config(name: str) -> Path:
    """Return the file of a config given by path or by the bare name of a shipped one ('small').

    Raises:
        UserError: where neither is there, listing the shipped names.
    """
    try:
        path = Path(name).expanduser()
        if path.is_file():
            return path
    except (OSError, RuntimeError) as error:
        raise UserError(f"--config is {name[:80]!r}, but that is no file's name ({error}): correct it.") from None
    here = Path(__file__).parent
    for folder in (here / "configs", here.parent / "configs"):
        if folder.is_dir():
            shipped = {p.stem: p for p in sorted(folder.glob("*.py")) if not p.stem.startswith("_")}
            if path.parent == Path() and path.suffix in ("", ".py") and path.stem in shipped:
                return shipped[path.stem]
            raise UserError(
                f"--config is {name!r}, but there is no such file: give a path, or one of {', '.join(shipped)}."
            )
    raise UserError(f"--config is {name!r}, but there is no such file: give the path of a config file.")


def _read_config(path: Path) -> Config:
    try:
        return from_dict(read_json(path))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not the config of a run ({error}): give another.") from None


def read_json(path: Path, most: int = MOST_JSON) -> Any:
    """Read a JSON file that anybody may have written: of sane size, no name twice in an object, no NaN or Infinity.

    Raises:
        OSError: where it cannot be read.
        ValueError: where it is not that, saying what is wrong.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")  # reading a pipe would wait for ever
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it is larger than {most >> 20} MiB")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_once_each, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it has {shown(name)} twice in one object")
        found[name] = value
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is no number of JSON")


def load_config(name: str) -> Config:
    """Run a config file's `get_config()`, or read the config.json of a run; `name` as in `find_config`.

    Raises:
        UserError: where the file is missing or does not give a `Config`.
    """
    path = find_config(name)
    if path.suffix == ".json":
        return _read_config(path)
    spec = importlib.util.spec_from_file_location(f"chargpt_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config is {name!r}, but that is not a Python file: give one that ends in .py, or .json.")
    module = importlib.util.module_from_spec(spec)
    kept, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # or a folder of bytecode appeared beside the file
    try:
        spec.loader.exec_module(module)
        config = module.get_config() if hasattr(module, "get_config") else None
    except UserError:
        raise
    except Exception as error:
        for old in (*RENAMED, DROPOUT_BITS):  # as in DataConfig(short_epochs=True)
            if isinstance(error, TypeError | AttributeError) and f"'{old.partition('.')[2]}'" in str(error):
                raise renamed_field(old) or error from None
        what = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{path} fails with {type(error).__name__} ({what}): correct it.") from error
    finally:
        sys.dont_write_bytecode = kept
    if not isinstance(config, Config):
        raise UserError(f"{path} does not define get_config() returning a chargpt_jax Config: see configs/small.py.")
    return config
