"""Measure one implementation, chargpt_jax or a baseline, in a process of its own.

    python -m benchmarks.implementations '{"implementation": "chargpt_jax", "measure": "training", "config": "small"}'

benchmarks/baselines.py starts these processes. A baseline's model and generate function come from a checkout of its
repository. Batches are random crops of one token array. The optimizer is AdamW with the weight decay, betas and
clipping of the config, for all implementations. NOTES lists what a baseline does differently.
"""

import contextlib
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from chargpt_jax.config import Config
from chargpt_jax.config.files import load_config
from chargpt_jax.devices import startup

BATCH_SIZES = {"small": 4, "nanogpt_baby": 8, "nanogpt_cpu": 12}
"""The measured configs and their batch sizes on a CPU; an accelerator uses the configs' own batch sizes."""

IMPLEMENTATIONS = {
    "chargpt_jax": ("chargpt_jax", ""),
    "chargpt_jax, bfloat16": ("chargpt_jax", "bfloat16"),
    "chargpt_jax, bfloat16, nondeterministic": ("chargpt_jax", "bfloat16 nondeterministic"),
    "nanoGPT": ("nanogpt", ""),
    "nanoGPT, compiled": ("nanogpt", "compiled"),
    "nanoGPT, bfloat16": ("nanogpt", "bfloat16"),
    "nanoGPT, bfloat16, compiled": ("nanogpt", "bfloat16 compiled"),
    "original": ("original", ""),
    "original, compiled": ("original", "compiled"),
    "original, bfloat16": ("original", "bfloat16"),
    "original, bfloat16, compiled": ("original", "bfloat16 compiled"),
    "Equinox": ("equinox", ""),
    "nanodo": ("nanodo", ""),
}
"""By name in the tables: the code, and the variant; '' is float32 without torch.compile.

On a GPU, PyTorch's float32 is TF32, as in nanoGPT's train.py; float32 of chargpt_jax stays float32. "nondeterministic"
trains without XLA's deterministic kernels, which changes the programs for a GPU only."""

NOTES = {
    "nanogpt": "learned positions; heads of n_embd / n_head: in small they are 4 wide, half of the attention's work",
    "original": "the original, in PyTorch",
    "equinox": "the original's JAX port",
    "nanodo": "learned positions, no dropout, no generation; in small its heads are 4 wide as well",
}

TRAINED_ON, PROMPT, WARM_UP = 400_000, 8, 16

LOGGED_EVERY = 10
"""Training steps between two reads of the loss, which wait for a GPU: nanoGPT's log_interval."""

TrainSteps = Callable[[], int]
"""Runs some training steps, waits for them, and returns their number."""


def config_for(name: str, accelerated: bool = False) -> Config:
    """Return a shipped config with the vocabulary size of its text and the batch size for the device."""
    config = load_config(name)
    config.model.vocab_size, config.model.used_ids = 128, 69 if name == "small" else 66
    config.data.padding_chance = 0.0
    if not accelerated:
        config.data.batch_size = BATCH_SIZES.get(name, 4)
    config.optimizer.learning_rate = 1e-3
    return config


def config_of(task: dict[str, Any]) -> Config:
    """Return the config of a task: a shipped one, with the task's `fields`, {"section.field": value}."""
    config = config_for(task["config"], task.get("accelerated", False))
    for name, value in task.get("fields", {}).items():
        section, field = name.split(".")
        setattr(getattr(config, section), field, value)
    return config


def corpus(config: Config) -> np.ndarray:
    """Return random token ids, int32 [TRAINED_ON]: their values do not change the time."""
    return np.random.default_rng(0).integers(1, config.model.used_ids, TRAINED_ON, dtype=np.int32)


