"""Ours and its peers side by side: training, memory, cold start, generation.

    python -m benchmarks.peers --nanogpt=DIR --original=DIR --equinox=DIR --nanodo=DIR [--rounds=5] [--out=FOLDER]
        [--setups=small,nanogpt_baby,nanogpt_cpu] [--measures=training,start,generation] [--contestants='ours;nanoGPT']
        [--accelerated]

The folders are the user's checkouts of karpathy/nanoGPT, z0u/mi-ni at 2a991f7 (PyTorch), z0u/mi-ni (Equinox) and
google-deepmind/nanodo; a peer without a folder is left out. Every sample is a process of its own, one after the other,
and the contestants take turns, so that what a noisy machine does meets all of them. A ratio is the median over rounds
of ours against the other in the same round. Prints Markdown; --out also gets peers.json and peers.md.
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

from benchmarks.contestants import CONTESTANTS, NOTES, PROMPT, SETUPS, setup_of

UNITS = {
    "tokens_per_second": ("training, tokens/s", True),
    "peak_mib": ("peak memory of training, compilation included, MiB", False),
    "own_mib": ("of it beyond imports, MiB", False),
    "device_mib": ("peak memory of the GPU in training, MiB", False),
    "empty_seconds": ("start to first update, empty cache, s", False),
    "filled_seconds": ("start to first update, filled cache, s", False),
    "empty_mib": ("peak memory up to there, empty cache, MiB", False),
    "filled_mib": ("peak memory up to there, filled cache, MiB", False),
    "inside 1": ("writing inside the window, batch 1, characters/s", True),
    "inside 32": ("writing inside the window, batch 32, characters/s", True),
    "past 1": ("writing past the window, batch 1, characters/s", True),
    "inside 1 first": ("the first text inside the window, batch 1, compilation included, s", False),
}
"""By figure: how a table calls it, and whether more is better."""

LIMIT = 1200.0
"""Seconds after which a sample is given up."""

Row = dict[str, Any]
"""contestant, setup, round, and the sample's figures or an `error`."""


def child(task: dict[str, Any], environment: dict[str, str] | None = None) -> tuple[dict[str, float], float]:
    """Take a sample in a fresh process; return its figures and the seconds until it printed them.

    Raises:
        RuntimeError: with the last line that it said, where it failed.
    """
    command = [sys.executable, "-m", "benchmarks.contestants", json.dumps(task)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, text=True, env={**os.environ, **(environment or {})}, **{**pipes, "stderr": errors}
        )
        try:
            out, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise RuntimeError(f"no answer within {LIMIT:g} s") from None
        seconds = time.perf_counter() - began
        if process.returncode:
            errors.seek(0)
            raise RuntimeError((errors.read().strip().splitlines() or ["it ended without a word"])[-1][:200])
    return json.loads(out.strip().splitlines()[-1]), seconds


def starts(task: dict[str, Any]) -> dict[str, float]:
    """Start twice with one compilation cache: empty, then filled."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "TORCHINDUCTOR_CACHE_DIR": cache,
        }
        found = {state: child(task, environment) for state in ("empty", "filled")}
    return {
        **{f"{state}_seconds": seconds for state, (_, seconds) in found.items()},
        **{f"{state}_mib": figures["mib"] for state, (figures, _) in found.items()},
    }


def writings(setup: str, count: int) -> dict[str, dict[str, int]]:
    """Return what is written: by name, the prompt's length, the number of characters and the batch."""
    window = setup_of(setup).model.block_size
    inside = {"prompt": PROMPT, "count": min(count, window - PROMPT)}
    return {
        "inside 1": {**inside, "batch": 1},
        "inside 32": {**inside, "batch": 32},
        "past 1": {"prompt": window, "count": min(count, 100), "batch": 1},
    }


def samples(
    measures: Sequence[str],
    setups: Sequence[str],
    folders: dict[str, str],
    names: Sequence[str],
    rounds: int,
    **task: Any,
) -> Iterator[Row]:
    """Take all samples, the contestants' order turned by one each round."""
    names = [name for name in names if CONTESTANTS[name][0] in ("ours", *folders)]
    for number in range(rounds):
        turned = names[number % len(names) :] + names[: number % len(names)]
        for setup in setups:
            for measure in measures:
                for name in turned:
                    own = {"contestant": name, "measure": measure, "setup": setup, **task}
                    own["folder"] = folders.get(CONTESTANTS[name][0], "")
                    yield from _one(own, number)


