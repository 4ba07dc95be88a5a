"""Time to nanoGPT's final loss: its documented CPU recipe and ours, scored by one function.

    python -m benchmarks.time_to_loss --nanogpt=DIR --text_file=tinyshakespeare.txt [--rounds=3] [--out=FOLDER]
        [--flag=--config.scheduler.max_steps=700 ...] [--more=--config.amp.dtype=bfloat16 ...]

nanoGPT's train.py runs as its README says for a CPU, in a temporary copy of the checkout. chargpt_jax runs
`--mode=train --config=nanogpt_cpu` with the given flags; the defaults below keep the number of parameters. The time is
that of the complete process. Then both models predict each character of the validation set once, in the same windows.
The time counts only if the final loss is not above nanoGPT's.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.baselines import commit, machine, number

RECIPE = (
    "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 "
    "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
"""As in nanoGPT's README, "I only have a macbook"."""

OURS = (
    "--config.model.n_layer=6",
    "--config.model.n_ff=252",
    "--config.scheduler.max_steps=235",
    "--config.scheduler.warmup_epochs=0.01",
    "--config.scheduler.min_lr_factor=0.05",
    "--config.optimizer.kind=muon",
    "--config.optimizer.muon_factor=8",
    "--config.optimizer.muon_momentum=0.85",
    "--config.optimizer.muon_steps=3",
    "--config.optimizer.learning_rate=5e-3",
    "--config.optimizer.weight_decay=0",
    "--config.train.validate_every=9",
)
"""More layers, narrower MLPs, Muon for the weight matrices, a higher learning rate, no weight decay, one validation.

About sixty recipes with Muon were compared on the first nine tenths of the text, validated on the last tenth of those,
and three longer ones on the full text. This one was close to the best of them in the shortest time."""

WINDOW, BATCH = 64, 64

Logits = Callable[[np.ndarray], np.ndarray]
"""From int32 [B, WINDOW] to float [B, WINDOW, V]."""


