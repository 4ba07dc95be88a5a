"""The validation set, scored character by character: is a model's own text like it, and what surprised the model?"""

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from chargpt_jax.data import batches
from chargpt_jax.generation.loading import load
from chargpt_jax.generation.passages import Passages
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training.run import Warn

MAX_SCORED = 50_000
"""Characters at the start of the validation set that are scored; `evaluate` gives the loss of all of it."""

MAX_JSON = 64 << 20
"""Maximum size of the saved result, bytes."""


def path_of(folder: Workdir) -> Path:
    """Return the path of the saved result."""
    return folder.samples / "validation.json"


@dataclass(frozen=True)
class Validation:
    """What a model makes of the validation set."""

    step: int
    """Of the model's checkpoint."""
    passages: Passages


def write_validation(workdir: str | Path | Workdir, warn: Warn = print) -> Validation | None:
    """Score the validation set with the run's best model, and save the result in the workdir.

    A saved result of the same checkpoint is kept. Returns None, and writes nothing, if there is no validation set.
    """
    folder = Workdir(workdir)
    model = load(folder, warn=warn)
    with contextlib.suppress(ValueError):  # a damaged file is replaced
        if (saved := load_validation(folder)) and saved.step == model.step:
            return saved
    tokens, config = folder.load_tokens(), folder.load_config()
    n_train, n_validation = batches.sizes(len(tokens), config.data)
    held_out = tokens[n_train:][: min(n_validation, MAX_SCORED)]
    if len(held_out) < 2:
        return None
    found = model.score_long([folder.load_tokenizer().text_of(held_out)], skip_unknown=True)
    folder.write(path_of(folder), json.dumps({"step": model.step, **found.to_dict()}) + "\n")
    return Validation(model.step, found)


def load_validation(folder: Workdir) -> Validation | None:
    """Read the saved result; None if there is none.

    Raises:
        UserError: if the file cannot be read.
        ValueError: if it is malformed.
    """
    if not os.path.lexists(path_of(folder)):
        return None
    saved = folder.load_json(path_of(folder), MAX_JSON, "remove it")
    found = Passages.from_dict(saved)
    if type(saved.get("step")) is not int:
        raise ValueError("it has no step")
    return Validation(saved["step"], found)
