"""The leaderboard: train a config by the protocol of docs/leaderboard.md, score it, and keep the result as an entry.

    python -m benchmarks.leaderboard --config=configs/shakespeare.py --source=tinyshakespeare.txt [--seeds=0,1,2]
        [--workdirs=FOLDER] [--out=FOLDER] [--flag=--config.model.n_layer=4 ...] [--title=TITLE] [--text=TITLE]
    python -m benchmarks.leaderboard --write [--out=FOLDER]

Each seed trains in a process of its own, on the first nine tenths of the text, with a compilation cache that holds its
training step. The time is that of the process, from its start to its end. The last checkpoint is then scored on the
last tenth: every character once in consecutive windows, and once more in windows that overlap by half. An entry is a
JSON file in --out. If the command is interrupted, the same command continues it: a training resumes from its last
checkpoint, and its time is the sum of its processes' times. --write renews the tables of docs/leaderboard.md and the
figures of the losses from the entries of --out.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks import leaderboard_report
from benchmarks.baselines import commit, machine
from benchmarks.leaderboard_report import Entry
from chargpt_jax import api
from chargpt_jax.atomic import write_file
from chargpt_jax.cli.command_line import parse
from chargpt_jax.config import Config
from chargpt_jax.data import batches
from chargpt_jax.errors import UserError
from chargpt_jax.events import Compiled, bits_per_character
from chargpt_jax.generation.score import score_tokens
from chargpt_jax.model.init import count_parameters
from chargpt_jax.storage.checkpoint import Checkpoints
from chargpt_jax.storage.metrics_log import read_metrics
from chargpt_jax.storage.workdir import Workdir

ROOT = Path(__file__).parents[1]
ENTRIES = ROOT / "benchmarks" / "results" / "leaderboard"

TRAIN_SPLIT = 0.9
"""The first nine tenths of the text are trained on; the rest is held out."""

MAX_POINTS = 240
"""Number of training losses in an entry, at most; each is a mean."""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One training: a config, a text, a seed, further flags, and the titles of config and text in the table."""

    config: str
    source: str
    seed: int
    flags: tuple[str, ...] = ()
    title: str = ""
    text: str = ""

    @property
    def name(self) -> str:
        """The name of the entry's file and of the folder that it trains in."""
        config = re.sub(r"\.(py|json)(?=:|$)", "", Path(self.config).name).replace(":", "-")  # sized:0.3 is sized-0.3
        parts = [config, Path(self.source).stem]
        if self.flags:
            parts.append(hashlib.sha256("\n".join(self.flags).encode()).hexdigest()[:8])
        return "-".join([*parts, str(self.seed)])

    @property
    def command(self) -> list[str]:
        """The arguments of the command that trains, but for --workdir."""
        protocol = {"data.source": self.source, "data.train_split": TRAIN_SPLIT, "data.test_split": 0.0}
        protocol |= {"data.allow_stand_in": False, "seed": self.seed}
        fields = [f"--config.{name}={value}" for name, value in protocol.items()]
        config = Path(self.config).resolve() if Path(self.config).is_file() else self.config
        return ["--mode=train", f"--config={config}", *self.flags, *fields]


def config_of(command: Sequence[str]) -> Config:
    """Return the config of a training command."""
    config = parse(["chargpt", *command])[1]
    assert config is not None
    return config


class Journal:
    """When the processes of a training began and ended; it survives that this process is killed."""

    def __init__(self, path: Path, newest: Callable[[], float]):
        """Read or begin a journal; `newest` returns the time of the newest file that the training has written."""
        self.path, self.newest = path, newest
        self.lines: list[dict[str, float]] = []
        if path.exists():
            self.lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def add(self, **line: float) -> None:
        """Append a line."""
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def seconds(self) -> float:
        """Return the sum of all processes' seconds; one without an end counts up to the newest file."""
        total = 0.0
        for line, following in zip(self.lines, [*self.lines[1:], {}], strict=True):
            if "began" in line:
                total += max(0.0, following.get("ended", self.newest()) - line["began"])
        return total

    def settle(self) -> None:
        """Give the last process an end, if it has none, before another one begins."""
        if self.lines and "began" in self.lines[-1]:
            self.add(ended=max(self.newest(), self.lines[-1]["began"]))

    @property
    def processes(self) -> int:
        """The number of processes that the training took."""
        return sum("began" in line for line in self.lines)


def fill_cache(folder: str, *command: str) -> None:
    """Compile the training step of a command, so that the compilation cache holds it; in a process of its own."""
    for event in api.train(config_of(command), folder, warn=lambda text: None):
        if isinstance(event, Compiled):
            return


FILL_CACHE = "import sys; from benchmarks.leaderboard import fill_cache; fill_cache(*sys.argv[1:])"


def train(attempt: Attempt, folder: Path) -> Journal:
    """Train an attempt to its end in folder/run, or continue it there; return its times.

    Raises:
        UserError: if the training fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    workdir = folder / "run"
    journal = Journal(folder / "times.jsonl", functools.partial(newest_file, workdir))
    journal.settle()
    if not finished(attempt, workdir):
        fill = [sys.executable, "-c", FILL_CACHE, str(folder / "compiled"), *attempt.command]
        subprocess.run(fill, cwd=ROOT, check=False, capture_output=True)  # the training reports what is wrong
        command = [sys.executable, "-m", "chargpt_jax.main", *attempt.command, f"--workdir={workdir}"]
        journal.add(began=time.time())
        done = subprocess.run(command, check=False)
        journal.add(ended=time.time())
        if done.returncode:
            raise UserError(f"The training in {workdir} ended with exit code {done.returncode}: see above.")
    return journal


def finished(attempt: Attempt, workdir: Path) -> bool:
    """Return whether a training has validated its last step."""
    log = Workdir(workdir).metrics
    if not log.exists():
        return False
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    last = max((line["step"] for line in lines), default=0)
    validated = max((line["step"] for line in lines if line["event"] == "validation"), default=-1)
    return last == validated and validated == latest_step(workdir) and last > 0


def latest_step(workdir: Path) -> int:
    """Return the step of the newest checkpoint, 0 without one."""
    store = Checkpoints(Workdir(workdir).checkpoints)
    try:
        return max(store.valid_steps(), default=0)
    finally:
        store.close()


def newest_file(folder: Path) -> float:
    """Return when a folder's newest file was written, in seconds since 1970; 0 if it has none."""
    return max((path.stat().st_mtime for path in folder.rglob("*") if path.is_file()), default=0.0)


