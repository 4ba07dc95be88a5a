"""The grid of a sweep: one run for each learning rate and each seed, and the config of each run."""

import dataclasses
from dataclasses import dataclass

from chargpt_jax.config import Config, MeshConfig
from chargpt_jax.config.sections import SweepConfig
from chargpt_jax.errors import UserError

MAX_RUNS = 1_024
"""Runs of one sweep, at most: a line of its log holds the loss of each."""

MAX_SEED = 2**31 - 1


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    seed: int
    """Of the initial parameters, the batches and dropout."""
    learning_rate: float
    """Peak of its schedule."""


def members(config: Config) -> tuple[Member, ...]:
    """Return the runs of a sweep: the seeds of the first learning rate, then those of the second, and so on.

    Raises:
        UserError: if there is no learning rate, or one is given twice, or there are too many runs.
    """
    rates, seeds = learning_rates(config), config.sweep.seeds
    if len(set(rates)) < len(rates):
        twice = next(rate for rate in rates if rates.count(rate) > 1)
        raise UserError(f"sweep.learning_rates has {twice:g} twice, but all of them must differ: give it once.")
    if len(rates) * seeds > MAX_RUNS:
        raise UserError(
            f"sweep.seeds is {seeds}, which with {len(rates)} learning rates makes {len(rates) * seeds:,} runs, but a "
            f"sweep has at most {MAX_RUNS:,}: lower it."
        )
    if config.seed + seeds - 1 > MAX_SEED:
        raise UserError(
            f"seed is {config.seed}, but with sweep.seeds ({seeds}) the last seed must be at most {MAX_SEED}: lower it."
        )
    return tuple(Member(config.seed + i, rate) for rate in rates for i in range(seeds))


def learning_rates(config: Config) -> tuple[float, ...]:
    """Return the learning rates of a sweep.

    Raises:
        UserError: if the config sets none.
    """
    if config.sweep.learning_rates:
        return tuple(map(float, config.sweep.learning_rates))
    if config.optimizer.learning_rate is None:
        raise UserError(
            "sweep.learning_rates is empty and optimizer.learning_rate is not set, but a sweep needs a learning rate: "
            "give --config.sweep.learning_rates=1e-3,3e-3, for example, or run --mode=find_lr first."
        )
    return (config.optimizer.learning_rate,)


def check(config: Config) -> None:
    """Check that a config can be trained as a sweep; the learning rate may still be missing.

    Raises:
        UserError: if it asks for what a sweep does not do.
    """
    if config.sweep.learning_rates or config.optimizer.learning_rate is not None:
        members(config)
    if config.mesh != MeshConfig():
        raise UserError(
            "mesh.* is set, but a sweep gives each device whole runs and cannot split one over devices: leave it out."
        )
    if config.train.stream == "always":
        raise UserError(
            "train.stream is 'always', but a sweep keeps its training set on the devices: leave it at 'auto'."
        )
    if config.scheduler.minutes is not None:
        raise UserError(
            f"scheduler.minutes is {config.scheduler.minutes:g}, but the length of a sweep's runs is set by "
            "scheduler.max_steps or scheduler.epochs: set one of them."
        )
    if config.ancestor.random_validation:
        raise UserError(
            "ancestor.random_validation is True, but the runs of a sweep are validated on the full validation set: "
            "leave it out."
        )


def config_of(config: Config, member: Member) -> Config:
    """Return the config of one run of a sweep, as an ordinary training of it would have it."""
    optimizer = dataclasses.replace(config.optimizer, learning_rate=member.learning_rate)
    return dataclasses.replace(config, optimizer=optimizer, seed=member.seed, sweep=SweepConfig())
