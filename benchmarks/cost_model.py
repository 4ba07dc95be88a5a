"""Print the cost model of docs/scaling.md: memory, FLOPs and traffic of a training, computed on paper.

    python -m benchmarks.cost_model            # print the tables
    python -m benchmarks.cost_model --write    # renew them in docs/scaling.md

Nothing is measured or compiled here. Shapes and dtypes come from the package, traced on shapes. FLOPs are those of
model/flops.py. The assumptions are ASSUMED_MFU, the links of DEVICES and the texts of TRAININGS.
"""

import argparse
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.accelerator import SHAPE
from benchmarks.baselines import number
from benchmarks.implementations import config_of
from benchmarks.tables import load
from chargpt_jax.config import Config, DataConfig
from chargpt_jax.config.rules import MAX_BYTES
from chargpt_jax.config.sections import MAX_STEPS
from chargpt_jax.data.tokenizer import CharTokenizer
from chargpt_jax.model.flops import PEAK_TFLOPS, training_flops
from chargpt_jax.model.init import Params, abstract_model, count_parameters
from chargpt_jax.ops.choose import ops_for
from chargpt_jax.training import optimizer
from chargpt_jax.training.dispatch.steps import state_shapes
from chargpt_jax.training.step import cross_entropy_sum

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
DTYPE = "bfloat16"
"""Of matrix multiplications: what a TPU and a recent GPU use."""

ASSUMED_MFU = 0.4


def _sizes(n_layer: int, n_embd: int, n_head: int, block_size: int) -> dict[str, int]:
    heads = {"model.n_head": n_head, "model.n_head_dim": n_embd // n_head}
    width = {"model.n_layer": n_layer, "model.n_embd": n_embd, "model.n_ff": 4 * n_embd}
    return {**width, **heads, "model.block_size": block_size, "model.attention_block": 512, "data.batch_size": 16}


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "small": ("small", {}),
    "nanogpt_baby": ("nanogpt_baby", {}),
    "85 M": ("nanogpt_baby", SHAPE),
    "1.2 B": ("nanogpt_baby", _sizes(24, 2048, 16, 2048)),
    "6.4 B": ("nanogpt_baby", _sizes(32, 4096, 32, 2048)),
    "39 B": ("nanogpt_baby", _sizes(48, 8192, 64, 4096)),
}
"""By name: a shipped config, and the fields that differ from it."""


class Device(NamedTuple):
    """One device, from the manufacturer's data sheet."""

    peak: str  # its name in PEAK_TFLOPS
    gigabytes: float
    link: float  # 1e9 bytes per second and direction, to the other devices of its node or slice


DEVICES = {
    "TPU v5e": Device("TPU v5 lite", 16, 200),
    "H100": Device("H100", 80, 450),
    "H200": Device("H200", 141, 450),
}

PER_PARAMETER = 20
"""Training tokens per parameter of Hoffmann et al. 2022, "Training compute-optimal large language models". Their tokens
are parts of words; the best number of characters is not known."""

TRAININGS: tuple[tuple[str, str, Callable[[int], float]], ...] = (
    ("small", "25 epochs of its book: 1,200 steps of 8,192", lambda _: 1_200 * 8_192),
    ("nanogpt_baby", "its schedule: 5,000 steps of 16,384", lambda _: 5_000 * 16_384),
    *((name, f"{PER_PARAMETER} characters per parameter", lambda n: PER_PARAMETER * n) for name in list(MODELS)[2:]),
    ("39 B", "10 TB of text: internet scale", lambda _: 1e13),
)
"""Model, text in words, and the number of characters for a number of parameters."""


def config_named(name: str) -> Config:
    """Return the config of a model of MODELS."""
    config, fields = MODELS[name]
    return config_of({"config": config, "accelerated": True, "fields": fields})


def size_of(tree: Any) -> int:
    """Return the bytes of the arrays or shapes in a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@cache
def on_accelerator(name: str) -> tuple[Any, Params]:
    """Return a model's static description for an accelerator, and the shapes of its parameters."""
    model = config_named(name).model
    return abstract_model(model, ops_for(DTYPE, model.attention_block, platform="tpu"))


def parameters(name: str) -> Params:
    """Return the shapes of a model's parameters."""
    return on_accelerator(name)[1]


@cache
def bytes_per_parameter(kind: str, name: str = "85 M") -> dict[str, float]:
    """Return the bytes per parameter of the parameters, the optimizer state and the gradient with an optimizer."""
    config, shapes = config_named(name), parameters(name)
    config.optimizer.kind = kind
    tx = optimizer.make_optimizer(config, 1e-3)
    state, count = state_shapes(shapes, tx, 0, jnp.dtype(DTYPE)), count_parameters(shapes)
    gradient = jax.eval_shape(lambda params: jax.tree.map(jnp.zeros_like, params), shapes)  # as train_step sums it
    found = {"parameters": state.params, "optimizer state": state.opt_state, "gradient": gradient}
    return {part: size_of(tree) / count for part, tree in found.items()}


