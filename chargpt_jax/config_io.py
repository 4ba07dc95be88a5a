"""Config files: read and write JSON, run a Python config file, compare two configs."""

import ast
import contextlib
import dataclasses
import importlib.util
import inspect
import json
import os
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chargpt_jax.config import DROPOUT_BITS, RENAMED, Config, renamed_field, shown, unknown_field, validate
from chargpt_jax.errors import UserError, reason, remedy

MAX_JSON = 32 << 20
"""Maximum size of a JSON file in bytes; files of samples have a limit of their own."""


RESOLVED = ("model.vocab_size", "model.used_ids", "optimizer.learning_rate")
"""Fields that a run sets itself if the config leaves them unset."""


MAY_CHANGE = (
    *("train.", "sample.", "mesh."),
    *("scheduler.epochs", "scheduler.max_steps"),
    *("data.timeout", "data.max_megabytes", "data.mirrors"),
    *("model.remat", "model.attention_block", "optimizer.accumulation_steps"),
)
"""Fields, or sections, that may change when a run is resumed, because the trained parameters stay valid.

- Logging, validation, checkpoints and samples.
- The length of the run, but not below the current step. The learning rate follows the new schedule from there on.
- Download settings.
- Settings that save memory, and the devices. They may change the order of sums, and so cause rounding differences.

The devices are not part of the config and may change, too.
"""


MAY_CHANGE_BEFORE_A_CHECKPOINT = (*MAY_CHANGE, "optimizer.learning_rate", "optimizer.clip_norm")
"""Fields that may also change while a run has no checkpoint, so that a run that diverged at once can be repeated."""


