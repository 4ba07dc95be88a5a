"""Writing on: prefill, then a compiled loop with a cache and, past the window, one without; and scoring a given text.

Rows of a batch may have prompts of different lengths: each row sits at the left of its buffer and keeps its own
position, so no row sees padding and a row's text does not depend on its neighbours. They are written by a character in
turn, or one after the other where that is quicker.

Inside the first `block_size` characters each new one costs one pass of one token against the cache. Past them no
cache is exact: a window's deeper keys were computed with context that has left it. There the last `block_size`
characters are read anew for every character, with positions from the window's start: the ancestor's values exactly.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from chargpt_jax.devices.platform import writing_options
from chargpt_jax.errors import UserError
from chargpt_jax.generation.metrics import surprisal_and_entropy, token_metrics
from chargpt_jax.generation.sampler import Drawing
from chargpt_jax.model.gpt import Cache, count_parameters
from chargpt_jax.ops.cpu_kernel import WithKernels, in_one_kernel, kernels_allowed, writes_alone
from chargpt_jax.ops.cpu_kv_cache import Blocks
from chargpt_jax.ops.kv_cache import Rows

MOST_PLACES, MOST_DRAWN = 16, 2**20
"""For so many places at most, of so many numbers in all, the noise of drawing is made at once.

Made place by place it took an eighth of a small model's time on a CPU.
"""

MOST_IN_KERNEL = 1024
"""Characters of a vocabulary up to which drawing is part of a kernel; of more XLA leaves some work to a library."""


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
    """Keys and values; of use while every length is below block_size. None: no more is to be written with them."""
    surprisal: jax.Array
    """float32 [B, N], nats; NaN where undefined."""
    entropy: jax.Array
    """float32 [B, N], nats; NaN where undefined."""


Carry = tuple[jax.Array, Progress]
"""How many characters each text lacks, int32 [B], and the texts so far."""


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
    count: int,
    drawing: Drawing,
    *,
    graphdef: nnx.GraphDef,
    mesh: Mesh | None = None,
    once: bool = False,
) -> Progress:
    """Write `count` more tokens on every row; any count shares a compilation.

    Advancing in one go or in pieces, cached or not, on one device or many, gives the same text. `progress` is donated.
    `once` as for `begin`; nothing can be written after that.

    What lies past the window is another program's, compiled when it is first needed: most texts end inside.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    how = {"graphdef": graphdef, "mesh": mesh}
    alone, lacking = isinstance(progress.cache, Blocks), np.full(len(progress.length), count, np.int32)
    left, progress = inside(platform, alone and once)(params, (lacking, progress), drawing, **how)
    if np.asarray(left).any():
        without = left, replace(progress, cache=None)
        progress = replace(past(platform, alone)(params, without, drawing, **how)[1], cache=progress.cache)
    return progress


@cache
def inside(platform: str, last: bool) -> WithKernels:
    """Return the program that writes until texts end, or the window does.

    Args:
        platform: 'cpu' or another.
        last: the keys and values, Blocks, are not given back.
    """

    def write_inside(*args: Any, kernels: bool, **how: Any) -> Carry:
        with kernels_allowed(kernels):
            return _on_each_device(partial(_inside, last=last), *args, **how)

    return WithKernels(_compiled(write_inside, platform, () if last else 1, "kernels"))


@cache
def past(platform: str, alone: bool) -> Callable[..., Carry]:
    """Return the program that writes on without a cache: each text by itself where so told, else all in turn."""

    def write_past(*args: Any, **how: Any) -> Carry:
        return _on_each_device(partial(_past, alone=alone), *args, **how)

    return _compiled(write_past, platform, 1)


def _compiled(write: Callable[..., Carry], platform: str, donated: Any, *static: str) -> Callable[..., Carry]:
    options, static = writing_options(platform), ("graphdef", "mesh", *static)
    return jax.jit(write, static_argnames=static, donate_argnums=donated, compiler_options=options)


def _on_each_device(
    write: Callable[..., Carry],
    params: Any,
    carry: Carry,
    drawing: Drawing,
    *,
    graphdef: nnx.GraphDef,
    mesh: Mesh | None = None,
) -> Carry:
    """Let the devices of a mesh write on some rows each, by write(model, carry, the rows' numbers, drawing)."""

    def write_on(params: Any, carry: Carry, numbers: jax.Array, drawing: Drawing) -> Carry:
        return write(nnx.merge(graphdef, params), carry, numbers, drawing)

    if mesh is not None:
        shared = (ROWS, SHARED)
        specs = (PartitionSpec(), shared, ROWS, PartitionSpec())
        write_on = jax.shard_map(write_on, mesh=mesh, in_specs=specs, out_specs=shared, check_vma=False)
    return write_on(params, carry, jnp.arange(len(carry[0])), drawing)


