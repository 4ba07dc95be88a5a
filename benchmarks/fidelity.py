"""Numerical differences between chargpt_jax and the original's mathematics in PyTorch.

    python -m benchmarks.fidelity

Both sides start from the same random parameters and get the same tokens, without dropout, on the CPU. The reference
implementation is tests/pytorch_reference.py in float64. For the lower precisions, the table also has PyTorch's own
difference from it. tests/test_parity.py holds bounds on the results of these functions. Needs PyTorch.
"""

import math
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

from chargpt_jax.config import LRFinderConfig, ModelConfig, OptimizerConfig, SchedulerConfig
from chargpt_jax.data.tokenizer import CharTokenizer
from chargpt_jax.events import LRFinderResult
from chargpt_jax.generation.generate import bucket, decode, prefill
from chargpt_jax.generation.metrics import surprise_surprise
from chargpt_jax.generation.sampler import Sampler
from chargpt_jax.model.init import create
from chargpt_jax.ops.choose import ops_for
from chargpt_jax.training.optimizer import adamw, warmup_cosine
from chargpt_jax.training.range_test.search import LossesOf, search, trainer_losses
from chargpt_jax.training.step import create_state, train_step
from tests import pytorch_reference, reference
from tests.pairing import by_name, from_reference, x64

SIZES = {"vocab_size": 64, "n_embd": 16, "n_head": 3, "n_head_dim": 8, "n_ff": 40, "n_layer": 3}
# The original masks no id. Blocks of 10 queries do not divide the 24: the last one is shorter.
CONFIG = ModelConfig(**SIZES, used_ids=64, block_size=24, mask_unused_ids=False, attention_block=10)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
STEPS, WARMUP = 50, 10
TRAINED = f"parameters after {STEPS} training steps"
KEYS = f"the keys' biases that rotate slowest, after {STEPS} training steps"
"""The pair of channels with the lowest frequency in the bias of each head. Without rotation a bias adds the same number
to all scores of a query, which softmax ignores. The gradient of this pair is small, and Adam amplifies its rounding."""
SCHEDULER = SchedulerConfig(max_steps=STEPS, warmup_epochs=1.0, min_lr_factor=0.1)
ZOOMS = LRFinderConfig(start_lr=1e-5, end_lr=1.0, num_zooms=3, steps_per_zoom=8)

Arrays = Mapping[str, np.ndarray]
Figures = Mapping[str, Arrays]
"""The name of a quantity -> its arrays by name."""
LossOf = Callable[[int, int, float], float]
"""(zoom, step, learning rate) -> the loss before the step with this learning rate, for PyTorch's range test."""


@dataclass(frozen=True)
class Row:
    """One comparison."""

    what: str
    computed_by: str
    precision: str
    absolute: float
    """The largest difference."""
    relative: float
    """The largest difference, as a fraction of the largest value of its array."""


