"""Schedule, decay mask, AdamW or Muon: one optax transform."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from chargpt_jax.config import MAX_STEPS, OptimizerConfig, SchedulerConfig
from chargpt_jax.devices.sharding import sharded_update
from chargpt_jax.errors import UserError
from chargpt_jax.training.muon import is_hidden, scale_by_muon

EPS = 1e-8
"""What Adam adds to the root of the second moment: the ancestor's, and optax's and PyTorch's default."""


def total_steps(config: SchedulerConfig, epoch_steps: int) -> int:
    """Return the number of updates in a run, at least 1; `epoch_steps` is the number in an epoch.

    Raises:
        UserError: where there are more than can be counted.
    """
    if config.max_steps is not None:
        return config.max_steps
    steps = max(1, round(config.epochs * epoch_steps))
    if steps >= MAX_STEPS:
        raise UserError(
            f"{config.epochs:g} epochs of {epoch_steps:,} steps are too many to count: lower scheduler.epochs."
        )
    return steps


def warmup_cosine(config: SchedulerConfig, peak: float, epoch_steps: int, decay: str = "cosine") -> optax.Schedule:
    """Return the learning rate of each update, counted from 0.

    Linear from min_lr_factor x peak at update 0 to the peak after warmup_epochs, then a half cosine that reaches
    min_lr_factor x peak at the last update; in a run shorter than its warm-up, the last update reaches the peak. With
    decay 'none', like the original, the rate stays at the peak, and the warm-up keeps its length.
    """
    last = total_steps(config, epoch_steps) - 1
    warmup = round(config.warmup_epochs * epoch_steps)
    if decay == "none":
        rate = optax.constant_schedule(peak)
    else:
        warmup = min(warmup, last)
        rate = optax.cosine_decay_schedule(peak, max(1, last - warmup), alpha=config.min_lr_factor)
    if warmup:
        rate = optax.join_schedules([optax.linear_schedule(config.min_lr_factor * peak, peak, warmup), rate], [warmup])
    # Counted in floats: optax would divide the int32 count in float32, under x64 too.
    return lambda count: rate(jnp.asarray(count, float))


def decay_mask(params: dict[str, Any]) -> dict[str, Any]:
    """Mark with True the arrays that weight decay shrinks: matrices and the embedding, not biases and scales.

    Arrays under 'blocks' carry a leading axis of layers, which does not count towards their rank.
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: x.ndim - (path[0].key == "blocks") >= 2, params)


def transform(
    config: OptimizerConfig, learning_rate: optax.ScalarOrSchedule, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Build the optimizer that a config asks for, after clipping where it asks for that.

    Args:
        config: of the optimizer.
        learning_rate: a number, or a function from the number of updates made before to it.
        mesh: the devices that share an update's work; None: each does it all.
    """
    update = (adamw if config.kind == "adamw" else muon)(config, learning_rate, mesh)
    if config.clip_norm is None:
        return update
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def adamw(
    config: OptimizerConfig, learning_rate: optax.ScalarOrSchedule, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Build AdamW (Loshchilov and Hutter 2019) with the decay mask."""
    b1, b2 = config.betas
    update = optax.adamw(learning_rate, b1=b1, b2=b2, eps=EPS, weight_decay=config.weight_decay, mask=decay_mask)
    return sharded_update(update, mesh)


def muon(
    config: OptimizerConfig, learning_rate: optax.ScalarOrSchedule, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Build Muon for the layers' matrices, muon_factor times as fast, and AdamW for all else; decay as AdamW's."""
    b1, b2 = config.betas
    hidden = optax.chain(scale_by_muon(config.muon_momentum, config.muon_steps, mesh), optax.scale(config.muon_factor))
    kinds = {"muon": hidden, "adamw": sharded_update(optax.scale_by_adam(b1=b1, b2=b2, eps=EPS), mesh)}
    return optax.chain(
        optax.partition(kinds, partial(jax.tree_util.tree_map_with_path, _kind)),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _kind(path: tuple[Any, ...], x: Any) -> str:
    return "muon" if is_hidden(path, x) else "adamw"
