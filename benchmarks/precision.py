"""Is low precision worse? float32, bfloat16 and float16 from the same initial parameters and data, over many seeds.

    python -m benchmarks.precision --text_file=FILE [--seeds=16] [--steps=800] [--width=32] [--layers=2] [--context=64]
        [--batch=8] [--learning_rate=1e-2] [--characters=16000] [--variants=10]
        [--out=FOLDER]
    python -m benchmarks.precision --tables=benchmarks/results/precision.json

For each precision one sweep trains all seeds in one program (benchmarks/precision_ops.py has the operations). Then, on
the first `--characters` of the validation set: the loss, as computed in that precision and in float32; S2 where the
entropy is below 0.1 nats, or lowest; and texts sampled with the same random numbers. Differences to float32 are paired
by seed. Each precision's results are written to FOLDER/precision.json when they are complete; the same command
continues there.
"""

import os

if __name__ == "__main__":  # before JAX is imported: XLA must round to bfloat16 or float16 wherever a program says so
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_allow_excess_precision=false"

import argparse
import dataclasses
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.baselines import machine
from benchmarks.precision_ops import ALONE, Variant, alone, variants, whole
from chargpt_jax.config import Config
from chargpt_jax.data import batches
from chargpt_jax.devices import startup
from chargpt_jax.generation.metrics import surprisal_and_entropy, surprise_surprise
from chargpt_jax.lab.folder import SweepFolder
from chargpt_jax.lab.setup import SweepSetup
from chargpt_jax.lab.summary import interval
from chargpt_jax.model.init import abstract_model
from chargpt_jax.ops.plain import Ops
from chargpt_jax.training.dispatch.pacing import MAX_DISPATCH_STEPS
from chargpt_jax.training.run import Run

CONFIDENT, SUREST = 0.1, 0.02
"""A model counts as confident of a character if its entropy is below so many nats. A short training has none of these,
so the fraction SUREST of its characters with the lowest entropy is measured as well."""

TEXTS, LENGTH, TEMPERATURE, GRAM = 8, 300, 0.8, 10
"""Texts per seed, their characters, the sampler, and the length of the strings whose repetition is counted."""