def entry(attempt: Attempt, workdir: Path, journal: Journal) -> Entry:
    """Score the last checkpoint of a finished training, and return the entry."""
    model, tokens = api.load(workdir, "latest"), Workdir(workdir).load_tokens()
    n_train, held_out = batches.sizes(len(tokens), model.config.data)
    scored = {"windows": api.evaluate(workdir, "latest")["loss"], "half_windows": half_windows(model, tokens, n_train)}
    return {
        "title": attempt.title or Path(attempt.config).stem,
        "config": Path(attempt.config).name,
        "flags": list(attempt.flags),
        "text": {
            "name": attempt.text or Path(attempt.source).stem,
            "sha256": hashlib.sha256(Workdir(workdir).load_tokenizer().text_of(tokens).encode()).hexdigest(),
            "characters": len(tokens),
            "held_out": held_out,
        },
        "seed": attempt.seed,
        "parameters": count_parameters(model.params),
        "steps": model.step,
        "seconds": round(journal.seconds(), 1),
        "processes": journal.processes,
        "nats": scored,
        "bits": {name: bits_per_character(loss) for name, loss in scored.items()},
        "curve": {"training": losses(workdir, "step"), "validation": losses(workdir, "validation")},
        "machine": machine(),
        "commit": commit(str(ROOT)),
    }


def losses(workdir: Path, event: str) -> list[list[float]]:
    """Return the losses of an event of metrics.jsonl: [seconds, nats per character], means if there are many."""
    log = [line for line in read_metrics(Workdir(workdir).metrics) if line["event"] == event]
    points = np.array([[line["seconds"], line["loss"]] for line in log])
    means = [part.mean(axis=0) for part in np.array_split(points, min(len(points), MAX_POINTS))] if log else []
    return [[round(float(seconds), 1), round(float(loss), 4)] for seconds, loss in means]


def half_windows(model: api.Model, tokens: np.ndarray, n_train: int) -> float:
    """Return the loss of the held-out characters, nats per character, in windows that overlap by half.

    Each character is predicted from at least T / 2 characters before it, which for the first ones are the end of the
    training set.
    """
    T = model.config.model.block_size
    start = max(0, n_train - T)
    found = score_tokens(
        model.params, tokens[start:].astype(np.int32), graphdef=model.graphdef, block_size=T, stride=max(1, T // 2)
    )
    return float(np.mean(found.surprisal[n_train - start :], dtype=np.float64))


def keep(found: Entry, path: Path) -> None:
    """Write an entry, with a point of its curve on a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"\[\s+([\d.]+),\s+([\d.]+)\s+\]", r"[\1, \2]", json.dumps(found, indent=1))
    write_file(path, f"{text}\n".encode())


def load_entries(folder: Path) -> list[Entry]:
    """Read the entries of a folder, in the order of their files.

    Raises:
        UserError: if a file is not JSON.
    """
    entries = []
    for path in sorted(folder.glob("*.json")):
        try:
            entries.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not an entry ({error}): remove it, or restore it.") from None
    return entries


def numbers(text: str) -> tuple[int, ...]:
    """Read comma-separated numbers."""
    return tuple(map(int, text.split(",")))


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, train and score what has no entry yet, and print the tables or renew the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a config file")
    parser.add_argument("--source", help="a text file, or a Project Gutenberg number")
    parser.add_argument("--seeds", type=numbers, default=(0, 1, 2), help="comma-separated; default: 0,1,2")
    parser.add_argument("--title", default="", help="of the entry in the table; default: the config's name")
    parser.add_argument("--text", default="", help="title of the text; default: its file's name")
    parser.add_argument("--flag", action="append", default=[], help="a further flag of the training")
    parser.add_argument("--workdirs", type=Path, default=Path("runs/leaderboard"), help="where to train")
    parser.add_argument("--out", type=Path, default=ENTRIES, help="where the entries are")
    parser.add_argument("--write", action="store_true", help="renew the page and its figures, and train nothing")
    args = parser.parse_args(argv)
    if not args.write and not (args.config and args.source):
        parser.error("give --config and --source, or --write")
    for seed in () if args.write else args.seeds:
        source = str(Path(args.source).resolve()) if Path(args.source).is_file() else args.source
        attempt = Attempt(args.config, source, seed, tuple(args.flag), args.title, args.text)
        path = args.out / f"{attempt.name}.json"
        if path.exists():
            continue
        folder = args.workdirs.resolve() / attempt.name
        journal = train(attempt, folder)
        found = entry(attempt, folder / "run", journal)
        keep(found, path)
        print(f"{attempt.name}: {found['bits']['windows']:.4f} bits in {found['seconds']:,.0f} s", file=sys.stderr)
    entries = load_entries(args.out)
    print(leaderboard_report.tables(entries))
    if args.write:
        leaderboard_report.write(entries)


def console(main: Callable[[], None]) -> None:
    """Run a command; a user's mistake is one sentence on stderr and an exit code."""
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    console(main)
