"""Compare final validation losses of PyTorch and chargpt_jax over several seeds, for a reduced version of the original.

    python -m benchmarks.seed_statistics --text_file=FILE [--seeds=5] [--epochs=3] [--out=FOLDER]

The PyTorch side is tests/pytorch_reference.py, with the batches and the validation below. The other side is
`chargpt_jax.train`. They share the text and the config, but no random numbers: initialisation, order of the text,
padding and dropout are independent. Both run the same number of training steps, and predict every character of the
validation set once after each epoch. Prints a table and writes seed_statistics.json and seed_statistics.svg. Needs
PyTorch. On a machine with other load, set OMP_NUM_THREADS=1.
"""

import argparse
import dataclasses
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

import chargpt_jax
from chargpt_jax.config import Config
from chargpt_jax.config.files import load_config
from chargpt_jax.config.saved import flatten
from chargpt_jax.data.batches import steps_per_epoch
from chargpt_jax.data.corpus import load_corpus
from chargpt_jax.errors import UserError
from chargpt_jax.events import Validated
from chargpt_jax.pictures.plots.losses import BOTTOM, HEIGHT, TOP, WIDTH, Axis
from chargpt_jax.pictures.svg import Entry, figure, label, legend, number
from tests import pytorch_reference

Curve = list[float]
"""The validation loss after each epoch, nats per character."""

Curves = Mapping[str, Sequence[Curve]]
"""By implementation: one curve per seed."""


def reduced(text_file: str, epochs: int) -> Config:
    """Return configs/small.py with fewer layers, a shorter context and a fixed learning rate, in float32."""
    config = load_config("small")
    config.data.source = text_file
    config.model.n_layer, config.model.block_size = 4, 64
    config.model.mask_unused_ids = False  # the original masks no id
    config.optimizer.learning_rate = 8e-3
    config.scheduler.epochs = float(epochs)
    config.amp.enabled = False
    return config


def ours(config: Config, seed: int) -> Curve:
    """Train with the package, as a user would."""
    with tempfile.TemporaryDirectory() as workdir:
        events = chargpt_jax.train(dataclasses.replace(config, seed=seed), workdir)
        return [event.loss for event in events if isinstance(event, Validated)]


# PyTorch's side


def theirs(config: Config, text: str, seed: int) -> Curve:
    """Train the original's model in PyTorch."""
    torch.manual_seed(seed)
    model, tokens = torch_model(config, text)
    data, how, schedule, block_size = config.data, config.optimizer, config.scheduler, config.model.block_size
    n_train = int(data.train_split * len(tokens))
    epoch_steps = steps_per_epoch(n_train, block_size, data)
    warmup, steps = round(schedule.warmup_epochs * epoch_steps), round(schedule.epochs * epoch_steps)
    optimizer = pytorch_reference.adamw(model, how.learning_rate, how.weight_decay, how.betas)
    rates = pytorch_reference.warmup_cosine(optimizer, warmup, steps, schedule.min_lr_factor)
    batches = torch_batches(tokens[:n_train], block_size, data.batch_size, data.padding_chance)
    curve = []
    for _ in range(round(schedule.epochs)):
        model.train()
        pytorch_reference.train(lambda _: pytorch_reference.loss(model, *next(batches)), optimizer, rates, epoch_steps)
        curve.append(validation_loss(model.eval(), tokens, n_train, block_size))
    return curve


def torch_model(config: Config, text: str) -> tuple[pytorch_reference.GPT, Tensor]:
    """Return a new model with the sizes of the config, and the token ids of the text, int64 [N]."""
    names = pytorch_reference.vocabulary(text)
    sizes = {name: getattr(config.model, name) for name in ("n_embd", "n_head", "n_head_dim", "n_ff", "n_layer")}
    model = pytorch_reference.GPT(vocab_size=64 * math.ceil(len(names) / 64), dropout=config.model.dropout, **sizes)
    return model, torch.tensor(pytorch_reference.encode(names, [text])[0])


