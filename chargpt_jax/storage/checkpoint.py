"""Save and restore a training state together with the config and the vocabulary that give it meaning.

A step is a folder named by its number. It is made under another name and renamed when it is whole, sealed and on the
disk, so that it is there entirely or not at all:

    60/arrays/        the state, written by orbax
    60/record.json    what the arrays mean: config, vocabulary, corpus; and their names, shapes, dtypes and digest
    60/manifest.json  sha256 and size of every file

Nothing is believed that was not verified: a step that fails is passed over with a warning, the one before it is taken
instead, and what failed is never deleted.
"""

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from chargpt_jax import atomic
from chargpt_jax.config_io import from_dict
from chargpt_jax.errors import NoCheckpoint, SaveFailed, UserError
from chargpt_jax.storage import manifest
from chargpt_jax.storage.manifest import Damaged
from chargpt_jax.storage.state_arrays import (
    Arrays,
    StateT,
    check_same,
    described,
    digest,
    named,
    on_host,
    placed,
    stored_shape,
)

FORMAT = 2
"""Of what a step holds; a reader refuses a newer one."""

UNVALIDATED = 1e30
"""The validation loss of a checkpoint that was not validated: it is never the best."""

MOST_RECORD_BYTES = 32_000_000
"""The longest record: a vocabulary of all of Unicode's characters takes half of it."""

ROOM, EXPANSION = 2**28, 100
"""Arrays may take 256 MiB, and more only up to so many times the bytes of their files (zeros compress well)."""

SAVING, DELETING = ".saving-", ".deleting-"
"""What the names of folders begin with that a dead run can leave behind."""

RECORD, ARRAYS = "record.json", "arrays"

MEANING = {"config": dict, "vocabulary": list, "corpus_sha256": str, "arrays": dict, "digest": str, "loss": float}
"""What every record says, besides format and step."""

REMEDIES = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "raise the limit on the size of files",
    errno.EROFS: "make the disk writable, or choose another --workdir",
    errno.EACCES: "make the folder writable, or choose another --workdir",
    errno.EPERM: "make the folder writable, or choose another --workdir",
    errno.EIO: "check the disk",
}
"""What a user can do about the system's reasons for not writing."""

T = TypeVar("T")


