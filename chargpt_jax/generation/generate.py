"""Text generation: prefill, decoding with a KV cache inside the context, and recomputation beyond it.

The sequences of a batch may have prompts of different lengths. Each is left-aligned in its buffer and has its own
length, so no sequence sees padding, and its text does not depend on its neighbours.

Inside the first `block_size` characters each new one costs one pass of one token against the cache. Beyond them no
cache is exact: the deeper keys of a window were computed with context that has left it. There the last `block_size`
characters are read again for every character, with positions from the window's start, which gives the original's
values up to rounding.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from chargpt_jax.generation.metrics import (
    Predictions,
    predictions,
    surprisal_and_entropy,
    token_metrics,
    token_predictions,
)
from chargpt_jax.generation.sampler import SamplerState
from chargpt_jax.generation.samplers.contract import State
from chargpt_jax.model.gpt import GPT, Block
from chargpt_jax.model.init import Params, count_parameters
from chargpt_jax.ops.choose import jit_for_generation
from chargpt_jax.ops.kv_cache import Generation, KVCache, Loop
from chargpt_jax.ops.plain import rotary

MAX_POSITIONS, MAX_GUMBEL = 16, 2**20
"""Gumbel noise is computed for up to so many positions at once, and up to so many elements.

Position by position it would take 12.5 % of a small model's time on a CPU.
"""


@flax.struct.dataclass
class DecodeState:
    """A batch of sequences that are being generated; N is the buffer's length."""

    tokens: jax.Array
    """int32 [B, N]; 0 from `length` on."""
    length: jax.Array
    """int32 [B]."""
    logits: jax.Array
    """float32 [B, V], for the next token."""
    cache: KVCache | None
    """Keys and values, used while every length is below block_size; None: not needed."""
    surprisal: jax.Array
    """float32 [B, N], nats; NaN if undefined."""
    entropy: jax.Array
    """float32 [B, N], nats; NaN if undefined."""
    predictions: Predictions | None = None
    """[B, N]; None: not asked for."""
    memory: Any = ()
    """Of the chain of samplers, a tree of arrays [B, ...]."""
    series: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    """What the samplers show, by name: float32 [B, N]; NaN for the prompt."""


Carry = tuple[jax.Array, DecodeState]
"""How many tokens each sequence still lacks, int32 [B], and the sequences, without their cache."""

BATCH: Any = PartitionSpec("data")
CACHE: Any = PartitionSpec(None, "data")
SHARDED = DecodeState(tokens=BATCH, length=BATCH, logits=BATCH, cache=CACHE, surprisal=BATCH, entropy=BATCH)
"""The devices of a mesh split a batch; none waits for another. The predictions, if there are any, are split as well."""


def bucket(length: int, least: int = 64) -> int:
    """Round a length up to a power of two, so that few lengths need their own compilation."""
    return max(least, 1 << (length - 1).bit_length())


@partial(jax.jit, static_argnames=("graphdef", "width", "mesh", "final", "alternatives"))
def prefill(
    params: Params,
    tokens: jax.Array,
    length: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    width: int,
    mesh: Mesh | None = None,
    final: bool = False,
    alternatives: int = 0,
) -> DecodeState:
    """Read the prompts.

    Args:
        params: of the model.
        tokens: int32 [B, N], left-aligned prompts and space for the continuations.
        length: int32 [B], the prompts' lengths.
        graphdef: the model's static description.
        width: positions to read: at least the longest prompt's, at most block_size. The metrics of a longer prompt's
            last window are at the start of its row.
        mesh: the devices that split the batch; None: one device.
        final: exactly one call of `decode` follows, with `final` as well. Sequences that are generated one by one then
            share the memory of one cache.
        alternatives: number of the likeliest tokens to keep for every token; 0: no predictions are kept.
    """
    read = partial(_prefill, graphdef=graphdef, width=width, final=final, alternatives=alternatives)
    if mesh is not None:
        specs = (PartitionSpec(), BATCH, BATCH)
        split = replace(SHARDED, predictions=BATCH if alternatives else None)
        read = jax.shard_map(read, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
    return read(params, tokens, length)


def _prefill(
    params: Params,
    tokens: jax.Array,
    length: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    width: int,
    final: bool,
    alternatives: int,
) -> DecodeState:
    model: GPT = nnx.merge(graphdef, params)
    B, N = tokens.shape
    capacity = min(model.config.block_size, N)
    window, last = last_window(tokens, length, width)
    x, (keys, values) = model.prefill(window)
    logits = model.logits(x)
    cache_elements = 2 * keys[:, 0, :, :, 0].size * capacity
    cache_type = model.ops.cache_type(B, cache_elements, count_parameters(params))

    def padded(metric: jax.Array) -> jax.Array:
        return jnp.pad(metric, ((0, 0), (0, N - width)), constant_values=jnp.nan)

    surprisal, entropy = map(padded, token_metrics(logits, window))
    kept = None
    if alternatives:
        unread = Predictions.undefined((B, N - width), alternatives)
        read = token_predictions(logits, window, alternatives)
        kept = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), read, unread)
    return DecodeState(
        tokens=tokens,
        length=length,
        logits=logits[jnp.arange(B), last],
        cache=cache_type.of(keys, values).allocated(capacity, final),
        surprisal=surprisal,
        entropy=entropy,
        predictions=kept,
    )


