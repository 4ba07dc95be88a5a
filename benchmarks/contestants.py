"""One contestant's sample in a process of its own: ours, or a peer's own model code from a checkout of the user's.

    python -m benchmarks.contestants '{"contestant": "ours", "measure": "training", "setup": "small", ...}'

benchmarks/peers.py starts these. A peer brings its model and its generate; batches are random crops of one array of
tokens, and the optimizer is AdamW with the setup's own decay, betas and clipping, for everybody. What a peer cannot do
as the others do is told by NOTES.
"""

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from chargpt_jax.config import Config
from chargpt_jax.config_io import load_config
from chargpt_jax.devices import startup

SETUPS = {"small": 4, "nanogpt_baby": 8, "nanogpt_cpu": 12}
"""The shipped configs that are measured, and the batch sizes that a CPU gets; an accelerator gets the configs' own."""

CONTESTANTS = {
    "ours": ("ours", ""),
    "ours, bfloat16": ("ours", "bfloat16"),
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
"""By its name in the tables: whose code, and how it is run; '' is float32 without torch.compile.

On a GPU PyTorch's float32 is TF32, as nanoGPT's train.py wants it, where ours is float32."""

NOTES = {
    "nanogpt": "learned positions; heads of n_embd / n_head: in small they are 4 wide, half of the attention's work",
    "original": "the PyTorch ancestor",
    "equinox": "the ancestor's later version in JAX",
    "nanodo": "learned positions, no dropout, no generation; in small its heads are 4 wide as well",
}

TRAINED_ON, PROMPT, WARM_UP = 400_000, 8, 16

LOGGED_EVERY = 10
"""Updates after which PyTorch on a GPU is asked for a loss, and so waited for: nanoGPT's log_interval."""

Update = Callable[[], int]
"""Makes some updates, waits for them, and returns how many they were."""


def setup_of(name: str, accelerated: bool = False) -> Config:
    """Return a shipped config with the vocabulary that its text gives and the batch size of what it is to run on."""
    config = load_config(name)
    config.model.vocab_size, config.model.used_ids = 128, 69 if name == "small" else 66
    config.data.padding_chance = 0.0
    if not accelerated:
        config.data.batch_size = SETUPS.get(name, 4)
    config.optimizer.learning_rate = 1e-3
    return config


def corpus(config: Config) -> np.ndarray:
    """Draw int32 [TRAINED_ON] ids that a character has: what they are does not change the time."""
    return np.random.default_rng(0).integers(1, config.model.used_ids, TRAINED_ON, dtype=np.int32)


class Ours:
    """This package, through the functions that its training calls."""

    def __init__(self, config: Config, variant: str, folder: Path | None) -> None:
        with startup.gc_paused():  # as where the package imports itself
            from chargpt_jax.training import setup  # noqa: F401

        startup.use_every_core()
        self.config = config
        config.amp.enabled, config.amp.dtype = True, variant or "float32"

    def trainer(self) -> Update:
        """Compile the updates and return them; each call is one dispatch, of as many as training puts into it."""
        from chargpt_jax.training import optimizer
        from chargpt_jax.training.pacing import Pace
        from chargpt_jax.training.setup import Setup

        config = self.config
        setup = Setup.on(config, corpus(config), vocabulary=())
        schedule = optimizer.warmup_cosine(config.scheduler, 1e-3, 100)
        tx = optimizer.transform(config.optimizer, schedule, setup.mesh)
        state, lowered = setup.begin(tx)
        dispatch, pace = lowered.compile(), Pace(config)

        def update() -> int:
            nonlocal state
            began, count = time.perf_counter(), pace.steps
            state, history = dispatch(state, setup.on_device, np.int32(count))
            np.asarray(history["loss"])
            pace.took(time.perf_counter() - began, count)
            return count

        return update

    def writer(self, prompt: int, count: int, batch: int) -> Callable[[int], None]:
        """Return what writes so many characters, `count` at most, after prompts of one length, with their metrics."""
        import jax

        from chargpt_jax.devices import sharding
        from chargpt_jax.devices.platform import compute_dtype
        from chargpt_jax.generation.generate import advance, begin, bucket
        from chargpt_jax.generation.sampler import Sampler
        from chargpt_jax.model.gpt import create

        graphdef, params = create(self.config.model, 0, compute_dtype(self.config.amp))
        mesh = sharding.data_mesh(batch)
        params = jax.device_put(params, sharding.replicated(mesh))
        tokens = np.zeros((batch, bucket(prompt + count)), np.int32)  # as Model.generate makes room
        tokens[:, :prompt] = corpus(self.config)[:prompt]
        width, drawing = min(prompt, self.config.model.block_size), Sampler().with_key(jax.random.key(0))

        def write(length: int) -> None:
            options = {"graphdef": graphdef, "mesh": mesh, "once": True}  # as Model.generate does without on_text
            progress = begin(params, tokens, np.full(batch, prompt, np.int32), width=width, **options)
            progress = advance(params, progress, length, drawing, **options)
            np.asarray(progress.tokens)

        return write


class Torch:
    """What both PyTorch peers share: `model`, and the loss of a batch."""

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
        """Import the peer's code and make its model."""
        raise NotImplementedError

    def loss(self, x: Any, y: Any) -> Any:
        """Return the mean loss of a batch, int64 [B, T] each."""
        raise NotImplementedError

    def autocast(self) -> Any:
        """Return the context in which bfloat16 is used, where it is asked for."""
        import torch

        return torch.autocast(self.device, dtype=torch.bfloat16) if self.bfloat16 else contextlib.nullcontext()

    def trainer(self) -> Update:
        """Return what makes updates on random crops: one, or as many as a GPU is left alone with."""
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

        def update() -> int:
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

        return update

    def writer(self, prompt: int, count: int, batch: int) -> Callable[[int], None]:
        """Return what writes with the peer's own generate."""
        import torch

        tokens = torch.from_numpy(corpus(self.config)[:prompt]).long().expand(batch, -1).to(self.device)
        self.model.eval()

        def write(length: int) -> None:
            with torch.no_grad(), self.autocast():
                self.model.generate(tokens, length).cpu()

        return write


class NanoGPT(Torch):
    """karpathy/nanoGPT: model.py."""

    def build(self, folder: Path) -> Any:
        """Make its GPT without biases, as its Shakespeare configs do."""
        sys.path.insert(0, str(folder))
        from model import GPT, GPTConfig  # type: ignore[import-not-found]

        m = self.config.model
        shape = {"block_size": m.block_size, "vocab_size": m.vocab_size, "n_layer": m.n_layer, "n_head": m.n_head}
        with contextlib.redirect_stdout(sys.stderr):
            return GPT(GPTConfig(**shape, n_embd=m.n_embd, dropout=m.dropout, bias=False))

    def loss(self, x: Any, y: Any) -> Any:
        """Take the loss that its model returns."""
        return self.run(x, y)[1]


def ancestral(config: Config, folder: Path) -> Any:
    """Return the ancestor's ModelConfig; unchecked, since it would refuse numbers of heads that 8 does not divide."""
    sys.path.insert(0, str(folder / "src"))
    from experiment.config import ModelConfig  # type: ignore[import-not-found]

    names = ("vocab_size", "block_size", "n_embd", "n_head", "n_head_dim", "n_ff", "n_layer", "dropout")
    return ModelConfig.model_construct(**{name: getattr(config.model, name) for name in names})


class Original(Torch):
    """z0u/mi-ni at 2a991f7: the ancestor in PyTorch."""

    def build(self, folder: Path) -> Any:
        """Make its GPT."""
        shape = ancestral(self.config, folder)
        from experiment.model.gpt import GPT  # type: ignore[import-not-found]

        return GPT(shape)

    def loss(self, x: Any, y: Any) -> Any:
        """Take the cross-entropy as its training module does."""
        from torch.nn.functional import cross_entropy

        logits = self.run(x)
        return cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1), ignore_index=0)


