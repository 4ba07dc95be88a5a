"""The command line: every flag, which mode it means something to, and a plain sentence for each mistake.

`--config` names a file, and where it is left out a run goes on with its own; `--config.section.field=value` overrides
what it says, through ml_collections. JAX is not imported here, so a mistyped command is answered at once.
"""

import difflib
import os
import re
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from chargpt_jax.config import Config
from chargpt_jax.config_io import find_config, flatten, help_lines, load_config, optional_fields, unknown_field
from chargpt_jax.errors import UserError

MODES = (
    "run",
    "prepare",
    "find_lr",
    "train",
    "eval",
    "generate",
    "score",
    "export",
    "import",
    "info",
    "compile",
    "selftest",
)
NEEDS_CONFIG = ("run", "prepare", "find_lr", "train", "compile")
USES_MODEL = ("generate", "score", "eval")
MODES_OF = {
    **dict.fromkeys(("prompt", "max_new_tokens", "temperature", "top_k", "top_p", "stream"), ("generate",)),
    "seed": ("generate", "selftest"),
    **dict.fromkeys(("text", "stride"), ("score",)),
    "text_file": ("score", "import"),
    "skip_unknown": ("generate", "score"),
    "step": (*USES_MODEL, "export"),
    **dict.fromkeys(("format", "out"), ("export",)),
    "from": ("import",),
    "topology": ("compile",),
    "profile": ("run", "train"),
    "max_minutes": ("run", "train"),
    **dict.fromkeys(("kills", "signals", "corruptions"), ("selftest",)),
    "json": (*USES_MODEL, "find_lr", "info", "selftest"),
}
"""The modes that a flag means something to; flags that are not here go with every mode."""


def define_flags() -> flags.FlagValues:
    """Return the flags of all modes, unparsed."""
    values = flags.FlagValues()
    text: dict[str, str] = {
        "workdir": "the run's folder; default: runs/NAME for --config=NAME; a run that is there needs no --config",
        "text": "score: the text",
        "text_file": "score: a UTF-8 file that holds the text; import: the text the model learned from",
        "step": "generate, score, eval, export: 'best' by validation, 'latest', or a number; default: best",
        "from": "import: a checkpoint of the original: .pt, .safetensors or .npz",
        "out": "export: a new folder",
        "topology": "compile: the TPU slice; default: v5e:2x4",
    }
    for name, about in text.items():
        flags.DEFINE_string(name, None, about, flag_values=values)
    flags.DEFINE_enum("mode", "run", MODES, "what to do", flag_values=values)
    flags.DEFINE_enum(
        "format", "hf", ("original", "hf"), "export: for the original, or for Hugging Face", flag_values=values
    )
    flags.DEFINE_multi_string("prompt", None, "generate: a text to go on from; may repeat", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", None, "generate: characters to write", flag_values=values)
    flags.DEFINE_float("temperature", None, "generate: 0 takes the likeliest character", flag_values=values)
    flags.DEFINE_integer("top_k", None, "generate: draw among the k likeliest", flag_values=values)
    flags.DEFINE_float("top_p", None, "generate: draw among the likeliest of this mass", flag_values=values)
    flags.DEFINE_integer("seed", None, "generate, selftest: of the draws; default: the config's", flag_values=values)
    flags.DEFINE_integer("kills", 20, "selftest: SIGKILLs and SIGTERMs at random moments", flag_values=values)
    flags.DEFINE_integer("signals", 6, "selftest: SIGTERMs, SIGINTs and SIGHUPs besides", flag_values=values)
    flags.DEFINE_integer("corruptions", 200, "selftest: damaged checkpoints", flag_values=values)
    flags.DEFINE_float(
        "max_minutes", None, "run, train: save and end in time; the same command goes on", flag_values=values
    )
    flags.DEFINE_integer(
        "stride", None, "score: between windows; 1 is exact; default: half a block", flag_values=values
    )
    flags.DEFINE_bool("stream", False, "generate: print while writing", flag_values=values)
    flags.DEFINE_bool("skip_unknown", False, "drop characters the model has never seen", flag_values=values)
    flags.DEFINE_bool("profile", False, "run, train: trace a few dispatches into WORKDIR/profile", flag_values=values)
    flags.DEFINE_bool("json", False, "print one JSON object on stdout, all else on stderr", flag_values=values)
    flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=values)
    return values


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, Config | None, str | None]:
    """Read a command line, the program's name first.

    Returns:
        The flags, the config (the one that is named, or that of the run in --workdir) with its overrides, and its
        bare name.

    Raises:
        UserError: for anything that is no flag, field or value.
    """
    argv, name = _without_config(list(argv))
    name = _own_config(argv) if name is None else name
    values = define_flags()
    if name is not None:
        config = load_config(name)
        _check_overrides(argv)
        argv = _unset_fields(argv, config)
        config_flags.DEFINE_config_dataclass("config", config, flag_values=values, sys_argv=argv)
    elif any(arg.lstrip("-").startswith("config.") for arg in argv if arg.startswith("-")):
        raise UserError("A --config.field=value needs a --config to change: give --config=small, for example.")
    try:
        rest = values(argv)[1:]
    except (flags.Error, ValueError, TypeError, KeyError) as error:
        raise UserError(_plainly(error)) from None
    mode = values.mode
    for flag, modes in MODES_OF.items():
        if values[flag].present and mode not in modes:
            raise UserError(f"--{flag} means nothing to --mode={mode}: it goes with --mode={' or '.join(modes)}.")
    if mode not in NEEDS_CONFIG and any(word.lstrip("-").startswith("config.") for word in argv[1:]):
        raise UserError(
            f"--mode={mode} takes the run's own config, which cannot be changed here: leave --config.* out."
        )
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag: put -- and a name before it, as in --prompt={rest[0]!r}.")
    return (values, None, None) if name is None else (values, values.config, _run_name(name))


