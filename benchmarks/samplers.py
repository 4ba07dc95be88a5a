"""Time generation with chains of samplers, as interleaved ratios.

    python -m benchmarks.samplers RUN [--other=CHECKOUT] [--rounds=20] [--characters=400] [--chains NAME ...]

RUN is the folder of a trained run. Each round generates a text with every chain, in turn, so that a machine whose speed
changes gives every chain the same conditions. The table has the median and the quartiles of the rounds' ratios to
`--temperature` in this checkout, for the time and for the processor time of all threads. The latter varies less on a
machine with other load. With --other, a process of another checkout (for example a `git worktree` of an older commit)
generates with `--temperature` in the same rounds; the run must be one that it can read.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]

BASELINE: dict[str, Any] = {"temperature": 0.8}

CHAINS: dict[str, dict[str, Any]] = {
    "sampler=temperature": {"sampler": "temperature=0.8"},
    "top_k=40 (without a chain)": {"temperature": 0.8, "top_k": 40},
    "min_p, temperature": {"sampler": "min_p=0.05,temperature=0.8"},
    "typical": {"sampler": "typical=0.95"},
    "mirostat": {"sampler": "mirostat=2.5"},
    "budget": {"sampler": "budget"},
    "dry": {"sampler": "dry"},
    "temperature, stop string": {"temperature": 0.8, "stop": ["zzzzzzzz"]},
}
"""The arguments of `Model.generate` by name."""


class Worker:
    """A process of one checkout that has loaded the run."""

    def __init__(self, checkout: Path, run: Path) -> None:
        """Start the process."""
        environment = {**os.environ, "PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
        words = [sys.executable, str(Path(__file__)), str(run), "--worker"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(words, env=environment, cwd=checkout, **pipes)

    def seconds(self, how: dict[str, Any], characters: int) -> tuple[float, float]:
        """Return how long a text takes: time and processor time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([how, characters]) + "\n")
        self._process.stdin.flush()
        elapsed, processor = map(float, self._process.stdout.readline().split())
        return elapsed, processor

    def end(self) -> None:
        """End the process."""
        self._process.communicate()


def work(run: Path) -> None:
    """Answer each line of standard input, arguments and a number of characters, with a text's two times in seconds."""
    import chargpt_jax

    model = chargpt_jax.load(run)
    for line in sys.stdin:
        how, characters = json.loads(line)
        began, used = time.perf_counter(), time.process_time()
        model.generate(model.config.sample.prompts[0], characters, alternatives=0, **how)
        print(time.perf_counter() - began, time.process_time() - used, flush=True)


def main(_: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a trained run")
    parser.add_argument("--other", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--characters", type=int, default=400, help="length of each text")
    parser.add_argument(
        "--chains", nargs="*", choices=CHAINS, default=list(CHAINS), help="only these; none: temperature"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.run)
        return
    run = given.run.absolute()
    this = Worker(ROOT, run)
    contestants = {"temperature": (this, BASELINE)} | {name: (this, CHAINS[name]) for name in given.chains}
    if given.other:
        contestants["temperature, other checkout"] = (Worker(given.other.absolute(), run), BASELINE)
    for worker, how in contestants.values():
        worker.seconds(how, given.characters)  # compiles
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for i in range(given.rounds):
        order = list(contestants.items())
        for name, (worker, how) in order if i % 2 else order[::-1]:
            seconds[name].append(worker.seconds(how, given.characters))
    for worker, _how in {id(worker): (worker, how) for worker, how in contestants.values()}.values():
        worker.end()
    base = np.array(seconds["temperature"])
    elapsed, processor = 1e6 * np.median(base, axis=0) / given.characters
    print(f"temperature: {elapsed:.0f} microseconds per character, {processor:.0f} of processor time, here and now")
    print(
        "\nMultiples of the times of temperature: median (quartiles)\n",
        *("| chain | time | processor time |", "|---|---:|---:|"),
        sep="\n",
    )
    for name, own in seconds.items():
        quartiles = np.quantile(np.array(own) / base, [0.25, 0.5, 0.75], axis=0).T
        print(f"| {name} | " + " | ".join(f"{m:.3f} ({low:.3f} to {high:.3f})" for low, m, high in quartiles) + " |")


if __name__ == "__main__":
    main()
