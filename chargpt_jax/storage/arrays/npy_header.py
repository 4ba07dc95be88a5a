"""The header of a .npy file: shape, order and dtype of an array, read before any memory is allocated for its values.

`write_npy` writes the same bytes as `np.save`, whose errors do not say why a disk refused them.
"""

from pathlib import Path
from typing import IO, NamedTuple, Protocol

import numpy as np

_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class NpyHeader(NamedTuple):
    """What the header of a .npy file states."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype


def read_npy_header(file: IO[bytes]) -> NpyHeader:
    """Read the header at the start of an open .npy file; afterwards the file is at the first value.

    Raises:
        ValueError, KeyError, SyntaxError or others: whatever NumPy raises for a header that is malformed.
    """
    return NpyHeader(*_READERS[np.lib.format.read_magic(file)](file))


def read_tokens(path: Path, max_bytes: int) -> np.ndarray:
    """Read an int32 array with one axis. Its header is compared with the size of the file first.

    Raises:
        ValueError, KeyError, SyntaxError or others: if the file holds something else, or more than `max_bytes`.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        shape, _, dtype = read_npy_header(file)
        if dtype != np.int32 or len(shape) != 1:
            raise ValueError("it is not a one-dimensional array of 32-bit integers")
        left = path.stat().st_size - file.tell()
        if left != 4 * shape[0] or left > max_bytes:
            raise ValueError(f"its header states {shape[0]:,} characters, but {left:,} bytes follow")
        return np.fromfile(file, np.int32, shape[0])


class Writable(Protocol):
    """Something that bytes can be written to."""

    def write(self, content: bytes | memoryview, /) -> int:
        """Write bytes and return their number."""


def write_npy(file: Writable, array: np.ndarray) -> None:
    """Write an array to an open file, in C order."""
    array = np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.data)
