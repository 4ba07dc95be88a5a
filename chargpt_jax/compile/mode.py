"""`--mode=compile`: compile the programs of a config for a topology, and report what that shows."""

from collections.abc import Callable
from typing import Any

from chargpt_jax.compile import report
from chargpt_jax.compile.compiled import Compiled, compiled, largest_training_batch
from chargpt_jax.compile.largest_batch import Found
from chargpt_jax.compile.programs import training_mesh, with_vocabulary
from chargpt_jax.compile.topology import open_topology
from chargpt_jax.config import Config
from chargpt_jax.errors import UserError
from chargpt_jax.training.attention import expected


def compile_config(
    config: Config,
    topology: str = "v5e:2x4",
    largest: bool = True,
    tell: Callable[[str], None] = print,
    show: Callable[[dict[str, Any]], None] = lambda result: None,
) -> None:
    """Compile the programs for training, validation and generation, and search the largest batch that fits.

    Args:
        config: of the run.
        topology: what to compile for, as in `open_topology`.
        largest: whether to search the largest batch size whose training fits, which takes several compilations.
        tell: called with each line of the report, as soon as it is known.
        show: called with the whole result at the end, as JSON can hold it; also if a program does not fit.

    Raises:
        UserError: if the compiler is missing, the topology is unknown, or a program needs too much memory.
    """
    target = open_topology(topology)
    attention = expected(config, training_mesh(config, target.devices))
    for line in report.introduction(config, target, attention):
        tell(line)
    config = with_vocabulary(config)
    programs = []
    for program in compiled(config, target):
        programs.append(program)
        for line in report.in_words(program, target):
            tell(line)
    first, found = programs[0], None
    if largest and first.limit is not None:
        tell("Searching the largest data.batch_size that fits; --largest_batch=false leaves this out.")
        found = largest_training_batch(config, target, first, lambda each: tell(report.tried_in_words(each)))
        tell(report.largest_in_words(found, first.limit))
    show(report.as_dict(target, attention, programs, found))
    for program in programs:
        if not program.fits:
            raise UserError(_misfit(program, topology, found))


def _misfit(program: Compiled, topology: str, found: Found | None) -> str:
    """Return the sentence about a program that does not fit."""
    reason = program.refusal or f"It {report.fit_in_words(program)}."
    fix = "lower data.batch_size" if program.unit in ("training step", "batch") else "use fewer sample.prompts"
    if program.unit == "training step" and found is not None:
        fix += f" to {found.batch_size}" if found.batch_size else ", or choose a smaller model: no batch size fits"
    return f"{program.name} does not fit into {topology}: {fix}. {reason}"
