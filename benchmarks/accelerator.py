"""Measure on one GPU: training speed and MFU, generation, bit-identity, the price of deterministic kernels; with goals.

    python -m benchmarks.accelerator --nanogpt=DIR --original=DIR [--minutes=10] [--rounds=5] [--out=FOLDER]
    python -m benchmarks.accelerator --size=tiny --out=FOLDER    # a trial of this script, also on a CPU

The folders are checkouts of karpathy/nanoGPT and of z0u/mi-ni at 2a991f7. A baseline is left out without its folder, or
if PyTorch is missing or has no CUDA, and the report says so. Only one device is used.

Every sample runs in its own process, one at a time, and the implementations alternate. Before the first round, all
programs are compiled into a cache, several at a time; bit-identity is checked there too. Each result is written at
once to FOLDER/accelerator.json and accelerator.md, so the same command continues after a stop. A round starts only if
it is the first one of a command or is expected to end within --minutes. The goals are for one H100 or H200.
"""

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from benchmarks.baselines import Row, caching, child, commit, machine, number, ratios, tables
from benchmarks.implementations import IMPLEMENTATIONS, NOTES, PROMPT, config_of
from chargpt_jax import atomic
from chargpt_jax.model.flops import peak_flops, training_flops

OURS = "chargpt_jax, bfloat16"
FREE = "chargpt_jax, bfloat16, nondeterministic"
NANOGPT = "nanoGPT, bfloat16, compiled"
NANOGPT_GENERATION = "nanoGPT, bfloat16"  # its generate would be compiled again for every length
ORIGINAL = "original, bfloat16"  # it trains with autocast and without torch.compile

NO_DROPOUT = {"model.dropout": 0.0}
SHAPE = NO_DROPOUT | {
    **{"model.n_layer": 12, "model.n_embd": 768, "model.n_head": 12, "model.n_head_dim": 64, "model.n_ff": 3072},
    **{"model.block_size": 1024, "data.batch_size": 16},
}
"""The layers and the context of GPT-2 with 124 M parameters. It has 85 M here: the vocabulary is that of characters."""

TINY = {
    **{"model.n_layer": 2, "model.n_embd": 16, "model.n_head": 2, "model.n_head_dim": 8, "model.n_ff": 64},
    **{"model.block_size": 32, "data.batch_size": 4},
}
"""Replaces the sizes of every part with --size=tiny."""

GOAL_DEVICES = re.compile(r"\b(H100|H200)\b")
TRAINED = "tokens_per_second"
WRITTEN = "within_1"
TIMEOUT_SECONDS = 300.0
"""A sample that takes longer fails."""


class Part(NamedTuple):
    """What is measured together in a round."""

    name: str
    config: str
    implementations: tuple[str, ...]
    fields: dict[str, Any]
    figure: str = TRAINED
    identity: bool = False
    """Whether bit-identity is checked."""


PARTS = (
    Part("nanogpt_baby", "nanogpt_baby", (OURS, NANOGPT, FREE), {}, identity=True),
    Part("small", "small", (OURS, ORIGINAL), {}, identity=True),
    Part("nanogpt_baby without dropout", "nanogpt_baby", (OURS,), NO_DROPOUT),
    Part("124 M shape", "nanogpt_baby", (OURS, NANOGPT, FREE), SHAPE),
    Part("nanogpt_baby, generation", "nanogpt_baby", (OURS, NANOGPT_GENERATION), {}, WRITTEN),
    Part("small without dropout", "small", (OURS,), NO_DROPOUT),
)

Rows = Sequence[Row]


class Goal(NamedTuple):
    """A figure that has to reach a value."""

    text: str
    least: float
    values: Callable[[Rows], list[float]]
    shown: Callable[[float], str]
    every: bool = False
    """Whether every value has to reach it; otherwise the median has to."""


def _times(value: float) -> str:
    return f"{number(value)}x"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


GOALS = (
    Goal(
        "training `nanogpt_baby`: speed compared with nanoGPT (compiled, bfloat16, flash attention)",
        2.5,
        lambda rows: ratios(rows, "nanogpt_baby", TRAINED, NANOGPT),
        _times,
    ),
    Goal(
        "training `small`: speed compared with the original (bfloat16)",
        4.0,
        lambda rows: ratios(rows, "small", TRAINED, ORIGINAL),
        _times,
    ),
    Goal(
        "MFU of `nanogpt_baby` without dropout",
        0.30,
        lambda rows: mfus(rows, "nanogpt_baby without dropout", OURS),
        _percent,
    ),
    Goal("MFU of the 124 M shape", 0.45, lambda rows: mfus(rows, "124 M shape", OURS), _percent),
    Goal(
        "generation with `nanogpt_baby`, batch size 1: speed compared with nanoGPT",
        5.0,
        lambda rows: ratios(rows, "nanogpt_baby, generation", WRITTEN, NANOGPT_GENERATION),
        _times,
    ),
    Goal(
        "configs whose second run was bit-identical",
        1.0,
        lambda rows: [float(same) for same in identical(rows).values()],
        lambda value: "all" if value == 1.0 else "not all",
        every=True,
    ),
)


