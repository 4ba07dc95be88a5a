"""A copy of a run in another folder, such as a network disk, that is kept up to date while the run trains."""

import contextlib
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from chargpt_jax.config.values import shown
from chargpt_jax.errors import UserError, reason
from chargpt_jax.events import Event, LRFinderResult, Saved
from chargpt_jax.storage.copies import check_copy, copy_run
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training import stages
from chargpt_jax.training.run import Warn


def backed_up(
    events: Iterable[Event], workdir: str | Path | Workdir, folder: str | Path | Workdir, warn: Warn = print
) -> Iterator[Event]:
    """Yield the events of a run, and keep a copy of the run in another folder, as `copy_run` does.

    The copy is updated after the range test, after each checkpoint and at the end. If that fails, for example because
    the disk is full or no longer mounted, one warning says so, and the run continues. `max_minutes` leaves no time for
    the last copy.

    Args:
        events: what `run`, `train`, `find_lr` or `prepare` returns.
        workdir: of the run.
        folder: of the copy; it is created in a folder that must exist.
        warn: receives messages for the user.

    Raises:
        UserError: before the first event, if `events` are no events; with it, if `folder` cannot hold the copy.
    """
    backup = Backup(Workdir(workdir), Workdir(folder), stages.without_repeats(warn))
    if isinstance(events, str) or not isinstance(events, Iterable):
        raise UserError(f"events is {shown(events)}, but it must be what run, train, prepare or find_lr return.")
    started = False
    try:
        for event in events:
            if not started:  # the workdir has its config now
                backup.check()
            started = True
            if isinstance(event, LRFinderResult | Saved):
                backup.update()
            yield event
        if started:
            backup.update()
    finally:
        if isinstance(events, Generator):
            events.close()  # releases the lock, even if the caller keeps the generator


@dataclass(frozen=True)
class Backup:
    """A run and its copy."""

    run: Workdir
    copy: Workdir
    warn: Warn

    def check(self) -> None:
        """Check that the copy's folder can be created, or holds an earlier copy of the run.

        Raises:
            UserError: if not.
        """
        with contextlib.suppress(OSError):  # the first update reports it
            if not self.copy.path.parent.is_dir():
                raise UserError(
                    f"{self.copy.path} is to hold a copy of the run, but {self.copy.path.parent} does not exist: "
                    "create it, mount its disk, or choose another folder."
                )
            check_copy(self.run, self.copy)

    def update(self) -> None:
        """Copy what has changed; if that fails, warn."""
        fault = f"Cannot copy the run to {self.copy.path} ({{}}): the run goes on without it, and tries again later."
        try:
            if self.copy.path.parent.is_dir():  # otherwise its disk is not mounted, and this one would get the copy
                copy_run(self.run, self.copy)
            else:
                self.warn(fault.format(f"{self.copy.path.parent} does not exist"))
        except UserError as error:
            self.warn(str(error))
        except OSError as error:
            self.warn(fault.format(reason(error)))
