"""How cost grows: training against the context, layers, width and batch; writing against the place in the window.

    python -m benchmarks.scaling [--rounds=5] [--small] [--out=FOLDER]

Ours alone. Each row changes one size of configs/small.py with one sequence a batch; its exponent is the slope of a
line through the logarithms of size and cost. Memory is what the compiler sets aside for temporaries, and what the cache
of keys and values takes. Beside the time of a character stands how long it takes to read as many bytes as there are
keys and values before it: what no attention to all of them can go below. Sizes take turns, round by round; figures are
medians.
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

from benchmarks.contestants import corpus, setup_of
from benchmarks.peers import machine, number
from chargpt_jax.config import Config
from chargpt_jax.devices import sharding, startup
from chargpt_jax.devices.platform import on_cpu, writing_options
from chargpt_jax.generation.generate import advance, begin
from chargpt_jax.generation.sampler import Sampler
from chargpt_jax.model.gpt import create
from chargpt_jax.ops.cpu_kernel import in_one_kernel
from chargpt_jax.training import optimizer
from chargpt_jax.training.setup import compiled_updates, fresh_state

SIZES = {
    "model.block_size": (64, 128, 256, 512, 1024, 2048),
    "model.n_layer": (1, 2, 4, 8, 15),
    "model.n_embd": (32, 64, 128, 256),
    "data.batch_size": (1, 2, 4, 8, 16),
}
SMALL = {"model.block_size": (16, 32)}


def changed(field: str, value: int) -> Config:
    """Return small with one sequence a batch and one field changed; the MLP stays four times as wide as the rest."""
    config = setup_of("small")
    config.data.batch_size = 1
    section, name = field.split(".")
    setattr(getattr(config, section), name, value)
    config.model.n_ff = 4 * config.model.n_embd
    return config


def trainer(config: Config) -> tuple[Callable[[], float], int]:
    """Compile an update; return what makes one and tells its seconds, and the bytes of its temporaries."""
    graphdef, params = create(config.model, 0)
    mesh = sharding.data_mesh(config.data.batch_size)
    tx = optimizer.transform(config.optimizer, 1e-3, mesh)
    state = fresh_state(params, tx, 0, np.float32, mesh)
    tokens = jax.device_put(corpus(config), sharding.replicated(mesh))
    dispatch = compiled_updates(config, graphdef, tx, mesh, state).lower(state, tokens, np.int32(1)).compile()

    def update() -> float:
        nonlocal state
        began = time.perf_counter()
        state, history = dispatch(state, tokens, np.int32(1))
        np.asarray(history["loss"])
        return time.perf_counter() - began

    update()
    return update, dispatch.memory_analysis().temp_size_in_bytes


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the slope of the least-squares line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def training(sizes: dict[str, Sequence[int]], rounds: int) -> list[dict[str, Any]]:
    """Measure every size; return a row for each."""
    rows = []
    for field, values in sizes.items():
        made = {value: trainer(changed(field, value)) for value in values}
        times: dict[int, list[float]] = {value: [] for value in values}
        for _ in range(rounds):
            for value, (update, _) in made.items():
                times[value] += [update() for _ in range(3)]
        rows += [
            {"field": field, "size": v, "seconds": statistics.median(times[v]), "temporaries": made[v][1]}
            for v in values
        ]
    return rows


def writing(config: Config, pieces: int, rounds: int) -> list[dict[str, Any]]:
    """Time the writing of one text in equal pieces of its window; return a row for each."""
    window = config.model.block_size
    graphdef, params = create(config.model, 0)
    tokens, count = np.zeros((1, window), np.int32), (window - 1) // pieces
    tokens[0, 0] = 1
    drawing = Sampler().with_key(jax.random.key(0))
    progress = begin(params, tokens, np.array([1], np.int32), graphdef=graphdef, width=1)
    cache = sum(x.nbytes for x in jax.tree.leaves(progress.cache))
    places = [1 + piece * count for piece in range(pieces)]
    reads = [reading(cache * (place + count // 2) // window) for place in places]
    times: list[list[tuple[float, float]]] = [[] for _ in places]
    for _ in range(rounds + 1):
        progress = begin(params, tokens, np.array([1], np.int32), graphdef=graphdef, width=1)
        for piece, read in enumerate(reads):
            began = time.perf_counter()
            progress = advance(params, progress, count, drawing, graphdef=graphdef)
            np.asarray(progress.tokens)
            times[piece].append(((time.perf_counter() - began) / count, read()))
    medians = [[statistics.median(column) for column in zip(*t[1:], strict=True)] for t in times]
    return [
        {"window": window, "place": place, "seconds": seconds, "reading": alone, "cache": cache}
        for place, (seconds, alone) in zip(places, medians, strict=True)
    ]


def reading(size: int, times: int = 100) -> Callable[[], float]:
    """Return what takes the seconds in which one core reads so many bytes in one kernel, which only adds them up.

    It reads them over and over, so that they lie in the nearest cache that holds them.
    """
    numbers, total = jnp.ones((max(2, size // 8192), 16, 128), jnp.float32), jnp.zeros(128, jnp.float32)

    def added(numbers: jax.Array, total: jax.Array) -> jax.Array:
        def add(i: jax.Array, total: jax.Array) -> jax.Array:
            row = jax.lax.dynamic_index_in_dim(numbers, i, keepdims=False)
            return total + reduce(jnp.add, (row[j] for j in range(len(row))))

        once = lambda _, total: jax.lax.fori_loop(0, len(numbers), add, total)  # noqa: E731
        return jax.lax.fori_loop(0, times, once, total)

    made = in_one_kernel(added) if on_cpu(None) else added
    add_up = jax.jit(made, compiler_options=writing_options(jax.default_backend()))
    add_up(numbers, total).block_until_ready()

    def read() -> float:
        began = time.perf_counter()
        add_up(numbers, total).block_until_ready()
        return (time.perf_counter() - began) / times

    return read


def report(trained: Sequence[dict[str, Any]], written: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    lines = ["Machine: " + ", ".join(f"{name} {value}" for name, value in facts.items()) + "."]
    lines += ["\n| training, B=1 | size | ms an update | temporaries, MB |\n|---|---:|---:|---:|"]
    for row in trained:
        shown = f"{number(1e3 * row['seconds'])} | {number(row['temporaries'] / 1e6)}"
        lines.append(f"| {row['field']} | {row['size']:,} | {shown} |")
    lines += ["\n| cost grows with | time, exponent | temporaries, exponent |\n|---|---:|---:|"]
    for field in dict.fromkeys(row["field"] for row in trained):
        own = [row for row in trained if row["field"] == field]
        slopes = (exponent([r["size"] for r in own], [r[what] for r in own]) for what in ("seconds", "temporaries"))
        lines.append("| {} | {:.2f} | {:.2f} |".format(field, *slopes))
    columns = "window | from place | ms a character | reading its keys and values alone, ms | the rest, ms | cache, MB"
    lines += [f"\n| writing, B=1, {columns} |\n|---:|---:|---:|---:|---:|---:|"]
    for row in written:
        shares = row["seconds"], row["reading"], row["seconds"] - row["reading"]
        shown = " | ".join(number(1e3 * share) for share in shares)
        lines.append(f"| {row['window']} | {row['place']} | {shown} | {number(row['cache'] / 1e6)} |")
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="tiny sizes: whether it works, not how fast it is")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(words)
    startup.use_every_core()
    trained = training(SMALL if args.small else SIZES, args.rounds)
    windows = (32,) if args.small else (128, 256, 512, 1024)
    written = [row for T in windows for row in writing(changed("model.block_size", T), 4, args.rounds)]
    facts = machine()
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        rows = {"facts": facts, "training": trained, "writing": written}
        (args.out / "scaling.json").write_text(json.dumps(rows, indent=1) + "\n")
        (args.out / "scaling.md").write_text(report(trained, written, facts))
    print(report(trained, written, facts))


if __name__ == "__main__":
    main()