def flatten(config: Config) -> dict[str, Any]:
    """Return {'section.field': value} for every field, in order; tuples become lists as in JSON."""
    flat: dict[str, Any] = {}
    for name, value in as_dict(config).items():
        items = {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        flat.update({k: list(v) if isinstance(v, tuple) else v for k, v in items.items()})
    return flat


def as_dict(config: Config) -> dict[str, Any]:
    """Return a config as nested dicts, without the fields that a subclass of Config adds."""
    found: dict[str, Any] = {}
    for section in dataclasses.fields(Config):
        value, kind = getattr(config, section.name), section.type
        inner = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
        found[section.name] = {item.name: getattr(value, item.name) for item in inner} if inner else value
    return found


def differences(saved: Config, given: Config, may_change: tuple[str, ...] = MAY_CHANGE) -> list[str]:
    """Return one line for each field in which a given config contradicts the saved one of a workdir.

    Fields that a run sets itself count only if both configs set them. Fields that may change do not count.
    """
    old, new = flatten(saved), flatten(given)
    lines = []
    for name, value in new.items():
        unset = name in RESOLVED and not (value and old[name])
        if value != old[name] and not unset and not name.startswith(may_change):
            lines.append(f"{name}: saved {shown(old[name])}, given {shown(value)}")
    return lines


def to_json(config: Config) -> str:
    """Return a config as indented JSON; `from_dict` reads it back."""
    return json.dumps(as_dict(config), indent=2) + "\n"


def from_dict(saved: dict[str, Any]) -> Config:
    """Build a validated config from `as_dict`'s form; fields it lacks keep their defaults.

    Fields that an earlier version saved under another name are accepted.

    Raises:
        UserError: for an unknown section or field, naming the nearest known one.
    """
    config = Config()
    if not isinstance(saved, dict):
        raise UserError(f"A config must be a JSON object of sections, but this is a {type(saved).__name__}.")
    for name, value in _with_new_names(saved).items():
        if not isinstance(value, dict):
            if dataclasses.is_dataclass(getattr(config, name, None)):
                raise UserError(
                    f"{name} is {shown(value)}, but it must be a section of the config, an object of fields: "
                    "correct it, or remove it for the defaults."
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


def fields_of_texts() -> list[str]:
    """List the fields that are tuples of strings, 'section.field'."""
    defaults = flatten(Config()).items()
    return [path for path, default in defaults if isinstance(default, list) and isinstance(default[0], str)]


def texts_of(text: str) -> tuple[object, ...]:
    """Return the tuple or list that a text is code for, else the text itself in a tuple."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    if isinstance(value, tuple | list) and (not value or any(isinstance(one, str) for one in value)):
        return tuple(value)
    return (text,)


def help_lines() -> list[str]:
    """Return one line for every field: its name, default and meaning."""
    lines = []
    for path, default in flatten(Config()).items():
        section, _, name = path.rpartition(".")
        holder = getattr(Config(), section) if section else Config()
        about = next(f.metadata["about"] for f in dataclasses.fields(holder) if f.name == name)
        lines.append(f"{path}={default}: {about}")
    return lines


def find_config(name: str | os.PathLike[str]) -> Path:
    """Return the file of a config: given by path, by the folder of a run, or by the bare name of a shipped one.

    Raises:
        UserError: if there is no such file; the message lists the shipped names.
    """
    if not isinstance(name, str | os.PathLike):
        raise UserError(f"The config is {shown(name)}, but it must be a path or a name: give 'small', for example.")
    name = os.fsdecode(name)
    try:
        path = Path(name).expanduser()
        is_file = path.is_file()
        if is_file and path.suffix:  # without one it may be a text, such as enwik8
            return path
        exists, saved = path.exists(), path / "config.json"
        run = saved if saved.is_file() else None
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--config is {name[:80]!r}, but that cannot be read ({reason(error)}): {remedy(error, 'correct it')}."
        ) from None
    here = Path(__file__).parent
    folder = next((one for one in (here / "configs", here.parent / "configs") if one.is_dir()), here)
    shipped = {p.stem: p for p in sorted(folder.glob("*.py")) if not p.stem.startswith("_") and folder != here}
    if path.parent == Path() and path.suffix in ("", ".py") and path.stem in shipped:
        return shipped[path.stem]
    if is_file:
        return path
    if run is not None:
        return run
    fault = "there is no such file"
    if exists:
        fault = "that is a folder without a config.json" if path.is_dir() else "that is not a regular file"
    known = f"a path, or one of {', '.join(shipped)}" if shipped else "the path of a config file"
    raise UserError(f"--config is {name!r}, but {fault}: give {known}.")


@contextlib.contextmanager
def naming(path: Path, fix: str) -> Iterator[None]:
    """Name the config file in every UserError of the block, and what a user can do about it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path} is not a valid config ({str(error).rstrip('.?')}): {fix}.") from None


def _read_config(path: Path) -> Config:
    try:
        with naming(path, "correct it, or give another --config or --workdir"):
            return from_dict(read_json_once(path))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        fix = remedy(error, "give another file")
        raise UserError(f"{path} is not a valid run config ({reason(error)}): {fix}.") from None


def read_json_once(path: Path) -> Any:
    """Return what `read_json` has returned for this file before, unless the file has changed since."""
    path = path.absolute()
    version = file_version(path) if path.exists() else None
    if version is None or path not in _READ or _READ[path][0] != version:
        _READ[path] = version, read_json(path)
    return _READ[path][1]


_READ: dict[Path, tuple[tuple[int, int, int] | None, Any]] = {}
"""The configs that this process has read, with the versions of their files."""


def file_version(path: Path) -> tuple[int, int, int]:
    """Return numbers that change whenever a file is replaced or rewritten."""
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def read_json(path: Path, limit: int = MAX_JSON) -> Any:
    """Read an untrusted JSON file. It must be of limited size, without duplicate names, NaN and Infinity.

    Args:
        path: of a regular file.
        limit: maximum size in bytes.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is invalid; the message gives the reason.
    """
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")  # reading a pipe would block
    with path.open("rb") as file:
        # As much memory as the file needs; a file that grows meanwhile is cut, and then not JSON.
        data = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
    if len(data) > limit:
        raise ValueError(f"larger than {limit >> 20} MiB")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique_names, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it contains {shown(name)} twice in one object")
        found[name] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it contains {name}, which JSON does not allow")


def load_config(name: str | os.PathLike[str]) -> Config:
    """Run a config file's `get_config()`, or read the config.json of a run; `name` as in `find_config`.

    Raises:
        UserError: if the file is missing or does not return a `Config`.
    """
    path = find_config(name)
    if path.suffix == ".json":
        return _read_config(path)
    spec = importlib.util.spec_from_file_location(f"chargpt_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        given = os.fspath(name)
        raise UserError(f"--config is {given!r}, but that is not a Python file: give one that ends in .py, or .json.")
    module = importlib.util.module_from_spec(spec)
    try:
        with naming(path, "correct it"), _importing(module, path.absolute().parent):
            spec.loader.exec_module(module)
            config = module.get_config() if hasattr(module, "get_config") else None
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        for old in (*RENAMED, DROPOUT_BITS):  # as in DataConfig(short_epochs=True)
            if isinstance(error, TypeError | AttributeError) and f"'{old.partition('.')[2]}'" in str(error):
                raise renamed_field(old) or error from None
        what = " ".join(str(error).split()).rstrip(".") or "no message"
        raise UserError(
            f"{path} fails{_line(error, spec.origin)} with {type(error).__name__} ({what}): correct it."
        ) from error
    if inspect.iscoroutine(config):
        config.close()  # or Python would warn that nothing awaits it
    if not isinstance(config, Config):
        raise UserError(f"{path} does not define get_config() returning a chargpt_jax Config: see configs/small.py.")
    return config


def _line(error: BaseException, file: str | None) -> str:
    """Return ' in line N', the last line of a config file that an error went through; '' if it is not known."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines = [error.lineno]
    return f" in line {lines[-1]}" if lines and lines[-1] else ""


@contextlib.contextmanager
def _importing(module: types.ModuleType, folder: Path) -> Iterator[None]:
    """Let a config file import modules of its folder, as a script can, and forget them afterwards.

    The module is registered, because dataclasses look up its annotations there. No __pycache__ is written.
    """
    before, path, known = sys.dont_write_bytecode, list(sys.path), set(sys.modules)
    sys.dont_write_bytecode, sys.modules[module.__name__] = True, module
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.dont_write_bytecode, sys.path[:] = before, path
        for name in set(sys.modules) - known:
            found = sys.modules[name]
            file = vars(found).get("__file__") if isinstance(found, types.ModuleType) else None
            if name == module.__name__ or (file and Path(file).is_relative_to(folder) and not _installed(file)):
                del sys.modules[name]


def _installed(file: str) -> bool:
    """Return whether a module belongs to this package or to an environment, which may lie below a config's folder."""
    return Path(file).is_relative_to(Path(__file__).parent) or Path(file).is_relative_to(sys.prefix)
