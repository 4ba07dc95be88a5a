"""Compare two checkouts bit by bit: losses, checkpoints, samples and exported models of the same runs.

    python -m benchmarks.same_bits OTHER [--this=CHECKOUT] [--steps=24] [--run=NAME] [--keep=FOLDER]

Both checkouts run the same commands on this machine with the same Python environment: `tiny` on the text that ships
with Python, and a short `small` run on it. Each checkout also resumes a run that the other one has begun. The script
prints a line per comparison and exits with 1 if one differs. OTHER is, for example, a `git worktree` of an older
commit.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RUNS = {
    "tiny": ["--config=tiny"],
    "small": ["--config=small", "--config.data.source=stdlib", "--config.optimizer.learning_rate=2e-3"],
    "tiny, Muon, dropout": [
        "--config=tiny",
        "--config.optimizer.kind=muon",
        "--config.model.dropout=0.1",
        "--config.optimizer.learning_rate=3e-3",
    ],
}
"""The runs by name; all but the first are cut to `--steps` training steps."""

TIMES = {"seconds", "tokens_per_second"}
"""What a log line holds besides results."""


def command(checkout: Path, mode: str, workdir: Path, *flags: str) -> None:
    """Run a command of one checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-m", "chargpt_jax.main", f"--mode={mode}", f"--workdir={workdir}", *flags]
    done = subprocess.run(words, env=environment, cwd=workdir.parent, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{checkout}: {' '.join(words[2:])} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def checkpoints(workdir: Path) -> dict[str, Any]:
    """Return of every checkpoint its validation loss, the names and shapes of its arrays, and their sha256."""
    found = {}
    for path in sorted(workdir.glob("checkpoints/*/record.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        found[path.parent.name] = {name: record[name] for name in ("loss", "arrays", "digest", "vocabulary")}
    return found


def results(workdir: Path) -> dict[str, Any]:
    """Return everything that a run has computed, by kind."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    files = {kind: sorted(workdir.glob(pattern)) for kind, pattern in (("samples", "samples/*.json"),)}
    files |= {form: sorted((workdir / form).glob("*.safetensors")) for form in ("hf", "original")}
    finder = workdir / "lr_finder.json"
    return {
        "range test": json.loads(finder.read_text(encoding="utf-8")) if finder.exists() else None,
        "losses": [{name: value for name, value in line.items() if name not in TIMES} for line in lines],
        "checkpoints": checkpoints(workdir),
        **{kind: [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths] for kind, paths in files.items()},
    }


def compared(name: str, one: dict[str, Any], other: dict[str, Any]) -> Iterator[bool]:
    """Print a line per kind of result; yield whether it is the same."""
    for kind in one:
        same = one[kind] == other[kind]
        count = len(one[kind]) if isinstance(one[kind], list | dict) else int(one[kind] is not None)
        print(f"{name:24} {kind:12} {count:5} {'identical' if same else 'DIFFERENT'}", flush=True)
        yield same


def main() -> int:
    """Run and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="a checkout to compare with")
    parser.add_argument(
        "--this", type=Path, default=Path(__file__).parents[1], help="the other side; default: this one"
    )
    parser.add_argument("--steps", type=int, default=24, help="training steps of the short runs")
    parser.add_argument("--keep", type=Path, help="a new folder for the runs, which are otherwise deleted")
    parser.add_argument("--run", action="append", choices=RUNS, help="only this run; may be repeated")
    given = parser.parse_args()
    sides = {"this": given.this.absolute(), "other": given.other.absolute()}
    folder = given.keep or Path(tempfile.mkdtemp(prefix="same-bits-"))
    same = []
    for name in given.run or RUNS:
        flags = RUNS[name]
        flags = flags if name == "tiny" else [*flags, f"--config.scheduler.max_steps={given.steps}"]
        made = {}
        for side, checkout in sides.items():
            (folder / side).mkdir(parents=True, exist_ok=True)
            workdir = folder / side / name.replace(", ", "-")
            command(checkout, "run", workdir, *flags)
            for form in ("hf", "original"):
                command(checkout, "export", workdir, f"--format={form}", f"--out={workdir / form}")
            made[side] = results(workdir)
        same += compared(name, made["this"], made["other"])
    begun, resumed = folder / "other" / "small", {}
    for side, checkout in sides.items() if begun.exists() else ():
        workdir = folder / side / "resumed"
        shutil.copytree(begun, workdir)
        command(checkout, "run", workdir, *RUNS["small"], f"--config.scheduler.max_steps={2 * given.steps}")
        resumed[side] = {kind: found for kind, found in results(workdir).items() if kind not in ("hf", "original")}
    if resumed:
        same += compared("small of other, resumed", resumed["this"], resumed["other"])
    if given.keep is None:
        shutil.rmtree(folder)
    print("all identical" if all(same) else "there are differences")
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
