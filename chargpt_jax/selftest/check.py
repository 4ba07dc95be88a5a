"""Self-test: checks the guarantees of docs/reliability.md on the user's machine and disk.

A small training runs as the real command in a process of its own. It is killed at random moments and resumed until it
is complete. The result and the log must be bit-identical to those of an uninterrupted training. Then its checkpoints
are damaged at random. A restore must reject them or fall back to a valid checkpoint, but never restore wrong values.
"""

import dataclasses
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from chargpt_jax.config import Config
from chargpt_jax.errors import UserError
from chargpt_jax.selftest.bench import KILL, Bench, Child, everything
from chargpt_jax.selftest.damage import mutate, outcome, same
from chargpt_jax.selftest.result import INTERVAL, Result
from chargpt_jax.storage.arrays.state_arrays import Arrays, on_host
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training.stages import restored

WORKERS = 2
"""Number of trainings at the same time."""

ASKING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


def check(
    parent: str | Path,
    config: Config | None = None,
    *,
    kills: int = 20,
    signals: int = 6,
    corruptions: int = 200,
    seed: int = 0,
    tell: Callable[[str], None] = print,
) -> Result:
    """Stop trainings, damage checkpoints, and check the outcomes.

    Args:
        parent: a folder on the disk to check; a new folder is created in it, and removed if all checks pass.
        config: its settings (dropout, accumulation, ...) are used with a very small model; None: `everything`.
        kills: number of SIGKILL and SIGTERM at random moments.
        signals: number of additional SIGTERM, SIGINT and SIGHUP.
        corruptions: number of checkpoints to damage.
        seed: random seed; the moments of signals still differ from run to run.
        tell: receives progress messages.

    Raises:
        UserError: if the folder cannot be written.
    """
    Workdir(parent).check_writable()
    began = time.monotonic()
    base = Workdir(parent).path
    base.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="chargpt-selftest-", dir=base))
    bench = Bench(folder, config or everything(), random.Random(seed), tell)
    try:
        whole = _uninterrupted(bench)
        _stop_trainings(bench, whole, _plan(kills, signals, bench.rng))
        if corruptions:
            _damage(bench, whole, corruptions)
    finally:
        bench.close()
    result = bench.result
    result.seconds = time.monotonic() - began
    if result.broken:
        result.broken.append(f"Its files are in {folder}.")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return result


@dataclasses.dataclass
class _Whole:
    """Results of an uninterrupted training."""

    arrays: Arrays
    log: list[dict[str, Any]]
    seconds: float
    """Duration of the command with a warm compilation cache."""


# Stopping


def _uninterrupted(bench: Bench) -> _Whole:
    """Train twice without a stop: once to fill the compilation cache, then as fast as all others."""
    for name in ("whole-0", "whole-1"):
        began = time.monotonic()
        child = bench.train(name)
        if (code := child.code()) != 0:
            said = (child.said().splitlines() or [""])[-1]
            raise UserError(
                f"The self-test's training failed with exit code {code} ({said[:300]}): see {child.output}."
            )
        seconds = time.monotonic() - began
    whole = _Whole(bench.state("whole-0"), bench.log("whole-0"), seconds)
    if not same(bench.state("whole-1"), whole.arrays) or bench.log("whole-1") != whole.log:
        bench.fail("Two uninterrupted trainings had different results or logs.")
    bench.tell(f"an uninterrupted training takes {seconds:.1f} s")
    return whole


def _plan(kills: int, signals: int, rng: random.Random) -> list[int]:
    """Return the signals to send, in random order."""
    plan = [rng.choice((KILL, signal.SIGTERM)) for _ in range(kills)]
    plan += [ASKING[i % len(ASKING)] for i in range(signals)]
    rng.shuffle(plan)
    return plan