def config_of(given: argparse.Namespace) -> Config:
    """Return the config of all sweeps."""
    config = Config()
    model = {"n_embd": given.width, "n_head": 4, "n_head_dim": given.width // 4, "n_ff": 4 * given.width}
    config.model = dataclasses.replace(config.model, **model, n_layer=given.layers, block_size=given.context)
    config.data = dataclasses.replace(config.data, source=given.text_file, batch_size=given.batch, train_split=0.9)
    config.optimizer.learning_rate, config.scheduler.max_steps = given.learning_rate, given.steps
    config.scheduler.warmup_epochs, config.scheduler.min_lr_factor = 0.05, 0.05
    config.sweep.seeds = given.seeds
    return config


def trained(setup: SweepSetup, variant: Variant) -> tuple[Any, np.ndarray]:
    """Train all seeds; return their parameters, [K, ...], and the step at which each diverged (0: never), [K]."""
    graphdef, _ = abstract_model(setup.run.config.model, variant.ops)
    own = dataclasses.replace(setup, graphdef=graphdef, dtype=jnp.float16 if variant.loss_scaling else jnp.float32)
    state = own.on_devices(own.initial_state())
    dispatch, left = own.lower(state).compile(), own.run.total_steps
    while left:
        count = min(left, MAX_DISPATCH_STEPS)
        state, history = dispatch(state, own.which, own.text, np.int32(count))
        jax.block_until_ready(history)
        left -= count
    state = own.without_padding(state)
    return jax.device_get(state.runs.params), np.asarray(state.diverged)


def predicted(setup: SweepSetup, ops: Ops, params: Any, characters: int) -> tuple[np.ndarray, np.ndarray]:
    """Return surprisal and entropy of each run, float32 [K, characters], on the start of the validation set, nats."""
    config = setup.run.config
    graphdef, _ = abstract_model(config.model, ops)
    T, first = config.model.block_size, setup.run.n_train
    tokens = np.asarray(setup.run.tokens[: first + characters])
    (pair,) = batches.validation_batches(tokens, first, T, -(-characters // T))

    @jax.jit
    def metrics(params: Any, inputs: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.map(
            lambda own: surprisal_and_entropy(nnx.merge(graphdef, own)(inputs).astype(jnp.float32), targets), params
        )

    found = (np.asarray(x).reshape(len(setup.members), -1)[:, :characters] for x in metrics(params, *pair))
    surprisal, entropy = found
    return surprisal, entropy


def sampled(setup: SweepSetup, ops: Ops, params: Any) -> list[list[str]]:
    """Return TEXTS texts of LENGTH characters from each run; a text's random numbers depend on its position only."""
    config, graphdef = setup.run.config, abstract_model(setup.run.config.model, ops)[0]
    T, start = config.model.block_size, setup.run.n_train
    prompts = np.stack([setup.run.tokens[start + i * T : start + (i + 1) * T] for i in range(TEXTS)]).astype(np.int32)

    @jax.jit
    def texts(params: Any) -> jax.Array:
        def one(own: Any) -> jax.Array:
            model = nnx.merge(graphdef, own)

            def step(window: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
                logits = model(window)[:, -1].astype(jnp.float32)
                noise = jax.random.gumbel(jax.random.fold_in(jax.random.key(0), i), logits.shape)
                new = jnp.argmax(logits / TEMPERATURE + noise, axis=-1).astype(jnp.int32)
                return jnp.concatenate([window[:, 1:], new[:, None]], axis=1), new

            return jax.lax.scan(step, jnp.asarray(prompts), jnp.arange(LENGTH))[1].T

        return jax.lax.map(one, params)

    return [[setup.run.tokenizer.text_of(row) for row in rows] for rows in np.asarray(texts(params))]


def words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return re.findall(r"[^\W\d_]+", text.lower())


def quality(texts: Sequence[str], known: set[str]) -> dict[str, float]:
    """Return the share of unknown words (without those at the ends), and of strings of GRAM characters that repeat."""
    found = [word for text in texts for word in words(text)[1:-1]]
    grams = [[text[i : i + GRAM] for i in range(len(text) - GRAM + 1)] for text in texts]
    repeated = sum(len(own) - len(set(own)) for own in grams) / sum(map(len, grams))
    return {"unknown_words": float(np.mean([word not in known for word in found])), "repeated": repeated}


def measured(setup: SweepSetup, variant: Variant, known: set[str], characters: int) -> dict[str, Any]:
    """Train a variant; return its results by seed."""
    began = time.perf_counter()
    params, diverged = trained(setup, variant)
    seconds = time.perf_counter() - began
    surprisal, entropy = predicted(setup, variant.ops, params, characters)
    plain, _ = predicted(setup, whole(jnp.float32), params, characters)
    s2 = surprise_surprise(surprisal, entropy, setup.run.config.model.vocab_size)
    sure = [own[near < CONFIDENT] for own, near in zip(s2, entropy, strict=True)]
    surest = [own[near <= np.quantile(near, SUREST)] for own, near in zip(s2, entropy, strict=True)]
    found = {
        "seconds": seconds,
        "diverged": diverged.tolist(),
        "loss": surprisal.mean(axis=1, dtype=float).tolist(),
        "loss_in_float32": plain.mean(axis=1, dtype=float).tolist(),
        "confident": [len(x) / characters for x in sure],
        "s2": [float(np.mean(x)) if len(x) else None for x in sure],
        "s2_quantiles": _quantiles(np.concatenate(sure)),
        "s2_of_surest": [float(np.mean(x)) for x in surest],
        "s2_of_surest_quantiles": _quantiles(np.concatenate(surest)),
        "quality": [quality(texts, known) for texts in sampled(setup, variant.ops, params)],
    }
    if variant.name == "float32":
        found["operations"] = operations(setup, params, surprisal, entropy, characters)
    return found


def _quantiles(values: np.ndarray) -> dict[str, float | None]:
    return {f"{q:g}": float(np.quantile(values, q)) if len(values) else None for q in (0.5, 0.9, 0.99, 0.999)}


def operations(
    setup: SweepSetup, params: Any, surprisal: np.ndarray, entropy: np.ndarray, characters: int
) -> dict[str, Any]:
    """Return the effect of each operation in low precision on models that float32 has trained, by seed."""
    ways = {f"{name} in {jnp.dtype(low).name}": alone(name, low) for low in LOW for name in ALONE}
    ways |= {f"all in {jnp.dtype(low).name}": whole(low) for low in LOW}
    found = {}
    for name, ops in ways.items():
        own, near = predicted(setup, ops, params, characters)
        found[name] = {
            "loss": (own - surprisal).mean(axis=1, dtype=float).tolist(),
            "surprisal": np.abs(own - surprisal).mean(axis=1, dtype=float).tolist(),
            "entropy": np.abs(near - entropy).mean(axis=1, dtype=float).tolist(),
        }
    return found


LOW = (jnp.bfloat16, jnp.float16)


def between(values: Sequence[float], digits: int = 4, sign: bool = False) -> str:
    """Return a mean with its 95 % interval over seeds as text."""
    mean, _, low, high = interval(np.array(values, float))
    return f"{mean:{'+' if sign else ''}.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def tables(results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the tables of docs/precision.md."""
    base = results["float32"]

    def paired(one: Sequence[float], other: Sequence[float]) -> str:
        both = [a - b for a, b in zip(one, other, strict=True) if np.isfinite(a) and np.isfinite(b)]
        return between(both, 5, sign=True) if both else "-"

    yield "| trained in | diverged | loss, nats | minus float32, paired | the same, evaluated in float32 |"
    yield "|---|---:|---:|---:|---:|"
    for name, own in results.items():
        good = [x for x in own["loss"] if np.isfinite(x)]
        row = f"| {name} | {sum(map(bool, own['diverged']))} | {between(good) if good else '-'} |"
        differences = [paired(own[key], base["loss"]) for key in ("loss", "loss_in_float32")]
        yield f"{row} {' | '.join(differences) if name != 'float32' else ' | '} |"
    yield ""
    yield "| trained in | characters | mean S2 | minus float32, paired | 50 % | 90 % | 99 % | 99.9 % |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|"
    for name, own in results.items():
        for key, which in (("s2", f"entropy below {CONFIDENT:g} nats"), ("s2_of_surest", f"surest {100 * SUREST:g} %")):
            if " in " in name or not (s2 := [x for x in own.get(key, ()) if x is not None]):
                continue
            which += f" ({100 * np.mean(own['confident']):.3f} %)" if key == "s2" else ""
            quantiles = " | ".join(f"{x:.4f}" for x in own[f"{key}_quantiles"].values())
            apart = paired(*([np.nan if x is None else x for x in side[key]] for side in (own, base)))
            yield f"| {name} | {which} | {between(s2)} | {apart if name != 'float32' else ''} | {quantiles} |"
    yield ""
    yield "| trained in | unknown words | minus float32, paired | repeated strings | minus float32, paired |"
    yield "|---|---:|---:|---:|---:|"
    for name, own in results.items():
        if " in " not in name:
            cells = []
            for key in ("unknown_words", "repeated"):
                one, other = ([row[key] for row in side["quality"]] for side in (own, base))
                cells += [between(one, 3), paired(one, other) if name != "float32" else ""]
            yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    yield "| on float32's models | loss minus float32's | mean change of surprisal | of entropy |"
    yield "|---|---:|---:|---:|"
    for name, own in base["operations"].items():
        changes = (f"{np.mean(own[key]):.1e}" for key in ("surprisal", "entropy"))
        yield f"| {name} | {between(own['loss'], 6, sign=True)} | {' | '.join(changes)} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text_file", help="the text, as data.source names it")
    parser.add_argument("--tables", type=Path, help="only print the tables of this precision.json")
    sizes = {"seeds": 16, "steps": 800, "width": 32, "layers": 2, "context": 64, "batch": 8, "characters": 16_000}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--variants", type=int, default=len(variants()), help="only the first so many precisions")
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--out", type=Path, default=Path("runs/precision"))
    given = parser.parse_args(argv)
    if given.tables:
        print(*tables(json.loads(given.tables.read_text(encoding="utf-8"))["results"]), sep="\n")
        return
    if not given.text_file:
        parser.error("--text_file is missing: give a text.")
    settings = {name: getattr(given, name) for name in (*sizes, "learning_rate")}
    file = given.out / "precision.json"
    saved = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"settings": settings, "results": {}}
    if saved["settings"] != settings:
        parser.error(f"{file} has other settings ({saved['settings']}): use them, or another --out.")
    startup.start()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run = Run.prepare(config_of(given), SweepFolder(folder), partial(print, file=sys.stderr))
        setup, known = SweepSetup.of(run), set(words(run.tokenizer.text_of(run.tokens[: run.n_train])))
        saved |= {"machine": machine(), "text": [source["title"] for source in run.sources]}
        for variant in variants()[: given.variants]:
            if variant.name in saved["results"]:
                continue
            own = saved["results"][variant.name] = measured(setup, variant, known, given.characters)
            partly = file.with_suffix(".partial")
            partly.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
            partly.replace(file)
            print(
                f"{variant.name}: {np.mean(own['loss']):.4f} nats, {own['seconds']:.0f} s", file=sys.stderr, flush=True
            )
    print(*tables(saved["results"]), sep="\n")


if __name__ == "__main__":
    main()
