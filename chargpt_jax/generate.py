"""Writing on: prefill, cached decoding, sampling, all in one compiled loop; and scoring a given text.

Rows of a batch may have prompts of different lengths: each row sits at the left of its buffer and keeps its own
position, so no row sees padding and a row's text does not depend on its neighbours. They are written by a character in
turn, or one after the other where that is quicker.

Inside the first `block_size` characters each new one costs one pass of one token against the cache. Past them no
cache is exact: a window's deeper keys were computed with context that has left it. There the last `block_size`
characters are read anew for every character, with positions from the window's start: the ancestor's values exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from chargpt_jax import devices
from chargpt_jax.config import MOST_TEMPERATURE, UserError
from chargpt_jax.kv_blocks import Blocks
from chargpt_jax.kv_cache import Rows
from chargpt_jax.metrics import surprisal_and_entropy, token_metrics
from chargpt_jax.model import Cache, count_parameters
from chargpt_jax.one_kernel import WithKernels, in_one_kernel, kernels_allowed, writes_alone

MOST_PLACES, MOST_DRAWN = 16, 2**20
"""For so many places at most, of so many numbers in all, the noise of drawing is made at once.

Made place by place it took an eighth of a small model's time on a CPU.
"""

MOST_IN_KERNEL = 1024
"""Characters of a vocabulary up to which drawing is part of a kernel; of more XLA leaves some work to a library."""


@dataclass(frozen=True)
class Sampler:
    """How the next character is drawn from the model's distribution: temperature, then top_k, then top_p."""

    temperature: float = 1.0
    """0 takes the likeliest character."""
    top_k: int | None = None
    """Draw among the k likeliest; None: among all."""
    top_p: float | None = None
    """Draw among the fewest of the likeliest whose mass is at least p; None: among all."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning, in one sentence each."""
        if not 0 <= self.temperature <= MOST_TEMPERATURE:
            raise UserError(
                f"temperature is {self.temperature}, but it must be between 0 (greedy) and {MOST_TEMPERATURE:g}: "
                "try 0.8."
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}, but it must be at least 1: leave it out to draw among all.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(
                f"top_p is {self.top_p}, but it must be above 0 and at most 1: leave it out to draw among all."
            )


@flax.struct.dataclass
class Progress:
    """A batch of texts under way; N is the buffer's length."""

    tokens: jax.Array
    """int32 [B, N]; 0 from `length` on."""
    length: jax.Array
    """int32 [B]."""
    logits: jax.Array
    """float32 [B, V], for the next token."""
    cache: Cache | None
    """Keys and values; of use while every length is below block_size. None: no more is to be written."""
    surprisal: jax.Array
    """float32 [B, N], nats; NaN where undefined."""
    entropy: jax.Array
    """float32 [B, N], nats; NaN where undefined."""


Carry = tuple[jax.Array, Progress]
"""How many characters are left to write, an int32 scalar, and the texts so far."""


def bucket(length: int) -> int:
    """Round a length up to a power of two, at least 64, so that few lengths need a compilation of their own."""
    return max(64, 1 << (length - 1).bit_length())


ROWS: Any = PartitionSpec("data")
ROWS_OF_LAYERS: Any = PartitionSpec(None, "data")
SHARED = Progress(tokens=ROWS, length=ROWS, logits=ROWS, cache=ROWS_OF_LAYERS, surprisal=ROWS, entropy=ROWS)
"""How the devices of a mesh share a batch: each takes some rows, and none waits for another."""


@partial(jax.jit, static_argnames=("graphdef", "width", "mesh", "once"))
def begin(
    params: Any,
    tokens: jax.Array,
    length: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    width: int,
    mesh: Mesh | None = None,
    once: bool = False,
) -> Progress:
    """Read the prompts.

    Args:
        params: of the model.
        tokens: int32 [B, N], prompts at the left, room for the answers at the right.
        length: int32 [B], the prompts' lengths.
        graphdef: the model's static half.
        width: how much of the buffer holds every prompt, or block_size where that is less.
        mesh: the devices that share the rows; None: one does it all.
        once: all the rest is written by one call of `advance`, which is told so too. Where texts are written alone
            room is then made for the keys and values of one, not of all.
    """
    read = partial(_begin, graphdef=graphdef, width=width, once=once)
    if mesh is not None:
        specs = (PartitionSpec(), ROWS, ROWS)
        read = jax.shard_map(read, mesh=mesh, in_specs=specs, out_specs=SHARED, check_vma=False)
    return read(params, tokens, length)


