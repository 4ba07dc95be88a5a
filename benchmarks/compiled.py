"""Print the tables of docs/devices.md about programs compiled for GPUs and TPUs that are not there.

    python -m benchmarks.compiled [--configs=tiny,small] [--topologies=h100,t4] [--reports=FOLDER]
    python -m benchmarks.compiled --large [--reports=FOLDER]  # the large models, which several devices share

It needs `pip install "chargpt_jax[cuda12]"` for GPUs and libtpu for TPUs, and about half an hour. The figures are exact
for a version of JAX and of its compilers: nothing is timed.

--reports is a folder for the JSON of each report. A report that is already there is not made again. Those of the page
are in benchmarks/results/compiled; delete them after a change of the model's programs.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from chargpt_jax.compile.compiled import compile_program
from chargpt_jax.compile.programs import programs, with_vocabulary
from chargpt_jax.compile.report import as_dict, gigaflop
from chargpt_jax.compile.topology import open_topology
from chargpt_jax.config import Config, MeshConfig
from chargpt_jax.config.files import load_config
from chargpt_jax.model.init import abstract_model, count_parameters
from chargpt_jax.ops.plain import Ops

CONFIGS = ("tiny", "small", "nanogpt_baby")
TOPOLOGIES = ("h100", "t4", "v5e:1x1", "v5e:2x4")

Report = dict[str, Any]
"""What --mode=compile --json prints."""


class Large(NamedTuple):
    """A training of a large model that several devices share."""

    config: str
    topology: str
    mesh: MeshConfig
    microbatches: int

    def __str__(self) -> str:
        sizes = f"{self.mesh.data}x{self.mesh.fsdp}x{self.mesh.tensor}"
        return f"{self.config}-{self.topology.replace(':', '-')}-{sizes}-{self.microbatches}"

    def load(self) -> Config:
        """Return the config with this mesh and number of microbatches."""
        config = load_config(self.config)
        optimizer = dataclasses.replace(config.optimizer, accumulation_steps=self.microbatches)
        return with_vocabulary(dataclasses.replace(config, mesh=self.mesh, optimizer=optimizer))


LARGE = (
    *(Large("gpt2_124m", topology, MeshConfig(1, 8, 1), 5) for topology in ("h100:8", "v5e:2x4")),
    *(Large("billion", topology, MeshConfig(1, 8, 1), 2) for topology in ("h100:8", "v5e:2x4")),
    Large("billion", "h100:8", MeshConfig(1, 4, 2), 2),
)
"""The trainings of the table about large models."""

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce")
"""The kinds of collectives that have a column."""


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


def large_report(large: Large, folder: Path | None = None) -> Report:
    """Compile the training of a large model, or read the report of an earlier call."""
    path = None if folder is None else folder / f"{large}.json"
    if path is not None and path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    config, target = large.load(), open_topology(large.topology)
    training = compile_program(next(programs(config, target.devices)), config, target)
    found = as_dict(target, [training], None)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found), encoding="utf-8")
    return found


def large_table(reports: list[tuple[Large, Report]]) -> Iterator[str]:
    """Yield the rows about large models, per training step and device."""
    kinds = " | ".join(f"{kind}, GB" for kind in (*COLLECTIVES, "other"))
    heads = f"| config | topology | data x fsdp x tensor | microbatches | memory, GB | fits | {kinds} |"
    yield f"{heads} bytes per parameter and microbatch |"
    yield f"|---|---|---|---:|---:|---|{'---:|' * (len(COLLECTIVES) + 2)}"
    for large, found in reports:
        (training,), mesh = found["programs"], large.mesh
        sizes = {kind: one["bytes"] for kind, one in training["collectives"].items()}
        total = sum(sizes.values())
        shown = [sizes.pop(kind, 0) for kind in COLLECTIVES]
        parameters = count_parameters(abstract_model(large.load().model, Ops())[1])
        cells = (
            f"`{large.config}`",
            f"`{large.topology}`",
            f"{mesh.data} x {mesh.fsdp} x {mesh.tensor}",
            f"{large.microbatches}",
            f"{training['needed_bytes'] / 1e9:.2f} of {found['memory_limit_bytes'] / 1e9:.1f}",
            "yes" if training["fits"] else "no",
            *(f"{size / 1e9:.2f}" for size in (*shown, sum(sizes.values()))),
            f"{total / parameters / large.microbatches:.2f}",
        )
        yield f"| {' | '.join(cells)} |"


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
    parser.add_argument("--large", action="store_true")
    args = parser.parse_args()
    if args.large:
        print("\n".join(large_table([(large, large_report(large, args.reports)) for large in LARGE])))
        return
    pairs = [(config, topology) for config in args.configs.split(",") for topology in args.topologies.split(",")]
    reports = {pair: report(*pair, args.reports) for pair in pairs}
    for table in (training_table, other_table):
        print("\n".join(table(reports)), end="\n\n")


if __name__ == "__main__":
    main()
