"""Checks of the JSON files of a run, which are untrusted input: sources of its corpus, attention, training speed."""

from collections.abc import Callable
from typing import Any

MAX_CORPUS = 16 << 30
"""Maximum size of the values in tokens.npy, bytes: 17e9 characters if the vocabulary has at most 255."""

LISTS = ("repairs", "notes")
"""Fields of a source that earlier versions did not write."""


def sources(saved: Any) -> list[dict[str, Any]]:
    """Check the content of sources.json.

    Raises:
        ValueError: if it is not a list of sources.
    """
    rules: dict[str, Callable[[Any], bool]] = {
        "title": lambda value: isinstance(value, str),
        "characters": lambda value: type(value) is int and 0 <= value <= MAX_CORPUS,
        **dict.fromkeys(("stand_in_for", "url", "file_sha256"), lambda value: isinstance(value, str | None)),
        **dict.fromkeys(LISTS, _strings),
    }
    if not isinstance(saved, list) or not all(isinstance(source, dict) for source in saved):
        raise ValueError("it is not a list of sources")
    for source in saved:
        for name, is_valid in rules.items():
            if not is_valid(source.get(name, [] if name in LISTS else None)):
                raise ValueError(f"the {name} of a source is invalid")
    return saved


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def attention(saved: Any) -> dict[str, Any]:
    """Check the content of attention.json.

    Raises:
        ValueError: if it does not name an attention and the conditions that it was chosen under.
    """
    known = isinstance(saved, dict) and isinstance(saved.get("attention"), str)
    if not known or not isinstance(saved.get("conditions"), dict):
        raise ValueError("it does not name an attention and its conditions")
    return saved


def speed(saved: Any) -> dict[str, Any]:
    """Check the content of speed.json.

    Raises:
        ValueError: if it is not an object of numbers and strings.
    """
    if not isinstance(saved, dict) or not all(isinstance(value, str | float | int | None) for value in saved.values()):
        raise ValueError("it is not an object of numbers and strings")
    return saved
