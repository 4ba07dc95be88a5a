"""The header of a .npy file: shape, order and dtype of an array, read before any memory is allocated for its values.

`write_npy` writes the same bytes as `np.save`, whose errors do not say why a disk refused them.
"""

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


class Writable(Protocol):
    """Something that bytes can be written to."""

    def write(self, content: bytes | memoryview, /) -> int:
        """Write bytes and return their number."""


def write_npy(file: Writable, array: np.ndarray) -> None:
    """Write an array to an open file, in C order."""
    array = np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.data)