def difference(ours: Arrays, exact: Arrays) -> tuple[float, float]:
    """Compare arrays by name; return the largest absolute and the largest relative difference, as in `Row`."""
    assert ours.keys() == exact.keys()
    absolute, relative = 0.0, 0.0
    for name, b in exact.items():
        a, b = np.asarray(ours[name], np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, name
        assert np.array_equal(np.isnan(a), np.isnan(b)), f"{name} has NaN at different indices"
        largest = float(np.nanmax(np.abs(a - b)))
        absolute, relative = max(absolute, largest), max(relative, largest / max(float(np.nanmax(np.abs(b))), 1e-300))
    return absolute, relative


# Common inputs


def parameters() -> reference.Params:
    """Return random parameters by the original's names: float64 arrays of values that float32 represents exactly."""
    drawn = reference.random_parameters(np.random.default_rng(0), **SIZES)
    return {name: array.astype(np.float32).astype(np.float64) for name, array in drawn.items()}


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs and targets of a step, int32 [4, 24]: a learnable pattern; one sequence starts with padding."""
    rng = np.random.default_rng([1, step])
    text = (rng.integers(0, 63, (4, 1)) + np.cumsum(rng.integers(1, 4, (4, 25)), axis=1)) % 63 + 1
    text[0, :5] = 0
    return text[:, :-1].astype(np.int32), text[:, 1:].astype(np.int32)


def torch_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same batch as int64 tensors."""
    inputs, targets = (torch.from_numpy(a).long() for a in batch(step))
    return inputs, targets


def prompts() -> np.ndarray:
    """Return prompts int32 [3, 12], padded on the left with 5, 0 and 9 zeros."""
    tokens = np.random.default_rng(2).integers(1, 64, (3, 12)).astype(np.int32)
    tokens[0, :5], tokens[2, :9] = 0, 0
    return tokens


def torch_model(dtype: torch.dtype, **settings: Any) -> pytorch_reference.GPT:
    """Return the original's model with the common parameters."""
    return pytorch_reference.with_parameters(parameters(), dtype, **SIZES, **settings)


def our_model(precision: str) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Return our model and the common parameters; for float64, call it and use them inside x64."""
    params = from_reference(parameters(), SIZES["n_layer"], np.float64 if precision == "float64" else np.float32)
    graphdef, _ = jax.eval_shape(lambda: create(CONFIG, 0, ops_for(precision, CONFIG.attention_block)))
    return graphdef, jax.tree.map(jnp.asarray, params)


# Logits, loss, gradients and training


def slowest_of_keys() -> np.ndarray:
    """Return the indices, in a layer's qkv.bias, of each key's pair of channels that RoPE rotates slowest."""
    heads, width = SIZES["n_head"], SIZES["n_head_dim"]
    starts = width * (heads + np.arange(heads))
    return np.sort(np.concatenate([starts + width // 2 - 1, starts + width - 1]))


def trained(params: Arrays) -> Figures:
    """Return the parameters by name, with the biases of the keys that rotate slowest separated from the rest."""
    keys = slowest_of_keys()
    biases = {name: array[keys] for name, array in params.items() if name.endswith("qkv.bias")}
    rest = {name: np.delete(array, keys) if name in biases else array for name, array in params.items()}
    return {TRAINED: rest, KEYS: biases}


def kept_gradients() -> optax.GradientTransformation:
    """Return a transform that changes nothing; its state is the gradients of the last step."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda gradients, *_: (gradients, gradients)
    )


@cache
def ours(precision: str) -> Figures:
    """Compute the figures with chargpt_jax; `precision` names the dtype of matrix multiplications."""
    with x64(precision == "float64"):
        graphdef, params = our_model(precision)
        logits = jax.jit(lambda p, tokens: nnx.merge(graphdef, p)(tokens))(params, batch(0)[0])
        schedule = warmup_cosine(SCHEDULER, OPTIMIZER.learning_rate, WARMUP)
        tx = optax.chain(kept_gradients(), adamw(OPTIMIZER, schedule))
        step = jax.jit(partial(train_step, graphdef=graphdef, tx=tx))
        state, losses, gradients = create_state(params, tx, 0, jnp.dtype(precision)), [], {}
        for number in range(STEPS):
            state, scalars = step(state, batch(number))
            losses.append(np.asarray(scalars["loss"]))
            gradients = gradients or by_name(state.opt_state[0])
        return {
            "logits": {"logits": np.asarray(logits)},
            "loss": {"loss": losses[0]},
            "gradients": gradients,
            "learning rates": {"rates": np.asarray(schedule(jnp.arange(STEPS, dtype=jnp.int32)))},
            f"losses of {STEPS} training steps": {"losses": np.asarray(losses)},
            **trained(by_name(state.params)),
        }


@cache
def theirs(precision: str, **settings: Any) -> Figures:
    """Compute the figures with PyTorch; bfloat16 is float32 parameters under autocast."""
    model = torch_model(torch.float64 if precision == "float64" else torch.float32, **settings)

    def cast() -> AbstractContextManager:
        return torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext()

    def loss(step: int) -> torch.Tensor:
        with cast():
            return pytorch_reference.loss(model, *torch_batch(step))

    value = loss(0)
    value.backward()
    gradients = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
    with cast(), torch.no_grad():
        logits = model(torch_batch(0)[0]).double().numpy()
    optimizer = pytorch_reference.adamw(model, OPTIMIZER.learning_rate, OPTIMIZER.weight_decay, OPTIMIZER.betas)
    schedule = pytorch_reference.warmup_cosine(optimizer, WARMUP, STEPS, SCHEDULER.min_lr_factor)
    losses, rates = pytorch_reference.train(loss, optimizer, schedule, STEPS)
    return {
        "logits": {"logits": logits},
        "loss": {"loss": np.asarray(value.item())},
        "gradients": gradients,
        "learning rates": {"rates": np.asarray(rates)},
        f"losses of {STEPS} training steps": {"losses": np.asarray(losses)},
        **trained({name: p.detach().numpy().copy() for name, p in model.named_parameters()}),
    }


