"""What the compilation for a topology showed, in words and as JSON."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from chargpt_jax.compile.compiled import Compiled
from chargpt_jax.compile.hlo import COLLECTIVES
from chargpt_jax.compile.largest_batch import Found
from chargpt_jax.compile.programs import N_TRAIN, USED_IDS, VOCAB_SIZE
from chargpt_jax.compile.topology import Topology
from chargpt_jax.config import Config
from chargpt_jax.ops.choose import CUDNN, KERNEL

MAX_DEVICES = 8
"""More TPU chips than these belong to several hosts."""


REMARKS = dict.fromkeys(
    (KERNEL, CUDNN),
    " A run first tries it on its device, and may find that blocks are faster: --config.train.attention=blocks.",
)
"""What must be known about an attention."""


def introduction(config: Config, topology: Topology, attention: str) -> Iterator[str]:
    """Yield what is compiled, and what is assumed; `attention` is that of training steps."""
    device = "GPU" if topology.is_gpu else "TPU"
    yield (
        f"Compiling for {topology.name} ({len(topology.devices)} x {topology.kind}) without a {device}. This proves "
        "that the steps compile, and shows the memory that they take; it does not run them."
    )
    on_chip = "" if topology.is_gpu else " Temporaries that stay on the chip are not counted."
    yield f"A training text of {N_TRAIN:,} characters is assumed.{on_chip}"
    yield f"Attention of training steps: {attention}.{REMARKS.get(attention, '')}"
    yield "Least bytes and bounds assume that no array stays in a cache between its writing and its reading."
    if not config.model.vocab_size:
        yield (
            f"The vocabulary is not known before a text is read: {USED_IDS} token ids and {VOCAB_SIZE} embeddings are "
            "assumed."
        )
    if not topology.is_gpu and len(topology.devices) > MAX_DEVICES:
        yield (
            f"A slice of {len(topology.devices)} devices has several hosts. A run of chargpt_jax uses the devices of "
            "one host."
        )


def in_words(program: Compiled, topology: Topology) -> Iterator[str]:
    """Yield the lines about a program: its compilation, then one indented line per fact."""
    if program.refusal:
        yield f"{program.name}: the compiler refused it for {program.devices} of {topology.name}"
        yield f"    does not fit: {program.refusal}"
    else:
        yield (
            f"{program.name}: compiled for {program.devices} of {topology.name} in {program.seconds:.1f} s; per device "
            f"{program.arguments / 1e6:.1f} MB of arguments, {program.outputs / 1e6:.1f} MB of additional outputs, "
            f"{program.temporaries / 1e6:.1f} MB of temporaries"
        )
        yield f"    {fit_in_words(program)}"
        yield f"    {work_in_words(program, topology.is_gpu)}"
        if program.device_count > 1:
            yield f"    collectives per {program.unit}: {_collectives_in_words(program)}"
    yield from (f"    {line}" for line in _bound_in_words(program))


def fit_in_words(program: Compiled) -> str:
    """Return whether a program fits, with the bytes that it needs and has per device."""
    fits = "fits" if program.fits else "does not fit"
    used = program.needed
    have = "" if program.limit is None else f" of {_size(program.limit)}"
    return fits if used is None else f"{fits}: {_size(used)}{have} per device"


def work_in_words(program: Compiled, is_gpu: bool) -> str:
    """Return the number of kernels (GPU), or of fusions and custom calls (TPU), per unit."""
    work, opcodes = program.work, program.work.opcodes
    if is_gpu:
        kinds = {"fusion": opcodes["fusion"], "library call": opcodes["custom-call"], "copy": opcodes["copy"]}
        kinds["collective"] = sum(opcodes[kind] for kind in COLLECTIVES)
        kinds["other"] = work.total - sum(kinds.values())
        plural = {"copy": "copies", "other": "other"}
        parts = [_counted(n, kind, plural.get(kind)) for kind, n in kinds.items() if n]
        counts = f"{_counted(work.total, 'kernel')} ({', '.join(parts)})"
    else:
        counts = f"{_counted(opcodes['fusion'], 'fusion')}, {_counted(opcodes['custom-call'], 'custom call')}"
    loops = work.unknown_loops
    unknown = f"; {_counted(loops, 'loop')} of unknown length counted as one iteration" if loops else ""
    return f"per {program.unit}: {counts}{unknown}"


def _collectives_in_words(program: Compiled) -> str:
    sizes, counts = program.work.collective_bytes, program.work.collectives
    return ", ".join(f"{counts[kind]} {kind} ({_size(sizes[kind])})" for kind in sorted(counts)) or "none"


def _bound_in_words(program: Compiled) -> Iterator[str]:
    """Yield FLOP, least bytes and the roofline bound."""
    parts = ", ".join(f"{what} {_size(size)}" for what, size in program.least_bytes.items())
    yield (
        f"per {program.unit} and device: {gigaflop(program.flop)} GFLOP; "
        f"reads and writes at least {_size(sum(program.least_bytes.values()))} ({parts})"
    )
    if program.bound_seconds is not None:
        flop, moved = (
            f"{what} {'unknown' if seconds is None else _time(seconds)}"
            for what, seconds in (("FLOP", program.flop_seconds), ("bytes", program.byte_seconds))
        )
        yield (
            f"roofline bound: at least {_time(program.bound_seconds)} per {program.unit} ({flop}, {moved}); "
            "a bound, not a prediction"
        )


def tried_in_words(program: Compiled) -> str:
    """Return the line about one batch size of the search."""
    return f"    {program.name} {fit_in_words(program)} (compiled in {program.seconds:.1f} s)"


def largest_in_words(found: Found, limit: int) -> str:
    """Return the result of the search for the largest batch size."""
    if not found.batch_size:
        return f"largest batch that fits: none; data.batch_size={found.next_size} does not fit"
    need = found.need.bytes if found.need else None
    used = "" if need is None else f", {_size(need)} of {_size(limit)} per device"
    if found.predicted:
        return (
            f"largest batch that fits: data.batch_size={found.batch_size}{used}, which was compiled; the limit is at "
            f"about {found.predicted} by a line through the compiled sizes, which was not compiled"
        )
    if not found.next_size:
        return f"largest batch that fits: at least data.batch_size={found.batch_size}, the largest that is tried{used}"
    return (
        f"largest batch that fits: data.batch_size={found.batch_size}{used}; {found.next_size} does not fit "
        "(both were compiled)"
    )


def as_dict(topology: Topology, attention: str, programs: list[Compiled], found: Found | None) -> dict[str, Any]:
    """Return everything as JSON can hold it; sizes in bytes per device, times in seconds."""
    limit = programs[0].limit if programs else None
    return {
        "topology": topology.name,
        "device": topology.kind,
        "devices": len(topology.devices),
        "attention": attention,
        "memory_limit_bytes": limit,
        "assumed_training_characters": N_TRAIN,
        "programs": [_program_dict(program) for program in programs],
        "largest_batch": None if found is None else _found_dict(found),
    }


def _program_dict(program: Compiled) -> dict[str, Any]:
    opcodes = program.work.opcodes if not program.refusal else Counter[str]()
    return {
        "name": program.name,
        "unit": program.unit,
        "devices": program.device_count,
        "fits": program.fits,
        "refusal": program.refusal or None,
        "compile_seconds": round(program.seconds, 2),
        "argument_bytes": program.arguments,
        "additional_output_bytes": program.outputs,
        "temporary_bytes": program.temporaries,
        "needed_bytes": program.needed,
        "instructions": program.work.total,
        "fusions": opcodes["fusion"],
        "custom_calls": opcodes["custom-call"],
        "copies": opcodes["copy"],
        "loops_of_unknown_length": program.work.unknown_loops,
        "collectives": {
            kind: {"count": count, "bytes": program.work.collective_bytes[kind]}
            for kind, count in sorted(program.work.collectives.items())
        },
        "flop": program.flop,
        "least_bytes": program.least_bytes,
        "bound_seconds": program.bound_seconds,
        "bound_seconds_of_flop": program.flop_seconds,
        "bound_seconds_of_bytes": program.byte_seconds,
    }


def _found_dict(found: Found) -> dict[str, Any]:
    return {
        "batch_size": found.batch_size,
        "bytes": found.need.bytes if found.need else None,
        "next_batch_size": found.next_size or None,
        "predicted_batch_size": found.predicted or None,
        "compilations": found.compiles,
    }


def _counted(count: int, what: str, plural: str | None = None) -> str:
    return f"{count:,} {what if count == 1 else plural or f'{what}s'}"


def gigaflop(flop: float) -> str:
    """Return FLOP in units of 10**9, with three significant digits."""
    return f"{flop / 1e9:,.0f}" if flop >= 1e11 else f"{flop / 1e9:.3g}"


def _size(size: float) -> str:
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} microseconds"
