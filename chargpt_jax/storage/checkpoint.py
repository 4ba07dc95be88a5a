"""Save and restore training states, together with the config and the vocabulary that they belong to.

A checkpoint is a folder named by its training step. It is written under another name, verified, and renamed when it is
complete and on the disk, so that it appears atomically:

    60/arrays/        the state, written by orbax
    60/record.json    config, vocabulary and corpus of the state; names, shapes, dtypes and digest of its arrays
    60/manifest.json  sha256 and size of every file

Every checkpoint is verified before it is loaded. One that fails is skipped with a warning, and never deleted; the next
older one is used instead.
"""

import contextlib
import errno
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import jax

from chargpt_jax import atomic
from chargpt_jax.errors import NoCheckpoint, SaveFailed
from chargpt_jax.storage import checkpoint_record, manifest
from chargpt_jax.storage.arrays.orbax_quirks import ArrayStore
from chargpt_jax.storage.arrays.state_arrays import (
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
from chargpt_jax.storage.checkpoint_record import Record
from chargpt_jax.storage.manifest import Damaged

UNVALIDATED = 1e30
"""The validation loss of a checkpoint without one: such a checkpoint is never the best."""

SAVING, DELETING = ".saving-", ".deleting-"
"""Prefixes of temporary folders, which a killed process can leave behind."""

ARRAYS = "arrays"

FIXES = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "raise the limit on the size of files",
    errno.EROFS: "make the disk writable, or choose another --workdir",
    errno.EACCES: "make the folder writable, or choose another --workdir",
    errno.EPERM: "make the folder writable, or choose another --workdir",
    errno.EIO: "check the disk",
    errno.ENOMEM: "free memory",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs, or raise the system's limit of open files",
}
"""What a user can do about an OS error of a write."""

T = TypeVar("T")