def training_rows() -> Iterator[Row]:
    """Compare all figures in each precision with PyTorch's in float64."""
    exact = theirs("float64")
    for precision in ("float64", "float32", "bfloat16"):
        for name, figures in (("chargpt_jax", ours), ("PyTorch", theirs)):
            if (name, precision) != ("PyTorch", "float64"):
                for what, arrays in figures(precision).items():
                    yield Row(what, name, precision, *difference(arrays, exact[what]))
    rounded = theirs("float64", frequencies=torch.float32)
    for what in ("logits", "loss", "gradients"):
        label = f"{what}, with RoPE's frequencies in float32"
        yield Row(label, "PyTorch", "float64", *difference(rounded[what], exact[what]))


# Generation


@cache
def written(precision: str, count: int = 30, temperature: float = 1.0) -> tuple[np.ndarray, Arrays]:
    """Continue the prompts beyond block_size, with zeros as tokens; return the tokens and their metrics."""
    with x64(precision == "float64"):
        graphdef, params = our_model(precision)
        given = prompts()
        rows, n_prompt = given.shape
        tokens = np.zeros((rows, bucket(n_prompt + count)), np.int32)
        tokens[:, :n_prompt] = given
        width = min(CONFIG.block_size, bucket(n_prompt))
        progress = prefill(params, tokens, np.full(rows, n_prompt, np.int32), graphdef=graphdef, width=width)
        progress = decode(params, progress, count, Sampler(temperature).with_key(jax.random.key(4)), graphdef=graphdef)
        end = n_prompt + count
        surprisal, entropy = np.asarray(progress.surprisal)[:, :end], np.asarray(progress.entropy)[:, :end]
        s2 = surprise_surprise(surprisal, entropy, SIZES["vocab_size"])
        return np.array(progress.tokens)[:, :end], {"surprisal": surprisal, "entropy": entropy, "S2": s2}


@cache
def measured(precision: str, floor: float = 0.0) -> Arrays:
    """Return PyTorch's metrics, in float64, of the tokens that we generated in a precision."""
    tokens = torch.from_numpy(written(precision)[0]).long()
    found = pytorch_reference.metrics(torch_model(torch.float64), tokens, prompts().shape[1], CONFIG.block_size, floor)
    return {name: a.numpy() for name, a in zip(("surprisal", "entropy", "S2"), found, strict=True)}


def generation_rows() -> Iterator[Row]:
    """Compare generation's metrics with PyTorch's, in float64, of the same tokens."""
    for precision in ("float64", "float32"):
        found, exact = written(precision)[1], measured(precision)
        for name in exact:
            pair = {name: found[name]}, {name: exact[name]}
            yield Row(f"generation, {name}", "chargpt_jax", precision, *difference(*pair))
    floored, found = measured("float64", pytorch_reference.ENTROPY_FLOOR), written("float64")[1]
    label = "generation, entropy; PyTorch's with 1e-10 inside the logarithm"
    yield Row(
        label, "chargpt_jax", "float64", *difference({"entropy": found["entropy"]}, {"entropy": floored["entropy"]})
    )


# The learning-rate range test


def analytic_loss(zoom: int, step: int, rate: float) -> float:
    """Return a loss with a minimum near learning rate 0.02, and ripples that differ between zooms and steps."""
    x = math.log10(rate)
    valley = 4.0 - 1.5 / (1.0 + math.exp(-2.0 * (x + 3.0))) + 3.0 / (1.0 + math.exp(-6.0 * (x + 0.7)))
    return valley + 0.02 * math.sin(3.0 * step + zoom)


def one_by_one(loss_of: LossOf) -> LossesOf:
    """Return a function for our search: the losses at the learning rates of a zoom, one by one."""
    return lambda zoom, rates: (loss_of(zoom, step, rate) for step, rate in enumerate(rates))


def our_zooms(losses_of: LossesOf, config: LRFinderConfig) -> Arrays:
    """Run our range test; return its results, one array per quantity."""
    result = list(search(losses_of, config))[-1]
    assert isinstance(result, LRFinderResult)
    assert result.learning_rate == result.zooms[-1].best
    found = {}
    for zoom in result.zooms:
        found |= {f"rates {zoom.number}": np.asarray(zoom.lrs), f"losses {zoom.number}": np.asarray(zoom.losses)}
        numbers = {"low": zoom.low, "high": zoom.high, "steepest": zoom.steepest, "lowest": zoom.lowest}
        found |= {f"{name} {zoom.number}": np.asarray(number) for name, number in numbers.items()}
    return found | {"best": np.asarray(result.learning_rate)}