class Equinox:
    """z0u/mi-ni today: the ancestor's own step to JAX, with its train step and its optimizer."""

    def __init__(self, config: Config, variant: str, folder: Path | None) -> None:
        import jax

        assert folder is not None
        self.config, shape = config, ancestral(config, folder)
        from experiment.model.gpt import GPT  # type: ignore[import-not-found]

        self.model = GPT(shape, key=jax.random.key(0))

    def trainer(self) -> Update:
        """Return its jitted train step on random crops."""
        import equinox as eqx
        import jax
        import optax
        from experiment.training.loop import make_train_step  # type: ignore[import-not-found]

        mask = jax.tree.map(lambda p: p.ndim >= 2, eqx.filter(self.model, eqx.is_inexact_array))
        tx = adamw_with(self.config, mask, optax)
        step, model = make_train_step(tx), self.model
        opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
        crops, keys = random_crops(self.config), iter(range(1 << 30))

        def update() -> int:
            nonlocal model, opt_state
            model, opt_state, loss = step(model, opt_state, *crops(), jax.random.key(next(keys)))
            float(loss)
            return 1

        return update

    def writer(self, prompt: int, count: int, batch: int) -> Callable[[int], None]:
        """Return what writes with its own generate."""
        import jax

        tokens = np.broadcast_to(corpus(self.config)[:prompt], (batch, prompt))
        return lambda length: self.model.generate(tokens, length, key=jax.random.key(0)) and None