class ChargptJax:
    """chargpt_jax, through the functions that its training and generation call."""

    def __init__(self, config: Config, variant: str, folder: Path | None) -> None:
        with startup.gc_paused():  # as at the start of the command line
            from chargpt_jax.training import setup  # noqa: F401

        startup.use_every_core()
        self.config = config
        config.amp.enabled, config.amp.dtype = True, "bfloat16" if "bfloat16" in variant else "float32"
        if "nondeterministic" in variant:
            from chargpt_jax.devices import platform

            platform.ON_GPU["xla_gpu_deterministic_ops"] = False

    def compiled(self) -> tuple[Any, Any, Any]:
        """Compile training; return the function of a dispatch, the first state and the training set on the device."""
        from chargpt_jax.training import optimizer
        from chargpt_jax.training.dispatch.steps import jit_train_steps
        from chargpt_jax.training.setup import Setup

        config = self.config
        setup = Setup.on(config, corpus(config), vocabulary=())
        schedule = optimizer.warmup_cosine(config.scheduler, 1e-3, 100)
        tx = optimizer.make_optimizer(config, schedule, setup.mesh)
        initial_state, shapes = setup.initial_state_in_background(tx), setup.state_shapes(tx)
        lowered = jit_train_steps(config, setup.graphdef, tx, setup.mesh, shapes).lower(
            shapes, setup.on_device, np.int32(1)
        )
        return lowered.compile(), initial_state.result(), setup.on_device

    def trainer(self) -> TrainSteps:
        """Compile training; each call is one dispatch, with as many steps as in a real training."""
        from chargpt_jax.training.dispatch.pacing import DispatchSize

        dispatch, state, tokens = self.compiled()
        pace = DispatchSize(self.config)

        def train_steps() -> int:
            nonlocal state
            began, count = time.perf_counter(), pace.steps
            state, history = dispatch(state, tokens, np.int32(count))
            np.asarray(history["loss"])
            pace.record(time.perf_counter() - began, count)
            return count

        return train_steps

    def digest(self, dispatches: Sequence[int]) -> str:
        """Train in dispatches of these numbers of steps; return the sha256 of the parameters and optimizer state."""
        import jax

        dispatch, state, tokens = self.compiled()
        for count in dispatches:
            state, _ = jax.block_until_ready(dispatch(state, tokens, np.int32(count)))
        found = hashlib.sha256()
        for array in jax.tree.leaves(jax.device_get((state.params, state.opt_state))):
            found.update(np.ascontiguousarray(array).tobytes())
        return found.hexdigest()

    def generator(self, prompt: int, count: int, batch: int) -> Callable[[int], None]:
        """Return a function that generates up to `count` tokens, with metrics, after equal prompts."""
        import jax

        from chargpt_jax.devices import sharding
        from chargpt_jax.devices.platform import compute_dtype
        from chargpt_jax.generation.generate import bucket, decode, prefill
        from chargpt_jax.generation.sampler import Sampler
        from chargpt_jax.model.init import create
        from chargpt_jax.ops.choose import ops_for

        graphdef, params = create(
            self.config.model, 0, ops_for(compute_dtype(self.config.amp), self.config.model.attention_block)
        )
        mesh = sharding.data_mesh(batch)
        params = jax.device_put(params, sharding.replicated(mesh))
        tokens = np.zeros((batch, bucket(prompt + count)), np.int32)  # as in Model.generate
        tokens[:, :prompt] = corpus(self.config)[:prompt]
        width, drawing = min(prompt, self.config.model.block_size), Sampler().with_key(jax.random.key(0))

        def generate(length: int) -> None:
            options = {"graphdef": graphdef, "mesh": mesh, "final": True}  # as in Model.generate without on_text
            progress = prefill(params, tokens, np.full(batch, prompt, np.int32), width=width, **options)
            progress = decode(params, progress, length, drawing, **options)
            np.asarray(progress.tokens)

        return generate


