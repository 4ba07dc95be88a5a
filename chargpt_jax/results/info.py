"""The facts of a run, as JSON can hold them."""

import contextlib
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from chargpt_jax.config import Config
from chargpt_jax.data import batches
from chargpt_jax.devices import sharding
from chargpt_jax.devices.platform import compute_dtype
from chargpt_jax.errors import UserError
from chargpt_jax.events import bits_per_character
from chargpt_jax.generation.trained_model import state_shapes_of
from chargpt_jax.model.flops import training_flops
from chargpt_jax.model.init import count_parameters
from chargpt_jax.storage.checkpoint import UNVALIDATED, Checkpoints
from chargpt_jax.storage.metrics_log import Expected, seconds_at
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training import attention, optimizer
from chargpt_jax.training.dispatch.run_length import fits_from, total_of
from chargpt_jax.training.range_test.saved import result_from
from chargpt_jax.training.run import Warn
from chargpt_jax.training.setup import training_mesh

INFO = (
    *("sources", "characters", "vocabulary", "parameters", "block_size", "steps_per_epoch", "total_steps"),
    *("learning_rate", "step", "seconds", "best_step", "best_loss", "best_bits_per_character"),
    *("unit", "best_bits_per_byte", "devices", "dtype", "trained_on", "compile_seconds", "seconds_per_step"),
    *("flops_per_step", "flops_per_second", "mfu"),
    *("attention", "attention_source", "attention_device", "attention_trial"),
)
"""The facts of `info`, in this order."""


def info(workdir: str | Path | Workdir, warn: Warn = print) -> dict[str, Any]:
    """Return the facts of a run, as JSON can hold them: corpus, model, progress, devices and training speed.

    model/flops.py defines flops_per_step. mfu is flops_per_second as a fraction of the devices' peak; None if the peak
    is not known. None before the first validation: compile_seconds, seconds_per_step, flops_per_second and mfu.
    best_bits_per_byte is None if the unit is the character. seconds is None if the last lines of metrics.jsonl are
    missing. `training.attention.facts` defines those of the attention. `warn` is told which files could not be used.
    """
    facts = all_facts(workdir, warn)
    return {name: facts[name] for name in INFO}


def all_facts(workdir: str | Path | Workdir, warn: Warn = print) -> dict[str, Any]:
    """Return the facts of `info`, and further ones for `facts_in_words`."""
    folder = Workdir(workdir)
    config, sources, speed = folder.load_config(), folder.load_sources(), folder.load_speed(warn)
    mesh = training_mesh(config, tell=False)  # first: it also decides how many CPU devices there are
    _, like = state_shapes_of(config, compute_dtype(config.amp))
    n = int(sum(source["characters"] for source in sources))
    n_train, n_validation = batches.sizes(n, config.data)
    epoch_steps = batches.steps_per_epoch(n_train, config.model.block_size, config.data, config.ancestor.short_epochs)
    with contextlib.closing(Checkpoints(folder.checkpoints, warn=warn)) as store:
        checkpoints, best = store.valid_steps(), store.best()
        step = max(checkpoints, default=0)
        validated = step > 0 and store.loss_of(step) < UNVALIDATED
    return {
        "sources": [source["title"] for source in sources],
        "source_notes": [source.get("notes", []) for source in sources],
        "characters": n,
        "n_train": n_train,
        "n_validation": n_validation,
        "unit": config.data.unit,
        "vocabulary": config.model.used_ids - 1,
        "model_kind": config.model.kind,
        "parameters": count_parameters(like.params),
        **{name: getattr(config.model, name) for name in ("block_size", "n_layer", "n_embd", "n_head", "n_head_dim")},
        "characters_per_step": config.data.batch_size * config.model.block_size,
        "steps_per_epoch": epoch_steps,
        "total_steps": _total_steps(folder, config, epoch_steps, warn),
        "minutes": config.scheduler.minutes,
        "learning_rate": config.optimizer.learning_rate,
        "learning_rate_method": _learning_rate_method(folder, config.optimizer.learning_rate),
        "checkpoints": checkpoints,
        "step": step,
        "seconds": seconds_at(folder.load_metrics(), Expected(step, validated, config.train.log_every)),
        "best_step": best and best[0],
        "best_loss": best and best[1],
        "best_bits_per_character": best and bits_per_character(best[1]),
        "best_bits_per_byte": best and bits_per_character(best[1]) if config.data.unit == "byte" else None,
        "devices": sharding.describe(mesh, jax.device_count()),
        "dtype": jnp.dtype(compute_dtype(config.amp)).name,
        "trained_on": speed.get("device"),
        "compile_seconds": speed.get("compile_seconds"),
        "seconds_per_step": speed.get("seconds_per_step"),
        "flops_per_step": training_flops(config.model, config.data.batch_size),
        "flops_per_second": speed.get("flops_per_second"),
        "mfu": speed.get("mfu"),
        **attention.facts(config, mesh, folder.load_attention(warn), step > 0),
        "report": str(folder.report) if folder.report.is_file() else None,
    }


def _total_steps(folder: Workdir, config: Config, epoch_steps: int, warn: Warn) -> int | None:
    """Return the training steps in the whole run; None if they follow from a speed that was not measured yet."""
    if config.scheduler.minutes is None:
        return optimizer.total_steps(config.scheduler, epoch_steps)
    try:
        return total_of(folder.load_schedule(fits_from), config.scheduler.minutes)
    except UserError as error:
        warn(str(error))
        return None


def _learning_rate_method(folder: Workdir, learning_rate: float | None) -> str | None:
    """Return the method of the range test that found a learning rate; None if none did; '' if it cannot be read."""
    if not os.path.lexists(folder.lr_finder):
        return None
    try:
        found = result_from(folder.load_json(folder.lr_finder))
    except ValueError:
        return ""
    return found.method if found.learning_rate == learning_rate else None
