"""The RoPE GPT and nothing else: token ids in, logits out, with or without a cache.

A decoder of pre-LayerNorm blocks with rotary positions (Su et al. 2021, "RoFormer") and an embedding tied to the head,
the mathematics of the PyTorch ancestor. Parameters are float32, matrix products run in `dtype`, and the residual
stream, LayerNorm's statistics, the softmax and the logits are float32 (or `dtype`, where that is wider).

Axes: B batch, T time of queries, S time of keys, C channels (n_embd), H heads, D head width, F feed-forward width,
V vocabulary, L layers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from chargpt_jax.config import ModelConfig
from chargpt_jax.hash_rng import derive, draw, seeds_of, unit
from chargpt_jax.ops.blockwise_attention import SAVED, causal_attention
from chargpt_jax.ops.cpu_kernel import in_one_kernel
from chargpt_jax.ops.cpu_kv_cache import Blocks
from chargpt_jax.ops.dropout import Dropout, dropout
from chargpt_jax.ops.kv_cache import Rows, cached_attention
from chargpt_jax.ops.layer_slice import IN_KERNEL, MOST_TERMS, OfStack, leaves_in_stack
from chargpt_jax.ops.matmul import product, rows_of
from chargpt_jax.ops.precision import between_products, rounded_product, widened

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""From q, k and v, [B, H, T, D] each, to the heads' outputs [B, H, T, D] and whatever is to be kept of the layer."""

Cache = Rows | Blocks
"""The keys and values that are kept of texts under way."""

MASKED = -1e9
"""The logit of an id that no character has: its probability is exactly 0."""


def uniform(fan_in: int) -> nnx.Initializer:
    """Return PyTorch's default for Linear weights and biases: uniform in +-1 / sqrt(fan_in)."""

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32, **_: Any) -> jax.Array:
        bits = draw(seeds_of(key), jnp.arange(math.prod(shape))).reshape(shape)
        return (2 * unit(bits, dtype) - 1) * fan_in**-0.5

    return init


class Keys:
    """What Flax's modules draw their parameters with: the keys that nnx.Rngs would give, all made at once.

    One Threefry for all of them: each by itself, as Rngs makes them when asked, takes a tenth of a second to compile.
    """

    def __init__(self, key: jax.Array, count: int):
        """Make `count` keys from one, a scalar."""
        self._left = iter(jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count, dtype=jnp.uint32)))

    def params(self) -> jax.Array:
        """Return the next key."""
        return next(self._left)


def rngs_of(key: jax.Array, count: int) -> nnx.Rngs:
    """Return Keys as the nnx.Rngs for which modules take them: they ask for no more than its params()."""
    return cast(nnx.Rngs, Keys(key, count))


class Linear(nnx.Linear):
    """A Linear layer whose product runs in `dtype` and whose bias is added in float32."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Map inputs [..., fan_in], of `dtype` or wider, to [..., fan_out] of theirs."""
        dtype: Any = self.dtype
        # All positions on one axis: for a gradient summed over two, a CPU would first write a transposed copy.
        rows, kernel = inputs.reshape(-1, inputs.shape[-1]), self.kernel[...]
        if isinstance(kernel, OfStack):
            y = kernel.times(rows)
        elif inputs.dtype == dtype:
            y = product("rc,cf->rf", rows, kernel.astype(dtype), dtype)
        else:
            y = rounded_product("rc,cf->rf", rows, kernel, dtype)
        # A bias added in bfloat16 has its gradient, a sum over every position, in bfloat16: that sum stalls.
        bias: Any = self.bias
        return (y.reshape(*inputs.shape[:-1], -1) + bias[...]).astype(inputs.dtype)


def linear(fan_in: int, fan_out: int, dtype: Any, rngs: nnx.Rngs) -> Linear:
    """Make a Linear layer initialised as in PyTorch."""
    init = uniform(fan_in)
    return Linear(fan_in, fan_out, kernel_init=init, bias_init=init, dtype=dtype, rngs=rngs)


def gelu(x: jax.Array) -> jax.Array:
    """Return x P(X < x) for a standard normal X, from erf as PyTorch does (jax.nn.gelu takes erfc, twice the work)."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def layer_norm(width: int, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Make a LayerNorm as in PyTorch: Flax's defaults are eps 1e-6 and a variance that cancels."""
    return nnx.LayerNorm(width, epsilon=1e-5, use_fast_variance=False, dtype=dtype, rngs=rngs)