class Torch:
    """Base class of the PyTorch baselines, which differ in `build` and `loss`."""

    def __init__(self, config: Config, variant: str, folder: Path | None) -> None:
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.manual_seed(0)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        assert folder is not None
        self.config, self.bfloat16 = config, "bfloat16" in variant
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = self.build(folder).to(self.device)
        self.run = torch.compile(self.model) if "compiled" in variant else self.model

    def build(self, folder: Path) -> Any:
        """Import the baseline's code and create its model."""
        raise NotImplementedError

    def loss(self, x: Any, y: Any) -> Any:
        """Return the mean loss of inputs and targets, int64 [B, T] each."""
        raise NotImplementedError

    def autocast(self) -> Any:
        """Return the autocast context for bfloat16, or an empty one."""
        import torch

        return torch.autocast(self.device, dtype=torch.bfloat16) if self.bfloat16 else contextlib.nullcontext()

    def trainer(self) -> TrainSteps:
        """Return training on random crops: one step per call on a CPU, LOGGED_EVERY on a GPU."""
        import torch

        how, T, B = self.config.optimizer, self.config.model.block_size, self.config.data.batch_size
        tokens = torch.from_numpy(corpus(self.config)).long()
        parameters = list(self.model.parameters())
        decayed = [p for p in parameters if p.dim() >= 2]
        others = [p for p in parameters if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": how.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=how.betas, fused=self.device == "cuda" or None)
        count = 1 if self.device == "cpu" else LOGGED_EVERY

        def crops() -> Any:
            at = torch.randint(len(tokens) - T - 1, (B,))
            pair = (torch.stack([tokens[i + shift : i + shift + T] for i in at]) for shift in (0, 1))
            return pair if self.device == "cpu" else (x.pin_memory().to(self.device, non_blocking=True) for x in pair)

        def train_steps() -> int:
            for _ in range(count):
                x, y = crops()
                with self.autocast():
                    loss = self.loss(x, y)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if how.clip_norm:
                    torch.nn.utils.clip_grad_norm_(parameters, how.clip_norm)
                optimizer.step()
            loss.item()
            return count

        return train_steps

    def generator(self, prompt: int, count: int, batch: int) -> Callable[[int], None]:
        """Return a function that generates with the baseline's own generate."""
        import torch

        tokens = torch.from_numpy(corpus(self.config)[:prompt]).long().expand(batch, -1).to(self.device)
        self.model.eval()

        def generate(length: int) -> None:
            with torch.no_grad(), self.autocast():
                self.model.generate(tokens, length).cpu()

        return generate


class NanoGPT(Torch):
    """karpathy/nanoGPT: model.py."""

    def build(self, folder: Path) -> Any:
        """Create its GPT without biases, as its Shakespeare configs do."""
        sys.path.insert(0, str(folder))
        from model import GPT, GPTConfig  # type: ignore[import-not-found]

        m = self.config.model
        shape = {"block_size": m.block_size, "vocab_size": m.vocab_size, "n_layer": m.n_layer, "n_head": m.n_head}
        with contextlib.redirect_stdout(sys.stderr):
            return GPT(GPTConfig(**shape, n_embd=m.n_embd, dropout=m.dropout, bias=False))

    def loss(self, x: Any, y: Any) -> Any:
        """Return the loss that its model computes."""
        return self.run(x, y)[1]


def original_config(config: Config, folder: Path) -> Any:
    """Return the original's ModelConfig, without its validation, which requires a multiple of 8 heads."""
    sys.path.insert(0, str(folder / "src"))
    from experiment.config import ModelConfig  # type: ignore[import-not-found]

    names = ("vocab_size", "block_size", "n_embd", "n_head", "n_head_dim", "n_ff", "n_layer", "dropout")
    return ModelConfig.model_construct(**{name: getattr(config.model, name) for name in names})


class Original(Torch):
    """z0u/mi-ni at 2a991f7: the original in PyTorch."""

    def build(self, folder: Path) -> Any:
        """Create its GPT."""
        shape = original_config(self.config, folder)
        from experiment.model.gpt import GPT  # type: ignore[import-not-found]

        return GPT(shape)

    def loss(self, x: Any, y: Any) -> Any:
        """Return the cross-entropy as in its training module."""
        from torch.nn.functional import cross_entropy

        logits = self.run(x)
        return cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1), ignore_index=0)


