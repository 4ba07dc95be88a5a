"""Compare samplers at equal mean surprisal: does a text gain if temperature is a resource, or depends on the letter?

    python -m benchmarks.temperature --book=FILE --plays=FILE [--out=runs/temperature] [--sets=5] [--texts=51]
    python -m benchmarks.temperature --write

FILE: The Scarlet Pimpernel, and tinyshakespeare. Trains four models, which takes up to 5 minutes each on two quiet CPU
cores, then calibrates each sampler and measures its texts. Everything is kept in `--out`: run the same command again to
resume, or run parts of it in several processes (--models, --samplers). Writes temperature.json there and prints the
tables. With --write, it renews docs/temperature.md and its pictures from benchmarks/results/temperature.json.

Each sampler has one setting that is changed until the texts' mean surprisal under the unchanged model is a given part
of that of held-out text. So no sampler wins by being colder.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import chargpt_jax
from benchmarks import temperature_report as report
from benchmarks.temperature_subject import CONTEXT, PROMPT, Subject, surprisal
from chargpt_jax import atomic
from chargpt_jax.config import Config
from chargpt_jax.config.files import load_config

LEVELS = (0.85, 0.7)
"""Mean surprisals of the texts, as parts of that of held-out text. A filter cannot reach 1: it only excludes."""

TOLERANCE = 0.005
"""Largest difference between a text's mean surprisal and its level, as a part of it."""

MUON = {"kind": "muon", "muon_factor": 8.0, "muon_steps": 3, "weight_decay": 0.0}


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, and which one judges its texts: a model of the same text, from another seed."""

    text: str
    config: str
    changes: dict[str, dict[str, Any]]
    seed: int
    judge: str


def changes(steps: int, rate: float, muon: bool = False, **model: int) -> dict[str, dict[str, Any]]:
    """Return what a recipe changes in its config: the number of steps, the optimizer, sizes of the model."""
    optimizer = {"learning_rate": rate, **(MUON if muon else {})}
    return {"optimizer": optimizer, "scheduler": {"max_steps": steps, "min_lr_factor": 0.03}, "model": model}


RECIPES = {
    "tiny, book": Recipe("book", "tiny", changes(2000, 3e-3), 0, "larger, book"),
    "larger, book": Recipe("book", "tiny", changes(1800, 5e-3, True, n_layer=5, n_ff=248), 1, "tiny, book"),
    "nanogpt_cpu, plays": Recipe("plays", "nanogpt_cpu", changes(600, 4e-3, True), 0, "tiny, plays"),
    "tiny, plays": Recipe("plays", "tiny", changes(1200, 3e-3), 1, "nanogpt_cpu, plays"),
}
MODELS = ("tiny, book", "larger, book", "nanogpt_cpu, plays")
"""The models whose texts are measured."""


@dataclass(frozen=True)
class Kind:
    """A sampler whose `{}` is calibrated, within a range; `log`: its logarithm is interpolated."""

    chain: str
    low: float
    high: float
    log: bool = False


SAMPLERS = {
    "temperature": Kind("temperature={}", 0.3, 1.6),
    "top-p": Kind("top_p={}", 0.3, 1.0),
    "min-p": Kind("min_p={}", 1e-5, 0.6, log=True),
    "mirostat": Kind("mirostat={}", 0.5, 6.0),
    "adaptive-p": Kind("min_p=0.05,adaptive_p={}", 0.05, 0.95),
    "budget": Kind("temperature={},budget", 0.3, 1.6),
    "strong budget": Kind("temperature={},budget=5:low=0.1:high=2", 0.3, 1.6),
    "word start": Kind("word_start={}", 0.05, 1.6),
}
"""By name in the tables. What a chain leaves out has its default."""


def config_of(name: str, source: str) -> Config:
    """Return the config of a model; the last tenth of the text is held out."""
    recipe = RECIPES[name]
    config = load_config(recipe.config)
    config.model.block_size, config.data.batch_size, config.seed = CONTEXT, 8, recipe.seed
    config.data.source, config.data.train_split = source, 0.9
    config.scheduler.warmup_epochs = 0.05
    config.train.validate_every = 1.0
    for section, fields in recipe.changes.items():
        for field, value in fields.items():
            setattr(getattr(config, section), field, value)
    return config


def trained(name: str, sources: Mapping[str, str], out: Path) -> tuple[chargpt_jax.Model, Path]:
    """Train a model, or resume its training; return it and its folder."""
    folder = out / "models" / slug(name)
    done = out / "models" / f"{slug(name)}.done"
    if not done.exists():
        for event in chargpt_jax.train(config_of(name, sources[RECIPES[name].text]), folder):
            print(f"{name}: {event}"[:150], file=sys.stderr)
        done.touch()
    return chargpt_jax.load(folder), folder


def scales(kind: Kind) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return the functions from a setting to what is interpolated, and back."""
    return (np.log, np.exp) if kind.log else (float, float)


def calibrated(
    value_of: Callable[[float], float], target: float, kind: Kind, known: dict[float, float], steps: int = 10
) -> float | None:
    """Return a setting at which a function has a value, by interpolation and bisection; None: there is none.

    Args:
        value_of: monotonic, up to noise.
        target: the value, to be met within TOLERANCE.
        kind: the range of the setting.
        known: values by setting, which the search uses and adds to.
        steps: evaluations at most; then the nearest setting counts.
    """
    to, back = scales(kind)
    for end in (kind.low, kind.high):
        if end not in known:
            known[end] = value_of(end)
    for i in range(steps):
        if min(abs(value - target) for value in known.values()) <= TOLERANCE * target:
            break
        above, below = [x for x in known if known[x] > target], [x for x in known if known[x] <= target]
        if not above or not below:
            return None
        pairs = [(a, b) for a in above for b in below]
        one, other = min(pairs, key=lambda pair: abs(to(pair[0]) - to(pair[1])))
        part = 0.5 if i % 3 == 2 else (target - known[one]) / (known[other] - known[one])
        between = float(back(to(one) + min(0.95, max(0.05, part)) * (to(other) - to(one))))
        known[between] = value_of(between)
    return min(known, key=lambda x: abs(known[x] - target))


