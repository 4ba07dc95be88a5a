"""Train with several processes on this machine, kill one of them at random moments, and resume.

    python -m benchmarks.processes [--kills=20] [--counts=2,4] [--out=FOLDER]

Each training is killed several times: one process, chosen at random, gets SIGKILL at a random moment after the
processes have been connected. The others must end within 30 s, with one line that says why and an exit code other than
0. The same commands are then run again. At the end the last checkpoint and metrics.jsonl must equal those of a training
that was not interrupted.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.baselines import machine
from chargpt_jax.config.saved import to_json
from chargpt_jax.data.corpus import load_corpus
from chargpt_jax.selftest.bench import CHARACTERS, everything, shrunk

STEPS = 60
"""Training steps of a training; a checkpoint is saved every few steps."""

LIMIT = 30.0
"""Seconds in which the other processes must end."""

HANG = 300.0
"""Seconds after which a training counts as hanging."""

SENTENCE = "another process has ended or cannot be reached"
CONNECTED = "corpus:"
"""The first line that process 0 prints after the processes have been connected."""


def prepared(folder: Path, steps: int = STEPS) -> Path:
    """Write a text and a config to a folder; return the path of the config."""
    text, _ = load_corpus(shrunk(everything(), Path("stdlib")).data)
    (folder / "text.txt").write_text(text[:CHARACTERS], encoding="utf-8")
    config = shrunk(everything(), folder / "text.txt")
    config.scheduler.max_steps, config.data.batch_size = steps, 8
    (folder / "config.json").write_text(to_json(config), encoding="utf-8")
    return folder / "config.json"


class Training:
    """The processes of one training, from start to end."""

    def __init__(
        self,
        config: Path,
        workdir: Path,
        count: int,
        words: Sequence[str] = (),
        mode: str = "train",
        own: Mapping[int, Sequence[str]] | None = None,
    ) -> None:
        """Start the processes; `words` are further flags of all of them, and `own` those of one, by its index."""
        address = f"localhost:{free_port()}"
        flags = [f"--mode={mode}", f"--workdir={workdir}", *([f"--config={config}"] if mode == "train" else []), *words]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        environment.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
        self.count, self.outputs = count, [workdir.with_suffix(f".{index}.txt") for index in range(count)]
        self.processes = []
        for index, output in enumerate(self.outputs):
            command = [sys.executable, "-m", "chargpt_jax.main", *flags, f"--distributed={address},{index},{count}"]
            command += (own or {}).get(index, [])
            with output.open("wb") as file:
                self.processes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment))

    def said(self, index: int) -> str:
        """Return the output of a process so far."""
        return self.outputs[index].read_text(errors="replace")

    def wait_for(self, words: str, seconds: float = HANG) -> bool:
        """Wait until process 0 has printed some words; return whether it did so before it ended."""
        end = time.monotonic() + seconds
        while words not in self.said(0) and self.processes[0].poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        return words in self.said(0)

    def send(self, index: int, number: int) -> None:
        """Send a signal to a process."""
        with contextlib.suppress(ProcessLookupError):
            self.processes[index].send_signal(number)

    def codes(self, seconds: float = HANG) -> list[int | None]:
        """Wait for the exit codes; None for a process that did not end in time, and was killed."""
        end, codes = time.monotonic() + seconds, list[int | None]()
        for process in self.processes:
            try:
                codes.append(process.wait(max(0.0, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                codes.append(None)
        return codes


def free_port() -> int:
    """Return a port of this machine that no process listens on."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])


def result(workdir: Path) -> dict[str, Any]:
    """Return what a training leaves: the digest and the loss of its last checkpoint, and its log without times."""
    last = max(
        (path for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal()), key=lambda p: int(p.name)
    )
    record = json.loads((last / "record.json").read_text())
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    log = [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]
    return {"step": record["step"], "digest": record["digest"], "loss": record["loss"], "log": log}


def reasons(training: Training, victim: int, codes: Sequence[int | None]) -> list[str]:
    """Return what is wrong with the end of the processes of which one was killed."""
    found = []
    for index, code in enumerate(codes):
        if index == victim:
            continue
        lines = training.said(index).splitlines()
        if code in (None, 0):
            found.append(f"process {index} ended with {code}")
        if sum(SENTENCE in line for line in lines) != 1 or "Traceback" in training.said(index):
            found.append(f"process {index} printed {lines[-5:]}")
    return found


def killed_and_resumed(folder: Path, config: Path, count: int, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill one process of a training so many times; return the times of the others to end, and what went wrong."""
    whole = Training(config, folder / f"whole-{count}", count)
    whole.wait_for(CONNECTED)
    began = time.monotonic()
    faults = [f"an uninterrupted training ended with {codes}" for codes in [whole.codes()] if any(codes)]
    seconds, took, workdir = time.monotonic() - began, list[float](), folder / f"killed-{count}"
    number, same, trainings = 0, 0, 0
    while number < kills or workdir.exists():
        training = Training(config, workdir, count)
        training.wait_for(CONNECTED)
        if number < kills:
            victim = rng.randrange(count)
            with contextlib.suppress(subprocess.TimeoutExpired):
                training.processes[victim].wait(rng.uniform(0, seconds))
            training.send(victim, signal.SIGKILL)
            killed, codes = time.monotonic(), training.codes(LIMIT)
            others = codes[:victim] + codes[victim + 1 :]
            if codes[victim] == -signal.SIGKILL and any(code != 0 for code in others):  # otherwise it was too late
                number += 1
                took.append(time.monotonic() - killed)
                faults += reasons(training, victim, codes)
                print(f"{count} processes, kill {number}: {took[-1]:.1f} s, {codes}", flush=True)
                continue
        codes = training.codes()
        trainings += 1
        if any(codes) and number == kills:
            faults.append(f"a resumed training ended with {codes}: {training.said(0)[-500:]}")
        same += result(workdir) == result(folder / f"whole-{count}")
        workdir.rename(folder / f"done-{count}-{trainings}")
    return {"kills": number, "seconds": took, "faults": faults, "trainings": trainings, "same": same}


def main(words: Sequence[str] | None = None) -> None:
    """Kill, resume, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--counts", default="2,4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(words)
    counts, rng = [int(count) for count in args.counts.split(",")], random.Random(args.seed)
    lines = [f"Machine: {', '.join(f'{name} {value}' for name, value in machine().items())}.\n"]
    lines += [
        "| processes | kills | median time to end of the others, s | longest | faults | trainings | bit-identical |"
    ]
    lines += ["|---:|---:|---:|---:|---:|---:|---:|"]
    faults = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = prepared(folder)
        for count in counts:
            found = killed_and_resumed(folder, config, count, args.kills // len(counts), rng)
            cells = [
                count,
                found["kills"],
                f"{statistics.median(found['seconds']):.1f}",
                f"{max(found['seconds']):.1f}",
            ]
            cells += [len(found["faults"]), found["trainings"], found["same"]]
            lines.append(f"| {' | '.join(map(str, cells))} |")
            faults += found["faults"]
    text = "\n".join([*lines, *(f"FAULT: {fault}" for fault in faults)]) + "\n"
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "processes.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
