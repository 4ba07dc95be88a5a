"""Checks of the JSON files of a run, which are untrusted input: the sources of its corpus, its training speed."""

from typing import Any

MAX_CORPUS = 4 << 30
"""Maximum size of the values in tokens.npy, bytes: about 1e9 characters."""


def sources(saved: Any) -> list[dict[str, Any]]:
    """Check the content of sources.json.

    Raises:
        ValueError: if it is not a list of sources.
    """

    def good(source: Any) -> bool:
        return (
            isinstance(source, dict)
            and isinstance(source.get("title"), str)
            and type(source.get("characters")) is int
            and 0 <= source["characters"] <= MAX_CORPUS
            and isinstance(source.get("stand_in_for"), str | None)
            and isinstance(source.get("url"), str | None)
            and isinstance(source.get("file_sha256"), str | None)
            and all(_strings(source.get(name, [])) for name in ("repairs", "notes"))
        )

    if not isinstance(saved, list) or not all(map(good, saved)):
        raise ValueError("each source must have a title and a number of characters")
    return saved


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def speed(saved: Any) -> dict[str, Any]:
    """Check the content of speed.json.

    Raises:
        ValueError: if it is not an object of numbers and strings.
    """
    if not isinstance(saved, dict) or not all(isinstance(value, str | float | int | None) for value in saved.values()):
        raise ValueError("it is not an object of numbers and strings")
    return saved
