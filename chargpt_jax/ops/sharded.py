"""The operations of one device of a mesh that splits the parameters, with the collectives that they need.

A device has a shard of each weight matrix: fan_in is sharded over the axis 'fsdp' and fan_out over 'tensor', or the
other way round. These operations run inside a shard_map over the mesh (`devices/layout.py`).

- fsdp (Zhao et al. 2023, "PyTorch FSDP"): a matrix is gathered for its multiplication and not saved. The backward pass
  gathers it again, and sums and scatters its gradient. All three move it in the dtype of the multiplication.
- tensor (Shoeybi et al. 2019, "Megatron-LM"): `linear` multiplies by some columns, for the device's own heads or hidden
  units; its backward pass sums the gradient of its input. `linear_out` multiplies by some rows and sums its output. So
  each layer has two sums of activations [B, T, C] in the forward pass, and two in the backward pass.
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from chargpt_jax.ops.dropout import NONE, Dropout, head_seeds
from chargpt_jax.ops.plain import SAVED, Ops

Linear = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""As `plain.linear`."""


class Split(NamedTuple):
    """How a linear layer is split over the devices of a mesh."""

    linear: Linear
    """Of a device."""
    fsdp: int
    """Devices that gather a matrix."""
    tensor: int
    """Devices that share a multiplication."""
    out: bool
    """Whether each device has some rows of the matrix (`linear_out`), as opposed to columns."""

    def times(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Multiply x [..., fan_in] by a matrix [fan_in, fan_out], without a bias."""
        return self.linear(x, kernel, jnp.zeros(kernel.shape[1:], kernel.dtype))

    def gathered(self, shard: jax.Array, x: jax.Array) -> jax.Array:
        """Return the matrix of the shards of the 'fsdp' axis, in the dtype of x."""
        shard = shard.astype(x.dtype)
        return jax.lax.all_gather(shard, "fsdp", axis=int(self.out), tiled=True) if self.fsdp > 1 else shard

    def scattered(self, gradient: jax.Array) -> jax.Array:
        """Return this device's shard of the sum of a matrix's gradients over the 'fsdp' axis."""
        if self.fsdp == 1:
            return gradient
        return jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=int(self.out), tiled=True)

    def summed(self, x: jax.Array) -> jax.Array:
        """Return the sum of activations, or of their gradients, over the 'tensor' axis."""
        return jax.lax.psum(x, "tensor") if self.tensor > 1 else x


def sharded(ops: Ops, mesh: Mesh) -> Ops:
    """Return the operations for one device of a mesh that splits the parameters, given those of a device by itself."""
    return _sharded(ops, mesh.shape["fsdp"], mesh.shape["tensor"])


@functools.cache
def _sharded(ops: Ops, fsdp: int, tensor: int) -> Ops:
    def attention(
        q: jax.Array, k: jax.Array, v: jax.Array, seeds: jax.Array | None = None, how: Dropout = NONE
    ) -> jax.Array:
        if seeds is not None and tensor > 1:  # dropout's masks are those of the model's heads, not of the device's
            heads = q.shape[1]
            seeds = head_seeds(seeds, heads, first=jax.lax.axis_index("tensor") * heads)
        return ops.attention(q, k, v, seeds, how)

    return dataclasses.replace(
        ops,
        linear=partial(_linear, how=Split(ops.linear, fsdp, tensor, out=False)),
        linear_out=partial(_linear, how=Split(ops.linear_out, fsdp, tensor, out=True)),
        attention=attention,
    )


def _linear(x: jax.Array, kernel: jax.Array, bias: jax.Array, *, how: Split) -> jax.Array:
    """Compute `plain.linear`, given a shard of the kernel and this device's elements of the bias."""
    return (_product(how, x, kernel) + bias).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: Split, x: jax.Array, shard: jax.Array) -> jax.Array:
    """Multiply x [B, T, fan_in] by the matrix of which the device has a shard; returns x's dtype."""
    return _forward(how, x, shard)[0]


def _forward(how: Split, x: jax.Array, shard: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = how.times(x, how.gathered(shard, x))
    # Rematerialisation saves the result: to compute it again, it would have to gather the matrix once more.
    return checkpoint_name(how.summed(y) if how.out else y, SAVED), (x, shard)


def _backward(how: Split, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, shard = saved
    _, pull_back = jax.vjp(how.times, x, how.gathered(shard, x))
    to_x, to_kernel = pull_back(g)
    return to_x if how.out else how.summed(to_x), how.scattered(to_kernel).astype(shard.dtype)


_product.defvjp(_forward, _backward)
