"""The command line: its flags, the modes that each belongs to, and a one-line message for each mistake.

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

from chargpt_jax.cli.signals import Signals
from chargpt_jax.config import Config, unknown_field, validate
from chargpt_jax.config_io import (
    fields_of_texts,
    find_config,
    flatten,
    help_lines,
    load_config,
    naming,
    optional_fields,
    texts_of,
)
from chargpt_jax.devices import startup
from chargpt_jax.errors import UserError, reason, remedy

if TYPE_CHECKING:
    from chargpt_jax.storage.workdir import Workdir

MODES = {
    "run": "all stages: prepare the text, find a learning rate if none is set, train, generate samples, write a report",
    "prepare": "load the text, remove the licence, repair encoding errors, encode it",
    "find_lr": "run only the learning-rate range test",
    "train": "train, or resume training",
    "eval": "compute the loss on the full validation set",
    "generate": "continue --prompt (may be repeated)",
    "score": "compute the loss and the metrics of each character of --text or --text_file",
    "export": "write the model to --out, for Hugging Face transformers or for the original PyTorch code",
    "import": "create a run from a checkpoint of the original PyTorch code (--from)",
    "info": "print a run's settings, progress and speed",
    "compile": "compile a config's programs for a TPU, without a TPU (--topology)",
    "selftest": "stop small trainings at random moments, damage their checkpoints, and check that no data is lost",
}
"""What each mode does."""

EXIT_CODES = {
    0: "success, or time limit reached after saving",
    1: "self-test failed",
    2: "invalid arguments or input, or disk not writable",
    3: "no usable checkpoint",
    4: "non-finite loss (NaN or infinity)",
    5: "checkpoint could not be written",
    130: "stopped by SIGINT (during training: after saving a checkpoint)",
    143: "stopped by SIGTERM or SIGHUP (during training: after saving a checkpoint)",
}
"""What each exit code means."""

NEEDS_CONFIG = ("run", "prepare", "find_lr", "train", "compile")
FLAG_MODES = {
    **dict.fromkeys(("profile", "max_minutes"), ("run", "train")),
    **dict.fromkeys(("prompt", "max_new_tokens", "temperature", "top_k", "top_p", "stream"), ("generate",)),
    **dict.fromkeys(("skip_unknown", "alternatives"), ("generate", "score")),
    **dict.fromkeys(("text", "stride"), ("score",)),
    "text_file": ("score", "import"),
    "step": ("generate", "score", "eval", "export"),
    "seed": ("generate", "selftest"),
    **dict.fromkeys(("format", "out"), ("export",)),
    "from": ("import",),
    "topology": ("compile",),
    **dict.fromkeys(("kills", "signals", "corruptions"), ("selftest",)),
    "json": ("generate", "score", "eval", "find_lr", "info", "selftest"),
}
"""The modes that a flag applies to; other flags apply to every mode."""


TEXTS = ("prompt", "text", "config.data.start_at", "config.sample.prompts")
"""The flags whose values are texts: they are read as UTF-8, whatever encoding the system uses for file names."""


def define_flags() -> flags.FlagValues:
    """Return the flags of all modes, unparsed."""
    values = flags.FlagValues()
    strings = {
        "workdir": "run folder; default: runs/NAME for --config=NAME; an existing run needs no --config",
        "text": "text to score",
        "text_file": "score: UTF-8 file to score; import: the model's training text",
        "step": "checkpoint to use: 'best' by validation loss, 'latest', or a step number; default: best",
        "from": "checkpoint of the original PyTorch code: .pt, .safetensors or .npz",
        "out": "output folder, new or empty",
        "topology": "TPU topology to compile for; default: v5e:2x4",
    }
    integers: dict[str, tuple[int | None, str]] = {
        "max_new_tokens": (None, "number of characters to generate; default: the config's"),
        "top_k": (None, "sample from the k most likely characters"),
        "seed": (None, "random seed; default: the config's seed (generate), 0 (selftest)"),
        "alternatives": (5, "likeliest characters to give for every character in JSON; 0: none, which is faster"),
        "stride": (None, "characters between window starts; 1 is exact but slow; default: block_size // 2"),
        "kills": (20, "number of SIGKILL and SIGTERM at random moments; default: 20"),
        "signals": (6, "number of additional SIGTERM, SIGINT and SIGHUP; default: 6"),
        "corruptions": (200, "number of checkpoints to damage; default: 200"),
    }
    floats = {
        "temperature": "sampling temperature; 0: greedy; default: the config's",
        "top_p": "nucleus sampling from the fewest most likely characters whose total probability is at least p",
        "max_minutes": "save a checkpoint and exit within this many minutes; run the command again to resume",
    }
    booleans = {
        "stream": "print characters as they are generated",
        "skip_unknown": "drop characters that are not in the vocabulary",
        "profile": "write a profiler trace of a few dispatches to WORKDIR/profile",
        "json": "print one JSON object to stdout and everything else to stderr",
    }
    for name, about in strings.items():
        flags.DEFINE_string(name, None, about, flag_values=values)
    for name, (default, about) in integers.items():
        flags.DEFINE_integer(name, default, about, flag_values=values)
    for name, about in floats.items():
        flags.DEFINE_float(name, None, about, flag_values=values)
    for name, about in booleans.items():
        flags.DEFINE_bool(name, False, about, flag_values=values)
    flags.DEFINE_enum("mode", "run", list(MODES), "what to do; default: run", flag_values=values)
    about = "'hf' for Hugging Face transformers, 'original' for the original PyTorch code; default: hf"
    flags.DEFINE_enum("format", "hf", ("original", "hf"), about, flag_values=values)
    about = "text to continue; default: the config's prompts"
    flags.DEFINE_multi_string("prompt", None, about, flag_values=values)
    flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=values)
    return values


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, Config | None, str | None]:
    """Read a command line, the program's name first.

    Returns:
        The flags, the config (the named one, or the saved one of the run in --workdir) with its overrides, and its
        bare name.

    Raises:
        UserError: if a flag, a field or a value is invalid.
    """
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


def help_text() -> str:
    """Return the text of --help: modes, flags by mode, config fields by section, exit codes."""
    values = define_flags()
    usage = "chargpt --config=NAME [--workdir=DIR] [--mode=MODE] [--config.SECTION.FIELD=VALUE ...]"
    lines = ["Train and use a character-level GPT.", "", f"Usage: {usage}", "", "Modes:"]
    lines += [f"  {mode:<9} {about}" for mode, about in MODES.items()]

    def flag_line(name: str) -> str:
        return f"  --{name}: {' '.join((values[name].help or '').split())}"

    config = "  --config: shipped config by name, as in --config=small, or path of a .py or .json config file"
    lines += ["", "Flags of all modes:", config, *map(flag_line, ("workdir", "mode", "help"))]
    for modes in dict.fromkeys(FLAG_MODES.values()):
        lines += ["", f"Flags of {', '.join(modes)}:"]
        lines += [flag_line(name) for name, own in FLAG_MODES.items() if own == modes]
    lines += ["", "Config fields with their defaults; set one as in --config.model.n_layer=4:"]
    section = None
    for line in help_lines():
        field = line.partition("=")[0]
        if (new := field.rpartition(".")[0]) != section:
            section = new
            lines += ["", f"  {section}:" if section else "  without a section:"]
        lines.append(f"    {line}")
    lines += ["", "Exit codes:", *(f"  {code:<4}{about}" for code, about in EXIT_CODES.items())]
    return "\n".join(lines)


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
        if not word.startswith("-") or name == "prompt":
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
    began, start = time.monotonic(), _working_directory()
    flags, config, name = parse(argv)
    mode, minutes = flags.mode, flags.max_minutes
    if not flags.help:
        startup.check_environment()
        startup.check_open_files()
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


def _working_directory() -> str:
    """Return the working directory; '' if it was removed."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def api_module() -> ModuleType:
    """Import the API, and with it JAX; compiled programs are cached on disk."""
    with startup.gc_paused():
        from chargpt_jax import api
        from chargpt_jax.data import download
    startup.check_settings()
    startup.use_compilation_cache(download.default_cache() / "xla")
    return api
