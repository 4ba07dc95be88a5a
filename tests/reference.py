"""Reference implementation of the mathematics in NumPy and float64: slow and plain.

It covers the model, its token metrics, greedy generation, AdamW, the learning-rate schedule and the learning-rate
range test. It does not import the package, handles one sequence at a time (the caller loops over a batch) and has no
dropout. It follows the original, z0u/mi-ni at commit 2a991f7 (PyTorch).

RoPE: Su et al. 2021, "RoFormer". Decoupled weight decay: Loshchilov and Hutter 2019. Range test: Smith 2017.

Axes: T time, C channels, H heads, D head width, F feed-forward width, V vocabulary.
Token id 0 is padding: the model treats it like any token, but losses and metrics ignore it.
"""

import math
from collections.abc import Callable

import numpy as np

Params = dict[str, np.ndarray]
LrRange = tuple[float, float]

PADDING_ID = 0
LAYER_NORM_EPS = 1e-5
ROPE_BASE = 10_000.0
MASKED_LOGIT = -1e30  # finite, to avoid inf - inf; exp of it, or of its distance to a real logit, is 0.0


# Parameters


def random_parameters(
    rng: np.random.Generator, *, vocab_size: int, n_embd: int, n_head: int, n_head_dim: int, n_ff: int, n_layer: int
) -> Params:
    """Return random parameters with activations and logits of order one, no bias of 0 and no scale of 1.

    Unlike with the model's initialisation, a test fails if an implementation omits a bias or a scale.

    Names are the original's, and weights have torch's orientation [out, in]; each array is float64:
    'transformer.wte.weight' [V, C], which is also the output head; for each block N, under 'transformer.blocks.N.':
    'ln_1' and 'ln_2' [C], 'attn.qkv' [3*H*D, C], 'attn.proj' [C, H*D], 'mlp.net.0' [F, C], 'mlp.net.2' [C, F];
    'transformer.ln_f' [C]. Each but wte has a '.weight' and a '.bias'.
    """
    params = {}

    def add_linear(name: str, n_in: int, n_out: int) -> None:
        params[name + ".weight"] = rng.normal(size=(n_out, n_in)) / math.sqrt(n_in)
        params[name + ".bias"] = 0.1 * rng.normal(size=n_out)

    def add_layer_norm(name: str) -> None:
        params[name + ".weight"] = 1.0 + 0.1 * rng.normal(size=n_embd)
        params[name + ".bias"] = 0.1 * rng.normal(size=n_embd)

    params["transformer.wte.weight"] = rng.normal(size=(vocab_size, n_embd)) / math.sqrt(n_embd)
    for n in range(n_layer):
        block = f"transformer.blocks.{n}."
        add_layer_norm(block + "ln_1")
        add_linear(block + "attn.qkv", n_embd, 3 * n_head * n_head_dim)
        add_linear(block + "attn.proj", n_head * n_head_dim, n_embd)
        add_layer_norm(block + "ln_2")
        add_linear(block + "mlp.net.0", n_embd, n_ff)
        add_linear(block + "mlp.net.2", n_ff, n_embd)
    add_layer_norm("transformer.ln_f")
    return params


# Model


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Normalise each row of x [T, C] by its mean and its biased variance, then apply weight [C] and bias [C]."""
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + LAYER_NORM_EPS) * weight + bias


def gelu(x: np.ndarray) -> np.ndarray:
    """Return x times the standard normal distribution function at x, elementwise: exact erf, not tanh."""
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return 0.5 * x * (1.0 + erf(x / math.sqrt(2.0)))


def rope(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Rotate the vectors x [T, D] of one head by angles that grow with positions [T]; D is even.

    Channel i of the first half and channel i of the second half are one point of a plane. At position p it turns by
    p * base ** (-2 i / D) radians. (The original keeps its frequencies in float32; here they are float64.)
    """
    n_head_dim = x.shape[-1]
    half = n_head_dim // 2
    rotated = np.empty_like(x, dtype=np.float64)
    for t, position in enumerate(positions):
        for i in range(half):
            angle = float(position) * ROPE_BASE ** (-2.0 * i / n_head_dim)
            a, b = x[t, i], x[t, half + i]
            rotated[t, i] = a * math.cos(angle) - b * math.sin(angle)
            rotated[t, half + i] = b * math.cos(angle) + a * math.sin(angle)
    return rotated


def linear(x: np.ndarray, params: Params, name: str) -> np.ndarray:
    """Apply the named weight [out, in] and bias [out] to x [T, in]. Returns [T, out]."""
    return x @ params[name + ".weight"].T + params[name + ".bias"]


