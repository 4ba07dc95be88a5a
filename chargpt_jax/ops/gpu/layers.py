"""The layers of a GPU's programs: unrolled, with the parameters of all layers prepared at once.

A loop over layers needs kernels that copy parameters out of arrays of all layers, and activations and gradients into
such arrays. Without a loop most of these copies disappear. Operations on parameters alone are computed for all layers
in a few kernels:

- casts to the dtype of matrix multiplications
- LayerNorm's scale s and bias b move into the linear layer behind it, W and c: (n s + b) W + c = n (s W) + (b W + c).
  Then n, the normalised input, has no parameters, and their gradients need no sums over all positions: they follow
  from the gradients of s W and b W + c.
- each sequence gets a copy of every bias, so that the sum of the copies' gradients is computed for all layers at once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from chargpt_jax.ops import plain
from chargpt_jax.ops.dropout import SEEDS
from chargpt_jax.ops.gpu.operations import LINEAR, NORMALISED

MAX_UNROLLED = 16
"""Layers that are unrolled. More run in a loop, because compilation takes longer the more layers are unrolled."""

LINEARS = (("attn", "qkv"), ("attn", "proj"), ("mlp", "up"), ("mlp", "down"))
"""The linear layers of a block."""

NORMS = ((("ln_1",), ("attn", "qkv")), (("ln_2",), ("mlp", "up")))
"""The LayerNorms of a block, each with the linear layer that alone reads its output."""

SAVED = (plain.SAVED, plain.INPUTS, SEEDS, NORMALISED)
"""Names of arrays that the backward pass does not recompute: each would take a kernel that the rest cannot include."""


def layers_in(dtype: DTypeLike) -> Callable[..., Any]:
    """Return `plain.layers` for a GPU that multiplies matrices in a dtype."""
    return partial(layers, dtype=dtype)


def layers(
    layer: plain.Layer,
    blocks: nnx.Module,
    carry: Any,
    *,
    dtype: DTypeLike,
    remat: bool = False,
    count: int | None = None,
) -> Any:
    """Run `layer` through a stack of blocks, as `plain.layers` does.

    Args:
        layer, blocks, count: as for `plain.layers`.
        carry: the first layer's input, [B, T, C].
        dtype: of matrix multiplications.
        remat: recompute the output of the MLP's first linear layer in the backward pass, instead of saving it. GELU and
            dropout's masks are always recomputed, inside other kernels.
    """
    graphdef, state = nnx.split(blocks)
    stacked = nnx.to_pure_dict(state)
    L = len(jax.tree.leaves(stacked)[0]) if count is None else count
    if L > MAX_UNROLLED or "ln_1" not in stacked:  # nGPT has no LayerNorm
        return plain.layers(layer, blocks, carry, remat=remat, count=count)
    names = SAVED if remat else (*SAVED, LINEAR)
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    outputs = []
    for index, own in enumerate(unstacked(prepared(stacked, dtype, len(carry)), L)):

        def body(own: Any, carry: Any, index: int = index) -> tuple[Any, Any]:
            return layer(nnx.merge(graphdef, own), carry, jnp.int32(index))

        carry, output = jax.checkpoint(body, policy=policy)(own, carry)
        outputs.append(output)
    return carry, jax.tree.map(lambda *each: jnp.stack(each), *outputs)


def prepared(stacked: Any, dtype: DTypeLike, sequences: int) -> Any:
    """Return the parameters of a stack of blocks as its operations use them.

    Args:
        stacked: nested dicts of arrays with a leading axis of L, float32 or wider.
        dtype: of matrix multiplications.
        sequences: B.

    Returns:
        The same dicts: kernels [L, fan_in, fan_out] of `dtype`, biases [L, B, 1, fan_out], and scales and biases of
        LayerNorm [L, 0], which `operations.layer_norm` leaves out.
    """
    params = jax.tree.map(lambda x: x, stacked)  # the dicts below are changed
    for norm, linear in NORMS:
        scale, bias, own = _at(params, norm)["scale"], _at(params, norm)["bias"], _at(params, linear)
        own["bias"] = own["bias"] + jnp.sum(bias[:, :, None] * own["kernel"], axis=1)
        own["kernel"] = scale[:, :, None] * own["kernel"]
        _at(params, norm).update(scale=scale[:, :0], bias=bias[:, :0])
    for linear in LINEARS:
        own = _at(params, linear)
        L, fan_out = own["bias"].shape
        own["kernel"] = own["kernel"].astype(dtype)
        own["bias"] = jnp.broadcast_to(own["bias"][:, None, None], (L, sequences, 1, fan_out))
    return params


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def unstacked(stacked: Any, count: int) -> list[Any]:
    """Return the first `count` parts of a tree of arrays with a leading axis of L; the gradient stacks those of all."""
    leaves, structure = jax.tree.flatten(stacked)
    return [jax.tree.unflatten(structure, [x[index] for x in leaves]) for index in range(count)]


def _unstacked_forward(stacked: Any, count: int) -> tuple[list[Any], int]:
    return unstacked(stacked, count), len(jax.tree.leaves(stacked)[0])


def _unstacked_backward(count: int, L: int, gradients: list[Any]) -> tuple[Any]:
    missing = [jax.tree.map(jnp.zeros_like, gradients[0])] * (L - count)
    return (jax.tree.map(lambda *each: jnp.stack(each), *gradients, *missing),)


unstacked.defvjp(_unstacked_forward, _unstacked_backward)
