"""The cost of the learning-rate range test, compared with the same number of training steps.

    python -m benchmarks.range_test [--config=small] [--text_file=FILE] [--rounds=5] [--out=FOLDER]

A range test runs lr_finder.num_zooms x steps_per_zoom steps and reads every loss. It is timed from the end of its first
step to the end of its last one. The same number of training steps is timed in one dispatch, in the same round. The time
before the first step, which includes compilation, is printed separately.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.baselines import machine
from chargpt_jax.config.files import load_config
from chargpt_jax.events import LRFinderStep
from chargpt_jax.training import optimizer
from chargpt_jax.training.dispatch.steps import jit_train_steps
from chargpt_jax.training.run import Run
from chargpt_jax.training.setup import Setup
from chargpt_jax.training.stages import find_lr


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="small")
    parser.add_argument("--text_file", default="stdlib")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(words)
    config = load_config(args.config)
    config.data.source, config.data.start_at = args.text_file, ""
    steps = config.lr_finder.num_zooms * config.lr_finder.steps_per_zoom - 1
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            workdir, times = Path(folder, str(number)), []
            began = time.perf_counter()
            for event in find_lr(config, workdir):
                if isinstance(event, LRFinderStep):
                    times.append(time.perf_counter())
            setup = Setup.of(Run.load(workdir))
            tx = optimizer.make_optimizer(config, 1e-3, setup.mesh)
            initial_state, shapes = setup.initial_state_in_background(tx), setup.state_shapes(tx)
            lowered = jit_train_steps(config, setup.graphdef, tx, setup.mesh, shapes).lower(
                shapes, setup.on_device, np.int32(1)
            )
            state, dispatch = initial_state.result(), lowered.compile()
            state, _ = dispatch(state, setup.on_device, np.int32(1))
            compiled = time.perf_counter()
            _, history = dispatch(state, setup.on_device, np.int32(steps))
            np.asarray(history["loss"])
            training = time.perf_counter() - compiled
            rows.append({"first": times[0] - began, "search": times[-1] - times[0], "training": training})
    ratios = [row["search"] / row["training"] for row in rows]
    median = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    text = (
        f"Machine: {', '.join(f'{name} {value}' for name, value in machine().items())}.\n\n"
        f"| {steps} steps of {args.config} | s |\n|---|---:|\n"
        f"| range test | {median['search']:.2f} |\n| training | {median['training']:.2f} |\n\n"
        f"The range test takes {statistics.median(ratios):.3f}x as long ({min(ratios):.3f} to {max(ratios):.3f}, "
        f"{len(ratios)} rounds); {median['first']:.1f} s pass before the end of its first step.\n"
    )
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "range_test.json").write_text(json.dumps({"facts": machine(), "rows": rows}, indent=1) + "\n")
        (args.out / "range_test.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