def state_bytes(name: str) -> float:
    """Return the bytes of parameters, gradient and AdamW's state of a model."""
    return sum(bytes_per_parameter("adamw", name).values()) * count_parameters(parameters(name))


@cache
def activation_bytes(name: str) -> float:
    """Return the bytes per token that the forward pass saves for the backward pass, on an accelerator."""
    return saved_bytes(config_named(name).model.block_size, *on_accelerator(name))


def saved_bytes(context: int, graphdef: nnx.GraphDef[Any], params: Params) -> float:
    """Return the bytes per token that the forward pass of a model saves; `params` are arrays or shapes."""

    def saved(params: Params, tokens: jax.Array, seeds: jax.Array) -> Any:
        def loss(params: Params) -> jax.Array:
            return cross_entropy_sum(nnx.merge(graphdef, params)(tokens, seeds), tokens)

        return jax.vjp(loss, params)[1]

    def total(batch: int) -> int:
        tokens = jax.ShapeDtypeStruct((batch, context), jnp.int32)
        return size_of(jax.eval_shape(saved, params, tokens, jax.ShapeDtypeStruct((batch, 2), jnp.uint32)))

    return (total(3) - total(2)) / context  # the difference leaves out the parameters


def cache_bytes(name: str) -> int:
    """Return the bytes per token of the KV cache."""
    model = config_named(name).model
    return 2 * model.n_layer * model.n_head * model.n_head_dim * jnp.dtype(DTYPE).itemsize


def flops_per_token(name: str) -> float:
    """Return the FLOPs of training per token."""
    model = config_named(name).model
    return training_flops(model, 1) / model.block_size


def fewest_devices(name: str, device: Device) -> int | None:
    """Return the smallest power of two of devices with memory for a shard of the state and for one sequence each.

    None: one sequence alone does not fit, so tensor parallelism is needed.
    """
    sequence = activation_bytes(name) * config_named(name).model.block_size
    room = 1e9 * device.gigabytes - sequence
    return None if room <= 0 else 2 ** max(0, math.ceil(math.log2(state_bytes(name) / room)))


def seconds_for(flops: float, device: Device) -> float:
    """Return the seconds that one device takes for some FLOPs, at the assumed MFU."""
    return flops / (ASSUMED_MFU * 1e12 * PEAK_TFLOPS[DTYPE][device.peak])


def hidden_tokens(name: str, device: Device) -> float:
    """Return the tokens per device and microbatch for which computation takes as long as FSDP's traffic."""
    return traffic(name) / (1e9 * device.link) / seconds_for(flops_per_token(name), device)


def traffic(name: str) -> float:
    """Return the bytes that each device exchanges per microbatch with FSDP.

    The parameters are gathered for the forward and for the backward pass, and the gradient is summed and scattered:
    three times, in the dtype of matrix multiplications.
    """
    return 3 * jnp.dtype(DTYPE).itemsize * count_parameters(parameters(name))


def token_bytes() -> int:
    """Return the bytes of a character of the training set in the memory of a device, for up to 255 distinct ones."""
    return CharTokenizer.from_text("ab").dtype.itemsize


def measured_mfu() -> Iterator[tuple[str, float, float]]:
    """Yield config, tokens/s and MFU of the trainings that were measured on an H100."""
    table = load("h100")["tables"][0]
    for column, title in enumerate(table["columns"][1:], 1):
        name, rate = title.split()[0], float(table["rows"][0][column].replace(",", ""))
        yield name, rate, rate * flops_per_token(name) / (1e12 * PEAK_TFLOPS[DTYPE]["H100"])


def amount(value: float) -> str:
    """Format with two to three digits and a unit: 850 K, 85 M, 1.2 B, 10 T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Format a time: 0.18 s, 45 min, 150 h, 22 days, 200 years."""
    for unit, size, least in (("years", 365.25 * 86_400, 2), ("days", 86_400, 3), ("h", 3_600, 1), ("min", 60, 1)):
        if seconds >= least * size:
            return f"{number(seconds / size)} {unit}"
    return f"{seconds:.2g} s"


