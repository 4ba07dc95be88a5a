"""A parsed command line, and a one-line message for each mistake in it.

`--config` names a config file; without it an existing run uses its saved config. `--config.section.field=value`
overrides a field, through ml_collections. This file does not import JAX, so a mistyped command is answered at once.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
import os
import re
import stat
import time
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from absl import flags
from absl.flags import FlagValues
from ml_collections import config_flags

from chargpt_jax.cli.flags import FLAG_MODES, NEEDS_CONFIG, TEXTS, define_flags
from chargpt_jax.cli.signals import Signals
from chargpt_jax.config import Config, validate
from chargpt_jax.config.files import find_config, load_config, naming, texts_of
from chargpt_jax.config.saved import fields_of_texts, flatten, optional_fields
from chargpt_jax.config.sections import unknown_field
from chargpt_jax.devices import connecting, native_output, processes, startup
from chargpt_jax.errors import UserError, reason, remedy

if TYPE_CHECKING:
    from chargpt_jax.storage.workdir import Workdir


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, Config | None, str | None]:
    """Read a command line, the program's name first.

    Returns:
        The flags, the config (the named one, or the saved one of the run in --workdir) with its overrides, and its
        bare name.

    Raises:
        UserError: if a flag, a field or a value is invalid.
    """
    argv = [f"--distributed={connecting.AUTO}" if word.lstrip("-") == "distributed" else word for word in argv]
    _check_repeats(argv)
    argv, name = _without_config(_texts_in_utf8(argv))
    name = _own_config(argv) if name is None else name
    values = define_flags()
    if name is not None:
        run_name = _run_name(name)
        file = find_config(name)  # before the config's code runs, which may change the current folder
        config = load_config(name)
        _check_overrides(argv)
        if not _overrides(argv):
            with naming(file, "correct it"):
                validate(config)
        argv = _texts_as_tuples(_unset_fields(argv, config))
        config_flags.DEFINE_config_dataclass("config", config, flag_values=values, sys_argv=argv)
    elif any(arg.lstrip("-").startswith("config.") for arg in argv if arg.startswith("-")):
        raise UserError("A --config.field=value needs a --config to change: give --config=small, for example.")
    try:
        rest = values(argv)[1:]
    except (flags.Error, ValueError, TypeError, KeyError) as error:
        raise UserError(_plainly(error)) from None
    mode = values.mode
    for flag, modes in FLAG_MODES.items():
        if values[flag].present and mode not in modes:
            raise UserError(f"--{flag} does not apply to --mode={mode}: use it with --mode={' or '.join(modes)}.")
    if mode not in NEEDS_CONFIG and any(word.lstrip("-").startswith("config.") for word in argv[1:]):
        raise UserError(
            f"--mode={mode} uses the run's saved config, which cannot be changed: remove the --config.* flags."
        )
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag: put -- and a name before it, as in --prompt={rest[0]!r}.")
    return (values, None, None) if name is None else (values, values.config, run_name)


def _texts_in_utf8(argv: Sequence[str]) -> list[str]:
    """Decode the values of `TEXTS`: Python has read bytes that are not ASCII as lone surrogates under LC_ALL=C."""
    words, of_a_text = [], False
    for word in argv:
        flag, equals, _ = word.partition("=")
        named = word.startswith("-") and flag.lstrip("-") in TEXTS
        if of_a_text or (named and equals):
            with contextlib.suppress(UnicodeError):
                word = os.fsencode(word).decode()
        of_a_text = named and not equals
        words.append(word)
    return words


def _check_repeats(argv: Sequence[str]) -> None:
    """Raise UserError if a flag that counts once is given twice with different values."""
    flags, given, words = define_flags(), dict[str, str](), iter(argv[1:])
    for word in words:
        if word == "--":
            return
        name, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-") or name in ("prompt", "stop"):
            continue
        no = name.removeprefix("no")
        if no in flags and flags[no].boolean and not equals:
            name, value = no, str(name == no).lower()
        elif not equals and (name == "config" or name in flags):
            value = next(words, "")
        if given.setdefault(name, value) != value:
            raise UserError(f"--{name} is given as {given[name][:80]!r} and as {value[:80]!r}: give one of them.")


def _without_config(argv: list[str]) -> tuple[list[str], str | None]:
    """Split a command line into its other words and the NAME of --config=NAME or --config NAME."""
    name, rest = None, []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in ("--config", "-config"):
            rest.append(word)
            continue
        name = value if equals else next(words, "")
    return rest, name


def _own_config(argv: list[str]) -> str | None:
    """Return the path of the saved config of the run in --workdir; None if there is none, or the mode needs none."""
    given = {"mode": "run", "workdir": ""}
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        given[flag.lstrip("-")] = value if equals else following
    own = os.path.join(os.path.expanduser(given["workdir"]), "config.json")
    if not given["workdir"] or given["mode"] not in NEEDS_CONFIG:
        return None
    try:
        if not stat.S_ISREG(os.stat(own).st_mode):
            raise UserError(f"{own} is not a regular file: remove it, or give another --workdir.")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        fix = remedy(error, "give another --workdir")
        raise UserError(f"{own[:200]} cannot be read ({reason(error)}): {fix}.") from None
    return own


def _run_name(config: str) -> str:
    """Return the name of a run with this config: small for configs/small.py, tiny for runs/tiny/config.json."""
    path = find_config(config)
    return path.absolute().parent.name if path.suffix == ".json" else path.stem


def _overrides(argv: Sequence[str]) -> list[tuple[str, str, str]]:
    """List the words of a command line that override a field: (word, section.field, value)."""
    words = [(word, *word.lstrip("-").partition("=")[::2]) for word in argv if word.startswith("-")]
    return [(word, path.removeprefix("config."), value) for word, path, value in words if path.startswith("config.")]


def _check_overrides(argv: Sequence[str]) -> None:
    """Raise UserError if an override names an unknown field; the message suggests the nearest one."""
    known = flatten(Config())
    for word, field, _ in _overrides(argv):
        if hasattr(Config(), field) and field not in known:
            some = next(name for name in known if name.startswith(field))
            raise UserError(f"{word!r} names a section: give one of its fields, as in --config.{some}={known[some]}.")
        if field not in known:
            raise unknown_field(field)


def _unset_fields(argv: list[str], config: Config) -> list[str]:
    """Apply --config.x.y=None, which ml_collections does not support, and return the command line without it."""
    done = []
    for word, field, value in _overrides(argv):
        section, _, name = field.rpartition(".")
        if value.lower() == "none" and section and name in optional_fields(section):
            setattr(getattr(config, section), name, None)
            done.append(word)
    return [word for word in argv if word not in done]


def _texts_as_tuples(argv: list[str]) -> list[str]:
    """Write the value of a field of strings as a tuple, if it is not one: a bare text is taken as it is written."""
    words: list[str] = []
    fields, rest = fields_of_texts(), iter(argv)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag.startswith("-") and flag.lstrip("-").removeprefix("config.") in fields:
            word = f"{flag}={texts_of(value if equals else next(rest, ''))!r}"
        words.append(word)
    return words


def _plainly(error: BaseException) -> str:
    """Return an error of absl as one plain sentence."""
    if isinstance(error, flags.UnrecognizedFlagError):
        near = difflib.get_close_matches(error.flagname, list(define_flags()), 1, 0.6)
        return f"There is no flag --{error.flagname}: " + (f"did you mean --{near[0]}?" if near else "see --help.")
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split()).rstrip(".")
    text = text.replace("flag --", "--", 1).removeprefix("ERROR:: ")
    rules = {"literal for int": "an integer", "could not convert": "a number", "on-boolean": "true or false"}
    for words, wanted in rules.items():
        if words in text and ": " in text:
            return f"{text.partition(': ')[0]} is invalid: it must be {wanted}."
    text = re.sub(r"\[Errno \d+\] ", "", text)
    return f"{text[:1].upper()}{text[1:]}: see --help."


MAX_START = 60.0
"""Seconds that a process takes at most to read its command line."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A parsed command line."""

    flags: FlagValues
    config: Config | None
    """The named config with its overrides."""
    workdir: str
    signals: Signals
    began: float
    """When the command line was read, by time.monotonic()."""

    @property
    def mode(self) -> str:
        """The value of --mode."""
        return str(self.flags.mode)

    @functools.cached_property
    def folder(self) -> "Workdir":
        """The workdir; each of its files that are read to resolve the run is read once."""
        from chargpt_jax.storage.workdir import Workdir

        return Workdir(self.workdir)

    @property
    def parent(self) -> str | None:
        """The value of --from."""
        value: str | None = self.flags["from"].value
        return value

    @property
    def step(self) -> str | int:
        """The checkpoint that --step selects: 'best', 'latest' or a number.

        Raises:
            UserError: for any other value.
        """
        step = self.flags.step or "best"
        number = step.isdecimal() and len(step) < 19
        if step not in ("best", "latest") and not number:
            raise UserError(f"--step is {step[:80]!r}, but it must be 'best', 'latest' or a number.")
        return int(step) if number else str(step)

    @property
    def minutes_left(self) -> float | None:
        """The minutes that --max_minutes leaves, above 0; None without a limit."""
        minutes = self.flags.max_minutes
        return minutes and max(1e-9, minutes - (time.monotonic() - self.began) / 60)


