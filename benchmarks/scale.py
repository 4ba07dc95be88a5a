"""Bits per character against parameters: configs/sized.py in several sizes, trained for several numbers of minutes.

    python -m benchmarks.scale --source=60 [--text=TITLE] [--sizes=0.1,0.3,1,3,10] [--minutes=1,10,60] [--seeds=0]
        [--variants] [--workdirs=FOLDER] [--out=FOLDER]
    python -m benchmarks.scale --write [--out=FOLDER]

Each training follows the protocol of docs/leaderboard.md, with scheduler.minutes, in a process of its own. --variants
also trains neighbours of the dial in the same time: half and double learning rate and batch size, fewer and more layers
at the same number of parameters. A result is a JSON file in --out. If the command is interrupted, the same command
continues it. A training that fails is reported, and the others go on.

--write collects all results of --out in benchmarks/results/scale.json, and renews docs/leaderboard.md and its figures.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import scale_report
from benchmarks.leaderboard import Attempt, Entry, config_of, console, entry, keep, load_entries, numbers, train
from chargpt_jax.config import Config, validate
from chargpt_jax.config.files import load_config
from chargpt_jax.config.saved import flatten
from chargpt_jax.errors import UserError
from configs import sized

SETTINGS = (
    *("model.n_layer", "model.n_embd", "model.n_ff", "model.block_size"),
    *("optimizer.learning_rate", "data.batch_size", "amp.dtype"),
)
"""The fields that the dial sets; a result has their values."""

FACTORS = {"half": 0.5, "double": 2.0, "fewer": 0.5**0.5, "more": 2.0**0.5}
"""By how much a neighbour of the dial changes its quantity."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training: a size in million parameters, minutes, a seed, and the dial or one of its neighbours."""

    size: float
    minutes: float
    seed: int
    variant: str = scale_report.DIAL

    def attempt(self, source: str, text: str) -> Attempt:
        """Return the training by the protocol of the leaderboard."""
        name, own, dial = f"sized:{self.size:g}", flatten(self.config()), flatten(load_config(f"sized:{self.size:g}"))
        changed = [f"--config.{field}={value}" for field, value in own.items() if value != dial[field]]
        flags = (f"--config.scheduler.minutes={self.minutes:g}", *changed)
        return Attempt(name, source, self.seed, flags, f"{name} {self.variant}", text)

    def config(self) -> Config:
        """Return the config of the variant, but for text, seed and minutes."""
        config = load_config(f"sized:{self.size:g}")
        n_layer, factor = config.model.n_layer, FACTORS.get(self.variant.partition(" ")[0], 1.0)
        if self.variant.endswith("layers"):
            return sized.config_of(self.size, max(1, round(n_layer * factor)))
        if self.variant.endswith("rate"):
            config.optimizer.learning_rate = (config.optimizer.learning_rate or 0.0) * factor
        if self.variant.endswith("batch"):
            config.data.batch_size = round(config.data.batch_size * factor)
        return config

    def name(self, source: str) -> str:
        """Return the name of the result's file, and of the folder that is trained in."""
        return f"{Path(source).stem}-{self.size:g}-{self.minutes:g}-{self.seed}-{self.variant.replace(' ', '_')}"

    def settings(self) -> dict[str, object]:
        """Return the values of SETTINGS."""
        flat = flatten(self.config())
        return {field: flat[field] for field in SETTINGS}


def cells(
    sizes: Sequence[float], minutes: Sequence[float], seeds: Sequence[int], variants: Sequence[str]
) -> Iterator[Cell]:
    """Yield the trainings, the shortest first; the dial comes before its neighbours."""
    for time in sorted(minutes):
        for size in sizes:
            for seed in seeds:
                yield from (Cell(size, time, seed, variant) for variant in variants)


def measured(cell: Cell, source: str, text: str, workdir: Path) -> Entry:
    """Train and score a cell in a folder; return its result."""
    attempt = cell.attempt(source, text)
    journal = train(attempt, workdir)
    found = entry(attempt, workdir / "run", journal)
    del found["curve"]
    return {**found, **dataclasses.asdict(cell), "settings": cell.settings()}


def is_measured(path: Path, cell: Cell) -> bool:
    """Return whether there is a result of a cell.

    Raises:
        UserError: if it has other settings than the dial has at present, or is damaged.
    """
    if not path.exists():
        return False
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is not a result ({error}): remove it, or restore it.") from None
    if settings != cell.settings():
        raise UserError(f"{path} has other settings than configs/sized.py sets: remove it, or give another --out.")
    return True


def sizes_of(text: str) -> tuple[float, ...]:
    """Read comma-separated numbers, which may have decimals."""
    return tuple(map(float, text.split(",")))


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, train and score what has no result yet, and write the page if that is asked for.

    Raises:
        UserError: if a size or a number of minutes is invalid, or a training failed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="a text file, or a Project Gutenberg number")
    parser.add_argument("--text", default="", help="title of the text; default: its file's name")
    parser.add_argument("--sizes", type=sizes_of, default=(0.1, 0.3, 1.0, 3.0, 10.0), help="million parameters")
    parser.add_argument("--minutes", type=sizes_of, default=(1.0, 10.0, 60.0), help="of each training")
    parser.add_argument("--seeds", type=numbers, default=(0,), help="comma-separated; default: 0")
    parser.add_argument("--variants", action="store_true", help="also train neighbours of the dial")
    parser.add_argument("--workdirs", type=Path, default=Path("runs/scale/workdirs"), help="where to train")
    parser.add_argument("--out", type=Path, default=Path("runs/scale"), help="where the results are")
    parser.add_argument("--write", action="store_true", help="renew the committed results and the page")
    args = parser.parse_args(argv)
    if not args.source and not args.write:
        parser.error("give --source, or --write")
    failed: list[str] = []
    if args.source:
        source = str(Path(args.source).resolve()) if Path(args.source).is_file() else args.source
        variants = scale_report.VARIANTS if args.variants else (scale_report.DIAL,)
        todo = list(cells(args.sizes, args.minutes, args.seeds, variants))
        for cell in todo:
            validate(config_of(cell.attempt(source, args.text).command))
        failed = measure(todo, source, args.text, args.workdirs.resolve(), args.out)
    if args.write:
        found = load_entries(args.out)
        if not found:
            raise UserError(f"{args.out} has no results: train first, or give another --out.")
        if not all(one.get("variant") in scale_report.VARIANTS for one in found):
            raise UserError(f"{args.out} has other files than results of this benchmark: remove them.")
        scale_report.write(found)
    if failed:
        raise UserError(f"Trainings failed ({', '.join(failed)}): see above, and run the command again.")


def measure(todo: Sequence[Cell], source: str, text: str, workdirs: Path, out: Path) -> list[str]:
    """Write the results of the cells that have none; return the names of those whose training failed."""
    failed = []
    for cell in todo:
        name = cell.name(source)
        path = out / f"{name}.json"
        if is_measured(path, cell):
            continue
        try:
            found = measured(cell, source, text, workdirs / name)
        except UserError as error:
            print(error, file=sys.stderr)
            failed.append(name)
            continue
        keep(found, path)
        print(f"{name}: {found['bits']['windows']:.4f} bits, {found['steps']:,} steps", file=sys.stderr)
    return failed


if __name__ == "__main__":
    console(main)
