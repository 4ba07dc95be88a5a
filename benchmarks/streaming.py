"""Training speed with a streamed text, compared with the text on the device.

python -m benchmarks.streaming [--config=tiny] [--steps=20] [--rounds=7] trains a config on Python's help texts. One
program makes the steps of both; in each round, every feed gives it one dispatch, in turn. The result is the median and
the range of the ratios of the rounds, and the memory that the process has gained since the first round.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil

from chargpt_jax.config.files import load_config
from chargpt_jax.training import optimizer
from chargpt_jax.training.dispatch.feed import Feed, OnDevice, Streamed
from chargpt_jax.training.dispatch.steps import jit_train_steps
from chargpt_jax.training.run import Run
from chargpt_jax.training.setup import Setup
from chargpt_jax.training.stages import prepare


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--steps", type=int, default=20, help="training steps per dispatch")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    config = load_config(args.config)
    config.data.source, config.optimizer.learning_rate = "stdlib", 1e-3
    with tempfile.TemporaryDirectory() as folder:
        for _ in prepare(config, folder, print):
            pass
        compare(Run.load(Path(folder)), args.steps, args.rounds)


def compare(run: Run, steps: int, rounds: int) -> None:
    """Make dispatches with both feeds in turn, and print the ratios of their times."""
    setup = Setup.of(run)
    tx = optimizer.make_optimizer(setup.config, run.schedule(), setup.mesh)
    feeds: dict[str, Feed] = {
        "on the device": OnDevice(setup.on_device, setup.config, setup.mesh),
        "streamed": Streamed(setup.tokens[: setup.n_train], setup.config, setup.mesh),
    }
    shapes = setup.state_shapes(tx)
    dispatch = jit_train_steps(setup.config, setup.graphdef, tx, setup.mesh, shapes)
    program = dispatch.lower(shapes, feeds["streamed"].shape, np.int32(1)).compile()
    states: dict[str, Any] = {name: setup.initial_state(tx) for name in feeds}
    seconds: dict[str, list[float]] = {name: [] for name in feeds}
    memory = 0
    for i in range(rounds + 1):  # the first round warms up
        for name, feed in feeds.items():
            began = time.perf_counter()
            states[name], history = program(states[name], feed.text_for(i * steps, steps), np.int32(steps))
            jax.block_until_ready(history)
            seconds[name].append(time.perf_counter() - began)
        memory = memory or psutil.Process().memory_info().rss
    ratios = [b / a for a, b in zip(seconds["on the device"][1:], seconds["streamed"][1:], strict=True)]
    same = all(map(np.array_equal, *(jax.tree.leaves(jax.device_get(state.params)) for state in states.values())))
    for feed in feeds.values():
        feed.close()
    gained = psutil.Process().memory_info().rss - memory
    print(f"{rounds} rounds of {steps} steps with each feed, {setup.mesh.size} devices; parameters equal: {same}")
    print(f"time streamed / on the device: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"memory gained since the first round: {gained / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