def rotary(positions: jax.Array, n_head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin, [..., D / 2], of int32 positions [...], base 10,000; float32, or float64 under x64."""
    inverse = 10_000.0 ** -(jnp.arange(0, n_head_dim, 2) / n_head_dim)
    angles = positions[..., None] * inverse
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn each pair (x_i, x_{i + D/2}) of x [..., D] by its angle, in cos's precision; x's dtype comes back."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention; where the keys come from is the caller's `attend`."""

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs):
        width = config.n_head * config.n_head_dim
        self.heads = (config.n_head, config.n_head_dim)
        self.qkv = linear(config.n_embd, 3 * width, dtype, rngs)
        self.proj = linear(width, config.n_embd, dtype, rngs)

    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend) -> tuple[jax.Array, Any]:
        """Map x [B, T, C] to [B, T, C]; also returns what `attend` keeps."""
        y, kept = attend(*self.project(x, rope))
        return self.proj(y.swapaxes(1, 2).reshape(*x.shape[:2], -1)), kept

    def project(self, x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the queries, keys and values of x [B, T, C], [B, H, T, D] each, with their positions in them."""
        parts = jnp.split(self.qkv(x), 3, axis=-1)
        q, k, v = (part.reshape(*x.shape[:2], *self.heads).swapaxes(1, 2) for part in parts)
        return rotate(q, *rope), rotate(k, *rope), v


class MLP(nnx.Module):
    """Linear, GELU, Linear."""

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs):
        self.up = linear(config.n_embd, config.n_ff, dtype, rngs)
        self.down = linear(config.n_ff, config.n_embd, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [B, T, C] to [B, T, C]."""
        return self.down(gelu(self.up(x)))


class Block(nnx.Module):
    """One layer: attention, then the MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: ModelConfig, dtype: Any, between: Any, rngs: nnx.Rngs):
        self.dropout = Dropout(config.dropout)
        self.ln_1 = layer_norm(config.n_embd, between, rngs)
        self.attn = Attention(config, dtype, rngs)
        self.ln_2 = layer_norm(config.n_embd, between, rngs)
        self.mlp = MLP(config, dtype, rngs)

    def __call__(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend, seeds: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Map x [B, T, C] to [B, T, C]; `seeds`, uint32 [B, 2], turn dropout on. Also returns what `attend` keeps."""
        y, kept = self.attn(self.ln_1(x), rope, attend)
        x = x + dropout(y, seeds if seeds is None else derive(seeds, 1), self.dropout)
        y = self.mlp(self.ln_2(x))
        return x + dropout(y, seeds if seeds is None else derive(seeds, 2), self.dropout), kept


class GPT(nnx.Module):
    """The decoder. Its blocks are one block with a leading axis of L on every parameter, run by `lax.scan`."""

    def __init__(self, config: ModelConfig, *, dtype: Any = jnp.float32, platform: str | None = None, rngs: nnx.Rngs):
        self.config = config = dataclasses.replace(config)  # a copy: what is compiled must not change under its feet
        self.dtype = dtype
        self.platform = platform
        between = between_products(dtype, platform)

        @nnx.vmap
        def stack(key: jax.Array) -> Block:
            return Block(config, dtype, between, rngs_of(key, 12))  # two for each norm and each Linear

        # The tied table takes the initialisation of the ancestor's head, a Linear of fan-in C.
        init = uniform(config.n_embd)
        self.wte = nnx.Embed(config.vocab_size, config.n_embd, embedding_init=init, dtype=widened(dtype), rngs=rngs)
        self.blocks = stack(jax.random.split(rngs.params(), config.n_layer))
        self.ln_f = layer_norm(config.n_embd, between, rngs)

    def __call__(self, tokens: jax.Array, seeds: jax.Array | None = None) -> jax.Array:
        """Predict the token after each token.

        Args:
            tokens: int32 [B, T].
            seeds: uint32 [B, 2] turn dropout on (training).

        Returns:
            Logits, float32 [B, T, V].
        """
        return self.logits(self.features(tokens, seeds))

    def features(self, tokens: jax.Array, seeds: jax.Array | None = None, layers: int | None = None) -> jax.Array:
        """Return the last block's output, [B, T, C], from which `logits` predicts; arguments as for a call.

        Where `layers` says so only the first so many blocks are run.
        """
        rope = rotary(jnp.arange(tokens.shape[1]), self.config.n_head_dim)

        def layer(block: Block, x: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            own = seeds if seeds is None else derive(seeds, number + 1)
            weights = own if own is None else derive(own, 0)
            return block(x, rope, lambda q, k, v: (self._attend(q, k, v, weights), None), own)[0], None

        return self._scan(layer, self.embed(tokens), self.config.remat, layers)[0]

    def predict(self, tokens: jax.Array, last: jax.Array) -> jax.Array:
        """Predict the token after one place of each sequence: what a call gives there, in less work.

        Nothing of the last layer but its keys and values is made for the other places.

        Args:
            tokens: int32 [B, T].
            last: int32 [B], the places.

        Returns:
            Logits, float32 [B, V].
        """
        T, D, number = tokens.shape[1], self.config.n_head_dim, self.config.n_layer - 1
        x = self.features(tokens, layers=number)
        graphdef, stacked = nnx.split(self.blocks)
        block = nnx.merge(graphdef, jax.tree.map(lambda stack: stack[number], stacked))
        _, k, v = block.attn.project(block.ln_1(x), rotary(jnp.arange(T), D))
        keys, values = k.swapaxes(2, 3)[None], v.swapaxes(2, 3)[None]  # a cache of one layer

        def attend(q: jax.Array, *_: jax.Array) -> tuple[jax.Array, None]:
            y = cached_attention(q[:, :, 0], keys, values, 0, last, self.platform, width=T)
            return y[:, :, None], None

        own = x[jnp.arange(len(last)), last][:, None]
        return self.logits(block(own, rotary(last[:, None, None], D), attend)[0])[:, 0]

    def prefill(self, tokens: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Read int32 [B, T] without dropout; return the last block's output [B, T, C] and all keys and values.

        Keys and values are [L, B, H, D, T] each, of which Rows and Blocks make the cache that `decode` continues.
        """
        rope = rotary(jnp.arange(tokens.shape[1]), self.config.n_head_dim)

        def layer(block: Block, x: jax.Array, _: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            return block(x, rope, lambda q, k, v: (self._attend(q, k, v), (k.swapaxes(2, 3), v.swapaxes(2, 3))))

        return self._scan(layer, self.embed(tokens))

    def decode(
        self,
        tokens: jax.Array,
        position: jax.Array,
        cache: Cache,
        place: Callable[[jax.Array], jax.Array] | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Predict the token after one token a sequence.

        Args:
            tokens: int32 [B].
            position: int32 [B], each token's place in its sequence, less than S.
            cache: keys and values, filled up to the position. With Blocks all layers are one kernel, and B is 1.
            place: from a layer's number, an int32 scalar, to where it is on the cache's first axis, which may be
                longer than L; None: there it has its own number.

        Returns:
            Logits, float32 [B, V], and the cache with this position filled.
        """
        cos, sin = rotary(position[:, None, None], self.config.n_head_dim)  # [B, 1, 1, D / 2]

        def layer(block: Block, carry: tuple[jax.Array, Any], number: jax.Array) -> tuple[tuple[jax.Array, Any], None]:
            x, kept = carry

            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
                # Written into the whole stack, so that the loop updates it in place.
                at = number if place is None else place(number)
                new = kept.put(k[:, :, 0], v[:, :, 0], at, position)
                return new.attend(q[:, :, 0], at, position, self.platform)[:, :, None], new

            return block(x, (cos, sin), attend), None

        carry = self.embed(tokens[:, None]), cache
        if leaves_in_stack(len(tokens), self.dtype, self.platform):
            if isinstance(cache, Blocks):
                x, cache = in_one_kernel(functools.partial(self._loop, layer, IN_KERNEL))(carry)
            else:
                x, cache = self._loop(layer, MOST_TERMS, carry)
        else:
            (x, cache), _ = self._scan(layer, carry)
        return self.logits(x)[:, 0], cache

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Return the rows of tokens, int32 [...] to [..., C] in float32 or wider."""
        return rows_of(self.wte.embedding[...].astype(widened(self.dtype)), tokens)

    def logits(self, x: jax.Array) -> jax.Array:
        """Map the last block's output [B, T, C] to logits, float32 [B, T, V]; ids not in use get `MASKED`."""
        x, table = self.ln_f(x), self.wte.embedding[...]
        if x.dtype == self.dtype:
            logits = product("btc,vc->btv", x, table.astype(self.dtype))
        else:
            rows = x.reshape(-1, x.shape[-1])
            logits = rounded_product("rc,vc->rv", rows, table, self.dtype).reshape(*x.shape[:-1], -1)
        if not self.config.mask_unused_ids:
            return logits
        ids = jnp.arange(self.config.vocab_size)
        return jnp.where((ids > 0) & (ids < self.config.used_ids), logits, MASKED)

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array, seeds: jax.Array | None = None) -> jax.Array:
        how = Dropout(self.config.dropout)
        return causal_attention(q, k, v, seeds, how, self.config.attention_block, self.platform)

    def _scan(
        self, layer: Callable[..., Any], carry: Any, remat: bool = False, layers: int | None = None
    ) -> tuple[Any, Any]:
        """Run layer(block, carry, number) -> (carry, kept) through the stack of blocks, or the first `layers` of it."""
        graphdef, stacked = nnx.split(self.blocks)
        if layers is not None:
            stacked = jax.tree.map(lambda stack: stack[:layers], stacked)

        def body(carry: Any, xs: Any) -> tuple[Any, Any]:
            return layer(nnx.merge(graphdef, xs[0]), carry, xs[1])

        if remat:
            # Matrix products are dear to make again; norms, GELU and masks are cheap.
            policies = jax.checkpoint_policies
            policy = policies.save_from_both_policies(
                policies.save_only_these_names(SAVED), policies.dots_with_no_batch_dims_saveable
            )
            body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        return jax.lax.scan(body, carry, (stacked, jnp.arange(self.config.n_layer if layers is None else layers)))

    def _loop(self, layer: Callable[..., Any], terms: int, carry: Any) -> Any:
        """Run layer as `_scan` does, for its carry alone, with the blocks' matrices left in their stack."""
        graphdef, stacked = nnx.split(self.blocks)

        def body(number: jax.Array, carry: Any) -> Any:
            own = lambda stack: OfStack(stack, number, terms) if stack.ndim == 3 else stack[number]  # noqa: E731
            return layer(nnx.merge(graphdef, jax.tree.map(own, stacked)), carry, number)[0]

        return jax.lax.fori_loop(0, self.config.n_layer, body, carry)


def create(
    config: ModelConfig, seed: int, dtype: Any = jnp.float32, platform: str | None = None
) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Build a model and take it apart.

    Args:
        config: with vocab_size and used_ids set.
        seed: of the initial parameters.
        dtype: of the matrix products.
        platform: that the model is to run on, which divides its work accordingly; None: JAX's default.

    Returns:
        What `nnx.merge(graphdef, params)` puts together again: the static description, and the parameters as nested
        dicts of float32 arrays.
    """
    return _built(config, dtype, platform)(jax.random.key(seed))


def plan(
    config: ModelConfig,
    seed: int,
    dtype: Any = jnp.float32,
    platform: str | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> tuple[nnx.GraphDef, dict[str, Any], Callable[[], dict[str, Any]]]:
    """Build a model, but leave the drawing of its parameters, and the compilation of that, for later.

    Args:
        config, seed, dtype, platform: as for `create`.
        compiler_options: what XLA is told when it compiles the drawing.

    Returns:
        The static description, the parameters' shapes, and the function that draws them.
    """
    key = jax.random.key(seed)
    lowered = _built(config, dtype, platform).lower(key)
    graphdef, shapes = lowered.out_info
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
    compiled = functools.cache(functools.partial(lowered.compile, compiler_options))
    return graphdef, shapes, lambda: compiled()(key)[1]


def _built(config: ModelConfig, dtype: Any, platform: str | None) -> Any:
    """Return, under jit, the function from a key to what `create` returns.

    One program that the compilation cache keeps, where drawing array by array would compile dozens at every start.
    """

    def init(key: jax.Array) -> tuple[nnx.GraphDef, dict[str, Any]]:
        rngs = rngs_of(key, 4)  # the table's, the blocks', two of the last norm's
        graphdef, state = nnx.split(GPT(config, dtype=dtype, platform=platform, rngs=rngs))
        return graphdef, nnx.to_pure_dict(state)

    return jax.jit(init)


def count_parameters(params: Any) -> int:
    """Count the numbers in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
