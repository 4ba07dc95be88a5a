"""Build a model: its static description, its parameters' shapes, and its initial parameters.

Those of the GPT are as PyTorch draws them: every kernel and bias is uniform in +-1 / sqrt(fan_in), PyTorch's default
for Linear; the embedding table, tied to the head, takes the head's. LayerNorm starts at scale 1 and bias 0. The random
bits are those of hash_rng.py. Those of the other kinds are in ngpt.py and modern.py.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from chargpt_jax.config import ModelConfig
from chargpt_jax.hash_rng import random_bits, seeds_of, unit
from chargpt_jax.model import modern, ngpt
from chargpt_jax.model.gpt import GPT
from chargpt_jax.ops.plain import Ops

Params = dict[str, Any]
"""Nested dicts of float32 arrays, by the names of the modules: params['blocks']['attn']['qkv']['kernel']."""

MODELS = {"gpt": GPT, "ngpt": ngpt.NGPT, "modern": modern.Modern}
"""The model of each `model.kind`."""

LAYER = (("ln_1",), ("attn", "qkv"), ("attn", "proj"), ("ln_2",), ("mlp", "up"), ("mlp", "down"))
"""The parts of a block in the order of their random keys, two for each: its kernel or scale, then its bias."""


def uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int, dtype: type = jnp.float32) -> jax.Array:
    """Draw from the uniform distribution in +-1 / sqrt(fan_in), PyTorch's default for Linear weights and biases."""
    bits = random_bits(seeds_of(key), jnp.arange(math.prod(shape))).reshape(shape)
    return (2 * unit(bits, dtype) - 1) * fan_in**-0.5


def abstract_model(config: ModelConfig, ops: Ops) -> tuple[nnx.GraphDef, Params]:
    """Return a model's static description and its parameters' shapes."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MODELS[config.kind](config, ops)))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.to_pure_dict(state))
    return graphdef, shapes


def initial_params(shapes: Params, key: jax.Array) -> Params:
    """Draw the parameters of these shapes; `key` is a JAX key."""
    table_key, layers_key = keys_of(key, 2)
    table = shapes["wte"]["embedding"]
    n_layer = jax.tree.leaves(shapes["blocks"])[0].shape[0]

    def layer(key: jax.Array) -> Params:
        params: Params = {}
        for path, keys in zip(LAYER, keys_of(key, 2 * len(LAYER)).reshape(-1, 2), strict=True):
            part, own = shapes["blocks"], params
            for name in path:
                part, own = part[name], own.setdefault(name, {})
            own.update(_part(part, keys))
        return params

    return {
        "wte": {"embedding": uniform(table_key, table.shape, fan_in=table.shape[-1])},
        "blocks": jax.vmap(layer)(jax.random.split(layers_key, n_layer)),
        "ln_f": _part({name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for name, x in shapes["ln_f"].items()}),
    }


def _part(shapes: Mapping[str, jax.ShapeDtypeStruct], keys: jax.Array | None = None) -> Params:
    """Draw one layer's Linear or LayerNorm; `shapes` have a leading axis of layers."""
    if "scale" in shapes:
        return {"scale": jnp.ones(shapes["scale"].shape[1:]), "bias": jnp.zeros(shapes["bias"].shape[1:])}
    assert keys is not None
    fan_in = shapes["kernel"].shape[1]
    return {
        name: uniform(key, shapes[name].shape[1:], fan_in) for name, key in zip(("kernel", "bias"), keys, strict=True)
    }


def keys_of(key: jax.Array, count: int) -> jax.Array:
    """Return `count` keys: those that nnx.Rngs would give one by one, in one operation that compiles fast."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count, dtype=jnp.uint32))


def create(config: ModelConfig, seed: int, ops: Ops | None = None) -> tuple[nnx.GraphDef, Params]:
    """Build a model.

    Args:
        config: with vocab_size and used_ids set.
        seed: of the initial parameters.
        ops: how it is computed; None: by plain mathematics in float32.

    Returns:
        The static description and the parameters; `nnx.merge(graphdef, params)` is the model.
    """
    graphdef, _, params = plan(config, seed, ops)
    return graphdef, params()


def plan(
    config: ModelConfig, seed: int, ops: Ops | None = None, compiler_options: dict[str, Any] | None = None
) -> tuple[nnx.GraphDef, Params, Callable[[], Params]]:
    """Build a model, but leave the drawing of its parameters, and the compilation of that, for later.

    Args:
        config, seed, ops: as for `create`.
        compiler_options: for XLA, for the program that draws.

    Returns:
        The static description, the parameters' shapes, and the function that draws the parameters.
    """
    ops = ops or Ops()
    graphdef, shapes = abstract_model(config, ops)
    drawing, key = drawing_program(config, shapes, ops, compiler_options), jax.random.key(seed)
    return graphdef, shapes, lambda: drawing(key)


def drawing_program(
    config: ModelConfig, shapes: Params, ops: Ops, compiler_options: dict[str, Any] | None = None
) -> Callable[[jax.Array], Params]:
    """Return the compiled function from a JAX key to the initial parameters of a model.

    It is one program, which the compilation cache keeps; drawing array by array would compile dozens at every start.
    """
    draws: dict[str, Callable[[jax.Array], Params]] = {
        "gpt": functools.partial(initial_params, shapes),
        "ngpt": functools.partial(ngpt.initial_params, config, ops),
        "modern": lambda key: modern.initial_params(initial_params(shapes, key)),
    }
    return jax.jit(draws[config.kind], compiler_options=compiler_options)


def count_parameters(params: Any) -> int:
    """Return the number of elements in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
