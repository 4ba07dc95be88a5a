"""Copy a run to another folder, for example on a network disk, and keep that copy up to date.

The copy of a run is a run: it can be loaded, trained further, and copied back. It stays one if copying is interrupted
at any moment: every file and every checkpoint appears atomically, and a checkpoint is deleted from the copy only after
another one is complete there.
"""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from chargpt_jax import atomic
from chargpt_jax.config.saved import MAY_CHANGE, MAY_CHANGE_BEFORE_A_CHECKPOINT, differences
from chargpt_jax.errors import UserError
from chargpt_jax.storage import lock, manifest
from chargpt_jax.storage.checkpoint import DELETING, SAVING
from chargpt_jax.storage.workdir import SAMPLE_SECONDS, Workdir

FIRST = (
    *("config.json", "corpus/tokens.npy", "corpus/sources.json", "corpus/vocabulary.json", "corpus/manifest.json"),
    "metrics.jsonl",
)
"""The files that are copied first, in this order; then the others, and last the checkpoints.

Without config.json, a folder is not recognised as a copy. The corpus is complete with its manifest. Log lines of steps
after the checkpoint are dropped when a run is resumed, but missing ones cause a warning.
"""

NOT_COPIED = (lock.NAME, "profile", "checkpoints")
"""Items of a run's folder that are not copied as files; checkpoints are copied as folders."""

UNITS = (10**9, 10**6, 1)
"""Nanoseconds: the steps in which file systems store times, the largest first."""


def copy_run(source: str | Path | Workdir, target: str | Path | Workdir) -> None:
    """Copy a run to another folder, or update an earlier copy: only what has changed is copied.

    A new copy appears atomically. The lock, temporary files and profiler traces are not copied. Files that only the
    copy has stay there; checkpoints that only the copy has are deleted at the end.

    Args:
        source: the folder of the run.
        target: the folder of the copy; it and its parents are created if they do not exist.

    Raises:
        UserError: as `check_copy` does; nothing has been written then.
        OSError: if a file cannot be read or written. Everything that was copied before is valid.
    """
    run, copy = Workdir(source), Workdir(target)
    check_copy(run, copy)
    if copy.path.exists():
        _update(run, copy)
        return
    with atomic.creating_folder(copy.path) as new:
        _update(run, Workdir(new))


def check_copy(run: Workdir, copy: Workdir) -> None:
    """Check that a folder is new or empty, or holds an earlier copy of a run.

    Raises:
        UserError: if it holds anything else, such as another run or a newer state of this one, or if there is no run.
    """
    config, paths = run.load_config(), (run.path.resolve(), copy.path.resolve())
    if paths[0].is_relative_to(paths[1]) or paths[1].is_relative_to(paths[0]):
        raise UserError(f"The copy of {run.path} must be outside of it, but is {copy.path}: choose another folder.")
    if not copy.config.exists():
        empty = copy.path.is_dir() and all(atomic.PARTIAL.fullmatch(name) for name in os.listdir(copy.path))
        if empty or not os.path.lexists(copy.path):
            return
        what = "holds other files" if copy.path.is_dir() else "is not a folder"
        raise UserError(
            f"{copy.path} cannot hold a copy of {run.path}, because it {what}: choose a new or an empty folder."
        )
    may_change = MAY_CHANGE if copy.has_checkpoints() else MAY_CHANGE_BEFORE_A_CHECKPOINT
    lines = differences(copy.load_config(), config, may_change)
    facts = [_corpus_facts(folder) for folder in (copy, run)]
    if all(facts) and facts[0] != facts[1]:
        lines.append("the text differs")
    if lines:
        shown = "; ".join(lines[:6])
        raise UserError(f"{copy.path} holds another run than {run.path} ({shown}): choose another folder for the copy.")
    newest, newest_copy = (max(_steps(folder.checkpoints), default=0) for folder in (run, copy))
    if newest_copy > newest:
        raise UserError(
            f"The run in {copy.path} is at step {newest_copy:,}, but the one in {run.path}, which must not replace it, "
            f"is at step {newest:,}: copy the newer one to a new workdir and resume that, or choose another folder "
            "for the copy."
        )


def _corpus_facts(folder: Workdir) -> list[object]:
    """Return the size and sha256 of a run's text and vocabulary; [] if its corpus is not complete."""
    try:
        listed = manifest.read_json(folder.corpus / manifest.NAME, manifest.MAX_BYTES)
    except manifest.Damaged:
        return []
    return [listed.get(name) for name in ("tokens.npy", "vocabulary.json")]


