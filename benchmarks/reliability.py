"""The cost of a verified save, and the outcome of a save that fails or is killed at any file operation.

    python -m benchmarks.reliability [--saves=30] [--every=1] [--out=FOLDER]

The first table uses the states of configs/small.py and configs/nanogpt_baby.py; saves by chargpt_jax and by orbax alone
alternate. The second uses a small state: each (with --every=N, each N-th) file operation that Python sees during one
save (benchmarks/stored.py) fails with ENOSPC, then with EIO, then kills the process. A case counts as survived if the
older checkpoints are intact and the newest one is restored bit-identically. The mode `selftest` of chargpt_jax tests
kills at random moments, signals and damaged files.
"""

import argparse
import errno
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from benchmarks.baselines import machine
from benchmarks.implementations import config_for
from benchmarks.stored import RECORD, Store, bits, faults, filled, refuse, state_at
from chargpt_jax.errors import SaveFailed
from chargpt_jax.storage import manifest
from chargpt_jax.storage.arrays.state_arrays import on_host


def seconds(f: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


def costs(name: str, saves: int, folder: Path) -> dict[str, list[float]]:
    """Save with chargpt_jax and with orbax alone, alternating; return milliseconds by column of the table."""
    states = [state_at(step, model=config_for(name).model) for step in range(1, 3)]
    store, orbax = Store(folder / name, keep_last=2), ocp.Checkpointer(ocp.StandardCheckpointHandler())
    found: dict[str, list[float]] = {"chargpt_jax": [], "orbax": [], "difference": [], "verification": []}
    for number in range(saves + 1):
        state = states[number % 2].replace(step=np.int32(number + 1))
        alone = folder / f"{name}-{number}"
        plain = on_host(state)
        theirs = seconds(lambda at=alone, arrays=plain: orbax.save(at, args=ocp.args.StandardSave(arrays)))  # type: ignore[misc]
        ours = seconds(lambda state=state: store.save(state, RECORD, 1.0))  # type: ignore[misc]
        checked = seconds(lambda step=number + 1: manifest.verify(store.folder / str(step)))  # type: ignore[misc]
        shutil.rmtree(alone)
        if number:  # the first warms up
            for column, value in zip(found, (ours, theirs, ours - theirs, checked), strict=True):
                found[column].append(1e3 * value)
    store.close()
    orbax.close()
    return found


def survived(folder: Path, must_be_saved: bool = False) -> bool:
    """Return whether the older checkpoints are intact, the newest is the last one saved, and none was skipped."""
    store = Store(folder)
    try:
        step, _, state = store.load("latest", lambda record: state_at(1))
        whole = all(bits(store.restore(older, state_at(1))) == bits(state_at(older)) for older in store.steps())
        fine = bits(state) == bits(state_at(step)) and {2, 3} <= set(store.steps()) and not store.heard
        return whole and fine and step in ((4,) if must_be_saved else (3, 4))
    finally:
        store.close()


def refusals(home: Path, number: int, every: int) -> tuple[int, int]:
    """Let each operation of one save fail; return how many cases were tried and survived."""
    total, fine = operations(home), 0
    for at in range(0, total, every):
        folder, saved = home / f"refused-{at}", True
        shutil.copytree(home / "store", folder)
        store = Store(folder)
        with faults().within(folder, at, refuse(number)):
            try:
                store.save(state_at(4), RECORD, 0.5)
            except SaveFailed:
                saved = False
        store.close()
        fine += survived(folder, saved) and not list(folder.glob(".saving*"))
        shutil.rmtree(folder)
    return len(range(0, total, every)), fine


def operations(home: Path) -> int:
    """Count the file operations of one save."""
    shutil.copytree(home / "store", home / "counted")
    store = Store(home / "counted")
    with faults().within(home / "counted"):
        store.save(state_at(4), RECORD, 0.5)
    count = len(faults().seen)
    store.close()
    shutil.rmtree(home / "counted")
    return count


def kills(home: Path, every: int) -> tuple[int, int]:
    """Kill a process at each operation of one save; return how many cases were tried and survived."""
    numbers = range(0, operations(home), every)
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks.stored", str(home), *map(str, numbers)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    statuses = {int(number): status for number, status in json.loads(done.stdout).items()}
    killed = [number for number, status in statuses.items() if status]  # a save may need fewer operations
    fine = sum(statuses[number] == -9 and survived(home / f"killed-{number}") for number in killed)
    return len(killed), fine


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=30)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--configs", default="small,nanogpt_baby")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(words)
    lines = [f"Machine: {', '.join(f'{name} {value}' for name, value in machine().items())}.\n"]
    lines += ["| save of | chargpt_jax, ms | orbax alone, ms | difference, ms | verification, ms |"]
    lines += ["|---|---:|---:|---:|---:|"]
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.configs.split(","):
            found = costs(name, args.saves, Path(temporary))
            cells = (f"{statistics.median(x):.1f} ({min(x):.1f} to {max(x):.1f})" for x in found.values())
            lines.append(f"| {name} | {' | '.join(cells)} |")
        home = Path(temporary, "faults")
        filled(home / "store").close()
        lines += ["\n| fault at each file operation of one save | tried | survived |", "|---|---:|---:|"]
        for name in ("ENOSPC", "EIO"):
            lines.append("| {} | {} | {} |".format(name, *refusals(home, getattr(errno, name), args.every)))
        lines.append("| SIGKILL | {} | {} |".format(*kills(home, args.every)))
    text = "\n".join(lines) + "\n"
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "reliability.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
