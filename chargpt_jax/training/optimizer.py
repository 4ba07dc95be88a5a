"""The optimizer as one optax transformation: learning-rate schedule, decay mask, AdamW or Muon, unit norms."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from chargpt_jax.config import Config, OptimizerConfig, SchedulerConfig
from chargpt_jax.config.sections import MAX_STEPS
from chargpt_jax.devices.sharding import sharded_update
from chargpt_jax.errors import UserError
from chargpt_jax.model.ngpt import unit_norm
from chargpt_jax.training.muon import is_layer_matrix, scale_by_muon

EPS = 1e-8
"""Added to the root of Adam's second moment: the value of the original, and optax's and PyTorch's default."""


def total_steps(config: SchedulerConfig, epoch_steps: int) -> int | None:
    """Return the number of training steps in a run, at least 1; `epoch_steps` is the number in an epoch.

    None if the config sets minutes: the number follows from the speed (dispatch/run_length.py).

    Raises:
        UserError: if the number is too large for the step counter.
    """
    if config.minutes is not None:
        return None
    if config.max_steps is not None:
        return config.max_steps
    steps = max(1, round(config.epochs * epoch_steps))
    if steps >= MAX_STEPS:
        raise UserError(
            f"{config.epochs:g} epochs of {epoch_steps:,} steps are too many to count: lower scheduler.epochs."
        )
    return steps


def warmup_cosine(config: SchedulerConfig, peak: float, epoch_steps: int, decay: str = "cosine") -> optax.Schedule:
    """Return the learning rate as a function of the step, counted from 0.

    Linear from min_lr_factor x peak at step 0 to the peak after warmup_epochs, then a half cosine that reaches
    min_lr_factor x peak at the last step. In a run shorter than its warm-up, the last step reaches the peak. With
    decay 'none', like the original, the learning rate stays at the peak, and the warm-up is never shortened.
    """
    total = total_steps(config, epoch_steps)
    assert total is not None  # a run of given minutes has set max_steps to the number that fits
    last = total - 1
    warmup = round(config.warmup_epochs * epoch_steps)
    if decay == "none":
        rate = optax.constant_schedule(peak)
    else:
        warmup = min(warmup, last)
        rate = optax.cosine_decay_schedule(peak, max(1, last - warmup), alpha=config.min_lr_factor)
    if warmup:
        rate = optax.join_schedules([optax.linear_schedule(config.min_lr_factor * peak, peak, warmup), rate], [warmup])
    # The count is converted to float here: optax would divide the int32 count in float32, under x64 too.
    return lambda count: rate(jnp.asarray(count, float))


def decay_mask(params: dict[str, Any]) -> dict[str, Any]:
    """Return True for the arrays that weight decay applies to: matrices and the embedding, not biases and scales.

    Arrays under 'blocks' have a leading axis of layers, which does not count towards their rank.
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: x.ndim - (path[0].key == "blocks") >= 2, params)


def make_optimizer(
    config: Config, learning_rate: optax.ScalarOrSchedule, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Return the optimizer of a config, with gradient clipping if the config sets it.

    Args:
        config: of the run.
        learning_rate: a number, or a function from the step, counted from 0, to a number.
        mesh: the devices that shard the update; None: one device.
    """
    own = config.optimizer
    update = (adamw if own.kind == "adamw" else muon)(own, learning_rate, mesh)
    if own.clip_norm is not None:
        update = optax.chain(optax.clip_by_global_norm(own.clip_norm), update)
    return with_unit_norms(update) if config.model.kind == "ngpt" else update


def with_unit_norms(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return an optimizer after whose updates the matrices of an nGPT have vectors of length 1, up to rounding."""

    def update(
        gradient: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = tx.update(gradient, state, params)
        return jax.tree.map(jnp.subtract, unit_norm(optax.apply_updates(params, updates)), params), state

    return optax.GradientTransformation(tx.init, update)


def empty(config: Config) -> optax.GradientTransformation:
    """Return an optimizer whose state has the structure of a run's, for use where no learning rate is known.

    A run's learning rate is a schedule, which adds a step counter to the state; here the schedule is zero.
    """
    return make_optimizer(config, optax.constant_schedule(0.0))


def adamw(
    config: OptimizerConfig, learning_rate: optax.ScalarOrSchedule, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Return AdamW (Loshchilov and Hutter 2019) with the decay mask."""
    b1, b2 = config.betas
    update = optax.adamw(learning_rate, b1=b1, b2=b2, eps=EPS, weight_decay=config.weight_decay, mask=decay_mask)
    return sharded_update(update, mesh)


def muon(
    config: OptimizerConfig, learning_rate: optax.ScalarOrSchedule, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Return Muon for the layers' matrices and AdamW for all other arrays, with AdamW's weight decay.

    The matrices' learning rate is muon_factor times the learning rate of the other arrays.
    """
    b1, b2 = config.betas
    hidden = optax.chain(scale_by_muon(config.muon_momentum, config.muon_steps, mesh), optax.scale(config.muon_factor))
    kinds = {"muon": hidden, "adamw": sharded_update(optax.scale_by_adam(b1=b1, b2=b2, eps=EPS), mesh)}
    return optax.chain(
        optax.partition(kinds, partial(jax.tree_util.tree_map_with_path, _kind)),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _kind(path: tuple[jax.tree_util.DictKey, ...], x: jax.Array) -> str:
    return "muon" if is_layer_matrix(path, x) else "adamw"