def _update(run: Workdir, copy: Workdir) -> None:
    """Copy what has changed to a folder that exists, in an order that leaves a valid run at any moment."""
    _sweep(copy)
    steps, swept = _steps(run.checkpoints), {copy.path}
    for path in sorted(_files(run), key=_position):
        for parent in reversed(path.parents):
            (copy.path / parent).mkdir(exist_ok=True)
            if copy.path / parent not in swept:
                atomic.sweep(copy.path / parent, SAMPLE_SECONDS)
                swept.add(copy.path / parent)
        _copy_file(run.path / path, copy.path / path)
    before = set(_steps(copy.checkpoints))
    complete = []
    for step in sorted(steps, key=lambda step: (step in before, -step)):  # a replaced one is absent for a moment
        if _copy_checkpoint(run.checkpoints / str(step), copy.checkpoints / str(step)):
            complete.append(step)
    if complete:
        for step in before.difference(steps):
            going = copy.checkpoints / f"{DELETING}{step}"
            os.rename(copy.checkpoints / str(step), going)
            atomic.remove(going)


def _sweep(copy: Workdir) -> None:
    """Remove what an interrupted copy has left."""
    atomic.sweep(copy.path)
    for prefix in (SAVING, DELETING):
        for path in copy.checkpoints.glob(f"{prefix}*"):
            atomic.remove(path)


def _steps(checkpoints: Path) -> list[int]:
    """Return the training steps of the checkpoints in a folder, valid or not."""
    names = [path.name for path in checkpoints.glob("*") if path.name.isdecimal() and path.is_dir()]
    return [int(name) for name in names if str(int(name)) == name]


def _files(run: Workdir) -> Iterator[Path]:
    """Yield the paths of a run's regular files but those of its checkpoints, relative to its folder.

    Links are left out. Only the folders `corpus` and `samples` may be links, as for any run.
    """
    for top in (run.path, *(part for part in (run.corpus, run.samples) if part.is_symlink())):
        for folder, inner, names in os.walk(top, onerror=_fail):
            here = Path(folder).relative_to(run.path)
            left_out = NOT_COPIED if here == Path() else ()
            inner[:] = [name for name in inner if name not in left_out and not atomic.PARTIAL.fullmatch(name)]
            for name in names:
                if name in left_out or atomic.PARTIAL.fullmatch(name):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    if stat.S_ISREG(os.lstat(Path(folder, name)).st_mode):
                        yield here / name


def _position(path: Path) -> tuple[int, str]:
    """Sort the files in the order in which they are copied."""
    name = path.as_posix()
    return (FIRST.index(name) if name in FIRST else len(FIRST)), name


def _copy_file(source: Path, target: Path) -> None:
    """Copy a file with its modification time, unless the target has both already, or the source no longer exists."""
    try:
        facts = os.lstat(source)
        if _is_copied(facts, target):
            return
        file = open(source, "rb", opener=atomic.regular_only)  # noqa: SIM115
    except FileNotFoundError:
        return
    with file, atomic.replacing(target) as copy:
        shutil.copyfileobj(file, copy, 1 << 20)
    with contextlib.suppress(OSError):  # without its time, the file is copied again the next time
        os.utime(target, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def _is_copied(facts: os.stat_result, target: Path) -> bool:
    """Return whether a file has this size and time, as far as its file system stores times."""
    try:
        there = os.lstat(target)
    except FileNotFoundError:
        return False
    unit = next(unit for unit in UNITS if there.st_mtime_ns % unit == 0)
    same_time = abs(there.st_mtime_ns - facts.st_mtime_ns) < unit
    return stat.S_ISREG(there.st_mode) and there.st_size == facts.st_size and same_time


def _copy_checkpoint(source: Path, target: Path) -> bool:
    """Copy a checkpoint, unless it is there already. Return whether the target is complete.

    A damaged checkpoint, or one that is deleted meanwhile, is not copied.
    """
    if manifest.same(source, target):
        return True
    target.parent.mkdir(exist_ok=True)
    staging, going = (target.with_name(f"{prefix}{target.name}") for prefix in (SAVING, DELETING))
    try:
        for folder, _, names in os.walk(source, onerror=_fail):
            below = staging / Path(folder).relative_to(source)
            below.mkdir()
            for name in names:
                shutil.copyfile(Path(folder, name), below / name, follow_symlinks=False)
        manifest.verify(staging)
        atomic.sync_tree(staging)
        atomic.replace_folder(staging, target, going if os.path.lexists(target) else None)
    except manifest.Damaged:
        if _is_valid(source):
            raise OSError(errno.EIO, "the written files cannot be read back", str(target)) from None
        return False
    except FileNotFoundError:
        if source.is_dir():
            raise
        return False
    finally:
        atomic.remove(staging)
    atomic.remove(going)
    return True


def _is_valid(checkpoint: Path) -> bool:
    try:
        manifest.verify(checkpoint)
    except manifest.Damaged:
        return False
    return True


def _fail(error: OSError) -> None:
    raise error