def read(argv: Sequence[str], signals: Signals) -> Request:
    """Parse a command line, the program's name first, and check what its mode needs.

    Raises:
        UserError: if a flag, a config field, an environment variable or a value is invalid, or a flag that the mode
            needs is missing.
    """
    began, start = time.monotonic() - (_age() if signals.last else 0.0), _working_directory()
    flags, config, name = parse(argv)
    mode, minutes = flags.mode, flags.max_minutes
    if not flags.help:
        startup.check_environment()
        startup.check_open_files()
        connecting.parsed(flags.distributed)
        connecting.check_seconds(flags.connect_seconds)
        if mode in NEEDS_CONFIG:
            if config is None:
                raise UserError(f"--mode={mode} needs a config: give --config=small, or the path of a config file.")
            validate(config)
        elif not flags.workdir and name is None and mode != "selftest":
            raise UserError(f"--mode={mode} needs the folder of a run: give --workdir.")
        if minutes is not None and not 0 < minutes < math.inf:
            raise UserError(
                f"--max_minutes is {minutes:g}, but it must be a finite number of minutes above 0: give 50, for "
                "example."
            )
        if minutes is not None:
            signals.end_after(60 * minutes)
    workdir = flags.workdir or ("." if mode == "selftest" else f"runs/{name}")
    if _working_directory() != start:  # the config file changed it
        workdir = os.path.join(start, os.path.expanduser(workdir))
    return Request(flags, config, workdir, signals, began)