def attention(x: np.ndarray, params: Params, name: str, n_head: int, n_head_dim: int) -> np.ndarray:
    """Apply causal self-attention to x [T, C]: each position attends to itself and all earlier ones. Returns [T, C].

    name: the module's prefix in params, such as 'transformer.blocks.0.attn'. The rows of its qkv weight are all heads
    of q, then all heads of k, then all heads of v. Positions count from 0.
    """
    n_time = x.shape[0]
    positions = np.arange(n_time)
    q_all, k_all, v_all = np.split(linear(x, params, name + ".qkv"), 3, axis=-1)  # each [T, H*D]

    y = np.empty((n_time, n_head * n_head_dim))
    for h in range(n_head):
        columns = slice(h * n_head_dim, (h + 1) * n_head_dim)
        q = rope(q_all[:, columns], positions)
        k = rope(k_all[:, columns], positions)
        v = v_all[:, columns]
        for t in range(n_time):
            scores = k[: t + 1] @ q[t] / math.sqrt(n_head_dim)  # [t + 1]
            weights = np.exp(log_softmax(scores))
            y[t, columns] = weights @ v[: t + 1]
    return linear(y, params, name + ".proj")


def mlp(x: np.ndarray, params: Params, name: str) -> np.ndarray:
    """Apply the two linear layers net.0 and net.2 of the named module to x [T, C], with GELU between."""
    return linear(gelu(linear(x, params, name + ".net.0")), params, name + ".net.2")


def logits(params: Params, tokens: np.ndarray, n_head: int, n_head_dim: int, used_ids: int | None = None) -> np.ndarray:
    """Run the model on one sequence, tokens: int [T], at positions 0 to T - 1. Returns [T, V].

    used_ids: number of token ids in use, padding included. If given, the logits of id 0 and of ids from used_ids on
    are MASKED_LOGIT, so that their softmax is exactly 0. None: all logits as computed, as the original does.
    """

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return layer_norm(x, params[name + ".weight"], params[name + ".bias"])

    wte = params["transformer.wte.weight"]
    x = wte[np.asarray(tokens)]  # [T, C]
    n = 0
    while f"transformer.blocks.{n}.ln_1.weight" in params:
        block = f"transformer.blocks.{n}."
        x = x + attention(norm(x, block + "ln_1"), params, block + "attn", n_head, n_head_dim)
        x = x + mlp(norm(x, block + "ln_2"), params, block + "mlp")
        n += 1
    rows = norm(x, "transformer.ln_f") @ wte.T  # the head is the embedding table, without bias

    if used_ids is not None:
        rows[:, PADDING_ID] = MASKED_LOGIT
        rows[:, used_ids:] = MASKED_LOGIT
    return rows


# Loss and metrics


def log_softmax(row: np.ndarray) -> np.ndarray:
    """Return the log probabilities [V], in nats, of logits [V]."""
    shifted = row - row.max()
    return shifted - math.log(np.exp(shifted).sum())


def entropy_of(row: np.ndarray) -> float:
    """Return the entropy in nats of the distribution that logits [V] describe, taking 0 log 0 as 0."""
    log_p = log_softmax(row)
    p = np.exp(log_p)
    possible = p > 0
    return float(-np.sum(p[possible] * log_p[possible]))