def task_of(part: Part, implementation: str, size: str, folders: dict[str, str], seconds: float) -> dict[str, Any]:
    """Return the task of a sample, for `child`."""
    fields = part.fields | (TINY if size == "tiny" else {})
    task = {"config": part.config, "accelerated": True, "fields": fields, "implementation": implementation}
    task["folder"] = folders.get(IMPLEMENTATIONS[implementation][0], "")
    if part.figure == TRAINED:
        return {**task, "measure": "training", "seconds": seconds}
    count = config_of(task).model.block_size - PROMPT
    return {**task, "measure": "generation", "prompt": PROMPT, "count": count, "batch": 1, "repeats": 5}


@cache
def flops_per_token(name: str, size: str) -> float:
    """Return the FLOPs of training per token of the part with this name."""
    part = next(part for part in PARTS if part.name == name)
    model = config_of(task_of(part, OURS, size, {}, 0.0)).model
    return training_flops(model, 1) / model.block_size


def mfu(row: Row) -> float | None:
    """Return the fraction of the device's peak FLOP/s in bfloat16 that a training row reached, None if not known."""
    peak = peak_flops(SimpleNamespace(device_kind=row.get("device", "")), "bfloat16")
    if peak is None or TRAINED not in row:
        return None
    return row[TRAINED] * flops_per_token(row["config"], row["size"]) / peak


def mfus(rows: Rows, name: str, implementation: str) -> list[float]:
    """Return the known MFUs of the rows of a part and an implementation."""
    own = (mfu(row) for row in rows if (row["config"], row["implementation"]) == (name, implementation))
    return [value for value in own if value is not None]


def identical(rows: Rows) -> dict[str, bool]:
    """Return, by part, whether two processes that trained the same steps have the same bits."""
    return {row["config"]: len(set(row["digests"])) == 1 for row in rows if "digests" in row}


def outcome(goal: Goal, rows: Rows, facts: dict[str, Any]) -> tuple[str, str]:
    """Return the measured value of a goal, as text, and 'met', 'missed' or 'not measured'."""
    counts = facts.get("size") == "full" and GOAL_DEVICES.search(facts.get("device", ""))
    values = goal.values(rows) if counts else []
    if not values:
        return "", "not measured"
    value = min(values) if goal.every else statistics.median(values)
    span = "" if goal.every or len(values) == 1 else f" ({goal.shown(min(values))} to {goal.shown(max(values))})"
    return goal.shown(value) + span, "met" if value >= goal.least else "missed"


