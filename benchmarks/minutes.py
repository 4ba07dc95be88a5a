"""When runs of given minutes end: the wall time of whole commands with scheduler.minutes, compared with the setting.

    python -m benchmarks.minutes [--minutes=1,2] [--rounds=3] [--mode=run] [--flag=--config.seed=1 ...]

Each command is a new process with a new run folder. Its time includes the start of Python, compilation, samples and the
report. The compilation cache is shared: the first command fills it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = ("-m", "chargpt_jax.main", "--config=tiny", "--config.data.source=stdlib")


def measured(minutes: float, mode: str, flags: list[str], cache: Path) -> dict[str, float]:
    """Run a command; return its wall time in seconds, the training steps and the number of fits."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder, "run")
        command = [sys.executable, *COMMAND, f"--mode={mode}", f"--config.scheduler.minutes={minutes}", *flags]
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
        began = time.monotonic()
        subprocess.run([*command, f"--workdir={workdir}"], check=True, env=environment, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - began
        fits = json.loads((workdir / "schedule.json").read_text(encoding="utf-8"))["fits"]
        speeds = [fit["seconds_per_step"] for fit in fits]
        return {
            "seconds": seconds,
            "steps": fits[-1]["total_steps"],
            "fits": len(fits),
            "first": fits[0]["total_steps"],
            "slowest to fastest": max(speeds) / min(speeds),
        }


def main() -> None:
    """Run the commands in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mode", default="run", choices=("run", "train"))
    parser.add_argument("--flag", action="append", default=[])
    given = parser.parse_args()
    lengths = [float(length) for length in given.minutes.split(",")]
    print("| minutes | wall time, s | error | steps | first fit, steps | fits | step time, slowest / fastest |")
    print("|---|---|---|---|---|---|---|", flush=True)
    worst = 0.0
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(given.rounds):
            for minutes in lengths:
                one = measured(minutes, given.mode, given.flag, Path(cache))
                error = one["seconds"] / (60 * minutes) - 1
                worst = max(worst, abs(error))
                row = f"{minutes:g} | {one['seconds']:.1f} | {100 * error:+.1f} % | {one['steps']:,} | {one['first']:,}"
                print(f"| {row} | {one['fits']} | {one['slowest to fastest']:.2f} |", flush=True)
    print(f"largest error: {100 * worst:.1f} %")


if __name__ == "__main__":
    main()