def power(value: float) -> str:
    """Format with two digits and a power of ten: 1.5e21."""
    return f"{value:.1e}".replace("e+", "e")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; columns named `text` and the first one are aligned to the left."""
    sides = ["---" if i == 0 or name == "text" else "---:" for i, name in enumerate(columns)]
    lines = [f"| {' | '.join(columns)} |", f"|{'|'.join(sides)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def memory_table() -> str:
    """Return the bytes per parameter by optimizer."""
    kinds = {"AdamW": bytes_per_parameter("adamw"), "Muon": bytes_per_parameter("muon")}
    saved = [found["parameters"] + found["optimizer state"] for found in kinds.values()]
    rows = [[part, *(found[part] for found in kinds.values())] for part in kinds["AdamW"]]
    rows += [["together", *(sum(found.values()) for found in kinds.values())], ["in a checkpoint", *saved]]
    shown = [[str(part), *(f"{value:.1f}" for value in values)] for part, *values in rows]
    return table(["bytes per parameter", *kinds], shown)


def models_table() -> str:
    """Return the sizes of the models, and their FLOPs and memory per token."""
    rows = []
    for name in MODELS:
        model, count, flops = config_named(name).model, count_parameters(parameters(name)), flops_per_token(name)
        shape = [f"{model.n_layer} x {model.n_embd}", f"{model.block_size:,}", amount(count)]
        sizes = (state_bytes(name) / 1e9, activation_bytes(name) / 1e3, cache_bytes(name) / 1e3)
        rows.append([name, *shape, amount(flops), f"{flops / count:.1f}", *map(number, sizes)])
    columns = ("model", "layers x width", "context", "parameters", "FLOP per token", "FLOP per token and parameter")
    return table([*columns, "state, GB", "saved activations per token, kB", "KV cache per token, kB"], rows)


def devices_table() -> str:
    """Return the fewest devices of each kind for each model."""
    rows = []
    for name in MODELS:
        fewest = (fewest_devices(name, device) for device in DEVICES.values())
        rows.append([name, *("needs `mesh.tensor`" if count is None else f"{count:,}" for count in fewest)])
    return table(["fewest devices", *DEVICES], rows)


def costs_table() -> str:
    """Return the FLOPs and times of the trainings."""
    rows = []
    for name, text, characters in TRAININGS:
        count = characters(count_parameters(parameters(name)))
        flops = count * flops_per_token(name)
        times = [seconds_for(flops, DEVICES[device]) / n for device, n in (("TPU v5e", 1), ("H100", 1), ("H100", 256))]
        rows.append([name, text, amount(count), power(flops), *map(duration, times)])
    columns = ("model", "text", "characters", "FLOP", "on one TPU v5e", "on one H100", "on 256 H100")
    return table(columns, rows)


def limits_table() -> str:
    """Return the limits of a config, from the code."""
    megabytes = next(f for f in dataclasses.fields(DataConfig) if f.name == "max_megabytes").metadata["most"]
    rows = [
        ["memory of a training, by `min_memory` in config/rules.py", f"{MAX_BYTES / 1e9:,.0f} GB"],
        ["text, all files together: `data.max_megabytes`", f"{megabytes / 1e3:,.0f} GB"],
        ["training steps", amount(MAX_STEPS)],
    ]
    return table(["limit", "at most"], rows)


def tables() -> dict[str, str]:
    """Return all tables of the page by name, as Markdown."""
    sheets = [
        [name, f"{PEAK_TFLOPS[DTYPE][device.peak]:g}", f"{device.gigabytes:g}", f"{device.link:g}"]
        for name, device in DEVICES.items()
    ]
    some = {name: DEVICES[name] for name in ("TPU v5e", "H100")}
    each = [f"characters per {name} and microbatch" for name in some]
    links = [
        [name, number(traffic(name) / 1e9), *(number(hidden_tokens(name, device)) for device in some.values())]
        for name in MODELS
    ]
    texts = [[amount(count), number(count * token_bytes() / 1e9)] for count in (1e6, 1e8, 1e9, 1e13)]
    reached = [[name, f"{rate:,.0f}", f"{100 * mfu:.1f} %"] for name, rate, mfu in measured_mfu()]
    return {
        "devices": devices_table(),
        "memory": memory_table(),
        "models": models_table(),
        "sheets": table(["device", "peak in bfloat16, TFLOP/s", "memory, GB", "link, GB/s per direction"], sheets),
        "costs": costs_table(),
        "measured": table(["config", "tokens/s on one H100", "MFU"], reached),
        "links": table(["model", "GB per microbatch", *each], links),
        "texts": table(["characters", "GB of token ids in each device"], texts),
        "limits": limits_table(),
    }


def renewed(page: str) -> str:
    """Return the page with every table that follows a comment `<!-- cost_model: NAME -->` replaced by the current one.

    Raises:
        ValueError: if the page does not have every table exactly once.
    """
    made = tables()
    marks = re.findall(r"<!-- cost_model: (\w+) -->", page)
    if sorted(marks) != sorted(made):
        raise ValueError(f"The page has the tables {marks}, but it must have {list(made)}, each of them once.")
    pattern = r"(<!-- cost_model: (\w+) -->)\n+(?:\|.*\n)*\n*"
    return re.sub(pattern, lambda found: f"{found[1]}\n\n{made[found[2]]}\n\n", page)


def main(words: Sequence[str] | None = None) -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="renew the tables in docs/scaling.md")
    args = parser.parse_args(words)
    if args.write:
        PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(f"**{name}**\n\n{text}" for name, text in tables().items()))


if __name__ == "__main__":
    main()
