"""A sweep's folder: that of a run, with the files of the sweep in a folder of their own.

    config.json   corpus/   lock.json   sweep.svg   sweep/{metrics.jsonl, results.json, checkpoints/}

The files of an ordinary training in the same folder are not touched.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from chargpt_jax.config import Config
from chargpt_jax.config.saved import MAY_CHANGE, differences, from_dict
from chargpt_jax.errors import UserError
from chargpt_jax.events import SweepRow
from chargpt_jax.lab.grid import Member, members
from chargpt_jax.storage.workdir import Workdir

SWEPT_MAY_CHANGE = tuple(name for name in MAY_CHANGE if name != "sweep.")
"""Fields that may change when a sweep is resumed."""


class SweepFolder(Workdir):
    """The paths of a sweep. Preparing a run in it reads and writes the same config and corpus as an ordinary run."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Set the folder; no folder is created yet."""
        super().__init__(path)
        self.metrics = self.sweep_folder / "metrics.jsonl"
        self.checkpoints = self.sweep_folder / "checkpoints"
        self.results = self.sweep_folder / "results.json"
        self.picture = self.path / "sweep.svg"

    def save_results(
        self,
        members: Sequence[Member],
        step: int,
        losses: np.ndarray,
        diverged: np.ndarray,
        rows: Sequence[SweepRow],
    ) -> None:
        """Write what the runs have reached, as JSON; values that are not finite are null."""
        runs = [
            {
                "seed": member.seed,
                "learning_rate": member.learning_rate,
                "loss": finite_or_none(loss),
                "diverged_at_step": int(at) or None,
            }
            for member, loss, at in zip(members, losses, diverged, strict=True)
        ]
        table = [{name: finite_or_none(value) for name, value in vars(row).items()} for row in rows]
        self.write(self.results, json.dumps({"step": step, "learning_rates": table, "runs": runs}, indent=2) + "\n")


def finite_or_none(value: Any) -> Any:
    """Return a number as JSON can hold it: None for NaN and infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_rates(config: Config, folder: SweepFolder) -> None:
    """Check that a sweep will have a learning rate, before the text is read and anything is written.

    Raises:
        UserError: if neither the config sets one nor `find_lr` has found one in this folder.
    """
    if config.optimizer.learning_rate is None and folder.config.exists():
        rate = folder.load_config().optimizer.learning_rate
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=rate))
    members(config)


def check_record(saved: Mapping[str, Any], own: Mapping[str, Any], folder: SweepFolder) -> Config:
    """Compare the record of a sweep's checkpoint with that of the sweep to be resumed; return the config of the former.

    Raises:
        UserError: if config, vocabulary or corpus differ, naming the fields.
    """
    config = from_dict(saved["config"])
    lines = differences(config, from_dict(own["config"]), SWEPT_MAY_CHANGE)
    lines += [f"{name} differs" for name in ("vocabulary", "corpus_sha256") if saved[name] != own[name]]
    if lines:
        raise UserError(
            f"The sweep in {folder.path} was started with another config ({'; '.join(lines[:6])}): use its saved "
            "values, or another --workdir."
        )
    return config
