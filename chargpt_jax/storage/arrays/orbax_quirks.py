"""Write and read named arrays by orbax, and work around what it does when the file system refuses a write.

Orbax prints tracebacks of its threads, keeps writing after it has raised an error, takes some refusals for success, and
checks neither the shapes nor the content of what it reads. Callers see one exception instead: OSError or whatever orbax
raised for a write, `Damaged` for a read.
"""

import contextlib
import functools
import gc
import logging
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from chargpt_jax.errors import is_out_of_memory
from chargpt_jax.storage.arrays.state_arrays import Arrays, Shaped, check_same, described
from chargpt_jax.storage.manifest import Damaged, read_json

ALLOWANCE, EXPANSION = 2**28, 100
"""Arrays may claim 256 MiB, and more only up to so many times the bytes of their files (zeros compress well)."""

MAX_METADATA = 2**26
"""Largest list of a folder's arrays that is read, in bytes."""

SETTLED_SECONDS, MAX_SETTLING = 0.1, 20
"""A folder has settled if it does not change for this time; it is checked up to so many times."""

UNRETRIEVED = re.compile(r"(?s)Task exception was never retrieved.*orbax")
"""What asyncio logs of a second error of orbax; the first one is raised."""


class ArrayStore:
    """Reads and writes folders of named arrays."""

    @functools.cached_property
    def _orbax(self) -> ocp.Checkpointer:
        # Created on first use: it initialises JAX's devices, and their number can be set only before that.
        if jax.process_count() == 1:
            return ocp.Checkpointer(ocp.StandardCheckpointHandler())
        # By itself, orbax would wait for all processes in each call, and here only one of them saves.
        own = ocp.options.MultiprocessingOptions(jax.process_index(), {jax.process_index()})
        return ocp.Checkpointer(ocp.StandardCheckpointHandler(multiprocessing_options=own), multiprocessing_options=own)

    def save(self, folder: Path, arrays: Arrays) -> None:
        """Write arrays to a new folder, and check what was written.

        Raises:
            Damaged: if the written arrays differ from the given ones by name, dtype or shape.
            Exception: whatever orbax raises if a file cannot be written; no thread of it writes to the folder then.
        """
        with contained(folder.parent):
            self._orbax.save(folder, args=ocp.args.StandardSave(arrays))
            self._check(folder, arrays)  # orbax may take a refused write for success, and leave out a part

    def load(self, folder: Path, expected: Mapping[str, Shaped]) -> Arrays:
        """Read the arrays of a folder, which must have the expected names, dtypes and shapes.

        Raises:
            Damaged: if they differ, or cannot be read.
        """
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in expected.items()}
        with contained():
            self._check(folder, expected)
            with _readable(folder.name):
                return self._orbax.restore(folder, args=ocp.args.StandardRestore(shapes))

    def _check(self, folder: Path, expected: Mapping[str, Shaped]) -> None:
        """Compare the names, dtypes and shapes of the arrays in a folder with those expected, before any allocation.

        Raises:
            Damaged: if they differ, or orbax cannot read them.
        """
        _check_claim(folder, expected)
        with _readable(folder.name):
            found = _opened(folder)
            check_same(folder.name, {name: _described(array) for name, array in found.items()}, described(expected))
            _check_chunks(folder.name, found)

    def close(self) -> None:
        """Release what reading and writing needed."""
        if "_orbax" in vars(self):
            self._orbax.close()


@contextlib.contextmanager
def contained(folder: Path | None = None) -> Iterator[None]:
    """Keep orbax silent inside the block, and its threads from writing to a folder after a failed block.

    Inside the block, the absl logger is disabled, asyncio's messages about errors of orbax are dropped, and so are
    callbacks that find their event loop closed. At the end all three are as before.

    Args:
        folder: where the block writes. If the block fails, wait until nothing in it changes: after an error in one
            file, orbax's threads still write others, and would create again what the caller removes.
    """
    absl, asyncio_logger, unraisable = logging.getLogger("absl"), logging.getLogger("asyncio"), sys.unraisablehook
    disabled, absl.disabled = absl.disabled, True
    asyncio_logger.addFilter(_is_not_of_orbax)
    sys.unraisablehook = functools.partial(_ignore_closed_loop, unraisable)
    try:
        yield
    except Exception as error:
        if folder is not None:
            _wait_until_settled(folder)
            # Tasks report their errors when they are collected: do that while the reports are dropped.
            chain: BaseException | None = error
            while chain:
                traceback.clear_frames(chain.__traceback__)
                chain = chain.__context__
            gc.collect()
        raise
    finally:
        sys.unraisablehook = unraisable
        asyncio_logger.removeFilter(_is_not_of_orbax)
        absl.disabled = disabled


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return not UNRETRIEVED.match(record.getMessage())


def _ignore_closed_loop(report: Callable[["sys.UnraisableHookArgs"], object], what: "sys.UnraisableHookArgs") -> None:
    if not (what.exc_type is RuntimeError and str(what.exc_value) == "Event loop is closed"):
        report(what)


def _wait_until_settled(folder: Path) -> None:
    before = None
    for _ in range(MAX_SETTLING):
        now = _contents(folder)
        if now is not None and now == before:
            return
        before = now
        time.sleep(SETTLED_SECONDS)


def _contents(folder: Path) -> dict[Path, tuple[int, int]] | None:
    """Return {path: (size, time of change)} of everything in a folder; None if it changes while it is read."""
    try:
        found = {path: path.stat() for path in folder.rglob("*")}
    except OSError:
        return None
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn whatever orbax raises for a damaged folder into `Damaged`, with one line of its message."""
    try:
        yield
    except Damaged:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise  # the folder may be whole
        first = (str(error).splitlines() or [""])[0][:200]
        raise Damaged(name, f"cannot be read ({type(error).__name__}: {first})") from error


def _opened(folder: Path) -> dict[str, ts.TensorStore]:
    """Open every array of a folder by name, without reading its elements.

    Orbax's own metadata() is not used: it loses 3 kB of memory for each array. tensorstore accepts no ".." in a path.
    """
    listed = read_json(folder / "_METADATA", MAX_METADATA)["tree_metadata"]
    names = [entry["key_metadata"][0]["key"] for entry in listed.values()]  # type: ignore[attr-defined]
    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.resolve()}/"}}
    context = ts.Context()  # one for all: the database's index is read once
    opening = {
        name: ts.open({"driver": "zarr", "kvstore": {**database, "path": f"{name}/"}}, open=True, context=context)
        for name in names
    }
    return {name: array.result() for name, array in opening.items()}


def _check_claim(folder: Path, expected: Mapping[str, Shaped]) -> None:
    """Reject arrays that are much larger than the files they are in, since memory is allocated for their full size."""
    claimed = sum(np.dtype(x.dtype).itemsize * int(np.prod(x.shape, dtype=object)) for x in expected.values())
    available = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if claimed > ALLOWANCE + EXPANSION * available:
        raise Damaged(folder.name, f"claims {claimed:,} bytes of arrays in {available:,} bytes of files")


def _described(array: ts.TensorStore) -> list[object]:
    return [array.dtype.name, list(array.shape)]


def _check_chunks(name: str, found: Mapping[str, ts.TensorStore]) -> None:
    """Reject chunks larger than their array, since memory is allocated for complete chunks."""
    for array_name, array in found.items():
        chunk = [size or 0 for size in array.chunk_layout.read_chunk.shape or ()]
        if any(piece > max(1, size) for piece, size in zip(chunk, array.shape, strict=True)):
            raise Damaged(name, f"stores {array_name!r} in chunks of {chunk}")
