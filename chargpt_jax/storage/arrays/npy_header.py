"""The header of a .npy file: shape, order and dtype of an array, read before any memory is allocated for its values.

Token ids are mapped into memory. `write_npy` writes the same bytes as `np.save`, whose errors do not say why a disk
refused them.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, Protocol

import numpy as np

TOKEN_DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.uint32), np.dtype(np.int32))
"""The dtypes that token ids are saved in; version 0.1.0 wrote int32."""

PIECE = 1 << 20
"""Elements of a large array that are processed together."""

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


class MappedTokens(NamedTuple):
    """Token ids in a file."""

    ids: np.ndarray
    """[N], read-only; a part of it is read from the file when it is used."""
    lowest: int
    """The lowest id; 0 if there is none."""
    highest: int
    """The highest id; 0 if there is none."""


def map_tokens(path: Path, max_bytes: int) -> MappedTokens:
    """Map token ids [N], of one of `TOKEN_DTYPES`, into memory.

    The header is compared with the size of the file first. Then the file is read once, in pieces, so that the map does
    not occupy memory yet.

    Raises:
        ValueError, KeyError, SyntaxError or others: if the file holds something else, or more than `max_bytes`.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        shape, _, dtype = read_npy_header(file)
        if dtype not in TOKEN_DTYPES or len(shape) != 1:
            raise ValueError("it is not a one-dimensional array of integers of 8, 16 or 32 bits")
        offset = file.tell()
        left = path.stat().st_size - offset
        if left != dtype.itemsize * shape[0] or left > max_bytes:
            raise ValueError(f"its header states {shape[0]:,} characters, but {left:,} bytes follow")
        if not left:  # an empty part of a file cannot be mapped
            return MappedTokens(np.zeros(0, dtype), 0, 0)
        lowest, highest = np.iinfo(dtype).max, np.iinfo(dtype).min
        while len(piece := np.fromfile(file, dtype, PIECE)):
            lowest, highest = min(lowest, int(piece.min())), max(highest, int(piece.max()))
        return MappedTokens(np.asarray(np.memmap(file, dtype, "r", offset, shape)), lowest, highest)


def pieces_of(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield an array [N] in consecutive parts of at most `PIECE` elements."""
    return (array[start : start + PIECE] for start in range(0, len(array), PIECE))


class Writable(Protocol):
    """Something that bytes can be written to."""

    def write(self, content: bytes | memoryview, /) -> int:
        """Write bytes and return their number."""


def write_npy(file: Writable, array: np.ndarray) -> None:
    """Write an array to an open file, in C order."""
    array = np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.data)


def write_npy_pieces(file: Writable, dtype: np.dtype, count: int, pieces: Iterable[np.ndarray]) -> None:
    """Write an array [count] of a dtype that comes in pieces, converted to that dtype."""
    whole = np.broadcast_to(np.zeros((), dtype), (count,))  # describes the array, and needs no memory for it
    described = np.lib.format.header_data_from_array_1_0(whole) | {"fortran_order": False}
    np.lib.format.write_array_header_1_0(file, described)
    for piece in pieces:
        file.write(np.ascontiguousarray(piece, dtype).data)