def _one(task: dict[str, Any], number: int) -> Iterator[Row]:
    row = {"contestant": task["contestant"], "setup": task["setup"], "round": number}
    if task["measure"] == "generation" and CONTESTANTS[task["contestant"]][1] == "compiled":
        return  # its generate calls the model with a new length for every character
    wanted = writings(task["setup"], task.pop("count", 500)) if task["measure"] == "generation" else {"": {}}
    for name, how in wanted.items():
        try:
            if task["measure"] == "start":
                yield row | starts(task)
            elif name:
                figures = child(task | how)[0]
                yield row | {name: figures["characters_per_second"], f"{name} first": figures["first_seconds"]}
            else:
                yield row | child(task)[0]
        except RuntimeError as error:
            yield row | {"error": str(error), "measure": task["measure"]}


def ratios(rows: Sequence[Row], setup: str, figure: str, other: str) -> list[float]:
    """Return, round by round, how many times better ours is than another: faster, or smaller.

    Ours is float32's, or bfloat16's where only that was measured.
    """
    found = {(row["contestant"], row["round"]): row[figure] for row in rows if row["setup"] == setup and figure in row}
    measured = {name for name, _ in found}
    ours = next((name for name, (kind, _) in CONTESTANTS.items() if kind == "ours" and name in measured), "")
    pairs = [(value, found.get((other, n))) for (name, n), value in found.items() if name == ours]
    return [mine / theirs if UNITS[figure][1] else theirs / mine for mine, theirs in pairs if theirs]


def number(value: float) -> str:
    """Write a figure with three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """Write a Markdown table for each setup and figure that was measured, and what failed."""
    for setup in dict.fromkeys(row["setup"] for row in rows):
        for figure, (title, _) in UNITS.items():
            values: dict[str, list[float]] = {}
            for row in rows:
                if row["setup"] == setup and figure in row:
                    values.setdefault(row["contestant"], []).append(row[figure])
            if not values:
                continue
            yield f"\n**{setup}: {title}**\n\n| | median | range | ours is better by |\n|---|---:|---:|---:|"
            for name in (name for name in CONTESTANTS if name in values):
                own, times = values[name], ratios(rows, setup, figure, name)
                better = f"{number(statistics.median(times))}x ({number(min(times))} to {number(max(times))})"
                span = f"{number(min(own))} to {number(max(own))}"
                shown = better if times and CONTESTANTS[name][0] != "ours" else ""
                yield f"| {name} | {number(statistics.median(own))} | {span} | {shown} |"
    failed = {(row["contestant"], row["setup"], row["measure"]): row["error"] for row in rows if "error" in row}
    if failed:
        yield "\nNot measured:\n"
        yield from (f"- {name}, {setup}, {measure}: {error}" for (name, setup, measure), error in failed.items())


def machine() -> dict[str, Any]:
    """Describe the machine and the libraries."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fact = lambda key: next((line.split(":")[1].strip() for line in lines if line.startswith(key)), "?")  # noqa: E731
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
    """Return the whole as Markdown."""
    head = ", ".join(f"{name} {value}" for name, value in facts.items() if name not in ("commits", "accelerated"))
    peers = "".join(f"\n- {kind} at {at}: {NOTES[kind]}" for kind, at in facts.get("commits", {}).items())
    head += "".join(f", {device}" for device in dict.fromkeys(row["device"] for row in rows if "device" in row))
    own = facts.get("accelerated", False)
    batches = ", ".join(f"{name} {setup_of(name, own).data.batch_size}" for name in SETUPS)
    return "\n".join([f"Machine: {head}. Sequences a batch: {batches}.\n{peers}", *tables(rows)]) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in NOTES:
        parser.add_argument(f"--{kind}", default="", metavar="DIR")
    parser.add_argument("--contestants", default=";".join(CONTESTANTS), help="some of them, with ; between")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--setups", default=",".join(SETUPS))
    parser.add_argument("--measures", default="training,start,generation")
    parser.add_argument("--seconds", type=float, default=10.0, help="of training a sample")
    parser.add_argument("--count", type=int, default=500, help="characters that a sample writes")
    parser.add_argument("--accelerated", action="store_true", help="the configs' own batch sizes, for an accelerator")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(words)
    folders = {kind: str(Path(getattr(args, kind)).resolve()) for kind in NOTES if getattr(args, kind)}
    commits = {kind: commit(folder) for kind, folder in folders.items()}
    facts = {**machine(), "accelerated": args.accelerated, "commits": commits}
    rows: list[Row] = []
    wanted = args.measures.split(","), args.setups.split(",")
    task = {"seconds": args.seconds, "count": args.count, "accelerated": args.accelerated}
    for row in samples(*wanted, folders, args.contestants.split(";"), args.rounds, **task):
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "peers.json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
            (args.out / "peers.md").write_text(report(rows, facts))
    print(report(rows, facts))


if __name__ == "__main__":
    main()
