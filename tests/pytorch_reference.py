"""Reference implementation of the original's mathematics in PyTorch, in the dtype of the parameters.

It follows z0u/mi-ni at commit 2a991f7: the model and its parameter names, loss, AdamW, a schedule, the metrics of
generation, the learning-rate range test and the tokenizer. It uses autograd, SDPA, `torch.optim` and its schedulers,
and does not import the package.

Axes: B batch, T time, C channels, H heads, D head width, F feed-forward width, V vocabulary.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

PADDING = 0
ENTROPY_FLOOR = 1e-10
"""The original adds this to probabilities before the logarithm when it computes an entropy."""


# Model


class Attention(nn.Module):
    def __init__(self, n_embd: int, n_head: int, n_head_dim: int, frequencies: torch.dtype | None, dropout: float):
        super().__init__()
        self.shape, self.frequencies, self.rate = (3, n_head, n_head_dim), frequencies, dropout
        self.qkv = nn.Linear(n_embd, 3 * n_head * n_head_dim)
        self.proj = nn.Linear(n_head * n_head_dim, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, self.shape).permute(2, 0, 3, 1, 4)  # [B, H, T, D] each
        rate = self.rate if self.training else 0.0
        y = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v, dropout_p=rate, is_causal=True)
        return self.dropout(self.proj(y.transpose(1, 2).flatten(2)))

    def turned(self, x: Tensor) -> Tensor:
        """Multiply x [B, H, T, D], read as D / 2 complex numbers (first half + i second half), by e^(i t f)."""
        T, half = x.shape[-2], x.shape[-1] // 2
        wide = torch.promote_types(x.dtype, torch.float32)
        exponent = torch.arange(half, dtype=self.frequencies or wide) / half
        angle = torch.arange(T, dtype=wide)[:, None] * (10_000.0**-exponent).to(wide)
        plane = torch.complex(x[..., :half].to(wide), x[..., half:].to(wide))
        plane = plane * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((plane.real, plane.imag), dim=-1).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, n_embd: int, n_ff: int, dropout: float):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n_embd, n_ff), nn.GELU(), nn.Linear(n_ff, n_embd), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Block(nn.Module):
    def __init__(
        self, n_embd: int, n_head: int, n_head_dim: int, n_ff: int, frequencies: torch.dtype | None, dropout: float
    ):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attn = Attention(n_embd, n_head, n_head_dim, frequencies, dropout)
        self.mlp = MLP(n_embd, n_ff, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The decoder; its named_parameters() are those of the original.

    frequencies: the dtype in which RoPE's frequencies are computed; None: that of the model, at least float32. (The
    original always uses float32, which makes a difference in float64.)
    dropout: in training, on the attention weights, the attention's output and the MLP's output.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        n_embd: int,
        n_head: int,
        n_head_dim: int,
        n_ff: int,
        n_layer: int,
        frequencies: torch.dtype | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        blocks = [Block(n_embd, n_head, n_head_dim, n_ff, frequencies, dropout) for _ in range(n_layer)]
        parts = {
            "wte": nn.Embedding(vocab_size, n_embd),
            "blocks": nn.ModuleList(blocks),
            "ln_f": nn.LayerNorm(n_embd),
        }
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Map int64 [B, T] to logits [B, T, V]."""
        x = self.transformer["wte"](tokens)
        for block in self.transformer["blocks"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


def with_parameters(params: dict[str, np.ndarray], dtype: torch.dtype, **sizes: Any) -> GPT:
    """Return a model of these sizes with these parameters, by name, converted to `dtype`."""
    model = GPT(**sizes).to(dtype)
    named = dict(model.named_parameters())
    assert named.keys() == params.keys()
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.from_numpy(params[name]))
    return model