def decode(
    params: Params,
    state: DecodeState,
    count: int | np.ndarray,
    sampler: SamplerState,
    *,
    graphdef: nnx.GraphDef,
    mesh: Mesh | None = None,
    final: bool = False,
) -> DecodeState:
    """Generate `count` more tokens for every sequence, or for each its own; any count shares a compilation.

    A sequence with a lower count than another may get more tokens, which are to be ignored.

    One call or several, with a cache or without, on one device or many, give the same text. `state` must not be used
    afterwards. `final` as for `prefill`: nothing can be generated after that.

    Decoding beyond the context is a second program, compiled when it is first needed: most texts end inside.
    """
    cache, state = state.cache, with_memory(replace(state, cache=None), sampler)
    carry = np.full(len(state.length), count, np.int32), state
    assert cache is not None
    generate, final = type(cache).generate, final and cache.one_by_one
    inside = decoding_program(inside_context, graphdef, mesh, generate, final)
    (left, state), cache = inside(params, carry, cache, sampler)
    if (np.asarray(left) > 0).any():
        beyond = decoding_program(beyond_context, graphdef, mesh, generate, False)
        (left, state), _ = beyond(params, (left, state), None, sampler)
    return replace(state, cache=cache)


def with_memory(state: DecodeState, sampler: SamplerState) -> DecodeState:
    """Return sequences with the samplers' memory before their first tokens, if there is none yet."""
    if jax.tree.leaves((state.memory, state.series)):
        return state
    memory, series = sampler.first(state.tokens, state.logits.shape[-1])
    return replace(state, memory=memory, series=series)


@cache
def decoding_program(
    loop_of: Callable[..., Loop], graphdef: nnx.GraphDef, mesh: Mesh | None, generate: Callable[..., Any], final: bool
) -> Callable[..., tuple[Carry, KVCache | None]]:
    """Return a compiled generation loop, from (params, carry, cache, sampler) to (carry, cache).

    Args:
        loop_of: `inside_context` or `beyond_context`.
        graphdef: the model's static description.
        mesh: the devices that split the batch; None: one device.
        generate: the cache's: generates a batch in lockstep, or one sequence after the other.
        final: the cache is not returned.
    """
    run: Callable[..., Any] = partial(generate, partial(_generation, loop_of, graphdef, mesh), final=final)
    if mesh is not None:
        specs = (PartitionSpec(), BATCH, CACHE, PartitionSpec())
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(BATCH, CACHE), check_vma=False)
    return jit_for_generation(mesh)(run, donate_argnums=() if final else (1, 2))


def _generation(
    loop_of: Callable[..., Loop],
    graphdef: nnx.GraphDef,
    mesh: Mesh | None,
    params: Params,
    carry: Carry,
    sampler: SamplerState,
) -> Generation:
    """Say which sequences of the batch this device has, and how a loop for some of them is made."""
    model: GPT = nnx.merge(graphdef, params)
    B, N = carry[1].tokens.shape
    first = 0 if mesh is None or mesh.size == 1 else jax.lax.axis_index("data") * B
    return Generation(
        indices=first + jnp.arange(B),
        loop_of=partial(loop_of, model, sampler),
        capacity=min(model.config.block_size, N),
        vocab_size=model.config.vocab_size,
        sorts=sampler.sorts,
        blocks=model.blocks,
    )


def inside_context(
    model: GPT, sampler: SamplerState, indices: jax.Array, run_layers: Callable[..., Any] | None = None
) -> Loop:
    """Return the loop that generates with a cache, until one of its sequences fills the context."""

    def predict(state: DecodeState, cache: KVCache) -> tuple[DecodeState, KVCache]:
        last = state.tokens[jnp.arange(len(indices)), state.length - 1]
        logits, cache = model.decode(last, state.length - 1, cache, run_layers)
        return replace(state, logits=logits), cache

    def unfinished(left: jax.Array, state: DecodeState) -> jax.Array:
        return jnp.any(left > 0) & (jnp.max(state.length) < model.config.block_size)

    return generation_loop(predict, unfinished, sampler, indices, model.config.vocab_size)


def beyond_context(model: GPT, sampler: SamplerState, indices: jax.Array) -> Loop:
    """Return the loop that reads the last window again for every token."""

    def predict(state: DecodeState, cache: None) -> tuple[DecodeState, None]:
        width = min(model.config.block_size, state.tokens.shape[1])
        return replace(state, logits=predict_last(model, *last_window(state.tokens, state.length, width))), cache

    def unfinished(left: jax.Array, state: DecodeState) -> jax.Array:
        return jnp.any(left > 0)

    return generation_loop(predict, unfinished, sampler, indices, model.config.vocab_size)


