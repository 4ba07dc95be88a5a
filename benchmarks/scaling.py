"""How cost grows: training with context, layers, width and batch size; generation with the position in the context.

    python -m benchmarks.scaling [--rounds=5] [--small] [--out=FOLDER]

Each row changes one size of configs/small.py with batch size 1. An exponent is the slope of a line through the
logarithms of size and cost. Memory is the compiler's temporaries, and the KV cache. The time per token is compared with
the time to read the same number of bytes as the KV cache holds up to that position, a lower bound for attention. Sizes
alternate within a round; figures are medians.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.baselines import machine, number
from benchmarks.implementations import config_for, corpus
from chargpt_jax.config import Config
from chargpt_jax.devices import sharding, startup
from chargpt_jax.devices.platform import on_cpu
from chargpt_jax.generation.generate import decode, prefill
from chargpt_jax.generation.sampler import Sampler
from chargpt_jax.model.init import create
from chargpt_jax.ops.choose import jit_for_generation, ops_for
from chargpt_jax.ops.cpu_decode import fused, fusion_available
from chargpt_jax.training import optimizer
from chargpt_jax.training.dispatch.steps import jit_train_steps, state_sharding
from chargpt_jax.training.step import create_state

SIZES = {
    "model.block_size": (64, 128, 256, 512, 1024, 2048),
    "model.n_layer": (1, 2, 4, 8, 15),
    "model.n_embd": (32, 64, 128, 256),
    "data.batch_size": (1, 2, 4, 8, 16),
}
SMALL = {"model.block_size": (16, 32)}


def changed(field: str, value: int) -> Config:
    """Return `small` with batch size 1 and one field changed; n_ff stays 4 * n_embd."""
    config = config_for("small")
    config.data.batch_size = 1
    section, name = field.split(".")
    setattr(getattr(config, section), name, value)
    config.model.n_ff = 4 * config.model.n_embd
    return config


def trainer(config: Config) -> tuple[Callable[[], float], int]:
    """Compile a training step; return a function that runs and times one, and the bytes of temporaries."""
    graphdef, params = create(config.model, 0, ops_for(query_block=config.model.attention_block))
    mesh = sharding.data_mesh(config.data.batch_size)
    tx = optimizer.make_optimizer(config, 1e-3, mesh)
    state = create_state(params, tx, 0)
    state = jax.device_put(state, state_sharding(state, mesh))
    tokens = jax.device_put(corpus(config), sharding.replicated(mesh))
    dispatch = jit_train_steps(config, graphdef, tx, mesh, state).lower(state, tokens, np.int32(1)).compile()

    def timed_step() -> float:
        nonlocal state
        began = time.perf_counter()
        state, history = dispatch(state, tokens, np.int32(1))
        np.asarray(history["loss"])
        return time.perf_counter() - began

    timed_step()
    return timed_step, dispatch.memory_analysis().temp_size_in_bytes


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the slope of the least-squares line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def training(sizes: dict[str, Sequence[int]], rounds: int) -> list[dict[str, Any]]:
    """Measure every size; return one row per size."""
    rows = []
    for field, values in sizes.items():
        made = {value: trainer(changed(field, value)) for value in values}
        times: dict[int, list[float]] = {value: [] for value in values}
        for _ in range(rounds):
            for value, (timed_step, _) in made.items():
                times[value] += [timed_step() for _ in range(3)]
        rows += [
            {"field": field, "size": v, "seconds": statistics.median(times[v]), "temporaries": made[v][1]}
            for v in values
        ]
    return rows


def generation(config: Config, pieces: int, rounds: int) -> list[dict[str, Any]]:
    """Time generation with batch size 1 in equal pieces of the context; return one row per piece."""
    context = config.model.block_size
    graphdef, params = create(config.model, 0, ops_for(query_block=config.model.attention_block))
    tokens, count = np.zeros((1, context), np.int32), (context - 1) // pieces
    tokens[0, 0] = 1
    drawing = Sampler().with_key(jax.random.key(0))
    progress = prefill(params, tokens, np.array([1], np.int32), graphdef=graphdef, width=1)
    cache = sum(x.nbytes for x in jax.tree.leaves(progress.cache))
    positions = [1 + piece * count for piece in range(pieces)]
    reads = [reading(cache * (position + count // 2) // context) for position in positions]
    times: list[list[tuple[float, float]]] = [[] for _ in positions]
    for _ in range(rounds + 1):
        progress = prefill(params, tokens, np.array([1], np.int32), graphdef=graphdef, width=1)
        for piece, read in enumerate(reads):
            began = time.perf_counter()
            progress = decode(params, progress, count, drawing, graphdef=graphdef)
            np.asarray(progress.tokens)
            times[piece].append(((time.perf_counter() - began) / count, read()))
    medians = [[statistics.median(column) for column in zip(*t[1:], strict=True)] for t in times]
    return [
        {"context": context, "position": position, "seconds": seconds, "reading": alone, "cache": cache}
        for position, (seconds, alone) in zip(positions, medians, strict=True)
    ]


def reading(size: int, times: int = 100) -> Callable[[], float]:
    """Return a function that measures the seconds in which one core reads `size` bytes in one kernel.

    The kernel only adds the numbers. It reads them `times` times, so they are in the nearest cache that can hold them.
    """
    numbers, total = jnp.ones((max(2, size // 8192), 16, 128), jnp.float32), jnp.zeros(128, jnp.float32)

    def added(numbers: jax.Array, total: jax.Array) -> jax.Array:
        def add(i: jax.Array, total: jax.Array) -> jax.Array:
            row = jax.lax.dynamic_index_in_dim(numbers, i, keepdims=False)
            return total + reduce(jnp.add, (row[j] for j in range(len(row))))

        def once(_: jax.Array, total: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, len(numbers), add, total)

        return jax.lax.fori_loop(0, times, once, total)

    def in_one_kernel(numbers: jax.Array, total: jax.Array) -> jax.Array:
        return fused(jax.jit(added)(numbers, total))

    add_up = jit_for_generation()(in_one_kernel if on_cpu(None) and fusion_available() else added)
    add_up(numbers, total).block_until_ready()

    def read() -> float:
        began = time.perf_counter()
        add_up(numbers, total).block_until_ready()
        return (time.perf_counter() - began) / times

    return read


def report(trained: Sequence[dict[str, Any]], generated: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    lines = ["Machine: " + ", ".join(f"{name} {value}" for name, value in facts.items()) + "."]
    lines += ["\n| training, batch size 1 | size | ms per training step | temporaries, MB |\n|---|---:|---:|---:|"]
    for row in trained:
        shown = f"{number(1e3 * row['seconds'])} | {number(row['temporaries'] / 1e6)}"
        lines.append(f"| {row['field']} | {row['size']:,} | {shown} |")
    lines += ["\n| exponent of | time | temporaries |\n|---|---:|---:|"]
    for field in dict.fromkeys(row["field"] for row in trained):
        own = [row for row in trained if row["field"] == field]
        slopes = (exponent([r["size"] for r in own], [r[what] for r in own]) for what in ("seconds", "temporaries"))
        lines.append("| {} | {:.2f} | {:.2f} |".format(field, *slopes))
    columns = "context | from position | ms per token | reading the KV cache alone, ms | the rest, ms | KV cache, MB"
    lines += [f"\n| {columns} |\n|---:|---:|---:|---:|---:|---:|"]
    for row in generated:
        shares = row["seconds"], row["reading"], row["seconds"] - row["reading"]
        shown = " | ".join(number(1e3 * share) for share in shares)
        lines.append(f"| {row['context']} | {row['position']} | {shown} | {number(row['cache'] / 1e6)} |")
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to test that it works")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(words)
    startup.use_every_core()
    trained = training(SMALL if args.small else SIZES, args.rounds)
    contexts = (32,) if args.small else (128, 256, 512, 1024)
    generated = [row for T in contexts for row in generation(changed("model.block_size", T), 4, args.rounds)]
    facts = machine()
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        rows = {"facts": facts, "training": trained, "generation": generated}
        (args.out / "scaling.json").write_text(json.dumps(rows, indent=1) + "\n")
        (args.out / "scaling.md").write_text(report(trained, generated, facts))
    print(report(trained, generated, facts))


if __name__ == "__main__":
    main()