def loss_of(logits_of: Logits, text: np.ndarray, first: int, window: int = WINDOW) -> float:
    """Predict each character of a text, int [N], from index `first` on, once; return nats per character.

    The windows are consecutive. A character is predicted from those before it in its window; the first one of a window
    from the character before it.
    """
    positions = np.arange(first, len(text))
    total = 0.0
    for at in range(0, len(positions), window * BATCH):
        chosen = positions[at : at + window * BATCH]
        rows = np.zeros((-(-len(chosen) // window), window), np.int64)
        targets = rows.copy()
        rows.ravel()[: len(chosen)], targets.ravel()[: len(chosen)] = text[chosen - 1], text[chosen]
        logits = np.asarray(logits_of(rows), np.float64)
        top = logits.max(axis=-1, keepdims=True)
        losses = (
            np.log(np.exp(logits - top).sum(axis=-1))
            + (top - np.take_along_axis(logits, targets[..., None], -1))[..., 0]
        )
        total += losses.ravel()[: len(chosen)].sum()
    return total / len(positions)


def timed(command: Sequence[str], folder: Path, **environment: str) -> float:
    """Run a command in a folder; return its seconds.

    Raises:
        RuntimeError: if it fails, with its standard error.
    """
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return time.perf_counter() - began


def nanogpt(checkout: Path, text_file: Path, folder: Path) -> dict[str, Any]:
    """Train nanoGPT in a copy of its checkout; return seconds, parameters and the loss."""
    copy = folder / "nanogpt"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "assets", "*.ipynb"))
    shutil.copy(text_file, copy / "data/shakespeare_char/input.txt")
    timed([sys.executable, "data/shakespeare_char/prepare.py"], copy)
    recipe = [*RECIPE.split(), "--always_save_checkpoint=True", "--out_dir=out"]
    seconds = timed([sys.executable, "train.py", "config/train_shakespeare_char.py", *recipe], copy)
    sys.path.insert(0, str(copy))
    import torch
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    saved = torch.load(copy / "out/ckpt.pt", weights_only=False)
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()

    def logits_of(rows: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(rows)
        with torch.no_grad():
            return model(x, x)[0].numpy()

    text = np.concatenate(
        [np.fromfile(copy / f"data/shakespeare_char/{part}.bin", np.uint16) for part in ("train", "val")]
    )
    first = os.path.getsize(copy / "data/shakespeare_char/train.bin") // 2
    parameters = sum(p.numel() for p in model.parameters())
    held_out = len(text) - first
    loss = loss_of(logits_of, text.astype(np.int64), first)
    return {
        "seconds": seconds,
        "parameters": parameters,
        "loss": loss,
        "validation_characters": held_out,
        "steps": 2000,
    }


def ours(text_file: Path, folder: Path, flags: Sequence[str]) -> dict[str, Any]:
    """Train chargpt_jax with a cold compilation cache; return seconds, parameters and the loss."""
    run = folder / "chargpt_jax"
    command = [sys.executable, "-m", "chargpt_jax.main", "--mode=train", "--config=nanogpt_cpu", f"--workdir={run}"]
    command += [f"--config.data.source={text_file.resolve()}", *flags]
    seconds = timed(command, Path.cwd(), CHARGPT_CACHE=str(folder / "cache"))
    import jax
    from flax import nnx

    from chargpt_jax import api
    from chargpt_jax.model.init import count_parameters
    from chargpt_jax.storage.workdir import Workdir

    model, text = api.load(run, "latest"), Workdir(run).load_tokens()
    logits = jax.jit(lambda params, rows: nnx.merge(model.graphdef, params)(rows))
    loss = loss_of(lambda rows: logits(model.params, rows), text.astype(np.int64), int(0.9 * len(text)))
    held_out = len(text) - int(0.9 * len(text))
    facts = {"parameters": count_parameters(model.params), "steps": model.step}
    return {"seconds": seconds, "loss": loss, "validation_characters": held_out, **facts}


def report(rows: Sequence[dict[str, Any]], facts: dict[str, Any], flags: Sequence[str]) -> str:
    """Return the comparison as Markdown."""
    lines = ["Machine: " + ", ".join(f"{name} {value}" for name, value in facts.items()) + "."]
    lines += [
        f"\nchargpt_jax: `{' '.join(flags)}`\n",
        "| round | implementation | parameters | training steps | time, s | validation loss, nats per character |",
    ]
    lines += ["|---:|---|---:|---:|---:|---:|"]
    for row in rows:
        shown = f"{row['parameters']:,} | {row['steps']:,} | {number(row['seconds'])} | {row['loss']:.4f}"
        lines.append(f"| {row['round'] + 1} | {row['who']} | {shown} |")
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    reached = all(mine["loss"] <= theirs["loss"] for theirs, mine in pairs)
    times = [mine["seconds"] / theirs["seconds"] for theirs, mine in pairs]
    span = f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"
    outcome = f"takes {span} of nanoGPT's time to its final loss" if reached else "did not reach nanoGPT's loss"
    return "\n".join([*lines, f"\nchargpt_jax {outcome}."]) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    """Run both, alternating; print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, metavar="DIR")
    parser.add_argument("--text_file", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--flag", action="append", help="a flag of a recipe that replaces the default one")
    parser.add_argument("--more", action="append", default=[], help="a flag in addition to the recipe")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(words)
    flags, facts, rows = [*(args.flag or OURS), *args.more], {**machine(), "nanoGPT": commit(str(args.nanogpt))}, []
    for turn in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"who": "nanoGPT", "round": turn, **nanogpt(args.nanogpt, args.text_file, Path(folder))})
            rows.append({"who": "chargpt_jax", "round": turn, **ours(args.text_file, Path(folder), flags)})
        print(json.dumps(rows[-2:]), file=sys.stderr, flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "time_to_loss.json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
        (args.out / "time_to_loss.md").write_text(report(rows, facts, flags))
    print(report(rows, facts, flags))


if __name__ == "__main__":
    main()