def torch_batches(tokens: Tensor, block_size: int, batch_size: int, chance: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets, int64 [B, T] each, without end."""
    rows = (padded(window, chance) for window in windows(tokens, block_size))
    while True:
        inputs, targets = zip(*islice(rows, batch_size), strict=True)
        yield torch.stack(inputs), torch.stack(targets)


def windows(tokens: Tensor, block_size: int) -> Iterator[Tensor]:
    """Yield windows [T + 1] of a text, pass after pass, each with a random offset and in random order."""
    while True:
        starts = torch.arange(int(torch.randint(block_size, ())), len(tokens) - block_size, block_size)
        for start in starts[torch.randperm(len(starts))].tolist():
            yield tokens[start : start + block_size + 1]


def padded(window: Tensor, chance: float) -> tuple[Tensor, Tensor]:
    """Return copies of inputs and targets; with probability `chance`, up to a third of the inputs are padding.

    The character after the padding is the first target that counts.
    """
    inputs, targets = window[:-1].clone(), window[1:].clone()
    if torch.rand(()) < chance:
        length = int(torch.randint(1, max(2, len(inputs) // 3), ()))
        inputs[:length] = pytorch_reference.PADDING
        targets[: length - 1] = pytorch_reference.PADDING
    return inputs, targets


@torch.no_grad()
def validation_loss(model: pytorch_reference.GPT, tokens: Tensor, n_train: int, block_size: int) -> float:
    """Predict every character of the validation set once, in consecutive windows; return the mean loss in nats."""
    nats, piece = 0.0, 32 * block_size
    for x, y in zip(tokens[n_train - 1 : -1].split(piece), tokens[n_train:].split(piece), strict=True):
        rows = F.pad(x, (0, -len(x) % block_size)).view(-1, block_size)
        nats += F.cross_entropy(model(rows).flatten(0, 1)[: len(y)], y, reduction="sum").item()
    return nats / (len(tokens) - n_train)


# Both sides


def measure(config: Config, text: str, seeds: int) -> Curves:
    """Train both sides with every seed, alternating."""
    curves: dict[str, list[Curve]] = {"PyTorch": [], "chargpt_jax": []}
    for seed in range(seeds):
        for side, found in curves.items():
            began = time.perf_counter()
            found.append(theirs(config, text, seed) if side == "PyTorch" else ours(config, seed))
            seconds = time.perf_counter() - began
            print(f"seed {seed}, {side}: {found[-1][-1]:.4f} nats, {seconds:.0f} s", file=sys.stderr, flush=True)
    return curves


def permutation_p(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the fraction of splits of the pooled values whose means differ at least as much as those of a and b."""
    pooled = np.array([*a, *b])
    parts = pooled[list(combinations(range(len(pooled)), len(a)))].sum(axis=1)
    apart = np.abs(parts / len(a) - (pooled.sum() - parts) / len(b))
    return float(np.mean(apart >= abs(np.mean(a) - np.mean(b)) - 1e-12))


def unigram_entropy(text: str) -> float:
    """Return the entropy of the character frequencies, nats per character."""
    shares = np.unique(list(text), return_counts=True)[1] / len(text)
    return float(-np.sum(shares * np.log(shares)))


def table(curves: Curves) -> Iterator[str]:
    """Yield the lines of a Markdown table of the final losses, and of the test of their difference."""
    yield "| trained by | runs | mean, nats | standard deviation | lowest | highest |"
    yield "|---|---:|---:|---:|---:|---:|"
    finals = {side: np.array([curve[-1] for curve in found]) for side, found in curves.items()}
    for side, x in finals.items():
        yield f"| {side} | {len(x)} | {x.mean():.4f} | {x.std(ddof=1):.4f} | {x.min():.4f} | {x.max():.4f} |"
    a, b = finals["PyTorch"], finals["chargpt_jax"]
    error = math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    overlap = "overlap" if max(a.min(), b.min()) <= min(a.max(), b.max()) else "do not overlap"
    yield ""
    yield f"chargpt_jax - PyTorch: {b.mean() - a.mean():+.4f} nats, standard error {error:.4f}."
    yield f"Exact permutation test, two-sided: p = {permutation_p(a, b):.3f}. The ranges {overlap}."


def record(config: Config, text: str, title: str, curves: Curves) -> dict[str, Any]:
    """Return results, text and settings, for JSON."""
    # Not data.source: a path on this machine means nothing elsewhere.
    sections = ("model.", "data.batch", "data.start", "data.train", "data.padding", "optimizer.", "scheduler.", "amp.")
    return {
        "text": {"title": title, "characters": len(text), "unigram_entropy": unigram_entropy(text)},
        "config": {name: value for name, value in flatten(config).items() if name.startswith(sections)},
        "versions": {name: version(name) for name in ("torch", "jax", "flax", "optax", "numpy")},
        "python": platform.python_version(),
        "final_losses": {side: [curve[-1] for curve in found] for side, found in curves.items()},
        "losses_by_epoch": dict(curves),
    }


# The picture

COLOURS = {"PyTorch": "var(--cg-s2)", "chargpt_jax": "var(--cg-s3)"}


def picture(curves: Curves) -> str:
    """Plot the curves of all runs and, enlarged next to them, the final losses, as SVG."""
    everything = [curve for found in curves.values() for curve in found]
    x = Axis(1, len(everything[0]), 48, 372)
    y, near = loss_axis([loss for curve in everything for loss in curve]), loss_axis([c[-1] for c in everything])
    parts = [scale(y, 48, 372), scale(near, 468, 672)]
    parts += [label(x(epoch), BOTTOM + 18, f"{epoch:g}", "cg-middle") for epoch in x.ticks(8) if epoch % 1 == 0]
    parts += [label(16, 22, "validation loss, nats per character"), label(372, HEIGHT - 14, "epoch", "cg-end")]
    parts += [label(430, 22, "after the last epoch"), label(672, HEIGHT - 14, "dots: runs; lines: means", "cg-end")]
    for (side, colour), column in zip(COLOURS.items(), (522, 618), strict=True):
        parts += [curve_path(curve, x, y, colour) for curve in curves[side]]
        parts += strip([curve[-1] for curve in curves[side]], column, near, colour)
        parts.append(label(column, BOTTOM + 18, side, "cg-middle"))
    entries = [
        Entry(f'<path class="cg-curve" style="stroke:{c}" d="M0 0H16"/>', 16, side) for side, c in COLOURS.items()
    ]
    about = "Validation losses of equal runs in PyTorch and in chargpt_jax, by epoch and, enlarged, after the last one."
    body = "".join([*parts, legend(entries, 48, HEIGHT - 14, 260)[0]])
    return figure(WIDTH, HEIGHT, body, name="Training from several seeds", description=about)


def loss_axis(losses: Sequence[float]) -> Axis:
    """Return a vertical axis with a margin above and below."""
    room = 0.1 * (max(losses) - min(losses)) or 0.1
    return Axis(min(losses) - room, max(losses) + room, BOTTOM, TOP)


def scale(y: Axis, left: float, right: float) -> str:
    """Draw the grid of an axis, its labels and the line below."""
    ticks = y.ticks(5)
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    grid = "".join(f"M{left:g} {number(y(tick))}H{right:g}" for tick in ticks)
    lines = f'<path class="cg-grid" d="{grid}"/><path class="cg-axis" d="M{left:g} {BOTTOM:g}H{right:g}"/>'
    return lines + "".join(label(left - 8, y(tick) + 4, f"{tick:.{digits}f}", "cg-end") for tick in ticks)


def curve_path(curve: Curve, x: Axis, y: Axis, colour: str) -> str:
    """Draw one run."""
    points = "L".join(f"{number(x(epoch))} {number(y(loss))}" for epoch, loss in enumerate(curve, 1))
    return f'<path class="cg-curve" style="stroke:{colour};stroke-opacity:.7" d="M{points}"/>'


def strip(losses: Sequence[float], column: float, y: Axis, colour: str) -> Iterator[str]:
    """Draw final losses as dots around a column, from left to right by seed, and their mean as a line."""
    yield f'<path style="stroke:{colour}" d="M{column - 36:g} {number(y(float(np.mean(losses))))}h72"/>'
    for offset, loss in zip(np.linspace(-24, 24, len(losses)), losses, strict=True):
        yield f'<circle style="fill:{colour}" cx="{number(column + offset)}" cy="{number(y(loss))}" r="3"/>'


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text_file", required=True, help="the training text, used from its CHAPTER I on")
    parser.add_argument("--seeds", type=int, default=5, help="runs per side, at least 2")
    parser.add_argument("--epochs", type=int, default=3, help="epochs per run, at least 2: the first is the warm-up")
    parser.add_argument("--out", type=Path, default=Path("runs/statistics"), help="folder for the JSON and the SVG")
    given = parser.parse_args(argv)
    if min(given.seeds, given.epochs) < 2:
        parser.error(f"--seeds={given.seeds} --epochs={given.epochs}, but each must be at least 2.")
    config = reduced(given.text_file, given.epochs)
    try:
        text, sources = load_corpus(config.data)
    except UserError as error:
        parser.error(str(error))
    curves = measure(config, text, given.seeds)
    given.out.mkdir(parents=True, exist_ok=True)
    found = json.dumps(record(config, text, sources[0].title, curves), indent=1)
    (given.out / "seed_statistics.json").write_text(found + "\n", encoding="utf-8")
    (given.out / "seed_statistics.svg").write_text(picture(curves), encoding="utf-8")
    print(*table(curves), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