class Equinox:
    """The original's JAX port in z0u/mi-ni, with its own training step and optimizer."""

    def __init__(self, config: Config, variant: str, folder: Path | None) -> None:
        import jax

        assert folder is not None
        self.config, shape = config, original_config(config, folder)
        from experiment.model.gpt import GPT  # type: ignore[import-not-found]

        self.model = GPT(shape, key=jax.random.key(0))

    def trainer(self) -> TrainSteps:
        """Return its jitted training step on random crops."""
        import equinox as eqx
        import jax
        import optax
        from experiment.training.loop import make_train_step  # type: ignore[import-not-found]

        mask = jax.tree.map(lambda p: p.ndim >= 2, eqx.filter(self.model, eqx.is_inexact_array))
        tx = adamw_with(self.config, mask, optax)
        step, model = make_train_step(tx), self.model
        opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
        crops, keys = random_crops(self.config), iter(range(1 << 30))

        def train_steps() -> int:
            nonlocal model, opt_state
            model, opt_state, loss = step(model, opt_state, *crops(), jax.random.key(next(keys)))
            float(loss)
            return 1

        return train_steps

    def generator(self, prompt: int, count: int, batch: int) -> Callable[[int], None]:
        """Return a function that generates with its own generate."""
        import jax

        tokens = np.broadcast_to(corpus(self.config)[:prompt], (batch, prompt))
        return lambda length: self.model.generate(tokens, length, key=jax.random.key(0)) and None


