"""Read JSON files that may be damaged or hostile."""

import json
import os
from pathlib import Path
from typing import Any

from chargpt_jax.config.values import shown

MAX_JSON = 32 << 20
"""Maximum size of a JSON file in bytes; files of samples have a limit of their own."""


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
