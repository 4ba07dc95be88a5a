"""Compile the programs of a config for a topology, and collect what that shows about each of them."""

import dataclasses
import re
import time
from collections.abc import Callable, Iterator

import jax

from chargpt_jax.compile.accelerators import usable_memory
from chargpt_jax.compile.hlo import NOTHING, Work, work_per_unit
from chargpt_jax.compile.largest_batch import Found, Need, largest_batch, predicted_batch
from chargpt_jax.compile.matmul_flop import matmul_flop
from chargpt_jax.compile.programs import Program, programs
from chargpt_jax.compile.topology import Topology
from chargpt_jax.config import Config
from chargpt_jax.devices.platform import compute_dtype
from chargpt_jax.errors import UserError
from chargpt_jax.model.flops import peak_flops

MAX_BATCH = 2**20
"""Largest batch size that the search considers."""

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
"""Bytes per unit in the messages of XLA's compilers."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program as it was compiled, or the compiler's refusal; figures are per device."""

    name: str
    unit: str
    """What the figures of work, FLOP and bytes refer to: 'training step', 'batch', 'decoding step'."""
    devices: str
    """In words."""
    device_count: int
    seconds: float
    """Of compilation."""
    arguments: int
    """Bytes."""
    outputs: int
    """Bytes of the outputs that do not overwrite donated arguments."""
    temporaries: int
    """Bytes in the device's memory."""
    peak: int
    """Bytes that are in use at once, those on the chip included; 0: unknown."""
    limit: int | None
    """Bytes that a program can use; None: unknown."""
    work: Work
    flop: float
    """Of matrix multiplications, per unit."""
    least_bytes: dict[str, int]
    """{what: bytes that must be read and written at least, per unit}."""
    flop_seconds: float | None
    """FLOP / peak FLOP/s; None: the peak is unknown."""
    byte_seconds: float | None
    """Least bytes / memory bandwidth; None: the bandwidth is unknown."""
    refusal: str = ""
    """The compiler's message, if the program needs too much memory."""
    compiler_decides: bool = False
    """Whether the compiler refuses every program that does not fit, as that of TPUs does."""

    @property
    def total(self) -> int:
        """Bytes of arguments, additional outputs and temporaries."""
        return self.arguments + self.outputs + self.temporaries

    @property
    def needed(self) -> float | None:
        """Bytes that a device must have, also those that a refusal names; None: unknown.

        On a TPU the temporaries do not all exist at once, but some stay on the chip: the smaller of the total and the
        peak counts.
        """
        if self.refusal:
            used = re.search(r"(?:[Uu]sed |temporaries \()([\d.]+)([KMGT])", self.refusal)
            return float(used[1]) * UNITS[used[2]] if used else None
        return float(min(self.total, self.peak) if self.compiler_decides and self.peak else self.total)

    @property
    def fits(self) -> bool:
        """Whether the program fits into the memory of a device."""
        return not self.refusal and (self.compiler_decides or self.limit is None or self.total <= self.limit)

    @property
    def bound_seconds(self) -> float | None:
        """The roofline bound: no device of this kind computes a unit in less time; None: unknown."""
        known = [seconds for seconds in (self.flop_seconds, self.byte_seconds) if seconds is not None]
        return max(known, default=None)


def compiled(config: Config, topology: Topology) -> Iterator[Compiled]:
    """Compile the programs for training, validation and generation.

    Raises:
        UserError: if a slice cannot run a batch that does not use all of its devices.
    """
    for program in programs(config, topology.devices):
        yield compile_program(program, config, topology)


def compile_program(program: Program, config: Config, topology: Topology) -> Compiled:
    """Compile one program of a config.

    Raises:
        UserError: if the topology cannot run a program that does not use all of its devices.
    """
    began = time.perf_counter()
    traced = program.function.trace(*program.args, **program.static)
    lowered = traced.lower(lowering_platforms=(topology.lowering_platform,))
    refusal, work, sizes = "", NOTHING, (0, 0, 0, 0)
    try:
        executable = lowered.compile(compiler_options=topology.compiler_options or None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            _check_all_devices(program, topology)
            raise
        refusal = str(error).splitlines()[0]
    else:
        memory = executable.memory_analysis()
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak = getattr(memory, "peak_memory_in_bytes", 0)  # older versions of JAX do not have it
        sizes = memory.argument_size_in_bytes, outputs, memory.temp_size_in_bytes, peak
        work = work_per_unit(executable.as_text())
    seconds = time.perf_counter() - began
    device, accelerator = topology.devices[0], topology.accelerator
    flop = matmul_flop(traced.jaxpr) / program.device_count
    peak = peak_flops(device, jax.numpy.dtype(compute_dtype(config.amp, device)).name)
    moved = sum(program.least_bytes.values())
    return Compiled(
        *(program.name, program.unit, program.devices, program.device_count, seconds, *sizes),
        limit=usable_memory(accelerator) if accelerator else None,
        work=work,
        flop=flop,
        least_bytes=program.least_bytes,
        flop_seconds=flop / peak if peak else None,
        byte_seconds=moved / accelerator.bandwidth if accelerator else None,
        refusal=refusal,
        compiler_decides=topology.lowering_platform == "tpu",
    )


def _check_all_devices(program: Program, topology: Topology) -> None:
    """Raise UserError if a batch is split over some of a slice's devices, which large slices cannot run."""
    if 1 < program.device_count < len(topology.devices):
        raise UserError(
            f"{program.name} uses {program.device_count} of the {len(topology.devices)} devices of {topology.name}, "
            f"which cannot be compiled: choose a data.batch_size that all devices divide, or a smaller --topology."
        )


def largest_training_batch(
    config: Config, topology: Topology, first: Compiled, tell: Callable[[Compiled], None]
) -> Found:
    """Find the largest batch size whose training fits, with all devices in use; for a TPU one that is just below it.

    Args:
        config: its batch size is the first that is tried.
        topology: with known memory.
        first: training as it was compiled for the config.
        tell: called with each further training program, which is named after its batch size.
    """
    assert first.limit is not None
    tried = {config.data.batch_size: first}

    def need_at(batch_size: int) -> Need:
        if batch_size not in tried:
            data = dataclasses.replace(config.data, batch_size=batch_size)
            program = next(programs(dataclasses.replace(config, data=data), topology.devices))
            named = program._replace(name=f"data.batch_size={batch_size}")
            tried[batch_size] = compile_program(named, config, topology)
            tell(tried[batch_size])
        return Need(tried[batch_size].needed, tried[batch_size].fits)

    unit = config.optimizer.accumulation_steps * len(topology.devices)
    search = predicted_batch if first.compiler_decides else largest_batch
    return search(need_at, first.limit, config.data.batch_size, unit, MAX_BATCH)
