"""Find a config by its name or path, and load it: a Python file, or the config.json of a run."""

import ast
import contextlib
import importlib.util
import inspect
import os
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path

from chargpt_jax.config.json_file import read_json_once
from chargpt_jax.config.saved import from_dict
from chargpt_jax.config.sections import DROPOUT_BITS, RENAMED, Config, renamed_field
from chargpt_jax.config.values import shown
from chargpt_jax.errors import UserError, reason, remedy


def texts_of(text: str) -> tuple[object, ...]:
    """Return the tuple or list that a text is code for, else the text itself in a tuple."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    if isinstance(value, tuple | list) and (not value or any(isinstance(one, str) for one in value)):
        return tuple(value)
    return (text,)


def find_config(name: str | os.PathLike[str]) -> Path:
    """Return the file of a config: given by path, by the folder of a run, or by the bare name of a shipped one.

    A colon and an argument may follow, as in 'sized:0.3', unless a file has that name.

    Raises:
        UserError: if there is no such file; the message lists the shipped names.
    """
    return _file_and_argument(name)[0]


def _file_and_argument(name: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """Return the file of a config, and the text after the last colon; None without one, or if a file has that name."""
    try:
        return _file(name), None
    except UserError as error:
        before, colon, argument = os.fsdecode(name).rpartition(":") if isinstance(name, str | os.PathLike) else [""] * 3
        if colon:
            with contextlib.suppress(UserError):
                return _file(before), argument
        raise error from None


def _file(name: str | os.PathLike[str]) -> Path:
    """Return the file of a config, whose name has no argument; raise UserError if there is none."""
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
    here = Path(__file__).parents[1]
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


def load_config(name: str | os.PathLike[str]) -> Config:
    """Run a config file's `get_config()`, or read the config.json of a run; `name` as in `find_config`.

    If an argument follows the name, as in 'sized:0.3', the file's `get_config` gets it, as a string.

    Raises:
        UserError: if the file is missing or does not return a `Config`, or if the argument is invalid.
    """
    path, argument = _file_and_argument(name)
    if path.suffix == ".json":
        _arguments(None, name, argument)
        return _read_config(path)
    spec = importlib.util.spec_from_file_location(f"chargpt_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        given = os.fspath(name)
        raise UserError(f"--config is {given!r}, but that is not a Python file: give one that ends in .py, or .json.")
    module = importlib.util.module_from_spec(spec)
    arguments: tuple[str, ...] = ()
    try:
        with _importing(module, path.absolute().parent):
            with naming(path, "correct it"):
                spec.loader.exec_module(module)
            arguments = _arguments(getattr(module, "get_config", None), name, argument)
            with naming(path, "correct it"):
                config = module.get_config(*arguments) if hasattr(module, "get_config") else None
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if arguments and isinstance(error, ValueError):
            fault, given = _message(error), os.fsdecode(name)[:80]
            raise UserError(f"--config is {given!r}, but its argument is invalid ({fault}): correct it.") from error
        for old in (*RENAMED, DROPOUT_BITS):  # as in DataConfig(short_epochs=True)
            if isinstance(error, TypeError | AttributeError) and f"'{old.partition('.')[2]}'" in str(error):
                raise renamed_field(old) or error from None
        at, kind = _line(error, spec.origin), type(error).__name__
        raise UserError(f"{path} fails{at} with {kind} ({_message(error)}): correct it.") from error
    if inspect.iscoroutine(config):
        config.close()  # or Python would warn that nothing awaits it
    if not isinstance(config, Config):
        raise UserError(f"{path} does not define get_config() returning a chargpt_jax Config: see configs/small.py.")
    return config


def _arguments(get_config: object, name: str | os.PathLike[str], argument: str | None) -> tuple[str, ...]:
    """Return what a `get_config` is called with: the argument in the config's name, if there is one.

    Raises:
        UserError: if it takes no argument and there is one, or needs one and there is none.
    """
    least, most = _argument_count(get_config)
    given = os.fsdecode(name)
    if argument is not None and most == 0:
        bare = given.rpartition(":")[0]
        raise UserError(f"--config is {given!r}, but that config takes no argument: give {bare!r}.")
    if argument is None and least > 0:
        raise UserError(f"--config is {given!r}, but that config needs an argument: add it after a colon.")
    return () if argument is None else (argument,)


def _argument_count(get_config: object) -> tuple[int, int]:
    """Return how many arguments a function needs, and how many it takes at most, by position."""
    try:
        found = inspect.signature(get_config).parameters.values() if callable(get_config) else ()
    except ValueError:  # a function in C may have no signature
        found = ()
    places = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    needed = [p for p in places if p.kind != p.VAR_POSITIONAL and p.default is p.empty]
    return len(needed), len(places)


def _message(error: BaseException) -> str:
    """Return the message of an error in one line."""
    return " ".join(str(error).split()).rstrip(".") or "no message"


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
