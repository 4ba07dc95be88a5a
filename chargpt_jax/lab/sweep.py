"""Train a sweep: all learning rates and seeds of a config at once, in one program."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chargpt_jax.config import Config, validate
from chargpt_jax.devices import processes, startup
from chargpt_jax.errors import UserError
from chargpt_jax.events import Event
from chargpt_jax.lab import many
from chargpt_jax.lab.folder import SweepFolder, check_rates, check_record
from chargpt_jax.lab.grid import check
from chargpt_jax.lab.loop import SweepLoop
from chargpt_jax.lab.many import ManyState
from chargpt_jax.lab.setup import SweepSetup
from chargpt_jax.storage.checkpoint import Checkpoints
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training.dispatch.pacing import Stop, StopCondition
from chargpt_jax.training.run import Run, Warn, locked
from chargpt_jax.training.stages import without_repeats


def sweep(
    config: Config,
    workdir: str | Path | Workdir,
    warn: Warn = print,
    stop: Stop = lambda: None,
    max_minutes: float | None = None,
) -> Iterator[Event]:
    """Train one run for each learning rate and seed of `config.sweep`, resuming from the newest checkpoint.

    All runs are trained in one program, split over the devices. A run has the initial parameters, the batches and the
    dropout of an ordinary training with its seed and learning rate. A run that diverges is reported, and left out of
    the results; the others go on.

    Args:
        config: of the sweep. `sweep.learning_rates`, or `optimizer.learning_rate`, must be set.
        workdir: of the sweep; no other process may train in it at the same time.
        warn: receives messages for the user.
        stop: called between dispatches and during validations; if it returns the number of a signal, the sweep saves a
            checkpoint and ends.
        max_minutes: time limit from now on, within which a last checkpoint is saved.

    Raises:
        UserError: if the config, the workdir or the text is invalid, or another process trains in the workdir.
        NonFiniteLoss: if all runs diverge.
    """
    condition, warn = StopCondition(stop, max_minutes), without_repeats(warn)
    validate(config)
    check(config)
    processes.check()
    if processes.several():
        raise UserError("A sweep runs in one process, but --distributed has started several: use one.")
    folder = SweepFolder(workdir if isinstance(workdir, str | Path) else workdir.path)
    folder.check_writable()
    with locked(folder) as lock:
        check_rates(config, folder)
        run = Run.prepare(config, folder, warn)
        yield run.prepared()
        setup = SweepSetup.of(run)
        with contextlib.closing(Checkpoints(folder.checkpoints, keep_last=config.train.keep_last, warn=warn)) as store:
            store.sweep()
            with startup.gc_paused():
                state = _restored(setup, folder, store)
            yield from SweepLoop(setup, folder, state, store, lock, condition, warn).events()


def _restored(setup: SweepSetup, folder: SweepFolder, store: Checkpoints) -> ManyState:
    """Return the state of the newest usable checkpoint, or the initial state if there is no checkpoint."""
    if not store.steps():
        return setup.initial_state()

    def like_of(saved: dict[str, Any]) -> ManyState:
        check_record(saved, setup.record(), folder)
        return many.state_shapes(setup.run.config)

    return store.load("latest", like_of)[2]
