"""Compare the kinds of model, gpt, ngpt and modern, at equal tokens and at equal minutes.

    python -m benchmarks.kinds --text_file=tinyshakespeare.txt [--seeds=3] [--steps=600] [--search] [--out=FOLDER]

All have about 0.46 million parameters, the same batches, and a learning rate of their own, CHOSEN. --search trains each
with RATES on the first eight tenths of the text, and validates on the ninth. The comparison trains on the first nine
tenths and validates on the last tenth. The kinds alternate, seed by seed. A kind that takes longer per step is then
trained again with fewer steps, so that it takes the time of a gpt. The time is CPU time, which other load on the
machine changes little. Prints a table and writes kinds.json.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import chargpt_jax
from benchmarks.baselines import machine
from chargpt_jax.config import Config
from chargpt_jax.events import Compiled, Ended, Validated

RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
"""Peak learning rates that the search tries."""

CHOSEN = {
    ("gpt", "adamw"): 8e-3,
    ("gpt", "muon"): 4e-3,
    ("ngpt", "adamw"): 1.6e-2,
    ("ngpt", "muon"): 8e-3,
    ("modern", "muon"): 4e-3,
}
"""The learning rate of each kind and optimizer: the best one in a search with 250 steps, as far as it was tried.

Tried were 2e-3 to 8e-3 for gpt with adamw, 8e-3 and 1.6e-2 for ngpt with adamw, 4e-3 to 3.2e-2 for ngpt with muon, and
4e-3 alone for the others."""

Row = dict[str, Any]


def config_for(kind: str, optimizer: str, rate: float, steps: int, text_file: str, seed: int) -> Config:
    """Return the config of a training; nGPT has three matrices in an MLP, the others two, of the same total size."""
    config = Config(seed=seed)
    model, own = config.model, config.optimizer
    model.kind, model.n_layer, model.n_embd, model.n_head, model.n_head_dim = kind, 4, 96, 3, 32
    model.n_ff = 256 if kind == "ngpt" else 384
    model.block_size = 128
    config.data.source, config.data.batch_size, config.data.train_split = text_file, 8, 0.9
    own.kind, own.learning_rate, own.muon_factor, own.muon_steps = optimizer, rate, 8.0, 3
    own.weight_decay = 0.0 if kind == "ngpt" else 0.05
    config.scheduler.max_steps, config.scheduler.min_lr_factor = steps, 0.03
    config.scheduler.warmup_epochs = 0.02  # 20 steps
    config.train.validate_every = 1e3  # at the end
    return config


def trained(config: Config) -> Row:
    """Train a config; return the validation loss, nats per character, and the CPU seconds without compilation."""
    found: Row = {"kind": config.model.kind, "optimizer": config.optimizer.kind, "seed": config.seed}
    found |= {"rate": config.optimizer.learning_rate, "steps": config.scheduler.max_steps}
    with tempfile.TemporaryDirectory() as folder:
        for event in chargpt_jax.train(config, folder, warn=lambda text: None):
            if isinstance(event, Validated):
                found["loss"] = event.loss
            elif isinstance(event, Compiled):
                began = time.process_time()
            elif isinstance(event, Ended):
                found["seconds"] = time.process_time() - began
        found["parameters"] = chargpt_jax.info(folder)["parameters"]
    return found


def searched(text_file: str, steps: int) -> Iterator[Row]:
    """Try the learning rates of every kind on the first nine tenths of the text."""
    for kind, optimizer in CHOSEN:
        for rate in RATES:
            config = config_for(kind, optimizer, rate, steps, text_file, seed=0)
            config.data.train_split, config.data.test_split = 0.8, 0.1
            yield trained(config)


def compared(text_file: str, steps: int, seeds: int) -> Iterator[Row]:
    """Train every kind with the same number of steps, seed by seed, then with the steps of the same time."""
    rows = []
    for seed in range(seeds):
        for (kind, optimizer), rate in CHOSEN.items():
            rows.append({"equal": "tokens", **trained(config_for(kind, optimizer, rate, steps, text_file, seed))})
            yield rows[-1]
    for (kind, optimizer), rate in CHOSEN.items():
        fewer = round(steps / max(1.0, slowness(rows, kind, optimizer)))
        for seed in range(seeds if fewer < steps else 0):
            yield {"equal": "minutes", **trained(config_for(kind, optimizer, rate, fewer, text_file, seed))}


def slowness(rows: Sequence[Row], kind: str, optimizer: str) -> float:
    """Return how many times longer a step of a kind takes than a gpt's: the median of the ratios within each seed."""
    seconds = {(row["kind"], row["optimizer"], row["seed"]): row["seconds"] for row in rows}
    seeds = {row["seed"] for row in rows}
    return statistics.median(seconds[kind, optimizer, seed] / seconds["gpt", optimizer, seed] for seed in seeds)


def table(rows: Sequence[Row]) -> str:
    """Return the comparison as Markdown."""
    lines = [
        "| kind | optimizer | parameters | equal | steps | nats per character, mean (worst) | CPU time of a step |",
        "|---|---|---:|---|---:|---|---:|",
    ]
    tokens = [row for row in rows if row["equal"] == "tokens"]
    for kind, optimizer, equal in dict.fromkeys((row["kind"], row["optimizer"], row["equal"]) for row in rows):
        own = [row for row in rows if (row["kind"], row["optimizer"], row["equal"]) == (kind, optimizer, equal)]
        losses = [row["loss"] for row in own]
        lines.append(
            f"| {kind} | {optimizer} | {own[0]['parameters']:,} | {equal} | {own[0]['steps']:,} "
            f"| {statistics.mean(losses):.4f} ({max(losses):.4f}) | {slowness(tokens, kind, optimizer):.2f} x gpt |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text_file", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--search", action="store_true", help="search learning rates, and compare nothing")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of kinds.json")
    args = parser.parse_args(argv)
    rows = []
    trainings = (
        searched(args.text_file, args.steps) if args.search else compared(args.text_file, args.steps, args.seeds)
    )
    for row in trainings:
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    if not args.search:
        args.out.mkdir(parents=True, exist_ok=True)
        facts = {"machine": machine(), "rows": rows}
        (args.out / "kinds.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        print(table(rows))


if __name__ == "__main__":
    main()
