"""Print the tables of docs/devices.md about programs compiled for GPUs and TPUs that are not there.

    python -m benchmarks.compiled [--configs=tiny,small] [--topologies=h100,t4] [--reports=FOLDER]

It needs `pip install "chargpt_jax[cuda12]"` for GPUs and libtpu for TPUs, and about half an hour. The figures are exact
for a version of JAX and of its compilers: nothing is timed.

--reports is a folder for the JSON of each report. A report that is already there is not made again.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chargpt_jax.compile.report import gigaflop

CONFIGS = ("tiny", "small", "nanogpt_baby")
TOPOLOGIES = ("h100", "t4", "v5e:1x1", "v5e:2x4")

Report = dict[str, Any]
"""What --mode=compile --json prints."""


def report(config: str, topology: str, folder: Path | None = None) -> Report:
    """Compile a config for a topology, in a process of its own, or read the report of an earlier call."""
    path = None if folder is None else folder / f"{config}-{topology.replace(':', '-')}.json"
    if path is None or not path.exists():
        line = [sys.executable, "-m", "chargpt_jax.main", "--mode=compile", "--json"]
        done = subprocess.run(
            [*line, f"--config={config}", f"--topology={topology}"], stdout=subprocess.PIPE, text=True, check=True
        )
        if path is None:
            return dict(json.loads(done.stdout))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(done.stdout, encoding="utf-8")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def training_table(reports: dict[tuple[str, str], Report]) -> Iterator[str]:
    """Yield the rows about training, per training step and device."""
    yield "| config | topology | memory, MB | kernels | GFLOP | least MB | bound, ms | largest batch |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|"
    for (config, topology), found in reports.items():
        training = found["programs"][0]
        largest = found["largest_batch"]
        cells = (
            f"`{config}`",
            f"`{topology}`",
            f"{memory(training):,.1f}",
            kernels(found, training),
            gigaflop(training["flop"]),
            f"{sum(training['least_bytes'].values()) / 1e6:,.1f}",
            f"{1e3 * training['bound_seconds']:.3g}",
            f"{largest['batch_size']:,}" if largest else "",
        )
        yield f"| {' | '.join(cells)} |"


def other_table(reports: dict[tuple[str, str], Report]) -> Iterator[str]:
    """Yield the rows about validation and generation: memory and kernels."""
    names = ("validation", "prefill", "decoding")
    units = ("batch", "batch of prompts", "decoding step")
    heads = [f"{name}, MB | kernels per {unit}" for name, unit in zip(names, units, strict=True)]
    yield f"| config | topology | {' | '.join(heads)} |"
    yield f"|---|---|{'---:|' * 2 * len(names)}"
    for (config, topology), found in reports.items():
        programs = {program["name"]: program for program in found["programs"]}
        cells = [f"{memory(programs[name]):,.1f} | {kernels(found, programs[name])}" for name in names]
        yield f"| `{config}` | `{topology}` | {' | '.join(cells)} |"


def memory(program: Report) -> float:
    """Return what a program needs per device, in 10**6 bytes."""
    return float(program["needed_bytes"]) / 1e6


def kernels(found: Report, program: Report) -> str:
    """Return the number of kernels of a GPU, or of the fusions and custom calls of a TPU."""
    count = program["fusions"] + program["custom_calls"] if "TPU" in found["device"] else program["instructions"]
    return f"{count:,}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", default=",".join(CONFIGS))
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
    parser.add_argument("--reports", type=Path)
    args = parser.parse_args()
    pairs = [(config, topology) for config in args.configs.split(",") for topology in args.topologies.split(",")]
    reports = {pair: report(*pair, args.reports) for pair in pairs}
    for table in (training_table, other_table):
        print("\n".join(table(reports)), end="\n\n")


if __name__ == "__main__":
    main()
