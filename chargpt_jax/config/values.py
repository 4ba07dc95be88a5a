"""A setting as a value: how messages show it, and whether it has the type and the limits that it must have."""

import dataclasses
import math
import reprlib
import types
import typing
from typing import Any

from chargpt_jax.errors import UserError

MIN_FLOAT32, MAX_FLOAT32 = 2.0**-126, 2.0**127
"""Learning rates and norms are multiplied as float32: below and above these it has 0 and infinity."""

MAX_INT = 2**63
"""Integers must be less than this."""

KINDS = {float: "a number", int: "an integer", str: "a string", bool: "True or False"}
"""The types of fields and arguments, in words."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def shown(value: Any) -> str:
    """Return a value as code for a message; long ones are truncated."""
    if isinstance(value, int) and abs(value) >= MAX_INT:
        return "an integer of more than 18 digits"
    return _SHORT.repr(value)


def plain(value: Any) -> Any:
    """Return a value with Python's numbers in place of NumPy's and JAX's scalars, also inside a tuple or list."""
    if isinstance(value, tuple | list):
        return type(value)(map(plain, value)) if type(value) in (tuple, list) else value
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def argument(name: str, value: Any, kind: type, fix: str) -> Any:
    """Return an argument of a Python function as a plain value, if it is of a kind in `KINDS`.

    Raises:
        UserError: if it is of another kind; the message ends with the fix.
    """
    value = plain(value)
    if not _is_a(kind, value):
        raise UserError(f"{name} is {shown(value)}, but it must be {KINDS[kind]}: {fix}.")
    return value


def _is_a(kind: type, value: Any) -> bool:
    accepted = (float, int) if kind is float else kind
    return isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))


def check_field(name: str, item: dataclasses.Field, value: Any) -> None:
    """Check a field's value against its type and limits; `name` is its name in messages, 'section.field'.

    Raises:
        UserError: if it is of another type or outside the limits.
    """
    kind, optional = item.type, False
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
        optional = True
    if value is None and optional:
        return
    if typing.get_origin(kind) is tuple:
        args = typing.get_args(kind)
        fixed = Ellipsis not in args
        if not isinstance(value, tuple | list) or (fixed and len(value) != len(args)):
            wanted = f"{len(args)} values" if fixed else "a tuple"
            raise UserError(f"{name} is {shown(value)}, but it must be {wanted}: write it as in {item.default!r}.")
        for part in value:
            _check_value(name, item, args[0], part, value)
    else:
        _check_value(name, item, typing.cast(type, kind), value, value)


def _check_value(name: str, item: dataclasses.Field, kind: type, value: Any, given: Any) -> None:
    """Check a value, or one element of a given tuple."""
    limits, must = item.metadata, "it must be" if value is given else "each value must be"

    def wrong(rule: str) -> UserError:
        return UserError(f"{name} is {shown(given)}, but {must} {rule} ({item.metadata.get('about', '')}).")

    if not _is_a(kind, value):
        raise wrong(KINDS[kind])
    if isinstance(value, int) and abs(value) >= MAX_INT:
        raise wrong("an integer of at most 18 digits")
    if kind is float and not abs(typing.cast(float, value)) < math.inf:
        raise wrong("a finite number")
    if "choices" in limits and value not in limits["choices"]:
        raise wrong("one of " + ", ".join(limits["choices"]))
    if "above" in limits and not value > limits["above"]:
        raise wrong(f"above {limits['above']:g}")
    if "least" in limits and not value >= limits["least"]:
        raise wrong(f"at least {limits['least']:g}")
    if "below" in limits and not value < limits["below"]:
        raise wrong(f"below {limits['below']}")
    if "most" in limits and not value <= limits["most"]:
        raise wrong(f"at most {limits['most']:,.10g}")
    if limits.get("float32") and not MIN_FLOAT32 <= value <= MAX_FLOAT32:
        raise wrong(f"within the range of float32, {MIN_FLOAT32:.1e} to {MAX_FLOAT32:.1e}")
    if limits.get("even") and typing.cast(int, value) % 2:
        raise wrong("even, because rotary position embedding rotates its two halves")