class Nanodo:
    """google-deepmind/nanodo: its Flax decoder in a plain jitted training step."""

    def __init__(self, config: Config, variant: str, folder: Path | None) -> None:
        assert folder is not None
        sys.path.insert(0, str(folder))
        self.config = config

    def trainer(self) -> TrainSteps:
        """Return a jitted training step: its decoder, mean cross-entropy and optax's AdamW."""
        import jax
        import jax.numpy as jnp
        import optax
        from nanodo.model import DoConfig, TransformerDo  # type: ignore[import-not-found]

        m = self.config.model
        shape = {"D": m.n_embd, "H": m.n_head, "L": m.block_size, "N": m.n_layer, "V": m.vocab_size, "F": m.n_ff}
        model = TransformerDo(DoConfig(**shape, fsdp_enabled=False))
        crops = random_crops(self.config)
        params = jax.jit(model.init)(jax.random.key(0), jnp.asarray(crops()[0]))
        tx = adamw_with(self.config, lambda p: jax.tree.map(lambda x: x.ndim >= 2, p), optax)
        opt_state = jax.jit(tx.init)(params)

        def loss_of(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

        @jax.jit
        def step(params: Any, opt_state: Any, x: jax.Array, y: jax.Array) -> Any:
            loss, grads = jax.value_and_grad(loss_of)(params, x, y)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        def train_steps() -> int:
            nonlocal params, opt_state
            params, opt_state, loss = step(params, opt_state, *crops())
            float(loss)
            return 1

        return train_steps

    def generator(self, prompt: int, count: int, batch: int) -> Callable[[int], None]:
        """Raise NotImplementedError: it has no generation."""
        raise NotImplementedError("nanodo has no generation")


CLASSES: dict[str, Any] = {
    "chargpt_jax": ChargptJax,
    "nanogpt": NanoGPT,
    "original": Original,
    "equinox": Equinox,
    "nanodo": Nanodo,
}


def adamw_with(config: Config, mask: Any, optax: Any) -> Any:
    """Return optax's AdamW with the settings of a config."""
    how = config.optimizer
    tx = optax.adamw(1e-3, b1=how.betas[0], b2=how.betas[1], weight_decay=how.weight_decay, mask=mask)
    return optax.chain(optax.clip_by_global_norm(how.clip_norm), tx) if how.clip_norm else tx


def random_crops(config: Config) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    """Return a function that draws inputs and targets, int32 [B, T] each."""
    tokens, rng = corpus(config), np.random.default_rng(1)
    B, T = config.data.batch_size, config.model.block_size

    def draw() -> tuple[np.ndarray, np.ndarray]:
        text = tokens[rng.integers(len(tokens) - T - 1, size=B)[:, None] + np.arange(T + 1)]
        return text[:, :-1], text[:, 1:]

    return draw


def peak_mib() -> float:
    """Return the peak memory of this process, MiB (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def device() -> dict[str, Any]:
    """Return the name and peak memory (MiB) of the GPU in use; empty for a CPU."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return {"device": torch.cuda.get_device_name(), "device_mib": torch.cuda.max_memory_allocated() / 2**20}
    if jax and jax.default_backend() != "cpu":
        first = jax.local_devices()[0]
        return {"device": first.device_kind, "device_mib": first.memory_stats()["peak_bytes_in_use"] / 2**20}
    return {}


def training(implementation: Any, config: Config, seconds: float) -> dict[str, float]:
    """Train for some seconds, after three warm-up calls; return tokens/s and peak memory."""
    before, train_steps = peak_mib(), implementation.trainer()
    for _ in range(3):
        train_steps()
    times: list[float] = []
    start = time.perf_counter()
    while (began := time.perf_counter()) - start < seconds or len(times) < 3:
        count = train_steps()
        times.append((time.perf_counter() - began) / count)
    rate = config.data.batch_size * config.model.block_size / statistics.median(times)
    return {"tokens_per_second": rate, "peak_mib": peak_mib(), "own_mib": peak_mib() - before, **device()}


def generation(implementation: Any, prompt: int, count: int, batch: int, repeats: int = 1) -> dict[str, Any]:
    """Generate a few tokens, which compiles, then time the full generation `repeats` times.

    Returns tokens/s over all sequences of the batch (the median), the seconds up to the end of the first full
    generation, and the name and peak memory of a GPU.
    """
    generate = implementation.generator(prompt, count, batch)
    start = time.perf_counter()
    generate(min(count, WARM_UP))
    times = [time.perf_counter()]
    for _ in range(repeats):
        generate(count)
        times.append(time.perf_counter())
    seconds = statistics.median(ended - began for began, ended in pairwise(times))
    return {"tokens_per_second": batch * count / seconds, "first_seconds": times[1] - start, **device()}


def found_devices() -> dict[str, str]:
    """Return the device that JAX computes on, and the one of PyTorch: its name, 'cpu' or 'absent'."""
    import jax

    try:
        import torch
    except ImportError:
        other = "absent"
    else:
        other = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"jax": jax.local_devices()[0].device_kind, "torch": other}


def sample(task: dict[str, Any]) -> dict[str, Any]:
    """Measure what a task describes."""
    if task["measure"] == "devices":
        return found_devices()
    kind, variant = IMPLEMENTATIONS[task["implementation"]]
    config = config_of(task)
    implementation = CLASSES[kind](config, variant, Path(task["folder"]) if task.get("folder") else None)
    if task["measure"] == "training":
        return training(implementation, config, task["seconds"])
    if task["measure"] == "start":
        implementation.trainer()()
        return {"mib": peak_mib()}
    if task["measure"] == "digest":
        return {"digest": implementation.digest(task["dispatches"])}
    return generation(implementation, task["prompt"], task["count"], task["batch"], task.get("repeats", 1))


if __name__ == "__main__":
    print(json.dumps(sample(json.loads(sys.argv[1]))), flush=True)
    os._exit(0)  # skip the interpreter's shutdown, which is not part of the measurement
