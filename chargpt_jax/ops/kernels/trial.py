"""A trial of attention operations on the device that is to run them: first their numbers, then their time.

A kernel that compiles may still compute wrong values, or be slow, on a device that it was not tested on. So a device
runs each candidate at the shapes of the real training, forward and backward, before it trains with one.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from chargpt_jax.ops.dropout import Dropout
from chargpt_jax.ops.plain import rematerialised

Attention = Callable[..., jax.Array]
"""As `plain.attention`."""

ALLOWANCE = 2e-5
"""Error that is always accepted, as a fraction of the largest value: sums in another order differ by less."""

FACTOR = 2.0
"""A candidate's error may be so many times that of the known operation in the same dtype."""

CALLS, ROUNDS = 10, 5
"""Forward and backward passes per measurement, and measurements of each candidate; they alternate."""

MAX_FAULT = 200
"""Maximum length of a fault in words."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The attention of one layer in training, on one device."""

    sequences: int
    heads: int
    length: int
    width: int
    rate: float
    """Of dropout."""
    remat: bool
    """Whether the model recomputes cheap activations."""


@dataclasses.dataclass(frozen=True)
class Tried:
    """The result of one operation."""

    name: str
    error: float | None
    """Largest difference from float32, as a fraction of the largest value; None: it did not run."""
    seconds: float | None
    """Median time of a forward and a backward pass; None: it was not measured, since its numbers were wrong."""
    fault: str = ""
    """Why it cannot be used, in words; '': it can."""


def try_all(
    candidates: Mapping[str, Attention],
    exact: Attention,
    shape: Shape,
    dtype: DTypeLike,
    device: jax.Device,
    options: dict[str, Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Tried, ...]:
    """Run every candidate on a device.

    Args:
        candidates: by name; the first is the known one, whose numbers bound those of the others.
        exact: computes the correct values from float32 inputs.
        shape: of the training's attention.
        dtype: of queries, keys and values.
        device: to run on.
        options: XLA compiler options of the training.
        clock: returns seconds.

    Returns:
        The results, in the order of the candidates. One that fails to compile or run has a fault.
    """
    with jax.default_device(device):
        arrays = _inputs(shape, jnp.dtype(dtype))
        precise = [x.astype(jnp.float32) for x in arrays[:4]]
        right = jax.jit(partial(_values, exact, shape), compiler_options=options)(*precise, arrays[4])
        results: list[Tried] = []
        programs: dict[str, Callable[..., Any]] = {}
        bound = ALLOWANCE
        for name, attention in candidates.items():
            try:
                found = jax.jit(partial(_values, attention, shape), compiler_options=options)(*arrays)
                error = _error(found, right)
                program = jax.jit(partial(_repeated, attention, shape), compiler_options=options)
                jax.block_until_ready(program(*arrays))
            except Exception as fault:  # compilers raise many types for a kernel that they cannot compile
                if not results:
                    raise
                results.append(Tried(name, None, None, f"did not run ({_short(fault)})"))
                continue
            if not results:
                bound = max(ALLOWANCE, FACTOR * error)
            if error <= bound:  # False for NaN
                programs[name] = program
                results.append(Tried(name, error, None))
            else:
                results.append(Tried(name, error, None, f"differed by {error:.1e}, more than the {bound:.1e} allowed"))
        seconds = _times(programs, arrays, clock)
    return tuple(dataclasses.replace(one, seconds=seconds.get(one.name)) for one in results)


def fastest(results: tuple[Tried, ...]) -> str:
    """Return the name of the fastest of the operations that have no fault."""
    return min((one for one in results if one.seconds is not None), key=lambda one: one.seconds or 0.0).name


def _inputs(shape: Shape, dtype: Any) -> tuple[jax.Array, ...]:
    """Return queries, keys, values and the gradient of the output, [B, H, T, D], and seeds, uint32 [B, 2]."""
    sizes = (4, shape.sequences, shape.heads, shape.length, shape.width)
    first, second = jax.random.split(jax.random.key(0))
    draw = jax.jit(lambda key: jax.random.normal(key, sizes, jnp.float32).astype(dtype))
    return *draw(first), jax.random.bits(second, (shape.sequences, 2), jnp.uint32)


def _values(
    attention: Attention, shape: Shape, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, seeds: jax.Array
) -> tuple[jax.Array, ...]:
    """Return the output and the gradients of q, k and v, from the output's gradient g."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, seeds, Dropout(shape.rate))

    out, pull_back = jax.vjp(rematerialised(attend) if shape.remat else attend, q, k, v)
    return out, *pull_back(g)


def _repeated(
    attention: Attention, shape: Shape, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, seeds: jax.Array
) -> tuple[jax.Array, ...]:
    """Run CALLS forward and backward passes, each with inputs that depend on the one before."""

    def body(i: jax.Array, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        q, k, v = arrays
        changes = _values(attention, shape, q, k, v, g, seeds + i.astype(jnp.uint32))[1:]
        return tuple(x + (1e-3 * change).astype(x.dtype) for x, change in zip(arrays, changes, strict=True))

    return jax.lax.fori_loop(0, CALLS, body, (q, k, v))


def _error(found: tuple[jax.Array, ...], right: tuple[jax.Array, ...]) -> float:
    """Return the largest difference of any array from the right one, as a fraction of its largest value."""

    def of(ours: jax.Array, theirs: jax.Array) -> jax.Array:
        return jnp.max(jnp.abs(ours.astype(jnp.float32) - theirs)) / jnp.maximum(jnp.max(jnp.abs(theirs)), 1e-30)

    return float(jnp.max(jnp.stack([of(*pair) for pair in zip(found, right, strict=True)])))


def _times(
    programs: Mapping[str, Callable[..., Any]], arrays: tuple[jax.Array, ...], clock: Callable[[], float]
) -> dict[str, float]:
    """Return the median seconds of a forward and a backward pass of each program, which has run once before."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(ROUNDS):
        for name, program in programs.items():
            began = clock()
            jax.block_until_ready(program(*arrays))
            times[name].append((clock() - began) / CALLS)
    return {name: statistics.median(each) for name, each in times.items()}


def _short(fault: Exception) -> str:
    """Return an exception in one line."""
    text = " ".join(str(fault).split()) or type(fault).__name__
    return text if len(text) <= MAX_FAULT else text[:MAX_FAULT] + " ..."
