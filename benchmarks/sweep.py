"""K small models in one program, compared with K ordinary trainings one after the other.

    python -m benchmarks.sweep [--runs=8,16] [--rounds=5] [--steps=64] [--out=FOLDER]

Both sides make the same number of steps, with the compiled programs that `--mode=train` and `--mode=sweep` use;
compiling is timed apart. They alternate within a round. The ratio is that of the times of a round, and below 1 the
sweep is faster. Each core of a CPU is a device. An ordinary training is measured on one device and split over all of
them; the ratio is to the faster one. On a machine with other load the ratio of the fastest samples is the better
estimate: short samples (--steps=16) and many rounds find a quiet moment. CPU time is that of all threads.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.baselines import machine
from chargpt_jax.config import Config
from chargpt_jax.devices import sharding, startup
from chargpt_jax.lab.folder import SweepFolder
from chargpt_jax.lab.setup import SweepSetup
from chargpt_jax.training import optimizer
from chargpt_jax.training.dispatch.feed import OnDevice
from chargpt_jax.training.dispatch.steps import jit_train_steps
from chargpt_jax.training.run import Run
from chargpt_jax.training.setup import Setup

MODELS = {
    "width 16, 2 layers, context 32, batch 8": (16, 2, 32, 8),
    "width 32, 2 layers, context 32, batch 8": (32, 2, 32, 8),
    "width 32, 3 layers, context 64, batch 4": (32, 3, 64, 4),
    "width 48, 3 layers, context 64, batch 16": (48, 3, 64, 16),
}
"""n_embd, n_layer, block_size and batch_size of each model; 4 heads, and an MLP of 4 times the width."""

Side = Callable[[], None]
"""Makes the steps of all runs, and waits until they are done."""


def config_of(name: str, text: Path, runs: int) -> Config:
    """Return the config of a sweep of one of MODELS."""
    config = Config()
    width, layers, context, batch = MODELS[name]
    config.model = dataclasses.replace(
        config.model, n_embd=width, n_head=4, n_head_dim=width // 4, n_ff=4 * width, n_layer=layers, block_size=context
    )
    config.data = dataclasses.replace(config.data, source=str(text), batch_size=batch)
    config.optimizer.learning_rate, config.sweep.seeds = 3e-3, runs
    return config


def write_text(path: Path, characters: int = 400_000) -> Path:
    """Write random letters: speed does not depend on the text."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz ,.\n"))
    path.write_text("".join(np.random.default_rng(0).choice(letters, characters)), encoding="utf-8")
    return path


def ordinary(run: Run, runs: int, steps: int, devices: int) -> tuple[Side, float]:
    """Return the side of ordinary trainings on some devices, and the seconds of compiling."""
    began = time.perf_counter()
    setup = Setup.of(run)
    mesh = sharding.data_mesh(run.config.data.batch_size, jax.devices()[:devices])
    setup = dataclasses.replace(setup, mesh=mesh)
    tx = optimizer.make_optimizer(run.config, run.schedule(), mesh)
    feed, shapes = OnDevice(setup.on_device, run.config, mesh), setup.state_shapes(tx)
    dispatch = jit_train_steps(run.config, setup.graphdef, tx, mesh, shapes)
    compiled = dispatch.lower(shapes, feed.shape, np.int32(1)).compile()
    states = [setup.initial_state(tx) for _ in range(runs)]

    def side() -> None:
        for i in range(runs):
            states[i], history = compiled(states[i], feed.text_for(0, steps), np.int32(steps))
            jax.block_until_ready(history)

    side()
    return side, time.perf_counter() - began


def together(run: Run, steps: int) -> tuple[Side, float, int]:
    """Return the side of the sweep, the seconds of compiling, and the number of its devices."""
    began = time.perf_counter()
    setup = SweepSetup.of(run)
    holder = [setup.on_devices(setup.initial_state())]
    compiled = setup.lower(holder[0]).compile()

    def side() -> None:
        holder[0], history = compiled(holder[0], setup.which, setup.text, np.int32(steps))
        jax.block_until_ready(history)

    side()
    return side, time.perf_counter() - began, setup.mesh.size


def measure(name: str, runs: int, steps: int, rounds: int) -> dict[str, Any]:
    """Compare both sides for one model and number of runs; return seconds per step of one run, and ratios."""
    with prepared(name, runs) as run:
        sides: dict[str, Side] = {}
        compiling: dict[str, float] = {}
        sides["sweep"], compiling["sweep"], devices = together(run, steps)
        for count in sorted({1, len(jax.devices())}):
            label = f"ordinary, {count} device{'s' if count > 1 else ''}"
            sides[label], compiling[label] = ordinary(run, runs, steps, count)
        wall, cpu = ({label: list[float]() for label in sides} for _ in range(2))
        for i in range(rounds):
            for label in list(sides)[:: 1 if i % 2 else -1]:
                began, used = time.perf_counter(), time.process_time()
                sides[label]()
                cpu[label].append(time.process_time() - used)
                wall[label].append(time.perf_counter() - began)
    base = min((label for label in sides if label != "sweep"), key=lambda label: statistics.median(wall[label]))
    each = 1e3 / (steps * runs)
    fastest = {label: each * min(found) for label, found in wall.items()}
    ratios = {
        kind: [one / other for one, other in zip(found["sweep"], found[base], strict=True)]
        for kind, found in (("wall", wall), ("cpu", cpu))
    }
    return {
        "model": name,
        "runs": runs,
        "devices": devices,
        "baseline": base,
        "milliseconds_per_step": {label: each * statistics.median(found) for label, found in wall.items()},
        "fastest_milliseconds_per_step": fastest,
        "fastest_ratio": fastest["sweep"] / min(time for label, time in fastest.items() if label != "sweep"),
        "compile_seconds": compiling,
        "ratio": {kind: [statistics.median(x), min(x), max(x)] for kind, x in ratios.items()},
    }


@contextlib.contextmanager
def prepared(name: str, runs: int) -> Iterator[Run]:
    """Prepare a sweep in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        text = write_text(Path(folder) / "text.txt")
        (Path(folder) / "sweep").mkdir()
        yield Run.prepare(config_of(name, text, runs), SweepFolder(Path(folder) / "sweep"), print)


def table(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield (
        "| model | runs | devices | ordinary, ms/step | sweep, ms/step/run | time ratio (range) | CPU time ratio | "
        "ratio of the fastest samples |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for row in found:
        times, (ratio, low, high) = row["milliseconds_per_step"], row["ratio"]["wall"]
        yield (
            f"| {row['model']} | {row['runs']} | {row['devices']} | {times[row['baseline']]:.2f} | "
            f"{times['sweep']:.2f} | {ratio:.2f} ({low:.2f} to {high:.2f}) | {row['ratio']['cpu'][0]:.2f} | "
            f"{row['fastest_ratio']:.2f} |"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="8,16", help="numbers of runs, separated by commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=64, help="per run and sample")
    parser.add_argument("--models", type=int, default=len(MODELS), help="how many of the models, the smallest first")
    parser.add_argument("--out", type=Path, help="folder for sweep.json")
    given = parser.parse_args(argv)
    startup.start()
    found = []
    for name in list(MODELS)[: given.models]:
        for runs in map(int, given.runs.split(",")):
            found.append(measure(name, runs, given.steps, given.rounds))
            print(*list(table(found[-1:]))[2 if len(found) > 1 else 0 :], sep="\n", flush=True)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"machine": machine(), "results": found}, indent=1)
        (given.out / "sweep.json").write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
