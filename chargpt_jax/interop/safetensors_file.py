"""Read arrays from .safetensors and .npz files, and write .safetensors files, with NumPy only.

A file is untrusted input; no code in it is executed. Its table of names and shapes is read and checked first, and the
values of an array only on demand, so an invalid file is rejected before memory is allocated. The members of a zip
archive must be uncompressed and fit into the file together, so the allocated memory never exceeds the file size.
"""

import contextlib
import dataclasses
import json
import math
import os
import struct
import tokenize
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from chargpt_jax.errors import UserError
from chargpt_jax.storage.arrays.npy_header import read_npy_header

DTYPES = {"float32": "<f4", "float16": "<f2", "float64": "<f8", "bfloat16": "<u2"}
"""{supported dtype: NumPy's type string}. NumPy has no bfloat16: it is read as the upper 16 bits of a float32."""

SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "F64": "float64", "BF16": "bfloat16"}

MAX_HEADER = 4 << 20
"""Maximum size of a table of contents, bytes; that of the original needs a few kilobytes."""

MAX_AXES = 8


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array in a file. Its shape has been checked; its values have not been read yet."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    """Returns the values, float32 of that shape."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an error that a damaged file causes inside the block into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path} is too large for this machine's memory: import it on a larger one.") from None
    except (
        *(OSError, EOFError, ValueError, TypeError, LookupError, RecursionError, RuntimeError),
        *(struct.error, zipfile.BadZipFile, SyntaxError, tokenize.TokenError),  # the last two: .npy headers
    ) as error:
        what = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise UserError(f"{path} cannot be read ({what}): it is damaged, or not a checkpoint.") from None


def as_float32(raw: bytes, dtype: str) -> np.ndarray:
    """Convert little-endian values of one of `DTYPES` to float32 [N]; only float64 loses precision."""
    values = np.frombuffer(raw, DTYPES[dtype])
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def checked_shape(shape: Any, name: str) -> tuple[int, ...]:
    """Return a shape from a file as a tuple.

    Raises:
        ValueError: if it is invalid.
    """
    sizes = tuple(shape) if isinstance(shape, list | tuple) else (-1,)
    if len(sizes) > MAX_AXES or not all(type(n) is int and n >= 0 for n in sizes):
        raise ValueError(f"{name!r} has an invalid shape")
    return sizes


@contextlib.contextmanager
def zipped(path: Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """Open a zip file whose members are uncompressed; yield it and {name: member}."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size for m in members):
            raise ValueError("its members are compressed, but torch.save and numpy.savez do not compress them")
        if sum(m.file_size for m in members) > path.stat().st_size:
            raise ValueError("its members are together larger than the file")
        yield archive, {m.filename: m for m in members}


def read_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Read the table of a .safetensors file: 8 bytes with the length of the table, the table as JSON, then the values.

    Returns:
        The arrays by name, and the file's metadata, strings by name.

    Raises:
        UserError: if the table is invalid, or does not cover the file exactly.
    """
    with reading(path):
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise ValueError(f"its table of contents is larger than the file or {MAX_HEADER >> 20} MiB")
            table = json.loads(file.read(length))
        if not isinstance(table, dict):
            raise ValueError("its table of contents is not a JSON object")
        metadata = table.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata are not strings")
        arrays, spans = {}, []
        for name, item in table.items():
            arrays[name], span = _safetensor(path, name, item, 8 + length)
            spans.append(span)
        edges = [0, *(edge for span in sorted(spans) for edge in span), size - 8 - length]
        if edges[::2] != edges[1::2]:
            raise ValueError("its arrays overlap, leave gaps, or do not end at the end of the file")
        return arrays, metadata


def _safetensor(path: Path, name: str, item: Any, start: int) -> tuple[Stored, tuple[int, int]]:
    shape = checked_shape(item["shape"], name)
    begin, end = checked_shape(item["data_offsets"], name)
    if item["dtype"] not in SAFETENSORS_DTYPES:
        raise UserError(f"{path} has {name!r} as {str(item['dtype'])[:20]!r}: save it as one of {', '.join(DTYPES)}.")
    dtype = SAFETENSORS_DTYPES[item["dtype"]]
    if end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise ValueError(f"{name!r} has a shape that differs from the size of its data")

    def read() -> np.ndarray:
        with reading(path), path.open("rb") as file:
            file.seek(start + begin)
            return as_float32(file.read(end - begin), dtype).reshape(shape)

    return Stored(shape, read), (begin, end)


def write_safetensors(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write arrays as float32, and metadata, as a .safetensors file."""
    table: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for name, array in arrays.items():
        end = begin + 4 * array.size
        table[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)  # so that the values start at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array, "<f4").tobytes())
        file.flush()
        os.fsync(file.fileno())


def read_npz(path: Path) -> dict[str, Stored]:
    """Read the table of a file of `numpy.savez`.

    Raises:
        UserError: if it is damaged or compressed, or contains anything but floating-point arrays.
    """
    with reading(path), zipped(path) as (archive, members):
        return {name.removesuffix(".npy"): _npy(path, archive, member) for name, member in members.items()}


def _npy(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Stored:
    with archive.open(member) as file:
        shape, fortran_order, dtype = read_npy_header(file)
        start = file.tell()
    name, order = member.filename.removesuffix(".npy"), "F" if fortran_order else "C"
    if dtype.name not in ("float16", "float32", "float64"):
        raise UserError(f"{path} has {name!r} as {dtype.name!r}: save it as one of float32, float16, float64.")
    checked_shape(shape, name)
    if member.file_size - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} has a shape that differs from the size of its data")

    def read() -> np.ndarray:
        with reading(path), zipfile.ZipFile(path) as again, np.errstate(over="ignore"):
            values = np.frombuffer(again.read(member.filename)[start:], dtype)
            return values.astype(np.float32).reshape(shape, order=order)  # type: ignore[call-overload]

    return Stored(shape, read)