def loss(logits: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
    """Sum the cross-entropy, in nats, of logits [T, V] against the targets [T] that are not padding.

    Row t of the logits predicts target t: the caller shifts them. Returns the sum and the number of counted targets.
    The mean over a batch is the sum of the sums over the sum of the counts, not a mean of means.
    """
    nats, count = 0.0, 0
    for row, target in zip(logits, targets, strict=True):
        if target != PADDING_ID:
            nats -= float(log_softmax(row)[target])
            count += 1
    return nats, count


def token_metrics(
    all_logits: np.ndarray, tokens: np.ndarray, vocab_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the metrics of each token, from the model's logits [T, V] of tokens [T].

    Returns surprisal [T] in nats, entropy [T] in nats and s2 [T], which is (surprisal - entropy) / log(vocab_size).
    Token t is predicted by row t - 1. All three are NaN for token 0, which is not predicted, and for padding. The
    first token after padding does have values: the model predicts it from the padding.
    """
    n_time = len(tokens)
    surprisal = np.full(n_time, np.nan)
    entropy = np.full(n_time, np.nan)
    for t in range(1, n_time):
        if tokens[t] != PADDING_ID:
            surprisal[t] = -log_softmax(all_logits[t - 1])[tokens[t]]
            entropy[t] = entropy_of(all_logits[t - 1])
    return surprisal, entropy, (surprisal - entropy) / math.log(vocab_size)


def generate_greedy(
    params: Params,
    prompt: np.ndarray,
    n_new: int,
    block_size: int,
    n_head: int,
    n_head_dim: int,
    used_ids: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Append n_new tokens to prompt [T] (at least one token), each the most likely one; ties go to the smallest id.

    For every new token the model runs on the last block_size tokens, at positions from 0. Beyond block_size this
    differs from a rolling cache, whose keys and values above the first layer still depend on tokens outside the
    context.

    Returns tokens [T + n_new], and for the new tokens only surprisal [n_new] and entropy [n_new], in nats, under the
    logits (masked by used_ids, see `logits`) that selected them.
    """
    tokens = [int(token) for token in prompt]
    surprisal = np.empty(n_new)
    entropy = np.empty(n_new)
    for i in range(n_new):
        window = np.array(tokens[-block_size:])
        row = logits(params, window, n_head, n_head_dim, used_ids)[-1]
        token = int(np.argmax(row))
        surprisal[i] = -log_softmax(row)[token]
        entropy[i] = entropy_of(row)
        tokens.append(token)
    return np.array(tokens), surprisal, entropy


# Optimizer and schedule


def adamw_init(params: Params) -> dict:
    """Return the state before the first step: 'step' 0, and moments 'm' and 'v' of zeros shaped as params."""
    return {
        "step": 0,
        "m": {name: np.zeros_like(p) for name, p in params.items()},
        "v": {name: np.zeros_like(p) for name, p in params.items()},
    }


def adamw_update(
    params: Params,
    grads: Params,
    state: dict,
    lr: float,
    betas: tuple[float, float],
    eps: float = 1e-8,
    *,
    weight_decay: float,
) -> tuple[Params, dict]:
    """Make one AdamW update. Returns new params and state; the arguments are not changed.

    Matrices (rank 2 and more, the embedding table too) shrink by lr * weight_decay of their value before the update;
    biases and LayerNorm scales do not. eps is added to the root of the bias-corrected second moment.
    """
    beta1, beta2 = betas
    step = state["step"] + 1
    new_params, m, v = {}, {}, {}
    for name, p in params.items():
        g = grads[name]
        m[name] = beta1 * state["m"][name] + (1.0 - beta1) * g
        v[name] = beta2 * state["v"][name] + (1.0 - beta2) * g**2
        m_hat = m[name] / (1.0 - beta1**step)
        v_hat = v[name] / (1.0 - beta2**step)
        decay = weight_decay if p.ndim >= 2 else 0.0
        new_params[name] = p - lr * decay * p - lr * m_hat / (np.sqrt(v_hat) + eps)
    return new_params, {"step": step, "m": m, "v": v}


def adamw_steps(
    params: Params,
    grads_fn: Callable[[Params, int], Params],
    lrs: list[float],
    betas: tuple[float, float],
    eps: float = 1e-8,
    *,
    weight_decay: float,
) -> Params:
    """Make one AdamW update for each learning rate in lrs, from a new state, with gradients grads_fn(params, step).

    step counts from 0. Returns the final params.
    """
    state = adamw_init(params)
    for step, lr in enumerate(lrs):
        params, state = adamw_update(params, grads_fn(params, step), state, lr, betas, eps, weight_decay=weight_decay)
    return params


def warmup_cosine(step: int, peak: float, warmup_steps: int, total_steps: int, min_lr_factor: float) -> float:
    """Return the learning rate of a step, for a run of steps 0 to total_steps - 1.

    It rises linearly from min_lr_factor * peak at step 0 to peak at step warmup_steps. Then it falls as half a cosine
    to exactly min_lr_factor * peak at the last step, total_steps - 1, and stays there. Without warm-up, step 0 uses
    peak. The peak must come before the last step.
    """
    last_step = total_steps - 1
    if not 0 <= warmup_steps < last_step:
        raise ValueError(f"warmup_steps is {warmup_steps}; it must be from 0 to total_steps - 2 = {total_steps - 2}")
    if step < warmup_steps:
        height = step / warmup_steps
    else:
        progress = min(step, last_step) - warmup_steps
        height = 0.5 * (1.0 + math.cos(math.pi * progress / (last_step - warmup_steps)))
    return (1.0 - height) * min_lr_factor * peak + height * peak  # exact at height 0 and at height 1


# Learning-rate range test


def schedule(lr_range: LrRange, n: int) -> np.ndarray:
    """Return n learning rates [n] from one end of lr_range to the other, inclusive, evenly spaced in log space."""
    log_start, log_end = np.log(lr_range)
    return np.exp(np.linspace(log_start, log_end, n))


def keep_improving(lrs: list[float], losses: list[float]) -> tuple[list[float], list[float]]:
    """Return the points whose loss is below every earlier loss, in order; NaN and infinity are never below."""
    improving_lrs, improving_losses = [], []
    best = math.inf
    for lr, value in zip(lrs, losses, strict=True):
        if value < best:
            best = value
            improving_lrs.append(float(lr))
            improving_losses.append(float(value))
    return improving_lrs, improving_losses


def steepest(lrs: list[float], losses: list[float]) -> float:
    """Return the learning rate of the steepest descent: a weighted mean, in log space, of the midpoints.

    The weight of a midpoint is how much more the loss falls between its neighbours than at the smallest fall. If all
    falls are equal (always for two points), the result is the geometric mean of the ends. A slope is per point, not
    per unit of log rate: omitted points between two neighbours do not change it.
    """
    log_lrs = np.log(lrs)
    slopes = np.diff(losses)
    weights = np.maximum(0.0, slopes.max() - slopes)
    if weights.sum() == 0:
        return float(np.exp((log_lrs[0] + log_lrs[-1]) / 2))
    midpoints = (log_lrs[:-1] + log_lrs[1:]) / 2
    return float(np.exp(np.sum(weights * midpoints) / np.sum(weights)))


def lowest(lrs: list[float], losses: list[float]) -> float:
    """Return the learning rate at the lowest loss; the first of several."""
    return float(lrs[int(np.argmin(losses))])


def propose(method: str, steepest: float, lowest: float) -> LrRange:
    """Return the range that method ('steepest', 'lowest' or 'balanced') makes of the two learning rates.

    'balanced' is (steepest, lowest), even if steepest is larger.
    """
    if method == "steepest":
        return steepest, steepest
    if method == "lowest":
        return lowest, lowest
    if method == "balanced":
        return steepest, lowest
    raise ValueError(f"method is {method!r}; use 'steepest', 'lowest' or 'balanced'")


def zoom_range(proposed: LrRange, current: LrRange, zoom_factor: float) -> LrRange:
    """Move each end of the current range towards that of the proposed one, in log space.

    zoom_factor: the fraction of the distance that remains; 1 stays at current, 0 goes to proposed.
    """
    ends = []
    for old, new in zip(current, proposed, strict=True):
        ends.append(math.exp(math.log(old) + (1.0 - zoom_factor) * (math.log(new) - math.log(old))))
    return ends[0], ends[1]


def range_test(
    loss_of: Callable[[int, int, float], float],
    *,
    start_lr: float = 1e-10,
    end_lr: float = 10.0,
    num_zooms: int = 5,
    steps_per_zoom: int = 10,
    zoom_factor: float = 0.5,
    method: str = "steepest",
) -> tuple[float, list[dict]]:
    """Find a learning rate by several range tests, each in a narrower range.

    loss_of(zoom, step, lr): the loss before the step that uses lr, in a run that starts again at step 0 of each
    zoom. It is called for every step, in order, even if the loss does not improve. zoom and step count from 0.

    A zoom with fewer than two improving points is skipped and does not change the range. The lowest rate is the
    smallest over all zooms so far (the rate, not its loss); the steepest is that of the zoom.

    Returns the best rate, which is the arithmetic mean of the last proposed range, and one dict for each zoom not
    skipped: 'zoom', 'range' (as tested), 'lrs' and 'losses' (improving points), 'steepest', 'lowest', 'proposed',
    'best'.
    """
    best_lr = math.nan
    lowest_lr = math.inf
    current = (start_lr, end_lr)
    zooms = []
    for zoom in range(num_zooms):
        all_lrs = [float(lr) for lr in schedule(current, steps_per_zoom)]
        all_losses = [loss_of(zoom, step, lr) for step, lr in enumerate(all_lrs)]
        lrs, losses = keep_improving(all_lrs, all_losses)
        if len(lrs) < 2:
            continue
        steepest_lr = steepest(lrs, losses)
        lowest_lr = min(lowest_lr, lowest(lrs, losses))
        proposed = propose(method, steepest_lr, lowest_lr)
        best_lr = (proposed[0] + proposed[1]) / 2
        zooms.append(
            {
                "zoom": zoom,
                "range": current,
                "lrs": lrs,
                "losses": losses,
                "steepest": steepest_lr,
                "lowest": lowest_lr,
                "proposed": proposed,
                "best": best_lr,
            }
        )
        current = zoom_range(proposed, current, zoom_factor)
    if not zooms:
        raise ValueError(f"no zoom between rates {start_lr} and {end_lr} had two improving losses; widen the range")
    return best_lr, zooms