def _inside(model: Any, carry: Carry, numbers: jax.Array, drawing: Drawing, *, last: bool) -> Carry:
    """Write with a cache, in turn until one text fills its window, or one text after the other until each does."""

    def write(decode: Callable[..., tuple[jax.Array, Cache]], carry: Carry, numbers: jax.Array) -> Carry:
        def predicted(p: Progress) -> Progress:
            logits, cache = decode(p.tokens[jnp.arange(len(numbers)), p.length - 1], p.length - 1, p.cache)
            return replace(p, logits=logits, cache=cache)

        def unfinished(carry: Carry) -> jax.Array:
            return jnp.any(carry[0] > 0) & (jnp.max(carry[1].length) < model.config.block_size)

        go_on = partial(_write_on, predicted, unfinished, drawing, numbers)
        alone, few = isinstance(carry[1].cache, Blocks), carry[1].logits.size <= MOST_IN_KERNEL
        return (in_one_kernel(go_on) if alone and few and not drawing.sorts else go_on)(carry)

    (left, progress), b = carry, len(numbers)
    kept = progress.cache
    if not isinstance(kept, Blocks):
        return write(model.decode, carry, numbers)

    def one(row: jax.Array, carry: Carry, number: jax.Array, room: Blocks) -> tuple[Carry, Blocks]:
        place = None if last or b == 1 else lambda layer: layer * b + row
        mine = room.begun_with(kept.only(row)) if last else room
        left, done = write(partial(model.decode, place=place), (carry[0], replace(carry[1], cache=mine)), number)
        return (left, replace(done, cache=None)), cast(Blocks, done.cache)

    if last:  # room for the keys and values of one, which are let go
        room = kept.only(jnp.zeros((), int)).enlarged(_capacity(model, progress.tokens))
    else:  # all layers of all rows on one axis, so that a row's are updated where they are
        room = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), kept)
    (left, progress), room = _row_after_row(one, (left, replace(progress, cache=None)), numbers, room)
    return left, replace(progress, cache=None if last else jax.tree.map(lambda x, to: x.reshape(to.shape), room, kept))


def _past(model: Any, carry: Carry, numbers: jax.Array, drawing: Drawing, *, alone: bool) -> Carry:
    """Read the last window anew for every character."""
    width = _capacity(model, carry[1].tokens)

    def predicted(p: Progress) -> Progress:
        return replace(p, logits=model.predict(*_window(p.tokens, p.length, width)))

    def write(carry: Carry, numbers: jax.Array) -> Carry:
        return _write_on(predicted, lambda carry: jnp.any(carry[0] > 0), drawing, numbers, carry)

    if not alone:
        return write(carry, numbers)
    return _row_after_row(lambda _, own, number, kept: (write(own, number), kept), carry, numbers, None)[0]


def _row_after_row(
    write: Callable[..., tuple[Carry, Any]], carry: Carry, numbers: jax.Array, kept: Any
) -> tuple[Carry, Any]:
    """Call write(row, its carry, its number in the whole batch, kept) -> (carry, kept) for one row after the other."""

    def one(row: jax.Array, whole: tuple[Carry, Any]) -> tuple[Carry, Any]:
        carry, kept = whole
        own = lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1)  # noqa: E731
        back = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, row, 0)  # noqa: E731
        done, kept = write(row, jax.tree.map(own, carry), own(numbers), kept)
        return jax.tree.map(back, carry, done), kept

    return jax.lax.fori_loop(0, len(numbers), one, (carry, kept))


def _write_on(
    predicted: Callable[[Progress], Progress],
    unfinished: Callable[[Carry], jax.Array],
    drawing: Drawing,
    numbers: jax.Array,
    carry: Carry,
) -> Carry:
    """Write a character of each text and predict the next, in turn; noise is drawn for some places ahead."""
    logits, rows = carry[1].logits, jnp.arange(len(numbers))
    places_at_once = max(1, min(MOST_PLACES, MOST_DRAWN // logits.size))

    def written(p: Progress, noise: jax.Array) -> Progress:
        token = drawing.tokens(p.logits, noise)
        surprisal, entropy = surprisal_and_entropy(p.logits, token)
        return replace(
            p,
            tokens=p.tokens.at[rows, p.length].set(token),
            surprisal=p.surprisal.at[rows, p.length].set(surprisal),
            entropy=p.entropy.at[rows, p.length].set(entropy),
            length=p.length + 1,
        )

    def some(carry: Carry) -> Carry:
        noise = drawing.noise(numbers, carry[1].length + jnp.arange(places_at_once)[:, None], logits)

        def one(number_and_carry: tuple[jax.Array, Carry]) -> tuple[jax.Array, Carry]:
            number, (left, p) = number_and_carry
            return number + 1, (left - 1, predicted(written(p, noise[number])))

        some_left = lambda c: (c[0] < places_at_once) & unfinished(c[1])  # noqa: E731
        return jax.lax.while_loop(some_left, one, (jnp.int32(0), carry))[1]

    return jax.lax.while_loop(unfinished, some, carry)


def _capacity(model: Any, tokens: jax.Array) -> int:
    """Return for how many places of each row, int32 [B, N] in all, keys and values are ever kept."""
    return min(model.config.block_size, tokens.shape[1])


def _window(tokens: jax.Array, length: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """Cut the last `width` tokens before each row's length; return them and where in them the last one stands."""
    start = jnp.maximum(0, length - width)
    window = jax.vmap(lambda row, s: jax.lax.dynamic_slice(row, (s,), (width,)))(tokens, start)
    return window, length - start - 1


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
