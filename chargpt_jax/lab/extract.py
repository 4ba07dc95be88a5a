"""Write one run of a sweep as an ordinary run's folder, to load, evaluate, export and train further."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from chargpt_jax.config.saved import from_dict
from chargpt_jax.config.values import argument, shown
from chargpt_jax.errors import NoCheckpoint, UserError
from chargpt_jax.events import bits_per_character
from chargpt_jax.generation.arguments import checked_step
from chargpt_jax.interop.convert import export_place, new_folder
from chargpt_jax.lab import many
from chargpt_jax.lab.folder import SweepFolder
from chargpt_jax.lab.grid import Member, config_of, members
from chargpt_jax.lab.many import ManyState
from chargpt_jax.storage.checkpoint import UNVALIDATED, Checkpoints
from chargpt_jax.storage.metrics_log import Log
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training.run import Run, Warn


def extract(
    workdir: str | Path | Workdir,
    out: str | Path,
    seed: int,
    learning_rate: float | None = None,
    step: str | int = "best",
    warn: Warn = print,
) -> Path:
    """Write one run of a sweep to a new folder, as the run that an ordinary training would have written.

    It has the run's config, its text, its log and one checkpoint. Training in that folder continues from there. The
    seconds in its log are the sweep's, divided by its number of runs.

    Args:
        workdir: of the sweep.
        out: the folder, which must not exist or be empty.
        seed: of the run.
        learning_rate: of the run; it may be None if the sweep has only one.
        step: 'best' by the lowest mean validation loss of a learning rate, 'latest', or a checkpoint's step.
        warn: receives messages for the user.

    Returns:
        The folder.

    Raises:
        UserError: if there is no such run, it diverged, or the folder is not vacant; nothing has been written then.
        NoCheckpoint: if the sweep has no such checkpoint, or none that passes verification.
    """
    seed = argument("seed", seed, int, "give the seed of a run of the sweep")
    path, step = export_place("hf", out), checked_step(step)
    folder = SweepFolder(workdir if isinstance(workdir, str | Path) else workdir.path)
    folder.load_config()  # raises if this is not a run
    if not folder.checkpoints.is_dir():
        raise NoCheckpoint(f"{folder.path} holds no sweep: run --mode=sweep first.")
    run = Run.load(folder)
    with contextlib.closing(Checkpoints(folder.checkpoints, warn=warn)) as store:
        chosen, record, state = store.load(step, lambda record: many.state_shapes(from_dict(record["config"])))
    config = from_dict(record["config"])
    runs = members(config)
    index = _index(runs, seed, learning_rate, folder)
    if at := int(state.diverged[index]):
        raise UserError(
            f"The run with seed {seed} and learning rate {runs[index].learning_rate:g} diverged at step {at:,}: take "
            "another one."
        )
    own = dataclasses.replace(run, config=config_of(config, runs[index]), sources=folder.load_sources())
    lines = _log_of(own, folder.load_metrics(), index, len(runs), chosen)
    with new_folder(path, "--out") as partial:
        _write(Workdir(partial), own, state, index, lines)
    return path


def _index(runs: Sequence[Member], seed: int, learning_rate: float | None, folder: SweepFolder) -> int:
    """Return the index of the run with a seed and a learning rate."""
    rates, seeds = ([*dict.fromkeys(getattr(run, name) for run in runs)] for name in ("learning_rate", "seed"))
    if learning_rate is None and len(rates) > 1:
        raise UserError(
            f"The sweep in {folder.path} has {len(rates)} learning rates ({', '.join(f'{r:g}' for r in rates)}): give "
            "one of them with --learning_rate."
        )
    rate = rates[0] if learning_rate is None else argument("learning_rate", learning_rate, float, "give a number")
    if seed not in seeds:
        raise UserError(
            f"seed is {shown(seed)}, but the sweep in {folder.path} has the seeds {seeds[0]} to {seeds[-1]}: give one "
            "of them."
        )
    if rate not in rates:
        raise UserError(
            f"learning_rate is {rate:g}, but the sweep in {folder.path} has {', '.join(f'{r:g}' for r in rates)}: give "
            "one of them."
        )
    return runs.index(Member(seed, rate))


def _log_of(own: Run, log: Sequence[Mapping[str, Any]], index: int, count: int, step: int) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl of one run up to a step, from those of the sweep."""
    schedule, lines, best = jax.jit(own.schedule()), list[dict[str, Any]](), np.inf
    for line in log:
        if line["event"] not in ("sweep_step", "sweep_validation") or line["step"] > step:
            continue
        loss, common = line["losses"][index], {"step": line["step"], "seconds": line["seconds"] / count}
        if loss is None:
            continue
        if line["event"] == "sweep_step":
            rate = float(schedule(line["step"] - 1))
            lines.append({"event": "step", "loss": loss, "learning_rate": rate, **common})
        else:
            epoch, better, best = line["step"] / own.epoch_steps, loss < best, min(loss, best)
            bits = bits_per_character(loss)
            facts = {"loss": loss, "bits_per_character": bits, "best": bool(better), "epoch": epoch}
            lines.append({"event": "validation", **facts, **common})
    return lines


def _write(folder: Workdir, own: Run, state: ManyState, index: int, lines: list[dict[str, Any]]) -> None:
    """Write the files of one run to an empty folder."""
    step = int(state.step)
    losses = [line["loss"] for line in lines if line["event"] == "validation" and line["step"] == step]
    folder.save_corpus(own.tokenizer, own.tokens, own.sources)
    folder.save_config(own.config)
    Log(folder.metrics, step, lambda text: None).add(lines, durably=True)
    with contextlib.closing(Checkpoints(folder.checkpoints)) as store:
        run = jax.tree.map(lambda x: x[index], state.runs)
        store.save(run, own.record(), losses[0] if losses else UNVALIDATED)