def loss(model: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats, over the targets that are not padding; int64 [B, T] each."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=PADDING)


# Training


def adamw(model: GPT, rate: float, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Return AdamW with two groups: weight decay for matrices and the embedding, none for biases and scales."""
    matrices, vectors = [], []
    for parameter in model.parameters():
        (matrices if parameter.ndim > 1 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=betas)


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup: int, steps: int, low: float) -> SequentialLR:
    """Return a schedule: linear from low x rate in `warmup` steps, then half a cosine down to low x rate."""
    peak = optimizer.defaults["lr"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # SequentialLR steps a scheduler in a way that torch deprecates
        line = LinearLR(optimizer, start_factor=low, total_iters=warmup)
        cosine = CosineAnnealingLR(optimizer, T_max=steps - 1 - warmup, eta_min=low * peak)
        return SequentialLR(optimizer, [line, cosine], milestones=[warmup])


def train(
    loss_of: Callable[[int], Tensor], optimizer: torch.optim.Optimizer, schedule: SequentialLR, steps: int
) -> tuple[list[float], list[float]]:
    """Make training steps on loss_of(step); return the loss before each step, and its learning rate."""
    losses, rates = [], []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        losses.append(update(optimizer, loss_of(step)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            schedule.step()
    return losses, rates


def update(optimizer: torch.optim.Optimizer, value: Tensor) -> float:
    """Make one optimizer update on a loss; return the loss."""
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return value.item()


# Generation and its metrics


class Metrics(NamedTuple):
    """Float [B, T] each, in nats except for s2; NaN where undefined."""

    surprisal: Tensor
    entropy: Tensor
    s2: Tensor


@torch.no_grad()
def metrics(model: GPT, tokens: Tensor, n_prompt: int, block_size: int, floor: float = 0.0) -> Metrics:
    """Return the metrics of tokens [B, T]: a prompt of n_prompt tokens, and generated tokens after it.

    The model runs once on the prompt, which has at most block_size tokens, and then once per generated token, on the
    block_size tokens before it. Padding counts as context; in a prompt its metrics are NaN.

    floor: added to the probabilities inside the logarithm of the entropy.
    """
    vocab_size = model.lm_head.out_features
    surprisal, entropy = (torch.full(tokens.shape, math.nan, dtype=torch.float64) for _ in range(2))

    def measure(t: int, logits: Tensor) -> None:
        p = logits.double().softmax(-1)
        picked = logits.double().log_softmax(-1).gather(-1, tokens[:, t, None])[:, 0]
        h = -(p * torch.log(p + floor)).sum(-1) if floor else torch.special.entr(p).sum(-1)
        counts = (tokens[:, t] != PADDING) | (t >= n_prompt)
        surprisal[counts, t], entropy[counts, t] = -picked[counts], h[counts]

    prompt = model(tokens[:, :n_prompt])
    for t in range(1, n_prompt):
        measure(t, prompt[:, t - 1])
    for t in range(n_prompt, tokens.shape[1]):
        measure(t, model(tokens[:, max(0, t - block_size) : t])[:, -1])
    return Metrics(surprisal, entropy, (surprisal - entropy) / math.log(vocab_size))


@torch.no_grad()
def greedy(model: GPT, tokens: Tensor, count: int, block_size: int) -> Tensor:
    """Append the most likely token to tokens [B, T], `count` times; return [B, T + count]."""
    for _ in range(count):
        best = model(tokens[:, -block_size:])[:, -1].argmax(-1)
        tokens = torch.cat((tokens, best[:, None]), dim=1)
    return tokens


# The range test


def log_spaced(ends: Tensor, count: int) -> Tensor:
    """Return `count` learning rates, evenly spaced in log space between two logarithms."""
    return torch.exp(ends[0] + (ends[1] - ends[0]) * torch.arange(count, dtype=torch.float64) / (count - 1))


def improving(losses: Tensor) -> Tensor:
    """Return whether each of the losses [n] is below all earlier ones; NaN never is."""
    finite = losses.nan_to_num(nan=math.inf)
    before = torch.cat((torch.tensor([math.inf], dtype=losses.dtype), finite.cummin(0).values[:-1]))
    return finite < before


def steepest(logs: Tensor, losses: Tensor) -> Tensor:
    """Return the log of the learning rate at the steepest descent; with equal falls, the middle of the ends."""
    falls = losses[:-1] - losses[1:]
    weights = falls - falls.min()
    if not weights.any():
        return (logs[0] + logs[-1]) / 2
    return weights @ (logs[:-1] + logs[1:]) / 2 / weights.sum()


class ZoomFound(NamedTuple):
    ends: tuple[float, float]
    """The range that was tested."""
    rates: Tensor
    """The learning rates with improving losses."""
    losses: Tensor
    steepest: float
    lowest: float
    best: float


def range_test(
    loss_of: Callable[[int, int, float], float],
    *,
    start_lr: float,
    end_lr: float,
    num_zooms: int,
    steps_per_zoom: int,
    zoom_factor: float,
    method: str,
) -> list[ZoomFound]:
    """Run the range test on loss_of(zoom, step, rate); its result is `best` of the last zoom."""
    ends = torch.tensor([start_lr, end_lr], dtype=torch.float64).log()
    lowest, found = math.inf, []
    for zoom in range(num_zooms):
        rates = log_spaced(ends, steps_per_zoom)
        losses = torch.tensor([loss_of(zoom, i, r) for i, r in enumerate(rates.tolist())], dtype=torch.float64)
        good = improving(losses)
        if good.sum() < 2:
            continue
        rates, losses = rates[good], losses[good]
        middle = steepest(rates.log(), losses).exp().item()
        lowest = min(lowest, rates[-1].item())  # the last improving loss is the lowest
        proposed = {"steepest": [middle] * 2, "lowest": [lowest] * 2, "balanced": [middle, lowest]}[method]
        tested = tuple(ends.exp().tolist())
        found.append(ZoomFound(tested, rates, losses, middle, lowest, sum(proposed) / 2))
        ends = ends.lerp(torch.tensor(proposed, dtype=torch.float64).log(), 1 - zoom_factor)
    return found


# Tokenizer


def vocabulary(text: str) -> list[str]:
    """Return '' and the characters of a text, in the order of their token ids."""
    return sorted({"", *text})


def encode(names: Sequence[str], texts: Sequence[str], block_size: int | None = None) -> list[list[int]]:
    """Return the token ids of texts: truncated at the end, padded in front to one length."""
    id_of = {name: i for i, name in enumerate(names)}
    sequences = [[id_of[c] for c in text][:block_size] for text in texts]
    length = max(map(len, sequences), default=0) if block_size is None else block_size
    return [[PADDING] * (length - len(ids)) + ids for ids in sequences]


def decode_each(names: Sequence[str], rows: Sequence[Sequence[int]]) -> list[list[str]]:
    """Return the character of every id, and '' for an id without one."""
    return [[names[i] if 0 <= i < len(names) else "" for i in row] for row in rows]