class Checkpoints:
    """The checkpoints of one run. Many may read them, but one process alone may write."""

    def __init__(self, folder: Path, *, keep_last: int = 2, warn: Callable[[str], None] = print):
        """Open a folder, which need not exist; nothing in it is changed before something is saved.

        Args:
            folder: where the steps are.
            keep_last: newest steps to keep, besides the best.
            warn: told, once a step, which one cannot be used and why.
        """
        self.folder, self.keep_last, self.warn = folder.absolute(), keep_last, warn
        self._warned: set[int] = set()
        self._sound: dict[int, bool] = {}

    @functools.cached_property
    def _orbax(self) -> ocp.Checkpointer:
        # Made when it is needed: it starts JAX's devices, of which there are then as many as were asked for before.
        return ocp.Checkpointer(ocp.StandardCheckpointHandler())

    def steps(self) -> list[int]:
        """List the steps on disk, oldest first, whether they can be used or not."""
        try:
            with os.scandir(self.folder) as entries:
                return sorted(int(entry.name) for entry in entries if _is_number(entry.name) and entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise NoCheckpoint(f"{self.folder} cannot be read ({error.strerror}): make it readable.") from error

    def sweep(self) -> None:
        """Remove what dead runs left half written or half deleted. Only who may write here may ask for it."""
        for leftover in (SAVING, DELETING):
            for path in self.folder.glob(f"{leftover}*"):
                _remove(path)

    def save(self, state: StateT, record: dict[str, Any], loss: float) -> Path:
        """Save a state, and wait until it is on the disk; then delete the steps that need not be kept.

        Args:
            state: what to save.
            record: what the state means: config, vocabulary, corpus_sha256, and anything else that JSON can hold.
            loss: by validation, nats per character; tells which step is best.

        Returns:
            The step's folder.

        Raises:
            SaveFailed: where the system refuses; the older steps are as they were.
        """
        _expect_late_callbacks()
        step = int(state.step)
        target, staging = self.folder / str(step), self.folder / f"{SAVING}{step}"
        try:
            self._write(staging, state, record, loss)
            self._put(staging, target)
        except Exception as error:
            raise SaveFailed(self._refusal(step, error)) from error
        finally:
            _remove(staging)
        self._sound[step] = True
        with contextlib.suppress(OSError, Damaged, NoCheckpoint):  # the step is saved; the next save tries again
            self._delete_old()
        return target

    def _write(self, staging: Path, state: StateT, record: dict[str, Any], loss: float) -> None:
        _remove(staging)
        os.makedirs(staging)
        arrays = on_host(state)
        with _quiet(), _until_settled(staging):
            self._orbax.save(staging / ARRAYS, args=ocp.args.StandardSave(arrays))
        full = {
            "format": FORMAT,
            "step": int(state.step),
            "loss": float(loss),
            "versions": _versions(),
            "config_sha256": _sha256_of_json(record.get("config")),
            "arrays": described(dict(named(state))),
            "digest": digest(arrays),
            **record,
        }
        atomic.create_file(staging / RECORD, json.dumps(full).encode())
        with _until_settled(staging):  # orbax can take a refusal of the system for success, and leave a part out
            self._look(staging, arrays)
        manifest.seal(staging)

    def _put(self, staging: Path, target: Path) -> None:
        """Rename a sealed folder to a step; one of that number that cannot be used is moved aside, not deleted."""
        aside = None
        if os.path.lexists(target):
            aside = self._aside(target)
        atomic.replace_folder(staging, target, aside)
        _remove(self.folder / f"{DELETING}{target.name}")

    def _aside(self, target: Path) -> Path:
        """Return where to move a step that is in the way."""
        self._sound.pop(int(target.name), None)
        if self._is_sound(int(target.name)):
            gone = self.folder / f"{DELETING}{target.name}"
            _remove(gone)
            return gone
        names = (Path(f"{target}.damaged-{i}") for i in itertools.count(1))
        return next(path for path in names if not os.path.lexists(path))

    def _delete(self, step: int) -> None:
        """Delete a step, which is gone at once: what is half deleted is no step."""
        going = self.folder / f"{DELETING}{step}"
        _remove(going)
        os.rename(self.folder / str(step), going)
        _remove(going)

    def _refusal(self, step: int, error: Exception) -> str:
        number = getattr(error, "errno", None) or next((n for n in REMEDIES if os.strerror(n) in str(error)), None)
        reason = os.strerror(number) if number else (str(error).splitlines() or [type(error).__name__])[0][:200]
        reason = "what was written cannot be read back" if isinstance(error, Damaged) else reason
        good: list[int] = []
        with contextlib.suppress(NoCheckpoint):
            good = [one for one in self.steps() if one != step and self._is_sound(one)]
        kept = f"the checkpoint of step {good[-1]:,} is still good" if good else "there is no earlier one"
        remedy = REMEDIES.get(number or 0, "see that the disk can be written")
        return (
            f"The checkpoint of step {step:,} could not be written to {self.folder} ({reason}); {kept}: {remedy}, then "
            "give the same command again."
        )

    def _delete_old(self) -> None:
        """Delete all sound steps but the newest few and the best; a step that fails verification is left alone."""
        sound = [step for step in self.steps() if self._is_sound(step)]
        best = min(sound, key=lambda step: _rank(step, self._peek(step)))
        for step in sound:
            if step == best or step in sound[-self.keep_last :]:
                continue
            del self._sound[step]
            if self._is_sound(step):  # looked at anew: it may have been damaged since
                self._delete(step)

    def _is_sound(self, step: int) -> bool:
        """Say whether a step is what was sealed, as far as was seen when this process last looked."""
        if step not in self._sound:
            try:
                self._trusted(step)
                self._sound[step] = True
            except Damaged:
                self._sound[step] = False
        return self._sound[step]

    def choose(self, which: str | int = "best") -> int:
        """Return the number of a step that passes verification: 'latest', 'best' by validation, or that very number.

        Steps that do not pass are left out, each with a warning.

        Raises:
            NoCheckpoint: where there is none, or none of that number.
        """
        return self._first(which, lambda step, record: None)[0]

    def record(self, step: int) -> dict[str, Any]:
        """Read what a step's state means.

        Raises:
            NoCheckpoint: where it fails verification, or was written by a newer version.
        """
        return self._first(step, lambda step, record: None)[1]

    def restore(self, step: int, like: StateT) -> StateT:
        """Read a state.

        Args:
            step: one of `steps()`.
            like: a state with the shapes, dtypes and sharding that are wanted; its values do not matter.

        Raises:
            NoCheckpoint: where the step fails verification or holds something else.
        """
        return self.load(step, lambda record: like)[2]

    def load(self, which: str | int, like_of: Callable[[dict[str, Any]], StateT]) -> tuple[int, dict[str, Any], StateT]:
        """Read the step that `choose` says, or the next one where reading that fails.

        Args:
            which: 'latest', 'best', or a number.
            like_of: takes a step's record and returns a state like the one wanted, or raises what ends the search.

        Returns:
            The step, its record and its state.

        Raises:
            NoCheckpoint: where no step can be used, with each step's reason.
        """

        def use(step: int, record: dict[str, Any]) -> StateT:
            like = like_of(record)
            arrays = self._read(self.folder / str(step), record, like)
            leaves = [placed(arrays[name], leaf) for name, leaf in named(like)]
            return jax.tree.unflatten(jax.tree.structure(like), leaves)

        return self._first(which, use)

    def close(self) -> None:
        """Let go of what reading and writing needed."""
        if "_orbax" in vars(self):
            self._orbax.close()

    def _first(self, which: str | int, use: Callable[[int, dict[str, Any]], T]) -> tuple[int, dict[str, Any], T]:
        """Return the first step, in the order that is asked for, that passes and can be used, and what `use` gave."""
        reasons: dict[int, Damaged] = {}
        steps = self._candidates(which)
        verified = self._verified(steps, reasons, quiet=steps == [which])
        if which == "best":
            verified = iter(sorted(verified, key=lambda pair: _rank(*pair)))
        for step, record in verified:
            try:
                return step, record, use(step, record)
            except Damaged as error:
                self._pass_over(step, error, reasons, quiet=steps == [which])
        if steps == [which]:
            raise NoCheckpoint(f"Checkpoint {which} of {self.folder} cannot be used: {reasons[steps[0]]}.")
        listed = "; ".join(f"{step}: {reasons[step]}" for step in steps)
        raise NoCheckpoint(f"{self.folder} holds no checkpoint that can be used ({listed}).")

    def _candidates(self, which: str | int) -> list[int]:
        """Return the steps to choose from, newest first.

        Raises:
            NoCheckpoint: where there is none, or none of that number.
        """
        steps = self.steps()
        if not steps:
            raise NoCheckpoint(f"{self.folder} holds no checkpoint: train first.")
        if which in ("best", "latest"):
            return steps[::-1]
        if which not in steps:
            raise NoCheckpoint(f"{self.folder} holds no step {which}: it has {', '.join(map(str, steps))}.")
        return [int(which)]

    def _verified(
        self, steps: list[int], reasons: dict[int, Damaged], quiet: bool
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield those of these steps that pass, with their records; keep the reasons of the others."""
        for step in steps:
            try:
                yield step, self._trusted(step)
            except Damaged as error:
                self._pass_over(step, error, reasons, quiet)

    def _pass_over(self, step: int, error: Damaged, reasons: dict[int, Damaged], quiet: bool) -> None:
        reasons[step] = error
        if not quiet and step not in self._warned:
            self._warned.add(step)
            self.warn(f"Checkpoint {step} of {self.folder} is passed over: {error}.")

    def _peek(self, step: int) -> dict[str, Any]:
        return manifest.read_json(self.folder / str(step) / RECORD, MOST_RECORD_BYTES)

    def _trusted(self, step: int) -> dict[str, Any]:
        """Verify a step's files and return its record.

        Raises:
            Damaged: where something is not as it was saved, or this version cannot know what it means.
        """
        manifest.verify(self.folder / str(step))
        record = self._peek(step)
        if not isinstance(record.get("format"), int) or record["format"] > FORMAT:
            raise Damaged(
                RECORD,
                f"has format {record.get('format')!a}, but this version reads up to {FORMAT}: install a newer "
                "chargpt_jax",
            )
        missing = [name for name, kind in MEANING.items() if not isinstance(record.get(name), kind)]
        if missing:
            raise Damaged(RECORD, f"has no {missing[0]}")
        if record.get("step") != step:
            raise Damaged(RECORD, f"is of step {record.get('step')!a}")
        if record.get("config_sha256") != _sha256_of_json(record["config"]):
            raise Damaged(RECORD, "has a config that is not the one it was saved with")
        _check_vocabulary(record["vocabulary"])
        try:
            from_dict(record["config"])
        except UserError as error:
            raise Damaged(RECORD, f"has a config that this version does not know ({str(error).rstrip('.')})") from None
        return record

    def _read(self, folder: Path, record: dict[str, Any], like: StateT) -> Arrays:
        """Read a step's arrays, once it is known that they are those of the record, and of `like`.

        Raises:
            Damaged: where they are not.
        """
        leaves = dict(named(like))
        check_same(RECORD, record["arrays"], described(leaves))
        wanted = {name: stored_shape(leaf) for name, leaf in leaves.items()}
        self._look(folder, wanted)
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in wanted.items()}
        with _unreadable(), _quiet():
            arrays = self._orbax.restore(folder / ARRAYS, args=ocp.args.StandardRestore(shapes))
        if digest(arrays) != record["digest"]:
            raise Damaged(ARRAYS, "holds other numbers than were saved")
        return arrays

    def _look(self, folder: Path, wanted: Mapping[str, Any]) -> None:
        """Compare what a step says of its arrays with those wanted; no memory is taken for them.

        Raises:
            Damaged: where they differ, or orbax cannot tell them.
        """
        _check_room(folder / ARRAYS, wanted)
        with _unreadable(), _quiet():
            found = self._orbax.metadata(folder / ARRAYS).item_metadata.tree
            check_same(ARRAYS, described(found), described(wanted))
            _check_chunks(found)


@contextlib.contextmanager
def _unreadable() -> Iterator[None]:
    """Say in a sentence what orbax stumbles over, in whatever way."""
    try:
        yield
    except Damaged:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise Damaged(ARRAYS, f"cannot be read ({type(error).__name__}: {first})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep orbax from printing the tracebacks of its threads: what went wrong is raised, and told in one sentence."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextlib.contextmanager
def _until_settled(folder: Path) -> Iterator[None]:
    """Raise what is raised once nothing in a folder has changed for a tenth of a second, or after two seconds.

    Where the system refuses one file, orbax's threads go on with others: what is removed meanwhile they make anew.
    """
    try:
        yield
    except Exception:
        before = None
        for _ in range(20):
            now = _contents(folder)
            if now is not None and now == before:
                break
            before = now
            time.sleep(0.1)
        raise


def _contents(folder: Path) -> dict[Path, tuple[int, int]] | None:
    """Return the size and time of change of all that is in a folder, or None where it changes while it is read."""
    try:
        found = {path: path.stat() for path in folder.rglob("*")}
    except OSError:
        return None
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


@functools.cache
def _expect_late_callbacks() -> None:
    """Keep quiet about what else orbax was writing when the system refused: the first refusal is raised and told."""
    tell = sys.unraisablehook
    ours = re.compile(r"(?s)Task exception was never retrieved.*orbax")
    logging.getLogger("asyncio").addFilter(lambda record: not ours.match(record.getMessage()))

    def hook(what: Any) -> None:
        if not (what.exc_type is RuntimeError and str(what.exc_value) == "Event loop is closed"):
            tell(what)

    sys.unraisablehook = hook


def _remove(folder: Path) -> None:
    """Remove a folder, as far as the system lets us within a second."""
    for _ in range(20):
        with contextlib.suppress(OSError):
            shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder):
            return
        time.sleep(0.05)


def _is_number(name: str) -> bool:
    """Say whether a name is a number as we write it: '60', but not '060', '60 (1)' or other alphabets' digits."""
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def _check_vocabulary(vocabulary: list[Any]) -> None:
    """Refuse what a tokenizer would put into another order, and so give other ids."""
    fine = all(isinstance(text, str) and len(text) <= 1 for text in vocabulary)
    if not fine or vocabulary != sorted({"", *vocabulary}):
        raise Damaged(RECORD, "has a vocabulary that is not '' and single characters in order")


def _rank(step: int, record: dict[str, Any]) -> tuple[float, int]:
    """Sort by validation loss, then earlier first; but of those without one the newest first."""
    return (record["loss"], step) if record["loss"] < UNVALIDATED else (UNVALIDATED, -step)


def _check_room(folder: Path, wanted: Mapping[str, Any]) -> None:
    claimed = sum(np.dtype(x.dtype).itemsize * int(np.prod(x.shape, dtype=object)) for x in wanted.values())
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if claimed > ROOM + EXPANSION * there:
        raise Damaged(ARRAYS, f"claims {claimed:,} bytes of arrays in {there:,} bytes of files")


def _check_chunks(found: dict[str, Any]) -> None:
    """Refuse pieces larger than the array they are of, since memory is taken for whole pieces."""
    for name, array in found.items():
        chunk = array.storage.chunk_shape if array.storage else None
        if chunk and any(piece > max(1, whole) for piece, whole in zip(chunk, array.shape, strict=True)):
            raise Damaged(ARRAYS, f"holds {name!r} in pieces of {list(chunk)}")


def _sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@functools.cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy")}
