"""Save and restore a training state together with the config and the vocabulary that give it meaning.

Orbax writes each step into a folder of its own and renames it into place when it is whole. The newest few are kept,
and the best by validation. Arrays of equal shape can mean different models (heads, dropout, the order of the
vocabulary), so every step carries a JSON record that says which model it is.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from chargpt_jax.step import TrainState

FORMAT = 1
"""Of what a step holds; a reader refuses a newer one."""

SMALL = 1_000_000
"""Parameters up to which saving waits for the disk: it takes a fraction of a second, and is durable when it returns."""

UNVALIDATED = 1e30
"""The validation loss of a checkpoint that was not validated: it is never the best."""


class NoCheckpoint(Exception):
    """There is no checkpoint that can be used; `main` turns it into exit code 3."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, *, keep_last: int = 2, parameters: int = 0):
        """Open a folder, which need not exist.

        Args:
            folder: where the steps are.
            keep_last: newest steps to keep, besides the best.
            parameters: of the model; above `SMALL`, saves go on in the background.
        """
        self.folder = folder.absolute()  # orbax refuses a relative path late, in its background thread
        best = policies.BestN(get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            best_fn=_loss,
            best_mode="min",
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep_last), best]),
            enable_async_checkpointing=parameters > SMALL,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """List the steps on disk, oldest first."""
        return sorted(self._manager.all_steps())

    def choose(self, which: str | int = "best") -> int:
        """Return the number of a step: 'latest', 'best' by validation, or that very number.

        Raises:
            NoCheckpoint: where there is none, or none of that number.
        """
        steps = self.steps()
        if not steps:
            raise NoCheckpoint(f"{self.folder} holds no checkpoint: train first.")
        if which == "latest":
            return steps[-1]
        if which == "best":
            best = self._manager.best_step()
            return steps[-1] if best is None else best
        if which not in steps:
            raise NoCheckpoint(f"{self.folder} holds no step {which}: it has {', '.join(map(str, steps))}.")
        return int(which)

    def save(self, state: TrainState, record: dict[str, Any], loss: float) -> Path:
        """Save a state; waits for the disk where the model is small.

        Args:
            state: what to save.
            record: what the state means: anything JSON can hold.
            loss: by validation, nats per character; tells which step is best.

        Returns:
            The step's folder.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            self._manager.delete(step)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(vars(state)), record=ocp.args.JsonSave({"format": FORMAT, **record})
        )
        self._manager.save(step, args=items, metrics={"loss": loss}, force=True)
        return self.folder / str(step)

    def record(self, step: int) -> dict[str, Any]:
        """Read what a step's state means.

        Raises:
            NoCheckpoint: where it cannot be read, or was written by a newer version.
        """
        try:
            record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record
        except Exception as error:
            raise NoCheckpoint(f"The record of {self.folder / str(step)} cannot be read: {error}") from error
        if record["format"] > FORMAT:
            raise NoCheckpoint(
                f"{self.folder / str(step)} has format {record['format']}, but this version reads up to {FORMAT}: "
                "install a newer chargpt_jax."
            )
        return record

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Read a state.

        Args:
            step: one of `steps()`.
            like: a state with the shapes, dtypes and sharding that are wanted; its values do not matter.

        Raises:
            NoCheckpoint: where it cannot be read.
        """
        wanted = ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, vars(like)))
        try:
            return TrainState(**self._manager.restore(step, args=ocp.args.Composite(state=wanted)).state)
        except Exception as error:
            raise NoCheckpoint(f"{self.folder / str(step)} cannot be restored: {error}") from error

    def close(self) -> None:
        """Wait for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]
