"""Compare chargpt_jax with its baselines: training speed, memory, time to first step, generation.

    python -m benchmarks.baselines --nanogpt=DIR --original=DIR --equinox=DIR --nanodo=DIR [--rounds=5] [--out=FOLDER]
        [--configs=small,nanogpt_baby,nanogpt_cpu] [--measures=training,start,generation]
        [--implementations='chargpt_jax;nanoGPT'] [--accelerated]

The folders are checkouts of karpathy/nanoGPT, z0u/mi-ni at 2a991f7 (PyTorch), z0u/mi-ni (Equinox) and
google-deepmind/nanodo. A baseline without a folder is skipped. Each sample runs in its own process, one at a time. The
implementations alternate, so that noise of the machine affects all of them. A ratio compares samples of one round; the
table shows the median over the rounds. Prints Markdown; --out also writes baselines.json and baselines.md.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.implementations import BATCH_SIZES, IMPLEMENTATIONS, NOTES, PROMPT, config_for

UNITS = {
    "tokens_per_second": ("training, tokens/s", True),
    "peak_mib": ("peak memory, MiB", False),
    "own_mib": ("peak memory beyond imports, MiB", False),
    "device_mib": ("peak GPU memory, MiB", False),
    "cold_seconds": ("time to first step, cold cache, s", False),
    "warm_seconds": ("time to first step, warm cache, s", False),
    "cold_mib": ("peak memory to first step, cold cache, MiB", False),
    "warm_mib": ("peak memory to first step, warm cache, MiB", False),
    "within_1": ("generation within the context, batch 1, tokens/s", True),
    "within_32": ("generation within the context, batch 32, tokens/s", True),
    "beyond_1": ("generation beyond the context, batch 1, tokens/s", True),
    "first_seconds": ("first sample within the context, batch 1, compilation included, s", False),
}
"""By figure: its title in the tables, and whether more is better."""

TIMEOUT_SECONDS = 1200.0
"""A sample that takes longer fails."""

MEASURED = tuple(name for name, (_, variant) in IMPLEMENTATIONS.items() if "nondeterministic" not in variant)
"""The implementations to measure by default; benchmarks/accelerator.py measures the others."""

Row = dict[str, Any]
"""implementation, config, round, and the figures of the sample or an `error`."""


def child(
    task: dict[str, Any], environment: dict[str, str] | None = None, timeout: float = TIMEOUT_SECONDS
) -> tuple[dict[str, Any], float]:
    """Take a sample in a new process; return its figures and the seconds until it printed them.

    Args:
        task: for `sample` of implementations.py.
        environment: further environment variables.
        timeout: seconds after which the process is ended.

    Raises:
        RuntimeError: if the process fails, with the last line of its standard error.
    """
    command = [sys.executable, "-m", "benchmarks.implementations", json.dumps(task)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, text=True, env={**os.environ, **(environment or {})}, **{**pipes, "stderr": errors}
        )
        try:
            out, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise RuntimeError(f"no result within {timeout:g} s") from None
        seconds = time.perf_counter() - began
        if process.returncode:
            errors.seek(0)
            raise RuntimeError((errors.read().strip().splitlines() or ["no error message"])[-1][:200])
    return json.loads(out.strip().splitlines()[-1]), seconds


def caching(folder: str) -> dict[str, str]:
    """Return the environment variables with which JAX and PyTorch cache all their compiled programs in a folder."""
    return {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TORCHINDUCTOR_CACHE_DIR": folder,
    }


def starts(task: dict[str, Any]) -> dict[str, float]:
    """Start twice with one compilation cache: cold, then warm."""
    with tempfile.TemporaryDirectory() as cache:
        environment = caching(cache)
        found = {state: child(task, environment) for state in ("cold", "warm")}
    return {
        **{f"{state}_seconds": seconds for state, (_, seconds) in found.items()},
        **{f"{state}_mib": figures["mib"] for state, (figures, _) in found.items()},
    }


def generation_tasks(name: str, count: int) -> dict[str, dict[str, int]]:
    """Return, by figure, the prompt length, the number of generated tokens and the batch size for a config."""
    context = config_for(name).model.block_size
    within = {"prompt": PROMPT, "count": min(count, context - PROMPT)}
    return {
        "within_1": {**within, "batch": 1},
        "within_32": {**within, "batch": 32},
        "beyond_1": {"prompt": context, "count": min(count, 100), "batch": 1},
    }


def samples(
    measures: Sequence[str],
    configs: Sequence[str],
    folders: dict[str, str],
    names: Sequence[str],
    rounds: int,
    **task: Any,
) -> Iterator[Row]:
    """Take all samples; the order of the implementations rotates by one each round."""
    names = [name for name in names if IMPLEMENTATIONS[name][0] in ("chargpt_jax", *folders)]
    for number in range(rounds):
        rotated = names[number % len(names) :] + names[: number % len(names)]
        for config in configs:
            for measure in measures:
                for name in rotated:
                    own = {"implementation": name, "measure": measure, "config": config, **task}
                    own["folder"] = folders.get(IMPLEMENTATIONS[name][0], "")
                    yield from _one(own, number)


def _one(task: dict[str, Any], number: int) -> Iterator[Row]:
    row = {"implementation": task["implementation"], "config": task["config"], "round": number}
    if task["measure"] == "generation" and IMPLEMENTATIONS[task["implementation"]][1] == "compiled":
        return  # its generate calls the model with a new length for each token, and would compile each time
    wanted = generation_tasks(task["config"], task.pop("count", 500)) if task["measure"] == "generation" else {"": {}}
    for name, how in wanted.items():
        try:
            if task["measure"] == "start":
                yield row | starts(task)
            elif name:
                figures = child(task | how)[0]
                first = {"first_seconds": figures["first_seconds"]} if name == "within_1" else {}
                yield row | {name: figures["tokens_per_second"], **first}
            else:
                yield row | child(task)[0]
        except RuntimeError as error:
            yield row | {"error": str(error), "measure": task["measure"]}


def ratios(rows: Sequence[Row], config: str, figure: str, other: str) -> list[float]:
    """Return, for each round, how many times faster or smaller chargpt_jax is than a baseline.

    chargpt_jax is taken in float32, or in bfloat16 if only that was measured.
    """
    own = [row for row in rows if row["config"] == config and figure in row]
    found = {(row["implementation"], row["round"]): row[figure] for row in own}
    measured = {name for name, _ in found}
    ours = next((name for name, (kind, _) in IMPLEMENTATIONS.items() if kind == "chargpt_jax" and name in measured), "")
    pairs = [(value, found.get((other, n))) for (name, n), value in found.items() if name == ours]
    return [mine / theirs if UNITS[figure][1] else theirs / mine for mine, theirs in pairs if theirs]


def number(value: float) -> str:
    """Format a figure with three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a Markdown table for each config and figure that was measured, and a list of failures."""
    for config in dict.fromkeys(row["config"] for row in rows):
        for figure, (title, _) in UNITS.items():
            values: dict[str, list[float]] = {}
            for row in rows:
                if row["config"] == config and figure in row:
                    values.setdefault(row["implementation"], []).append(row[figure])
            if not values:
                continue
            yield f"\n**{config}: {title}**\n\n| | median | range | chargpt_jax is better by |\n|---|---:|---:|---:|"
            for name in (name for name in IMPLEMENTATIONS if name in values):
                own, times = values[name], ratios(rows, config, figure, name)
                better = f"{number(statistics.median(times))}x ({number(min(times))} to {number(max(times))})"
                span = f"{number(min(own))} to {number(max(own))}"
                shown = better if times and IMPLEMENTATIONS[name][0] != "chargpt_jax" else ""
                yield f"| {name} | {number(statistics.median(own))} | {span} | {shown} |"
    failed = {(row["implementation"], row["config"], row["measure"]): row["error"] for row in rows if "error" in row}
    if failed:
        yield "\nNot measured:\n"
        yield from (f"- {name}, {config}, {measure}: {error}" for (name, config, measure), error in failed.items())


def machine() -> dict[str, Any]:
    """Describe the machine and the versions of the libraries."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []

    def fact(key: str) -> str:
        return next((line.split(":")[1].strip() for line in lines if line.startswith(key)), "?")

    versions = {}
    for name in ("jax", "flax", "optax", "torch", "equinox"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    cpu = f"{fact('model name')} (family {fact('cpu family')}, model {fact('model	')})"
    widest = next((name for name in ("avx512f", "avx2") if name in fact("flags").split()), "?")
    return {
        "cpu": cpu,
        "vectors": widest,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **versions,
    }


def commit(folder: str) -> str:
    """Return the commit of a checkout."""
    done = subprocess.run(["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def report(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    head = ", ".join(f"{name} {value}" for name, value in facts.items() if name not in ("commits", "accelerated"))
    baselines = "".join(f"\n- {kind} at {at}: {NOTES[kind]}" for kind, at in facts.get("commits", {}).items())
    head += "".join(f", {device}" for device in dict.fromkeys(row["device"] for row in rows if "device" in row))
    own = facts.get("accelerated", False)
    batches = ", ".join(f"{name} {config_for(name, own).data.batch_size}" for name in BATCH_SIZES)
    return "\n".join([f"Machine: {head}. Batch sizes: {batches}.\n{baselines}", *tables(rows)]) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in NOTES:
        parser.add_argument(f"--{kind}", default="", metavar="DIR")
    parser.add_argument("--implementations", default=";".join(MEASURED), help="separate several with ;")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--configs", default=",".join(BATCH_SIZES))
    parser.add_argument("--measures", default="training,start,generation")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds of training per sample")
    parser.add_argument("--count", type=int, default=500, help="tokens to generate per sample")
    parser.add_argument("--accelerated", action="store_true", help="use the configs' own batch sizes")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(words)
    folders = {kind: str(Path(getattr(args, kind)).resolve()) for kind in NOTES if getattr(args, kind)}
    commits = {kind: commit(folder) for kind, folder in folders.items()}
    facts = {**machine(), "accelerated": args.accelerated, "commits": commits}
    rows: list[Row] = []
    wanted = args.measures.split(","), args.configs.split(",")
    task = {"seconds": args.seconds, "count": args.count, "accelerated": args.accelerated}
    for row in samples(*wanted, folders, args.implementations.split(";"), args.rounds, **task):
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "baselines.json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
            (args.out / "baselines.md").write_text(report(rows, facts))
    print(report(rows, facts))


if __name__ == "__main__":
    main()