def generation_loop(
    predict: Callable[[DecodeState, Any], tuple[DecodeState, Any]],
    unfinished: Callable[[jax.Array, DecodeState], jax.Array],
    sampler: SamplerState,
    indices: jax.Array,
    vocab_size: int,
) -> Loop:
    """Return the loop: sample a token of every sequence, append it, predict the next.

    Args:
        predict: computes the logits after the last token.
        unfinished: whether to go on.
        sampler: how tokens are sampled.
        indices: int32 [B], the sequences' indices in the batch: their random numbers depend on them.
        vocab_size: V.
    """
    B = len(indices)
    positions_at_once = max(1, min(MAX_POSITIONS, MAX_GUMBEL // (B * vocab_size)))

    def some_tokens(carry: Any) -> Any:
        (_, state), _ = carry
        positions = state.length + jnp.arange(positions_at_once)[:, None]
        gumbel = sampler.gumbel(indices, positions, state.logits)

        def one_token(counted: Any) -> Any:
            i, ((left, state), cache) = counted
            before = sampler.states(indices, state.tokens, state.length, state.memory)
            after, token, p = sampler.sample(before, state.logits, gumbel[i])
            state, cache = predict(appended(state, token, p, after), cache)
            return i + 1, ((remaining(left, state, sampler), state), cache)

        def some_left(counted: Any) -> jax.Array:
            i, (carry, _) = counted
            return (i < positions_at_once) & unfinished(*carry)

        return jax.lax.while_loop(some_left, one_token, (jnp.int32(0), carry))[1]

    return partial(jax.lax.while_loop, lambda carry: unfinished(*carry[0]), some_tokens)


def remaining(left: jax.Array, state: DecodeState, sampler: SamplerState) -> jax.Array:
    """Return how many tokens each sequence still lacks after one more: none behind a stop string."""
    left = left - 1
    if sampler.stop is None:
        return left
    return jnp.where(sampler.stop.end(state.tokens, state.length), jnp.minimum(left, 0), left)


def appended(state: DecodeState, token: jax.Array, p: jax.Array, sampled: State) -> DecodeState:
    """Append a token, int32 [B], its metrics, and its predictions if they are asked for, to every sequence.

    `p` is the probability with which the sampler gave the token, float32 [B]; `sampled` what the samplers returned.
    """
    batch = jnp.arange(len(token))
    surprisal, entropy = surprisal_and_entropy(state.logits, token)
    kept = state.predictions
    if kept is not None:
        new = predictions(state.logits, token, kept.likeliest.shape[-1], p)
        kept = jax.tree.map(lambda all_of, one: all_of.at[batch, state.length].set(one), kept, new)
    return replace(
        state,
        tokens=state.tokens.at[batch, state.length].set(token),
        surprisal=state.surprisal.at[batch, state.length].set(surprisal),
        entropy=state.entropy.at[batch, state.length].set(entropy),
        length=state.length + 1,
        predictions=kept,
        memory=sampled.memory,
        series={name: all_of.at[batch, state.length].set(sampled.shown[name]) for name, all_of in state.series.items()},
    )


def predict_last(model: GPT, tokens: jax.Array, last: jax.Array) -> jax.Array:
    """Predict the token after one position of each sequence: what a call of the model gives there, in less work.

    Of the last layer only keys and values are computed at the other positions.

    Args:
        model: the model.
        tokens: int32 [B, T].
        last: int32 [B], the positions.

    Returns:
        Logits, float32 [B, V].
    """
    T, D, index = tokens.shape[1], model.config.n_head_dim, model.config.n_layer - 1
    x = model.features(tokens, layers=index)
    graphdef, stacked = nnx.split(model.blocks)
    block: Block = nnx.merge(graphdef, jax.tree.map(lambda stack: stack[index], stacked))
    _, k, v = block.project(x, rotary(jnp.arange(T), D))
    keys, values = k.swapaxes(2, 3), v.swapaxes(2, 3)

    def attend(q: jax.Array, *_: jax.Array) -> tuple[jax.Array, None]:
        return model.ops.query_attention(q[:, :, 0], keys, values, last)[:, :, None], None

    own = x[jnp.arange(len(last)), last][:, None]
    return model.logits(block(own, rotary(last[:, None, None], D), attend)[0])[:, 0]


def last_window(tokens: jax.Array, length: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """Return the last `width` tokens before each sequence's length, and the index of the last one in them."""
    start = jnp.maximum(0, length - width)
    window = jax.vmap(lambda row, s: jax.lax.dynamic_slice(row, (s,), (width,)))(tokens, start)
    return window, length - start - 1
