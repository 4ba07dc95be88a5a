"""Load a trained model from the checkpoints of a run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from chargpt_jax.config import Config
from chargpt_jax.config.saved import from_dict
from chargpt_jax.data.repair import ALL, DEFAULT
from chargpt_jax.data.tokenizer import CharTokenizer
from chargpt_jax.devices import processes
from chargpt_jax.devices.platform import compute_dtype
from chargpt_jax.errors import NoCheckpoint, UserError
from chargpt_jax.generation.arguments import checked_step
from chargpt_jax.generation.trained_model import Model, state_shapes_of
from chargpt_jax.storage.checkpoint import Checkpoints
from chargpt_jax.storage.workdir import Workdir


def load(workdir: str | Path | Workdir, step: str | int = "best", warn: Callable[[str], None] = print) -> Model:
    """Load a trained model from a run's folder.

    Args:
        workdir: of the run.
        step: 'best' by validation loss, 'latest', or a checkpoint's step.
        warn: called with a message for each damaged checkpoint; another is loaded instead, unless `step` is a number.

    Raises:
        UserError: if the folder is not a run.
        NoCheckpoint: if it has no such checkpoint, or none that passes verification.
    """
    return load_with_record(workdir, step, warn)[0]


def load_with_record(
    workdir: str | Path | Workdir, step: str | int = "best", warn: Callable[[str], None] = print
) -> tuple[Model, dict[str, Any]]:
    """Load a trained model as `load` does; return the record of its checkpoint as well."""
    step = checked_step(step)
    processes.check()
    folder = Workdir(workdir)
    folder.load_config()  # raises if this is not a run
    if not folder.checkpoints.is_dir() and folder.sweep_folder.is_dir():
        raise NoCheckpoint(
            f"{folder.path} holds a sweep, not a single run: take a run out of it with --mode=export --format=run "
            "--seed=0 --out=DIR."
        )
    if not folder.checkpoints.is_dir():
        raise NoCheckpoint(f"{folder.path} holds no checkpoint: train first.")

    models: dict[int, tuple[Config, nnx.GraphDef]] = {}

    def like_of(record: dict[str, Any]) -> Any:
        config = from_dict(record["config"])
        graphdef, like = state_shapes_of(config, compute_dtype(config.amp))
        models[record["step"]] = config, graphdef
        return like

    store = Checkpoints(folder.checkpoints, warn=warn)
    try:
        chosen, record, state = store.load(step, like_of)
    finally:
        store.close()
    config, graphdef = models[chosen]
    vocabulary = _vocabulary(record, folder.checkpoints / str(chosen))
    return Model(config, vocabulary, graphdef, state.params, chosen, repairs_of(folder)), record


def repairs_of(folder: Workdir) -> Sequence[Sequence[str]]:
    """Return the fixes that each text of the corpus got; earlier versions always ran all of them."""
    try:
        return [source.get("repairs", ALL) for source in folder.load_sources()] or [DEFAULT]
    except UserError:  # an imported model, or a model without its corpus
        return [DEFAULT]


def _vocabulary(record: dict[str, Any], where: Path) -> CharTokenizer:
    try:
        return CharTokenizer.from_saved(record.get("vocabulary"))
    except ValueError as error:
        raise NoCheckpoint(f"{where} cannot be used: {error}.") from None