def _age() -> float:
    """Return the seconds since this process began, at most MAX_START: somebody may have set the clock."""
    import psutil

    return min(MAX_START, max(0.0, time.time() - psutil.Process().create_time()))


def _working_directory() -> str:
    """Return the working directory; '' if it was removed."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def api_module(request: Request | None = None) -> ModuleType:
    """Import the API, and with it JAX; compiled programs are cached on disk.

    With --distributed in the request, this process is connected with the others, and signals then stop all of them.

    Raises:
        UserError: if a setting of JAX is unsupported, or the processes cannot be connected.
    """
    with startup.gc_paused():
        from chargpt_jax import api
        from chargpt_jax.data import download
    startup.check_settings()
    startup.use_compilation_cache(download.default_cache() / "xla")
    if request is not None and request.flags.distributed is not None:
        native_output.divert()
        flags, request.signals.shared = request.flags, True
        processes.start(flags.distributed, flags.connect_seconds, _alike(request), request.signals.hear)
    return api


def _alike(request: Request) -> dict[str, object]:
    """Return what decides which programs a command runs, by name, besides its config."""
    given = {name: request.flags[name].value is not None for name in ("from", "max_minutes")}
    presence = {f"--{name}": "given" if is_given else "not given" for name, is_given in given.items()}
    return {"--mode": request.mode, "--step": str(request.step), **presence}
