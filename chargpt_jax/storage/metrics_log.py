"""metrics.jsonl: the losses of a run, one JSON object a line, appended to during training."""

import contextlib
import dataclasses
import itertools
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from chargpt_jax import atomic
from chargpt_jax.config.sections import MAX_STEPS
from chargpt_jax.errors import UserError, remedy

MAX_METRICS = 1 << 30
"""Maximum size of metrics.jsonl, bytes."""

MAX_LINE = 1 << 16
"""Maximum size of a line of metrics.jsonl, bytes; a longer one is split into parts, which are not valid lines."""

NUMBERS = {"step": ("loss",), "validation": ("loss", "bits_per_character", "seconds")}
"""Numbers that a line of metrics.jsonl must have, by its event, in addition to its step; each is below MAX_NUMBER."""

MAX_NUMBER = 1e30


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; [] if there is none. Invalid lines, such as a last one truncated by a crash, are skipped.

    Raises:
        UserError: if the file exists, but is unreadable or larger than MAX_METRICS.
    """
    try:
        facts = os.lstat(path)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_METRICS:
            raise UserError(
                f"{path} cannot be read: it must be a regular file, not a link, of at most "
                f"{MAX_METRICS >> 20} MiB: remove it."
            )
        with open(path, "rb", opener=atomic.regular_only) as file:
            lines = map(_metrics_line, iter(lambda: file.readline(MAX_LINE), b""))
            return [line for line in lines if line is not None]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy(error, 'remove it')}.") from None


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the log of a run must hold."""

    step: int
    """Of the checkpoint."""
    validated: bool
    """Whether the checkpoint has a validation loss, which is logged before the checkpoint is saved."""
    every: int
    """train.log_every; the lines may have been logged with a longer distance."""

    def lacks(self, lines: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether the last of the lines, which are sorted by step, are missing."""
        logged = [0, *(line["step"] for line in lines if line["event"] == "step" and line["step"] <= self.step)]
        if self.validated:
            return all(line["event"] != "validation" or line["step"] != self.step for line in lines)
        return self.step - logged[-1] >= max([self.every, *_distances(logged)])


def seconds_at(lines: Sequence[Mapping[str, Any]], expected: Expected) -> float | None:
    """Return the training time at a checkpoint, as it was logged last; None if these lines are missing."""
    found = sorted((line for line in lines if line["step"] <= expected.step), key=_position)
    return None if expected.lacks(found) else max((line.get("seconds", 0.0) for line in found), default=0.0)


class Log:
    """metrics.jsonl of a run in training. It holds complete lines only, and a failed write does not end the run.

    Lines that the disk refuses stay in memory until it accepts them; a line that was written in part is truncated.
    """

    def __init__(
        self,
        path: Path,
        step: int,
        warn: Callable[[str], None],
        expected: Expected | None = None,
        writes: bool = True,
    ) -> None:
        """Open the log of a run that resumes after a step; lines of later steps are dropped.

        Args:
            path: of metrics.jsonl.
            step: number of training steps done.
            warn: called once if lines are missing or out of order, and once when a write fails for the first time.
            expected: what the file must hold; None: it may lack its last lines.
            writes: whether to write the file at all; False: another process does.
        """
        self._writes = writes
        found = [line for line in read_metrics(path) if line["step"] <= step]
        self.lines = list({(line["step"], line["event"]): line for line in sorted(found, key=_position)}.values())
        """The lines that were in the file, by step, without the dropped and the repeated ones."""
        if fault := _fault(found, self.lines, expected):
            warn(f"{path} {fault}: only the log and its plot are affected, not the model.")
        self._path, self._warn, self._warned = path, warn, False
        self._size: int | None = None
        """Bytes of complete lines in the file; None: rewrite the whole file."""
        self._pending = _json_lines(self.lines)
        self.add([])

    def add(self, lines: Sequence[dict[str, Any]], durably: bool = False) -> None:
        """Append lines, one JSON object each; `durably`: call fsync, so that they survive a power failure."""
        if not self._writes:
            return
        self._pending += _json_lines(lines)
        with self._forgiving():
            if self._size is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                atomic.write_file(self._path, self._pending.encode())
                self._size = len(self._pending)
            else:
                self._size = self._append(self._size, self._pending.encode(), durably)
            self._pending = ""

    def _append(self, size: int, data: bytes, durably: bool) -> int:
        with open(self._path, "ab", opener=atomic.regular_only) as file:
            size = min(size, os.fstat(file.fileno()).st_size)
            file.truncate(size)
            file.write(data)
            file.flush()
            if durably:
                os.fsync(file.fileno())
        return size + len(data)

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                self._warned = True
                self._warn(
                    f"Cannot write {self._path} ({error.strerror}): training continues, and log lines "
                    "stay in memory until the disk is writable."
                )


def _position(line: Mapping[str, Any]) -> tuple[int, bool]:
    """Sort by step; a step is logged before its validation."""
    return line["step"], line["event"] == "validation"


def _fault(found: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]], expected: Expected | None) -> str:
    """Say what is wrong with a log of these lines, of which `lines` are left; '' if it is complete and in order.

    A gap is a distance between logged steps above those before and after it: train.log_every may have changed once.
    """
    if len(found) > len(lines):
        return f"repeats {len(found) - len(lines)} of its lines, which are removed"
    if list(found) != list(lines):
        return "has lines that were out of order, and are sorted"
    steps = [line["step"] for line in lines if line["event"] == "step"]
    apart = _distances([0, *steps])
    for (before, gap, after), step in zip(zip(apart, apart[1:], apart[2:], strict=False), steps[1:], strict=False):
        if gap > max(before, after):
            return f"has no line for some steps before step {step:,}"
    if expected and expected.lacks(lines):
        return f"lacks its last lines up to step {expected.step:,}"
    return ""


def _distances(steps: Sequence[int]) -> list[int]:
    return [after - before for before, after in itertools.pairwise(steps)]


def _json_lines(lines: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _metrics_line(data: bytes) -> dict[str, Any] | None:
    """Parse a line of metrics.jsonl; None if it is invalid."""
    try:
        line = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("event"), str) or type(line.get("step")) is not int:
        return None
    numbers: list[object] = [line.get("seconds", 0), *(line.get(name) for name in NUMBERS.get(line["event"], ()))]
    known = all(isinstance(n, int | float) and type(n) is not bool and abs(n) < MAX_NUMBER for n in numbers)
    return line if known and 0 <= line["step"] < MAX_STEPS else None