def goals_table(rows: Rows, facts: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the table of goals."""
    yield "| goal | at least | measured | result |\n|---|---:|---:|---|"
    for goal in GOALS:
        measured, result = outcome(goal, rows, facts)
        yield f"| {goal.text} | {goal.shown(goal.least)} | {measured} | {result} |"


def mfu_table(rows: Rows) -> Iterator[str]:
    """Yield the lines of the table of MFUs; nothing if the device's peak is not known."""
    pairs = dict.fromkeys((row["config"], row["implementation"]) for row in rows)
    known = {pair: values for pair in pairs if (values := mfus(rows, *pair))}
    if known:
        yield "\n**MFU: fraction of the peak FLOP/s in bfloat16**\n\n| config | implementation | median | range |"
        yield "|---|---|---:|---:|"
    for (name, implementation), values in known.items():
        span = f"{_percent(min(values))} to {_percent(max(values))}"
        yield f"| {name} | {implementation} | {_percent(statistics.median(values))} | {span} |"


def determinism(rows: Rows) -> Iterator[str]:
    """Yield the lines about bit-identity and the price of deterministic kernels."""
    for name, same in identical(rows).items():
        word = "bit-identical" if same else "DIFFERENT"
        yield f"- {name}: two processes, each with its own compilation, trained the same steps: {word}."
    for part in PARTS:
        prices = ratios(rows, part.name, TRAINED, FREE)
        if prices:
            span = f"{number(min(prices))} to {number(max(prices))}"
            yield f"- {part.name}: with deterministic kernels, {number(statistics.median(prices))}x the speed ({span})."


def report(rows: Rows, facts: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    head = ", ".join(f"{name} {value}" for name, value in facts.items() if isinstance(value, str | int))
    rounds = 1 + max((row["round"] for row in rows if "round" in row), default=-1)
    lines = [f"Machine: {head}. Rounds: {rounds}.", *(f"- {kind} at {at}" for kind, at in facts["commits"].items())]
    lines += [f"- {name} is left out: {why}" for name, why in facts["left out"].items()]
    if all(outcome(goal, rows, facts)[1] == "not measured" for goal in GOALS) and rows:
        lines.append(
            "\nThis is a trial of the script. The goals stay open: they need one H100 or H200 and --size=full."
        )
        lines.append("Only a GPU has nondeterministic kernels: on another device, their price below is noise.")
    lines += ["", *goals_table(rows, facts), *mfu_table(rows)]
    lines += ["\n**Determinism**\n", *determinism(rows), *tables(rows)]
    return "\n".join(lines) + "\n"


class Stopped(Exception):
    """A mistake of the user, in one sentence."""


class Results:
    """The rows that were measured, in FOLDER/accelerator.json; every row is written at once."""

    def __init__(self, folder: Path, facts: dict[str, Any]):
        """Read the rows of an earlier command; failed ones are measured again.

        Raises:
            Stopped: if they are from another machine, version or size.
        """
        self.path, self.facts, self.rows = folder / "accelerator.json", facts, list[Row]()
        if self.path.exists():
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            for name in dict.fromkeys((*facts, *saved["facts"])):
                if facts.get(name) != saved["facts"].get(name):
                    raise Stopped(
                        f"{self.path} has results with another {name} ({saved['facts'].get(name)}, now "
                        f"{facts.get(name)}): choose another --out."
                    )
            self.rows = [row for row in saved["rows"] if "error" not in row]
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        """Record a row, and write all files."""
        self.rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        """Write the JSON file and the report, atomically."""
        found = [(goal, *outcome(goal, self.rows, self.facts)) for goal in GOALS]
        goals = [{"goal": goal.text, "measured": measured, "result": result} for goal, measured, result in found]
        content = {"facts": self.facts, "goals": goals, "rows": self.rows}
        atomic.write_file(self.path, (json.dumps(content, indent=1) + "\n").encode())
        atomic.write_file(self.path.with_suffix(".md"), report(self.rows, self.facts).encode())

    def has(self, **key: Any) -> bool:
        """Whether a row with these entries was measured."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)


class Session:
    """One command: what to measure, and how."""

    def __init__(self, parts: Sequence[Part], size: str, folders: dict[str, str], results: Results, seconds: float):
        """Take the parts, with the implementations that are available."""
        self.size, self.folders, self.results, self.seconds = size, folders, results, seconds
        available = ("chargpt_jax", *folders)
        self.parts = [
            part._replace(implementations=tuple(n for n in part.implementations if IMPLEMENTATIONS[n][0] in available))
            for part in parts
        ]
        self.environment = one_device() | caching(str((results.path.parent / "cache").resolve()))

    def prepare(self, workers: int) -> None:
        """Check bit-identity, and compile all programs; `workers` processes at a time."""
        unchecked = [part for part in self.parts if part.identity and not self._checked(part)]
        pool = ThreadPoolExecutor(workers)
        try:
            jobs = [pool.submit(self._compile, part, name) for part, name in self._uncompiled() if workers > 1]
            runs = [[pool.submit(self._digest, part, how) for how in ((20,), (12, 8))] for part in unchecked]
            for part, pair in zip(unchecked, runs, strict=True):
                self.results.add(self._identity(part, pair))
            for job in jobs:
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _checked(self, part: Part) -> bool:
        return any(row["config"] == part.name and "digests" in row for row in self.results.rows)

    def _uncompiled(self) -> Iterator[tuple[Part, str]]:
        for part in self.parts:
            for name in part.implementations:
                # Without deterministic kernels XLA chooses them by their speed, which other processes would disturb.
                if name != FREE and not self.results.has(config=part.name, implementation=name):
                    yield part, name

    def _compile(self, part: Part, name: str) -> None:
        """Fill the compilation cache; an error will be reported by the measurement."""
        task = task_of(part, name, self.size, self.folders, 0.0)
        task = task if part.figure == WRITTEN else {**task, "measure": "start"}
        try:
            child(task, self.environment | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, TIMEOUT_SECONDS)
        except RuntimeError:
            return

    def _digest(self, part: Part, dispatches: tuple[int, ...]) -> str:
        """Train in a process that compiles anew, in dispatches of these sizes; return the sha256 of the result."""
        task = {**task_of(part, OURS, self.size, {}, 0.0), "measure": "digest", "dispatches": dispatches}
        own = {**one_device(), "JAX_ENABLE_COMPILATION_CACHE": "false", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        digest: str = child(task, own, TIMEOUT_SECONDS)[0]["digest"]
        return digest

    def _identity(self, part: Part, pair: Sequence[Future[str]]) -> Row:
        """Return the row of two such runs; the second one is split into two dispatches, as a resumed run is."""
        row = {"config": part.name, "implementation": OURS, "size": self.size}
        try:
            return row | {"digests": [run.result() for run in pair]}
        except RuntimeError as error:
            return row | {"error": str(error), "measure": "bit-identity"}

    def round(self, index: int) -> float:
        """Take the samples of a round that are missing; return the seconds that the whole round took."""
        for part in self.parts:
            names = part.implementations
            for name in names[index % len(names) :] + names[: index % len(names)]:
                key = {"config": part.name, "implementation": name, "round": index}
                failed = any("error" in row and row["config"] == part.name for row in self._of(name))
                if not failed and not self.results.has(**key):
                    self.results.add(self._sample(part, name, key))
        return sum(row["seconds"] for row in self.results.rows if row.get("round") == index)

    def _of(self, name: str) -> Iterator[Row]:
        return (row for row in self.results.rows if row["implementation"] == name and "round" in row)

    def _sample(self, part: Part, name: str, key: Row) -> Row:
        task, began = task_of(part, name, self.size, self.folders, self.seconds), time.monotonic()
        try:
            figures, _ = child(task, self.environment, TIMEOUT_SECONDS)
        except RuntimeError as error:
            seconds = time.monotonic() - began
            return key | {"error": str(error), "measure": task["measure"], "size": self.size, "seconds": seconds}
        kept: Row = {name: figures[name] for name in ("device", "device_mib") if name in figures}
        seconds = time.monotonic() - began
        return key | {"size": self.size, "seconds": seconds, part.figure: figures["tokens_per_second"], **kept}

    def rounds(self, count: int, until: float) -> None:
        """Take rounds until there are `count`, or until the next one would end after `until` (time.monotonic)."""
        took = 0.0
        for index in range(count):
            new = not all(
                self.results.has(config=part.name, implementation=name, round=index)
                for part in self.parts
                for name in part.implementations
            )
            if new and took and time.monotonic() + took > until:
                print(f"{index} rounds were taken: the next one would exceed the limit.", file=sys.stderr)
                break
            took = self.round(index) if new else took


def one_device() -> dict[str, str]:
    """Return the environment variable that shows only the first GPU to a process."""
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


def left_out(kinds: dict[str, str], found: dict[str, str]) -> dict[str, str]:
    """Return the baselines that cannot be measured, and why.

    Args:
        kinds: by baseline, the folder of its checkout, or ''.
        found: the devices of JAX and PyTorch, from `found_devices`.
    """
    if found["torch"] == "absent":
        return dict.fromkeys(kinds, "PyTorch is not installed")
    if found["torch"] == "cpu" and found["jax"] != "cpu":
        return dict.fromkeys(kinds, "PyTorch has no CUDA")
    return {kind: f"no checkout was given (--{kind})" for kind, folder in kinds.items() if not folder}


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in ("nanogpt", "original"):
        parser.add_argument(f"--{kind}", default="", metavar="DIR", help=NOTES[kind])
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: a trial, also on a CPU")
    parser.add_argument("--minutes", type=float, default=10.0, help="time limit; the first round is always complete")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds, those of earlier commands included")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds of training per sample")
    parser.add_argument("--part", action="append", choices=[part.name for part in PARTS], help="may be repeated")
    parser.add_argument("--out", type=Path, default=Path("accelerator"))
    args = parser.parse_args(words)
    until = time.monotonic() + 60 * args.minutes
    found, _ = child({"measure": "devices"}, one_device(), TIMEOUT_SECONDS)
    if args.size == "full" and found["jax"] == "cpu":
        parser.error("JAX finds no accelerator, and the full size takes hours on a CPU: use --size=tiny for a trial.")
    kinds = {kind: getattr(args, kind) for kind in ("nanogpt", "original")}
    missing = left_out(kinds, found)
    folders = {kind: str(Path(folder).resolve()) for kind, folder in kinds.items() if kind not in missing}
    facts: dict[str, Any] = {
        "device": found["jax"],
        "size": args.size,
        "seconds per sample": f"{args.seconds:g}",
        **machine(),
        "chargpt_jax": commit(str(Path(__file__).parent)),
        "commits": {kind: commit(folder) for kind, folder in folders.items()},
        "left out": missing,
    }
    try:
        results = Results(args.out, facts)
    except Stopped as error:
        parser.error(str(error))
    parts = [part for part in PARTS if not args.part or part.name in args.part]
    session = Session(parts, args.size, folders, results, args.seconds)
    try:
        session.prepare(max(1, min(4, len(os.sched_getaffinity(0)) // 4)))
        session.rounds(args.rounds, until)
    except KeyboardInterrupt:
        print("Stopped: the same command continues.", file=sys.stderr)
        sys.exit(130)
    results.write()
    print(report(results.rows, facts))


if __name__ == "__main__":
    main()