class Checkpoints:
    """The checkpoints of one run. Any number of processes may read them; only one may write."""

    def __init__(self, folder: Path, *, keep_last: int = 2, warn: Callable[[str], None] = print) -> None:
        """Open a folder, which need not exist; nothing in it is changed before the first save.

        Args:
            folder: where the checkpoints are.
            keep_last: number of newest checkpoints to keep, in addition to the best one.
            warn: called once for each checkpoint that fails verification, with the reason.
        """
        self.folder, self.keep_last, self.warn = folder.absolute(), keep_last, warn
        self.arrays = ArrayStore()
        self._warned: set[int] = set()
        self._odd: set[str] = set()
        self._valid: dict[int, bool] = {}

    def steps(self) -> list[int]:
        """List the training steps of the checkpoints on disk, oldest first, valid or not."""
        try:
            with os.scandir(self.folder) as entries:
                names = [entry.name for entry in entries if entry.name.isdecimal() and entry.is_dir()]
            for name in set(filter(_is_odd, names)) - self._odd:
                self._odd.add(name)
                if str(int(name)) not in names:  # otherwise it is a copy
                    self.warn(f"{self.folder / name} is not used: the name of a checkpoint is its step, {int(name)}.")
            return sorted(int(name) for name in names if not _is_odd(name))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise NoCheckpoint(f"{self.folder} cannot be read ({error.strerror}): make it readable.") from error

    def valid_steps(self) -> list[int]:
        """List the training steps of the checkpoints that pass verification, oldest first."""
        return [step for step in self.steps() if self._is_valid(step)]

    def best(self) -> tuple[int, float] | None:
        """Return the training step and the validation loss of the best checkpoint; None if none was validated."""
        step, record = min(
            ((step, self._read_record(step)) for step in self.valid_steps()),
            key=lambda pair: _rank(*pair),
            default=(0, {"loss": UNVALIDATED}),
        )
        return (step, record["loss"]) if record["loss"] < UNVALIDATED else None

    def loss_of(self, step: int) -> float:
        """Return the validation loss of a checkpoint, UNVALIDATED if it has none."""
        return float(self._read_record(step)["loss"])

    def seconds_of(self, step: int) -> float | None:
        """Return the time of the run at a checkpoint, if its length is set in minutes; else None."""
        seconds = self._read_record(step).get("seconds")
        return float(seconds) if isinstance(seconds, int | float) and 0 <= seconds < 1e30 else None

    def sweep(self) -> None:
        """Remove the temporary folders of killed processes. Only the process that holds the lock may call this."""
        for prefix in (SAVING, DELETING):
            for path in self.folder.glob(f"{prefix}*"):
                atomic.remove(path)

    def save(self, state: StateT, record: Mapping[str, object], loss: float) -> Path:
        """Save a state, and wait until it is on the disk; then delete the checkpoints that need not be kept.

        Args:
            state: what to save.
            record: config, vocabulary, corpus_sha256, and anything else that JSON can hold.
            loss: validation loss, nats per character; the lowest is the best checkpoint.

        Returns:
            The folder of the checkpoint.

        Raises:
            SaveFailed: if a file cannot be written; the older checkpoints are unchanged.
        """
        step = int(state.step)
        target, staging = self.folder / str(step), self.folder / f"{SAVING}{step}"
        try:
            self._write(staging, state, record, loss)
            self._install(staging, target)
        except Exception as error:
            raise SaveFailed(self._save_error(step, error)) from error
        finally:
            atomic.remove(staging)
        self._valid[step] = True
        with contextlib.suppress(OSError, Damaged, NoCheckpoint):  # the state is saved; the next save tries again
            self._delete_old()
        return target

    def _write(self, staging: Path, state: StateT, record: Mapping[str, object], loss: float) -> None:
        atomic.remove(staging)
        os.makedirs(staging)
        arrays = on_host(state)
        self.arrays.save(staging / ARRAYS, arrays)
        full = checkpoint_record.complete(record, int(state.step), loss, described(dict(named(state))), digest(arrays))
        atomic.create_file(staging / checkpoint_record.NAME, json.dumps(full).encode())
        manifest.seal(staging)

    def _install(self, staging: Path, target: Path) -> None:
        """Rename a complete folder to a checkpoint. A damaged one of that step is moved aside, not deleted."""
        aside = self._aside(target) if os.path.lexists(target) else None
        atomic.replace_folder(staging, target, aside)
        atomic.remove(self.folder / f"{DELETING}{target.name}")

    def _aside(self, target: Path) -> Path:
        """Return where to move an existing checkpoint of the same step."""
        self._valid.pop(int(target.name), None)
        if self._is_valid(int(target.name)):
            gone = self.folder / f"{DELETING}{target.name}"
            atomic.remove(gone)
            return gone
        names = (Path(f"{target}.damaged-{i}") for i in itertools.count(1))
        return next(path for path in names if not os.path.lexists(path))

    def _delete(self, step: int) -> None:
        """Delete a checkpoint. It is renamed first, so that a half-deleted one does not count."""
        going = self.folder / f"{DELETING}{step}"
        atomic.remove(going)
        os.rename(self.folder / str(step), going)
        atomic.remove(going)

    def _save_error(self, step: int, error: Exception) -> str:
        """Describe a failed save: the reason, the newest valid checkpoint, and the fix."""
        number = getattr(error, "errno", None) or next((n for n in FIXES if os.strerror(n) in str(error)), None)
        reason = os.strerror(number) if number else (str(error).splitlines() or [type(error).__name__])[0][:200]
        reason = "the written files cannot be read back" if isinstance(error, Damaged) else reason
        valid: list[int] = []
        with contextlib.suppress(NoCheckpoint):
            valid = [one for one in self.steps() if one != step and self._is_valid(one)]
        left = f"The checkpoint of step {valid[-1]:,} is still valid" if valid else "There is no earlier checkpoint"
        fix = FIXES.get(number or 0, "check that the disk is writable")
        return (
            f"Cannot write the checkpoint of step {step:,} to {self.folder} ({reason}). {left}: {fix}, then run the "
            "same command again."
        )

    def _delete_old(self) -> None:
        """Delete the valid checkpoints but the newest few and the best; one that fails verification stays."""
        valid = self.valid_steps()
        best = min(valid, key=lambda step: _rank(step, self._read_record(step)))
        for step in valid:
            if step == best or step in valid[-self.keep_last :]:
                continue
            del self._valid[step]
            if self._is_valid(step):  # verified again: it may have been damaged since
                self._delete(step)

    def _is_valid(self, step: int) -> bool:
        """Return whether a checkpoint passed verification when this process last checked it."""
        if step not in self._valid:
            try:
                self._verified_record(step)
                self._valid[step] = True
            except Damaged:
                self._valid[step] = False
        return self._valid[step]

    def load(self, which: str | int, like_of: Callable[[Record], StateT]) -> tuple[int, Record, StateT]:
        """Read a checkpoint. One that fails verification is skipped with a warning, and the next one is used.

        Args:
            which: 'latest', 'best' by validation loss, or a training step.
            like_of: takes the record of a checkpoint, and returns a state with the expected shapes, dtypes and
                sharding (its values are not used). An exception that it raises ends the search.

        Returns:
            The training step, the record and the state.

        Raises:
            NoCheckpoint: if no checkpoint can be used, with the reason for each.
        """

        def use(step: int, record: Record) -> StateT:
            like = like_of(record)
            arrays = self._read_arrays(self.folder / str(step), record, like)
            leaves = [placed(arrays[name], leaf) for name, leaf in named(like)]
            return jax.tree.unflatten(jax.tree.structure(like), leaves)

        return self._first(which, use)

    def close(self) -> None:
        """Release what reading and writing needed."""
        self.arrays.close()

    def _first(self, which: str | int, use: Callable[[int, Record], T]) -> tuple[int, Record, T]:
        """Return the first checkpoint, in the order that `which` asks for, for which `use` does not raise Damaged."""
        reasons: dict[int, Damaged] = {}
        steps = self._candidates(which)
        verified = self._verified(steps, reasons, quiet=steps == [which])
        if which == "best":
            verified = iter(sorted(verified, key=lambda pair: _rank(*pair)))
        for step, record in verified:
            try:
                return step, record, use(step, record)
            except Damaged as error:
                self._skip(step, error, reasons, quiet=steps == [which])
        if steps == [which]:
            raise NoCheckpoint(f"Checkpoint {which} in {self.folder} cannot be used: {reasons[steps[0]]}.")
        listed = "; ".join(f"{step}: {reasons[step]}" for step in steps)
        raise NoCheckpoint(f"No usable checkpoint in {self.folder} ({listed}).")

    def _candidates(self, which: str | int) -> list[int]:
        """Return the training steps to try, newest first.

        Raises:
            NoCheckpoint: if there is no checkpoint, or none of the given step.
        """
        steps = self.steps()
        if not steps:
            raise NoCheckpoint(f"{self.folder} holds no checkpoint: train first.")
        if which in ("best", "latest"):
            return steps[::-1]
        if which not in steps:
            there = ", ".join(map(str, steps))
            raise NoCheckpoint(f"{self.folder} holds no checkpoint of step {which}: it has {there}.")
        return [int(which)]

    def _verified(self, steps: list[int], reasons: dict[int, Damaged], quiet: bool) -> Iterator[tuple[int, Record]]:
        """Yield (step, record) of the checkpoints that pass verification; collect the reasons of the others."""
        for step in steps:
            try:
                yield step, self._verified_record(step)
            except Damaged as error:
                self._skip(step, error, reasons, quiet)

    def _skip(self, step: int, error: Damaged, reasons: dict[int, Damaged], quiet: bool) -> None:
        reasons[step] = error
        if not quiet and step not in self._warned:
            self._warned.add(step)
            self.warn(f"Skipping checkpoint {step} in {self.folder}: {error}.")

    def _read_record(self, step: int) -> Record:
        return manifest.read_json(self.folder / str(step) / checkpoint_record.NAME, checkpoint_record.MAX_BYTES)

    def _verified_record(self, step: int) -> Record:
        """Verify the files of a checkpoint, and return its record.

        Raises:
            Damaged: if a file or a field differs from what was saved, or this version cannot interpret it.
        """
        manifest.verify(self.folder / str(step))
        record = self._read_record(step)
        checkpoint_record.check(record, step)
        return record

    def _read_arrays(self, folder: Path, record: Record, like: StateT) -> Arrays:
        """Read the arrays of a checkpoint, after checking that they are those of the record and of `like`.

        Raises:
            Damaged: if they differ.
        """
        leaves = dict(named(like))
        check_same(checkpoint_record.NAME, record["arrays"], described(leaves))
        arrays = self.arrays.load(folder / ARRAYS, {name: stored_shape(leaf) for name, leaf in leaves.items()})
        if digest(arrays) != record["digest"]:
            raise Damaged(ARRAYS, "holds other values than were saved")
        return arrays


def _is_odd(name: str) -> bool:
    """Return whether a number is not as `save` writes it: '060', or digits of other alphabets."""
    return not name.isascii() or str(int(name)) != name


def _rank(step: int, record: Record) -> tuple[float, int]:
    """Sort by validation loss, then the older first; those without a validation loss come last, the newest first."""
    return (record["loss"], step) if record["loss"] < UNVALIDATED else (UNVALIDATED, -step)
