"""Compiled functions that are kept for the life of the process.

`jax.jit` recognises a function by its identity, and every stage builds its functions again. Equal stages get the same
function from here. A training that was interrupted and is resumed in a notebook, or evaluated, then compiles nothing
again.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

Function = TypeVar("Function")

MAX_KEPT = 16
"""Number of functions that are kept; the one that was not used for the longest time is dropped."""

_kept: OrderedDict[Hashable, object] = OrderedDict()


def kept(key: Hashable, make: Callable[[], Function]) -> Function:
    """Return the function of a key, made at its first use; the key names all that the function depends on."""
    if key not in _kept:
        _kept[key] = make()
    _kept.move_to_end(key)
    if len(_kept) > MAX_KEPT:
        _kept.popitem(last=False)
    return _kept[key]  # type: ignore[return-value]


def forget() -> None:
    """Drop all functions."""
    _kept.clear()
