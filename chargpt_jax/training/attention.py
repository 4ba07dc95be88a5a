"""Which attention the training steps of a run use: as the config says, as before in the run, or by a trial."""

import contextlib
import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from chargpt_jax.config import Config
from chargpt_jax.devices import layout, processes, sharding
from chargpt_jax.devices.platform import compute_dtype
from chargpt_jax.errors import UserError, excused
from chargpt_jax.events import AttentionChosen, AttentionTried, Event
from chargpt_jax.ops import choose
from chargpt_jax.ops.kernels.trial import Shape, fastest
from chargpt_jax.storage.checkpoint import Checkpoints
from chargpt_jax.training.run import Run, Warn
from chargpt_jax.training.setup import training_mesh

AUTO = "auto"
"""The value of train.attention that lets the run choose."""


def check(config: Config, mesh: Mesh | None = None) -> None:
    """Check that devices can train with the config's attention, before anything is written.

    Args:
        config: of the run.
        mesh: of the devices; None: those of this process, which must have the config's mesh.

    Raises:
        UserError: if they cannot.
    """
    asked, model = config.train.attention, config.model
    mesh = training_mesh(config, tell=False) if mesh is None else mesh
    if asked in (AUTO, choose.BLOCKS):
        return
    names = _attentions(config, mesh)
    if asked not in names:
        raise UserError(
            f"train.attention is {asked!r}, but on {sharding.describe(mesh)} with heads of width {model.n_head_dim}, "
            f"{model.block_size} characters and dropout {model.dropout:g} it must be {' or '.join(names)}: set one of "
            "these, or auto."
        )


def expected(config: Config, mesh: Mesh) -> str:
    """Return the attention that a run on these devices uses, if its trial finds that the kernels are faster.

    Raises:
        UserError: if the devices cannot train with the config's attention.
    """
    check(config, mesh)
    if config.train.attention != AUTO:
        return config.train.attention
    names = _attentions(config, mesh)
    return choose.KERNEL if choose.KERNEL in names else names[-1]


def _attentions(config: Config, mesh: Mesh) -> tuple[str, ...]:
    """Return the attentions that the devices of a mesh can train with."""
    model = config.model
    device = mesh.devices.flat[0]
    dtype = compute_dtype(config.amp, device)
    return choose.attentions_for(device, dtype, model.block_size, model.n_head_dim, model.dropout)


def chosen(run: Run, warn: Warn) -> Generator[Event, None, Run]:
    """Return the run with the attention of its training steps: as set, as saved in the run, or found by a trial.

    A run that has made training steps without a choice used blocks, and keeps its bits. With several processes,
    process 0 decides.
    """
    asked, mesh = run.config.train.attention, training_mesh(run.config, tell=False)
    names = _attentions(run.config, mesh)
    if asked == choose.BLOCKS or (asked == AUTO and len(names) == 1):
        return run
    if asked != AUTO:
        result = AttentionChosen(asked, "config")
    else:
        found = processes.on_first(lambda: _automatic(run, names, mesh, warn))
        name = processes.agreed(found and found.name)
        result = found or AttentionChosen(str(name), "run")
    yield result
    return dataclasses.replace(run, attention=result.name)


def _automatic(run: Run, names: tuple[str, ...], mesh: Mesh, warn: Warn) -> AttentionChosen:
    """Return the attention that the run has used before; without one, or under other conditions, the fastest."""
    conditions, saved = _conditions(run.config, mesh), run.workdir.load_attention(warn)
    with contextlib.closing(Checkpoints(run.workdir.checkpoints)) as store:
        has_trained = max(store.steps(), default=0) > 0
    kept = saved.get("attention", choose.BLOCKS if has_trained else "")
    if kept in names and saved.get("conditions", conditions) == conditions:
        return AttentionChosen(kept, "run")
    return _fastest(run, names, conditions, mesh, warn)


def _conditions(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Return what decides which attention is the fastest; a run whose conditions change tries them again."""
    shape = dataclasses.asdict(shape_of(config, mesh))
    return {
        **{name: value for name, value in shape.items() if name != "remat"},
        "dtype": jnp.dtype(compute_dtype(config.amp)).name,
        "device": mesh.devices.flat[0].device_kind,
        "jax": jax.__version__,
    }


def _fastest(run: Run, names: tuple[str, ...], conditions: dict[str, Any], mesh: Mesh, warn: Warn) -> AttentionChosen:
    """Try the attentions on a device of the run, and save the fastest in its workdir."""

    def save(name: str, tried: Sequence[dict[str, Any]] = ()) -> None:
        with excused(str(run.workdir.attention), warn):
            run.workdir.save_attention({"attention": name, "conditions": conditions, "tried": tried})

    config = run.config
    shape, dtype = shape_of(config, mesh), compute_dtype(config.amp)
    # A kernel may end the process, or leave its device unusable. The next start then has a choice that runs.
    save(choose.BLOCKS)
    try:
        results = choose.try_attentions(names, shape, dtype, config.model.attention_block, mesh)
    except KeyboardInterrupt:
        run.workdir.attention.unlink(missing_ok=True)
        raise
    except Exception:
        warn("The trial of attention kernels failed: run the same command again, which will use 'blocks'.")
        raise
    name, tried = fastest(results), [dataclasses.asdict(one) for one in results]
    save(name, tried)
    return AttentionChosen(name, "trial", tuple(AttentionTried(**one) for one in tried))


def facts(config: Config, mesh: Mesh, saved: Mapping[str, Any], has_trained: bool) -> dict[str, Any]:
    """Return which attention the training steps of a run use and why, as JSON can hold it.

    Args:
        config: of the run.
        mesh: the devices here.
        saved: the content of attention.json, {} without one: untrusted input.
        has_trained: whether the run has made training steps.

    Returns:
        attention: its name; None: a trial will choose it.
        attention_source: 'config', 'trial', 'device' (the devices here have no other one) or 'run' (the run began
            without a choice).
        attention_device: the kind of device of the trial, or None.
        attention_trial: the results of the trial, as in attention.json.
    """
    name: str | None = config.train.attention
    source: str | None = "config"
    device, trial = None, []
    if name == AUTO and saved.get("attention") in choose.ATTENTIONS:
        name, source, trial = saved["attention"], "trial", saved.get("tried", [])
        device = saved["conditions"].get("device")
    elif name == AUTO and len(_attentions(config, mesh)) == 1:
        name, source = choose.BLOCKS, "device"
    elif name == AUTO:
        name, source = (choose.BLOCKS, "run") if has_trained else (None, None)
    return {"attention": name, "attention_source": source, "attention_device": device, "attention_trial": trial}


def shape_of(config: Config, mesh: Mesh) -> Shape:
    """Return the shape of one layer's attention in a training step, on each device of a mesh."""
    model, tensor = config.model, mesh.shape["tensor"] if layout.splits_parameters(mesh) else 1
    sequences = config.data.batch_size // config.optimizer.accumulation_steps // (mesh.size // tensor)
    return Shape(sequences, model.n_head // tensor, model.block_size, model.n_head_dim, model.dropout, model.remat)