def _begin(
    params: Any, tokens: jax.Array, length: jax.Array, *, graphdef: nnx.GraphDef, width: int, once: bool
) -> Progress:
    model = nnx.merge(graphdef, params)
    N = tokens.shape[1]
    capacity = _capacity(model, tokens)
    window, last = _window(tokens, length, width)
    x, (keys, values) = model.prefill(window)
    logits = model.logits(x)
    surprisal, entropy = token_metrics(logits, window)
    wide = lambda a: jnp.pad(a, ((0, 0), (0, N - width)), constant_values=jnp.nan)  # noqa: E731
    texts, kept = len(length), 2 * keys[:, 0, :, :, 0].size * capacity
    alone = writes_alone(texts, kept, count_parameters(params), jnp.finfo(model.dtype).bits, model.platform)
    cache: Cache = (Blocks if alone else Rows).of(keys, values)
    return Progress(
        tokens=tokens,
        length=length,
        logits=logits[jnp.arange(len(length)), last],
        cache=cache if once and alone else cache.enlarged(capacity),
        surprisal=wide(surprisal),
        entropy=wide(entropy),
    )


def advance(
    params: Any,
    progress: Progress,
    key: jax.Array,
    count: ArrayLike,
    temperature: ArrayLike,
    top_k: ArrayLike,
    top_p: ArrayLike,
    *,
    graphdef: nnx.GraphDef,
    use_top_k: bool,
    use_top_p: bool,
    mesh: Mesh | None = None,
    once: bool = False,
) -> Progress:
    """Write `count` more tokens (an int32 scalar, so that any count shares a compilation) on every row.

    The token at place t of row b is drawn with fold_in(fold_in(key, b), t): advancing in one go or in pieces, cached
    or not, on one device or many, gives the same text. `progress` is donated. `once` as for `begin`; nothing can be
    written after that.
    """
    how = {"graphdef": graphdef, "use_top_k": use_top_k, "use_top_p": use_top_p, "mesh": mesh}
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    go_on = advancing(platform, once and isinstance(progress.cache, Blocks))
    return go_on(params, progress, key, count, temperature, top_k, top_p, **how)


@cache
def advancing(platform: str, last: bool) -> WithKernels:
    """Return what `advance` compiles and calls.

    Args:
        platform: 'cpu' or another.
        last: the keys and values, Blocks, are not given back.
    """

    def go_on(
        params: Any, progress: Progress, *how: jax.Array, kernels: bool, mesh: Mesh | None = None, **static: Any
    ) -> Progress:
        write_on: Callable[..., Progress] = partial(_advance, **static, last=last)
        if mesh is not None:
            specs = (PartitionSpec(), SHARED, ROWS, *(PartitionSpec(),) * len(how))
            write_on = jax.shard_map(write_on, mesh=mesh, in_specs=specs, out_specs=SHARED, check_vma=False)
        with kernels_allowed(kernels):
            return write_on(params, progress, jnp.arange(progress.tokens.shape[0]), *how)

    static = ("graphdef", "use_top_k", "use_top_p", "mesh", "kernels")
    options, donated = devices.writing_options(platform), () if last else 1
    return WithKernels(jax.jit(go_on, static_argnames=static, donate_argnums=donated, compiler_options=options))


def _advance(
    params: Any,
    progress: Progress,
    numbers: jax.Array,
    key: jax.Array,
    count: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    use_top_k: bool,
    use_top_p: bool,
    last: bool,
) -> Progress:
    """Write on rows that have these numbers, int32 [b], in the whole batch."""
    model = nnx.merge(graphdef, params)
    sort = partial(_filter, top_k=top_k, top_p=top_p, use_top_k=use_top_k, use_top_p=use_top_p)
    filtered = sort if use_top_k or use_top_p else None
    write_on: Callable[..., Progress] = partial(
        _write_on, model, key=key, count=count, temperature=temperature, filtered=filtered
    )
    if isinstance(progress.cache, Blocks):
        capacity = _capacity(model, progress.tokens)
        return _one_after_the_other(write_on, progress, progress.cache, numbers, capacity, last)
    return write_on(progress, numbers, place=lambda layer: layer)