def _stop_trainings(bench: Bench, whole: _Whole, plan: list[int]) -> None:
    """Send every signal of a plan to a training, and check how each training ends."""
    total, kills, names = len(plan), bench.result.kills, (f"stopped-{i}" for i in range(10**9))

    def work(seed: int) -> None:
        rng = random.Random(seed)
        while plan and not bench.result.broken:
            with bench.guard:
                name = next(names)
            stops = _stopped(bench, whole, name, plan, rng)
            equal = same(bench.state(name), whole.arrays) and bench.log(name) == whole.log
            with bench.guard:
                kills.tried += stops
                kills.bit_identical += stops * equal
            if equal:
                shutil.rmtree(bench.folder / name)
            else:
                bench.fail(f"The training {name} was stopped {stops} times and had a different result or log.")
            bench.tell(f"{kills.tried} of {total} kills and signals sent")

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(work, [bench.rng.getrandbits(32) for _ in range(WORKERS)]))


def _stopped(bench: Bench, whole: _Whole, name: str, plan: list[int], rng: random.Random) -> int:
    """Train to the end with stops at random moments; return the number of stops."""
    stops, reached, over = 0, (0, 0), False
    while not over:
        child = bench.train(name)
        number = None
        if plan and not child.ended(rng.uniform(0.0, whole.seconds)):
            with bench.guard:
                number = plan.pop() if plan else None
        stops += number is not None
        over, reached = _ends(bench, name, child, number, reached)
    return stops


def _ends(
    bench: Bench, name: str, child: Child, number: int | None, before: tuple[int, int]
) -> tuple[bool, tuple[int, int]]:
    """Send a signal, if any, and check the outcome.

    Returns:
        Whether the training is over; and the last logged and the last saved step, as in `before`.
    """
    began = time.monotonic()
    if number is not None:
        child.send(number)
    code, seconds = child.code(), time.monotonic() - began
    # A process that has just started has no signal handlers yet: there every signal kills.
    unhandled = number is not None and code == -number and not child.said()
    asked = number is not None and number != KILL and not unhandled
    right = {0, 130 if number == signal.SIGINT else 143} if asked else {0} if number is None else {0, -number}
    logged = max((line["step"] for line in Workdir(bench.folder / name).load_metrics()), default=0)
    after = logged, int(bench.state(name)["step"])
    # A process that ended before it trained has lost no step: an earlier process lost the missing ones.
    lost = 0 if after == before else after[0] - after[1]
    with bench.guard:
        kills, signals = bench.result.kills, bench.result.signals
        kills.most_steps_lost = max(kills.most_steps_lost, lost)
        kills.hangs += code is None
        if asked:
            signals.tried += 1
            signals.right_exit_code += code in right
            signals.verified_saves += lost == 0
            signals.seconds.append(seconds)
    if code not in right:
        bench.fail(f"After signal {number}, {name} ended with exit code {code}: see {child.output}.")
    if lost > (0 if asked else INTERVAL):
        bench.fail(f"After signal {number}, {name} had lost {lost} steps: see {child.output}.")
    return code == 0 or code not in right, after


# Damaging


def _damage(bench: Bench, whole: _Whole, corruptions: int) -> None:
    """Damage copies of a run's checkpoints, and restore each."""
    found, checkpoints = bench.result.corruptions, bench.folder / "whole-0" / "checkpoints"
    steps = sorted((path for path in checkpoints.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
    right: dict[int, Arrays] = {0: on_host(bench.fresh)}

    def restore(copy: Path) -> Arrays:
        return on_host(restored(bench.setup, bench.fresh, copy, lambda text: None))

    for i in range(len(steps)):  # each is the newest of a copy without the later ones
        copy = bench.folder / "older"
        for path in steps[: i + 1]:
            shutil.copytree(path, copy / path.name)
        state = restore(copy)
        right[int(state["step"])] = state
        shutil.rmtree(copy)
    for i in range(corruptions):
        copy = bench.folder / f"damaged-{i}"
        shutil.copytree(checkpoints, copy)
        what = mutate(copy, steps, bench.rng)
        result = outcome(partial(restore, copy), right, max(right))
        found.tried += 1
        setattr(found, result, getattr(found, result) + 1)
        if result in ("silent_wrong", "unclear", "hangs"):
            bench.fail(f"Corruption {i} ({what}) had the outcome: {result.replace('_', ' ')}.")
        else:
            shutil.rmtree(copy)
        if (i + 1) % 100 == 0:
            bench.tell(f"{i + 1} of {corruptions} corruptions tried")
