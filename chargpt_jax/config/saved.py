"""A config as JSON and as text: written, read back, and compared with another."""

import dataclasses
import json
import types
import typing
from typing import Any

from chargpt_jax.config.rules import validate
from chargpt_jax.config.sections import DROPOUT_BITS, RENAMED, Config, unknown_field
from chargpt_jax.config.values import shown
from chargpt_jax.errors import UserError

RESOLVED = ("model.vocab_size", "model.used_ids", "optimizer.learning_rate")
"""Fields that a run sets itself if the config leaves them unset."""

MAY_CHANGE = (
    *("train.", "sample.", "mesh.", "sweep."),
    *("scheduler.epochs", "scheduler.max_steps", "scheduler.minutes"),
    *("data.timeout", "data.max_megabytes", "data.mirrors"),
    *("model.remat", "model.attention_block", "optimizer.accumulation_steps"),
)
"""Fields, or sections, that may change when a run is resumed, because the trained parameters stay valid.

- Logging, validation, checkpoints and samples.
- The length of the run, but not below the current step. The learning rate follows the new schedule from there on.
- Download settings, and those of `--mode=sweep`, which has a check of its own.
- Settings that save memory, and the devices. They may change the order of sums, and so cause rounding differences.

The devices are not part of the config and may change, too.
"""

MAY_CHANGE_BEFORE_A_CHECKPOINT = (*MAY_CHANGE, "optimizer.learning_rate", "optimizer.clip_norm")
"""Fields that may also change while a run has no checkpoint, so that a run that diverged at once can be repeated."""


LATER_SECTIONS = ("sweep",)
"""Sections that are saved only if they differ from the defaults: the saved config of a run that does not use them is
what it was before they existed."""


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


def as_saved(config: Config) -> dict[str, Any]:
    """Return a config as it is saved: `as_dict` without those of LATER_SECTIONS that have their defaults."""
    defaults = as_dict(Config())
    found = as_dict(config).items()
    return {name: value for name, value in found if name not in LATER_SECTIONS or value != defaults[name]}


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
    return json.dumps(as_saved(config), indent=2) + "\n"


def from_dict(saved: dict[str, Any]) -> Config:
    """Build a validated config from the form of `as_saved`; fields it lacks keep their defaults.

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
    sections = ((section.name, section.type) for section in dataclasses.fields(Config))
    inner = ((name, dataclasses.fields(kind)) for name, kind in sections if dataclasses.is_dataclass(kind))
    return [
        f"{name}.{item.name}" for name, items in inner for item in items if typing.get_args(item.type)[:1] == (str,)
    ]


def help_lines() -> list[str]:
    """Return one line for every field: its name, default and meaning."""
    lines = []
    for path, default in flatten(Config()).items():
        section, _, name = path.rpartition(".")
        holder = getattr(Config(), section) if section else Config()
        about = next(f.metadata["about"] for f in dataclasses.fields(holder) if f.name == name)
        lines.append(f"{path}={default}: {about}")
    return lines