def _one_after_the_other(
    write_on: Callable[..., Progress], progress: Progress, cache: Blocks, numbers: jax.Array, capacity: int, last: bool
) -> Progress:
    """Write each row to its end before the next; `last`: with room for the keys and values of one, which are let go."""
    b = len(numbers)

    def one(row: jax.Array, carry: tuple[Progress, Blocks]) -> tuple[Progress, Blocks]:
        rows, kept = carry
        own = lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1)  # noqa: E731
        back = lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new, row, 0)  # noqa: E731
        place = lambda layer: layer if last or b == 1 else layer * b + row  # noqa: E731
        mine = kept.begun_with(cache.only(row)) if last else kept
        done = write_on(replace(jax.tree.map(own, rows), cache=mine), own(numbers), place=place)
        return jax.tree.map(back, rows, replace(done, cache=None)), cast(Blocks, done.cache)

    if last:
        room = cache.only(jnp.zeros((), int)).enlarged(capacity)
    else:  # all layers of all rows on one axis, so that a row's are updated where they are
        room = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), cache)
    done, kept = jax.lax.fori_loop(0, b, one, (replace(progress, cache=None), room))
    return replace(done, cache=None if last else jax.tree.map(lambda x, old: x.reshape(old.shape), kept, cache))


def _write_on(
    model: Any,
    progress: Progress,
    numbers: jax.Array,
    *,
    place: Callable[[jax.Array], jax.Array],
    key: jax.Array,
    count: jax.Array,
    temperature: jax.Array,
    filtered: Callable[[jax.Array], jax.Array] | None,
) -> Progress:
    """Write on all rows by a character in turn.

    Args:
        place: as for the model's decode.
        filtered: puts at -inf what may not be drawn, of logits [B, V], by sorting them; None: draw among all.
    """
    rows = jnp.arange(progress.tokens.shape[0])
    width = _capacity(model, progress.tokens)
    in_kernel = isinstance(progress.cache, Blocks) and filtered is None and progress.logits.size <= MOST_IN_KERNEL
    places_at_once = max(1, min(MOST_PLACES, MOST_DRAWN // progress.logits.size))

    def draw(row: jax.Array, place: jax.Array) -> jax.Array:
        at = jax.random.fold_in(jax.random.fold_in(key, row), place)
        return jax.random.gumbel(at, progress.logits.shape[1:], progress.logits.dtype)

    def write(p: Progress, noise: jax.Array) -> Progress:
        # The largest of logits with Gumbel's noise is a draw from their softmax, the one of jax.random.categorical.
        scaled = p.logits / jnp.where(temperature > 0, temperature, 1)
        noisy = noise + (scaled if filtered is None else filtered(scaled))
        token = jnp.argmax(jnp.where(temperature > 0, noisy, p.logits), axis=-1).astype(jnp.int32)
        surprisal, entropy = surprisal_and_entropy(p.logits, token)
        return replace(
            p,
            tokens=p.tokens.at[rows, p.length].set(token),
            surprisal=p.surprisal.at[rows, p.length].set(surprisal),
            entropy=p.entropy.at[rows, p.length].set(entropy),
            length=p.length + 1,
        )

    def cached(p: Progress) -> Progress:
        logits, cache = model.decode(p.tokens[rows, p.length - 1], p.length - 1, p.cache, place)
        return replace(p, logits=logits, cache=cache)

    def recomputed(p: Progress) -> Progress:
        window, last = _window(p.tokens, p.length, width)
        return replace(p, logits=model.predict(window, last))

    def go_on(predict: Callable[[Progress], Progress], unfinished: Callable[[Carry], jax.Array], carry: Carry) -> Carry:
        """Write and predict in turn; noise is drawn for some places ahead."""

        def some(carry: Carry) -> Carry:
            places = carry[1].length + jnp.arange(places_at_once)[:, None]
            noise = jax.vmap(jax.vmap(draw), (None, 0))(numbers, places)

            def one(number_and_carry: tuple[jax.Array, Carry]) -> tuple[jax.Array, Carry]:
                number, (left, p) = number_and_carry
                return number + 1, (left - 1, predict(write(p, noise[number])))

            some_left = lambda c: (c[0] < places_at_once) & unfinished(c[1])  # noqa: E731
            return jax.lax.while_loop(some_left, one, (jnp.int32(0), carry))[1]

        return jax.lax.while_loop(unfinished, some, carry)

    fits = lambda c: (c[0] > 0) & (jnp.max(c[1].length) < model.config.block_size)  # noqa: E731
    inside = partial(go_on, cached, fits)
    carry = (in_one_kernel(inside) if in_kernel else inside)((count, progress))
    return go_on(recomputed, lambda c: c[0] > 0, carry)[1]


def _capacity(model: Any, tokens: jax.Array) -> int:
    """Return for how many places of each row, int32 [B, N] in all, keys and values are ever kept."""
    return min(model.config.block_size, tokens.shape[1])


def _window(tokens: jax.Array, length: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """Cut the last `width` tokens before each row's length; return them and where in them the last one stands."""
    start = jnp.maximum(0, length - width)
    window = jax.vmap(lambda row, s: jax.lax.dynamic_slice(row, (s,), (width,)))(tokens, start)
    return window, length - start - 1


def _filter(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, use_top_k: bool, use_top_p: bool) -> jax.Array:
    """Put all but the allowed tokens of logits [B, V] at -inf."""
    if use_top_k:
        ranked = jnp.sort(logits, axis=-1)
        least = ranked[:, jnp.maximum(logits.shape[-1] - top_k, 0)]
        logits = jnp.where(logits < least[:, None], -jnp.inf, logits)
    if use_top_p:
        ranked = -jnp.sort(-logits, axis=-1)
        p = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(p, axis=-1) - p  # the likeliest always stays: nothing comes before it
        least = jnp.min(jnp.where(before < top_p, ranked, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


@partial(jax.jit, static_argnames=("graphdef",))
def _window_metrics(params: Any, windows: jax.Array, *, graphdef: nnx.GraphDef) -> tuple[jax.Array, jax.Array]:
    return token_metrics(nnx.merge(graphdef, params)(windows), windows)


def score_tokens(
    params: Any,
    tokens: np.ndarray,
    *,
    graphdef: nnx.GraphDef,
    block_size: int,
    stride: int | None = None,
    rows: int = 8,
) -> tuple[np.ndarray, np.ndarray]:
    """Measure a given text of any length.

    Args:
        params: of the model.
        tokens: int32 [N], without padding.
        graphdef: the model's static half.
        block_size: of the model.
        stride: how far windows past the first are apart: each of their characters has block_size - stride to
            block_size characters of context (1: the context that generation has). None: half of block_size.
        rows: windows a call.

    Returns:
        Surprisal and entropy, float32 [N] each, nats; NaN for the first character.
    """
    stride = max(1, block_size // 2) if stride is None else stride
    if not 1 <= stride <= block_size:
        raise UserError(f"stride is {stride}, but it must be between 1 and the block size {block_size}.")
    # A window holds a token more than a context, for its last prediction's sake: token T is predicted from 0 to T - 1.
    width = min(block_size + 1, bucket(len(tokens)))
    starts = [0, *range(stride, len(tokens) - width + stride, stride)] if len(tokens) > width else [0]
    padded = np.zeros(starts[-1] + width, np.int32)
    padded[: len(tokens)] = tokens
    results = np.full((2, len(padded)), np.nan, np.float32)
    rows = min(rows, 1 << (len(starts) - 1).bit_length())
    for at in range(0, len(starts), rows):
        group = starts[at : at + rows]
        windows = np.stack([padded[s : s + width] for s in group] + [padded[:width]] * (rows - len(group)))
        pair = [np.asarray(a) for a in _window_metrics(params, windows, graphdef=graphdef)]
        for row, start in enumerate(group):
            first = 0 if start == 0 else width - stride
            results[:, start + first : start + width] = [a[row, first:] for a in pair]
    return results[0, : len(tokens)], results[1, : len(tokens)]