def help_text(about: str) -> str:
    """Describe every flag and every field of a config, below a text of what the program does."""
    values = define_flags()
    own = [f"  --{name}: {' '.join((values[name].help or '').split())}" for name in ("workdir", "mode", *MODES_OF)]
    fields = [f"  {line}" for line in help_lines()]
    title = "Fields of a config, as in --config.model.n_layer=4, with their defaults:"
    return "\n".join([about, "Flags:", *own, "", title, *fields])


def _without_config(argv: list[str]) -> tuple[list[str], str | None]:
    """Take --config=NAME (or --config NAME) out of a command line."""
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
    """Return the path of the config of the run that --workdir names, where there is one and the mode needs it."""
    given = {"mode": "run", "workdir": ""}
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        given[flag.lstrip("-")] = value if equals else following
    own = os.path.join(os.path.expanduser(given["workdir"]), "config.json")
    return own if given["workdir"] and given["mode"] in NEEDS_CONFIG and os.path.isfile(own) else None


def _run_name(config: str) -> str:
    """Return what a run with this config is called: small for configs/small.py, tiny for runs/tiny/config.json."""
    path = find_config(config)
    return path.absolute().parent.name if path.suffix == ".json" else path.stem


def _overrides(argv: Sequence[str]) -> list[tuple[str, str, str]]:
    """List the words of a command line that override a field: (word, section.field, value)."""
    words = [(word, *word.lstrip("-").partition("=")[::2]) for word in argv if word.startswith("-")]
    return [(word, path.removeprefix("config."), value) for word, path, value in words if path.startswith("config.")]


def _check_overrides(argv: Sequence[str]) -> None:
    """Refuse an override of a field that no config has, naming the nearest."""
    known = flatten(Config())
    for word, field, _ in _overrides(argv):
        if hasattr(Config(), field) and field not in known:
            some = next(name for name in known if name.startswith(field))
            raise UserError(f"{word!r} names a section: give one of its fields, as in --config.{some}={known[some]}.")
        if field not in known:
            raise unknown_field(field)


def _unset_fields(argv: list[str], config: Config) -> list[str]:
    """Carry out --config.x.y=None, which the flags library cannot, and return the command line without it."""
    done = []
    for word, field, value in _overrides(argv):
        section, _, name = field.rpartition(".")
        if value.lower() == "none" and section and name in optional_fields(section):
            setattr(getattr(config, section), name, None)
            done.append(word)
    return [word for word in argv if word not in done]


def _plainly(error: BaseException) -> str:
    """Say in a sentence what absl found wrong with a command line."""
    if isinstance(error, flags.UnrecognizedFlagError):
        near = difflib.get_close_matches(error.flagname, list(define_flags()), 1, 0.6)
        return f"There is no flag --{error.flagname}: " + (f"did you mean --{near[0]}?" if near else "see --help.")
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split()).rstrip(".")
    text = text.replace("flag --", "--", 1).removeprefix("ERROR:: ")
    rules = {"literal for int": "a whole number", "could not convert": "a number", "on-boolean": "true or false"}
    for words, wanted in rules.items():
        if words in text and ": " in text:
            return f"{text.partition(': ')[0]} will not do: it must be {wanted}."
    text = re.sub(r"\[Errno \d+\] ", "", text)
    return f"{text[:1].upper()}{text[1:]}: see --help."