def cell(load: Callable[[], Subject], kind: Kind, target: float, known: dict[float, float]) -> dict[str, Any]:
    """Calibrate a sampler, and measure its texts.

    Returns:
        The setting and the figures by name, one per set; or the range of the mean surprisals if none has the target.
    """
    subject = load()
    setting = calibrated(lambda x: float(subject.generate(kind.chain.format(x))[1].mean()), target, kind, known)
    if setting is None:
        return {"range": [min(known.values()), max(known.values())]}
    chain = kind.chain.format(setting)
    return {"setting": setting, **subject.likelihood(chain), "figures": subject.figures(chain)}


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """Return what a JSON file holds; if it does not exist, make and write it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_file(path, (json.dumps(make(), indent=1) + "\n").encode())
    return json.loads(path.read_text(encoding="utf-8"))


def subject_of(name: str, sources: Mapping[str, str], out: Path, sets: int, texts: int) -> Subject:
    """Train a model and its judge, or load them."""
    model, folder = trained(name, sources, out)
    judge, _ = trained(RECIPES[name].judge, sources, out)
    training, held_out = (chargpt_jax.corpus_text(folder, part) for part in ("training", "validation"))
    return Subject(model, judge, training, held_out, sets, texts)


def slug(name: str) -> str:
    """Return a name for a file."""
    return name.replace(", ", "-").replace(" ", "-")


def about(load: Callable[[], Subject], folder: Path) -> dict[str, Any]:
    """Return what is known of a model: its size and losses, figures of held-out text, and of texts at temperature 1."""
    subject = load()
    letters = chargpt_jax.by_letter(subject.model.score(subject.held_out, alternatives=0))
    after = [passage[PROMPT:] for passage in subject.passages]
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(subject.model.params)),
        "loss": chargpt_jax.evaluate(folder)["loss"],
        "level": float(surprisal(subject.model, subject.passages).mean()),
        "held_out_text": subject.measured(after),
        "temperature_1": {"figures": subject.figures("temperature=1"), **subject.likelihood("temperature=1")},
        "entropy": letters.entropy.tolist(),
        "surprisal": letters.surprisal.tolist(),
        "characters": letters.characters.tolist(),
        "outside": [letters.outside, letters.outside_entropy, letters.outside_surprisal],
        "first_letters": letters.first_letters,
    }


def measure(
    sources: Mapping[str, str],
    out: Path,
    sets: int,
    texts: int,
    names: Sequence[str] = MODELS,
    samplers: Sequence[str] = tuple(SAMPLERS),
) -> dict[str, Any]:
    """Measure models at all levels with samplers, or read what was measured before."""
    chains = {name: kind.chain for name, kind in SAMPLERS.items()}
    given = {"sets": sets, "texts": texts, "chains": chains}
    if kept(out / "cells" / "settings.json", lambda: given) != given:
        sys.exit(f"{out} has results with other settings: give another --out, or remove {out / 'cells'}.")
    found = {}
    for name in names:
        subject = cache(partial(subject_of, name, sources, out, sets, texts))
        folder, model_folder = out / "cells" / slug(name), out / "models" / slug(name)
        own = kept(folder / "about.json", partial(about, subject, model_folder))
        cells: dict[str, dict[str, Any]] = {f"{level:g}": {} for level in LEVELS}
        known: dict[str, dict[float, float]] = {sampler: {} for sampler in SAMPLERS}
        for level in LEVELS:
            for sampler in samplers:
                kind = SAMPLERS[sampler]
                make = partial(cell, subject, kind, level * own["level"], known[sampler])
                cells[f"{level:g}"][sampler] = kept(folder / f"{level:g}-{slug(sampler)}.json", make)
                print(f"{name}, {level:g}, {sampler}: done", file=sys.stderr, flush=True)
        found[name] = own | {"cells": cells}
    return given | {"models": found}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--book", help="file of The Scarlet Pimpernel")
    parser.add_argument("--plays", help="file of tinyshakespeare")
    parser.add_argument("--out", type=Path, default=Path("runs/temperature"), help="folder of models and results")
    parser.add_argument("--sets", type=int, default=5, help="sets of texts per setting, at least 2")
    parser.add_argument("--texts", type=int, default=51, help="texts per set")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="measure only these")
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS), help="measure only these")
    parser.add_argument("--write", action="store_true", help="renew docs/temperature.md from the committed results")
    given = parser.parse_args(argv)
    if given.write:
        report.write()
        return 0
    sources = {name: path for name, path in (("book", given.book), ("plays", given.plays)) if path}
    if missing := {RECIPES[name].text for name in given.models} - sources.keys():
        parser.error(f"--{missing.pop()} is missing: give the file, or --write.")
    if given.sets < 2:
        parser.error(f"--sets is {given.sets}, but an interval needs at least 2.")
    found = measure(sources, given.out, given.sets, given.texts, given.models, given.samplers)
    if (given.models, given.samplers) == (list(MODELS), list(SAMPLERS)):
        content = json.dumps(report.rounded(found), indent=1) + "\n"
        (given.out / "temperature.json").write_text(content, encoding="utf-8")
        print(*report.tables(found).values(), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