class Nanodo:
    """google-deepmind/nanodo: its Flax decoder under a plain jitted step."""

    def __init__(self, config: Config, variant: str, folder: Path | None) -> None:
        assert folder is not None
        sys.path.insert(0, str(folder))
        self.config = config

    def trainer(self) -> Update:
        """Return a jitted step: its decoder, the mean cross-entropy and optax's AdamW."""
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

        def update() -> int:
            nonlocal params, opt_state
            params, opt_state, loss = step(params, opt_state, *crops())
            float(loss)
            return 1

        return update

    def writer(self, prompt: int, count: int, batch: int) -> Callable[[int], None]:
        """Refuse: it has no generation."""
        raise NotImplementedError("it has no generation")


PEERS: dict[str, Any] = {
    "ours": Ours,
    "nanogpt": NanoGPT,
    "original": Original,
    "equinox": Equinox,
    "nanodo": Nanodo,
}


def adamw_with(config: Config, mask: Any, optax: Any) -> Any:
    """Return optax's AdamW as a config asks for it."""
    how = config.optimizer
    tx = optax.adamw(1e-3, b1=how.betas[0], b2=how.betas[1], weight_decay=how.weight_decay, mask=mask)
    return optax.chain(optax.clip_by_global_norm(how.clip_norm), tx) if how.clip_norm else tx


def random_crops(config: Config) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    """Return what draws inputs and targets, int32 [B, T] each."""
    tokens, rng = corpus(config), np.random.default_rng(1)
    B, T = config.data.batch_size, config.model.block_size

    def draw() -> tuple[np.ndarray, np.ndarray]:
        text = tokens[rng.integers(len(tokens) - T - 1, size=B)[:, None] + np.arange(T + 1)]
        return text[:, :-1], text[:, 1:]

    return draw


def peak_mib() -> float:
    """Return the most memory that this process has held, MiB (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def device() -> dict[str, Any]:
    """Name the GPU that has been used, and the most of its memory that was taken, MiB; empty for a CPU."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return {"device": torch.cuda.get_device_name(), "device_mib": torch.cuda.max_memory_allocated() / 2**20}
    if jax and jax.default_backend() != "cpu":
        first = jax.local_devices()[0]
        return {"device": first.device_kind, "device_mib": first.memory_stats()["peak_bytes_in_use"] / 2**20}
    return {}


def training(peer: Any, config: Config, seconds: float) -> dict[str, float]:
    """Train for some seconds after three rounds of updates that do not count."""
    before, update = peak_mib(), peer.trainer()
    for _ in range(3):
        update()
    times: list[float] = []
    start = time.perf_counter()
    while (began := time.perf_counter()) - start < seconds or len(times) < 3:
        count = update()
        times.append((time.perf_counter() - began) / count)
    rate = config.data.batch_size * config.model.block_size / statistics.median(times)
    return {"tokens_per_second": rate, "peak_mib": peak_mib(), "own_mib": peak_mib() - before, **device()}


def generation(peer: Any, prompt: int, count: int, batch: int) -> dict[str, float]:
    """Write a little, which compiles, then time the whole: characters a second over all rows, and both together."""
    write = peer.writer(prompt, count, batch)
    start = time.perf_counter()
    write(min(count, WARM_UP))
    began = time.perf_counter()
    write(count)
    ended = time.perf_counter()
    return {"characters_per_second": batch * count / (ended - began), "first_seconds": ended - start}


def sample(task: dict[str, Any]) -> dict[str, float]:
    """Take one sample: what is measured, as the task says, of which contestant."""
    kind, variant = CONTESTANTS[task["contestant"]]
    config = setup_of(task["setup"], task.get("accelerated", False))
    for name, value in task.get("model", {}).items():
        setattr(config.model, name, value)
    peer = PEERS[kind](config, variant, Path(task["folder"]) if task.get("folder") else None)
    if task["measure"] == "training":
        return training(peer, config, task["seconds"])
    if task["measure"] == "start":
        peer.trainer()()
        return {"mib": peak_mib()}
    return generation(peer, task["prompt"], task["count"], task["batch"])


if __name__ == "__main__":
    print(json.dumps(sample(json.loads(sys.argv[1]))), flush=True)
    os._exit(0)  # the clock of a cold start has stopped: nobody waits for an orderly end
