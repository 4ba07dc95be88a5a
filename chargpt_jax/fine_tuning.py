"""Fine-tuning: start a run from the parameters of another run, on a text of its own.

The vocabulary of the new run has the characters of both texts. A character that the other run knows keeps its
embedding, and a new one is initialised as in any run. The parameters become the new run's checkpoint of step 0, from
which its training starts.

A range test finds no clear answer on parameters that are trained already: their loss falls by less than it varies
between batches. So the learning rate, if the config sets none, is a fraction of the other run's.
"""

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from chargpt_jax.config import Config, ModelConfig
from chargpt_jax.data.tokenizer import CharTokenizer
from chargpt_jax.devices import processes
from chargpt_jax.errors import UserError
from chargpt_jax.generation.loading import load
from chargpt_jax.generation.trained_model import Model
from chargpt_jax.storage.checkpoint import UNVALIDATED, Checkpoints
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training import optimizer
from chargpt_jax.training.run import Run, Warn, checked_workdir, locked
from chargpt_jax.training.setup import Setup
from chargpt_jax.training.step import create_state

SIZES = ("kind", "n_layer", "n_embd", "n_head", "n_head_dim", "n_ff")
"""The fields of a model that decide its parameters and their shapes, besides the vocabulary."""


RATE = 0.5
"""The learning rate of a fine-tuned run, as a fraction of the other run's."""


def start_from(parent: str | Path, config: Config, workdir: str | Path | Workdir, warn: Warn = print) -> None:
    """Prepare a new run, and give it the parameters of another run as its checkpoint of step 0.

    A run that has checkpoints already is left as it is: it has started, and training resumes it.

    Args:
        parent: the workdir of the other run; its best checkpoint is used.
        config: of the new run.
        workdir: of the new run.
        warn: receives messages for the user.

    With several processes, process 0 alone reads the other run.

    Raises:
        UserError: if the models differ in a size, the runs are the same one, or the new run's text was prepared before.
        NoCheckpoint: if the other run has no usable checkpoint.
    """
    folder = checked_workdir(config, workdir)
    if processes.agreed(folder.has_checkpoints()):
        return
    model = processes.on_first(lambda: _fitting_model(parent, config, folder, warn))  # None in the other processes
    with locked(folder):
        run = Run.prepare(config, folder, warn, known=model.tokenizer.vocabulary if model else ())
        processes.on_first(lambda: _check_vocabulary(run, model, parent))
        rate = processes.agreed(model.config.optimizer.learning_rate if model else None)
        if run.config.optimizer.learning_rate is None and rate is not None:
            run = run.with_learning_rate(RATE * rate)
            warn(f"learning rate: {RATE * rate:.2e}, {RATE:g} times that of {parent}; optimizer.learning_rate sets it")
        processes.on_first(lambda: _save_inherited(run, model, warn))


def _fitting_model(parent: str | Path, config: Config, folder: Workdir, warn: Warn) -> Model:
    """Return the model of another run, after checking that a run with this config can start from it."""
    if Workdir(parent).path.resolve() == folder.path.resolve():
        raise UserError(f"--from is {str(parent)!r}, the run's own --workdir: give the folder of another run.")
    model = load(parent, warn=warn)
    _check_sizes(model.config.model, config.model, parent)
    if model.tokenizer.unit != config.data.unit:
        raise UserError(
            f"The tokens of the model of {parent} are {model.tokenizer.unit}s, but data.unit is {config.data.unit!r}: "
            f"set --config.data.unit={model.tokenizer.unit}."
        )
    return model


def _check_vocabulary(run: Run, model: Model | None, parent: str | Path) -> None:
    """Check that the vocabulary of a prepared run has the characters of a model."""
    assert model is not None  # in process 0
    if missing := [c for c in model.tokenizer.vocabulary if c not in run.tokenizer.vocabulary]:
        raise UserError(
            f"The text in {run.workdir.path} was prepared without {missing[0]!r}, which the vocabulary of {parent} "
            "has: use a new --workdir."
        )


def _save_inherited(run: Run, model: Model | None, warn: Warn) -> None:
    """Save the parameters of a model as the checkpoint of step 0 of a run."""
    assert model is not None  # in process 0
    setup = Setup.of(run)
    initial = jax.tree.map(np.asarray, setup.initial_params())
    params = inherited(initial, jax.tree.map(np.asarray, model.params), run.tokenizer, model.tokenizer)
    state = create_state(jax.device_put(params), optimizer.empty(run.config), run.config.seed, setup.dtype)
    with contextlib.closing(Checkpoints(run.workdir.checkpoints, warn=warn)) as store:
        store.save(state, setup.record(), UNVALIDATED)


def inherited(initial: Any, parent: Any, own: CharTokenizer, theirs: CharTokenizer) -> Any:
    """Return another model's parameters for a vocabulary that has all of its characters.

    Args:
        initial: initial parameters of the new model, as nested dicts of arrays.
        parent: parameters of the other model.
        own: the vocabulary of the new model.
        theirs: that of the other model.
    """
    ids = {character: i for i, character in enumerate(own.vocabulary)}
    rows = [ids[character] for character in theirs.vocabulary]  # the first one is padding in both

    def with_own_rows(theirs: np.ndarray, initial: np.ndarray) -> np.ndarray:
        table = initial.copy()
        table[rows] = theirs[: len(rows)]
        return table

    by_character = [name for name in ("wte", "head", "logit_scale") if name in parent]
    return {**parent, **{name: jax.tree.map(with_own_rows, parent[name], initial[name]) for name in by_character}}


def _check_sizes(theirs: ModelConfig, own: ModelConfig, parent: str | Path) -> None:
    differ = [name for name in SIZES if getattr(theirs, name) != getattr(own, name)]
    if differ:
        flags = " ".join(f"--config.model.{name}={getattr(theirs, name)}" for name in differ)
        sizes = ", ".join(f"{name}={getattr(own, name)}" for name in differ)
        raise UserError(f"The model of {parent} differs from {sizes}: set {flags}.")