def their_zooms(loss_of: LossOf, config: LRFinderConfig) -> Arrays:
    """Run PyTorch's range test; return the same arrays. Only for losses for which no zoom is skipped."""
    keys = ("start_lr", "end_lr", "num_zooms", "steps_per_zoom", "zoom_factor", "method")
    zooms, found = pytorch_reference.range_test(loss_of, **{key: getattr(config, key) for key in keys}), {}
    for number, zoom in enumerate(zooms, 1):
        found |= {f"rates {number}": zoom.rates.numpy(), f"losses {number}": zoom.losses.numpy()}
        numbers = {"low": zoom.ends[0], "high": zoom.ends[1], "steepest": zoom.steepest, "lowest": zoom.lowest}
        found |= {f"{name} {number}": np.asarray(value) for name, value in numbers.items()}
    return found | {"best": np.asarray(zooms[-1].best)}


def our_probe(config: LRFinderConfig) -> LossesOf:
    """Return the losses of our model in training, in float64; call it inside x64."""
    graphdef, params = our_model("float64")

    @jax.jit
    def update(state: Any, rate: jax.Array, pair: Any) -> tuple[Any, jax.Array]:
        state, scalars = train_step(state, pair, graphdef=graphdef, tx=adamw(OPTIMIZER, rate))
        return state, scalars["loss"]

    def start(zoom: int) -> tuple[Any, int]:
        return create_state(params, adamw(OPTIMIZER, 0.0), 0), zoom * config.steps_per_zoom

    def train(at: tuple[Any, int], rates: Sequence[float]) -> tuple[tuple[Any, int], list[jax.Array]]:
        state, loss = update(at[0], jnp.float64(rates[0]), batch(at[1]))
        return (state, at[1] + 1), [loss]

    return trainer_losses(start, train)


def their_probe(config: LRFinderConfig) -> LossOf:
    """Return the loss of PyTorch's model in training, in float64."""
    model: Any = None
    optimizer: Any = None

    def loss_of(zoom: int, step: int, rate: float) -> float:
        nonlocal model, optimizer
        if step == 0:
            model = torch_model(torch.float64)
            optimizer = pytorch_reference.adamw(model, rate, OPTIMIZER.weight_decay, OPTIMIZER.betas)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return pytorch_reference.update(
            optimizer, pytorch_reference.loss(model, *torch_batch(zoom * config.steps_per_zoom + step))
        )

    return loss_of


@cache
def model_zooms() -> tuple[Arrays, Arrays]:
    """Run the range test on the model in float64, here and in PyTorch."""
    with x64(True):
        found = our_zooms(our_probe(ZOOMS), ZOOMS)
    return found, their_zooms(their_probe(ZOOMS), ZOOMS)


def range_test_rows() -> Iterator[Row]:
    """Compare range tests: on an analytic loss by each method, and on the model in training."""
    for method in ("steepest", "lowest", "balanced"):
        config = LRFinderConfig(method=method)
        pair = our_zooms(analytic_loss, config), their_zooms(analytic_loss, config)
        yield Row(f"range test ({method}) on a formula", "chargpt_jax", "float64", *difference(*pair))
    yield Row("range test on the model", "chargpt_jax", "float64", *difference(*model_zooms()))


# Tokenizer


def tokenizer_row() -> Row:
    """Encode random Unicode characters with both tokenizers."""
    codes = np.random.default_rng(5).integers(0, 0x110000, 5000)
    text = string.printable + "".join(map(chr, codes))
    found, names = CharTokenizer.from_text(text), pytorch_reference.vocabulary(text)
    assert list(found.vocabulary) == names
    pair = {"ids": found.encode_text(text)}, {"ids": np.asarray(pytorch_reference.encode(names, [text])[0])}
    return Row("ids of random Unicode", "chargpt_jax", "int32", *difference(*pair))


def table(rows: Iterator[Row]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield "| what | computed by | precision | largest absolute difference | relative |"
    yield "|---|---|---|---:|---:|"
    for row in rows:
        *words, absolute, relative = astuple(row)
        yield f"| {' | '.join(words)} | {absolute:.1e} | {relative:.1e} |"


def rows() -> Iterator[Row]:
    """Yield every comparison."""
    yield from training_rows()
    yield from generation_rows()
    yield from range_test_rows()
    yield tokenizer_row()


if __name__ == "__main__":
    for line in table(rows()):
        print(line, flush=True)
