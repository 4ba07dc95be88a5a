"""Muon: momentum with orthogonalised updates, for the weight matrices of the transformer layers.

A matrix W [fan_in, fan_out] with gradient G and momentum b moves along

    M <- b M + (1 - b) G      N = b M + (1 - b) G      sqrt(max(1, fan_out / fan_in)) polar(N)

where polar(N) = A B^T for the singular value decomposition N = A S B^T (Jordan et al. 2024, "Muon: An optimizer for
hidden layers in neural networks"). It is approximated by odd polynomials of the singular values,

    X <- a X + (b X X^T + c (X X^T)^2) X

whose coefficients are optimal for singular values from 1e-3 to 1 (Amsel et al. 2025, "The Polar Express: Optimal matrix
sign methods and their application to the Muon algorithm"). Before the first, X is divided by its Schatten-4 norm,
(sum_i s_i^4)^(1/4) = |X X^T|^(1/2). It is an upper bound of the singular values and costs nothing extra, since the
first polynomial needs X X^T anyway.

The projections to queries, keys and values are three matrices in one array; each is orthogonalised by itself.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from chargpt_jax.devices import sharding
from chargpt_jax.model.init import Params
from chargpt_jax.ops.matmul import matmul

Path = tuple[jax.tree_util.DictKey, ...]
"""The keys that lead to an array in nested dicts."""

POLYNOMIALS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
"""a, b and c of each iteration. After all five, singular values from 1e-3 to 1 are between 0.87 and 1.13; after three,
between 0.13 and 1.87."""

MARGIN = 1.01
"""Factor on the norm that keeps the largest singular value below 1 in spite of rounding."""


class Momentum(NamedTuple):
    """Muon's state."""

    mean: Params
    """The momentum M of each array, with its shape and dtype."""


def orthogonal(x: jax.Array, steps: int = len(POLYNOMIALS)) -> jax.Array:
    """Approximate polar(x) for matrices [..., m, n] by `steps` polynomials; polar(0) is 0."""
    if x.shape[-2] > x.shape[-1]:  # X X^T is [m, m]: transpose, so that m is the smaller dimension
        return orthogonal(x.swapaxes(-1, -2), steps).swapaxes(-1, -2)
    # Scale the largest element to 1, so that fourth powers stay within float32's range.
    x = x / jnp.maximum(jnp.max(jnp.abs(x), axis=(-1, -2), keepdims=True), jnp.finfo(x.dtype).tiny)
    for number, (a, b, c) in enumerate(POLYNOMIALS[:steps]):
        square = matmul("...mk,...nk->...mn", x, x)
        if number == 0:
            norm = MARGIN * jnp.sqrt(jnp.linalg.norm(square, axis=(-1, -2), keepdims=True))
            norm = jnp.where(norm > 0, norm, 1)
            x, square = x / norm, square / norm**2
        fourth = matmul("...mk,...kn->...mn", square, square)
        x = a * x + matmul("...mk,...kn->...mn", b * square + c * fourth, x)
    return x


def is_layer_matrix(path: Path, x: jax.Array) -> bool:
    """Return whether a parameter array, given its path, holds the layers' matrices, [L, fan_in, fan_out]."""
    return path[0].key == "blocks" and x.ndim == 3


def scale_by_muon(momentum: float, steps: int, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """Return the transformation from gradients of the layers' matrices to Muon's update directions.

    Args:
        momentum: b in the formula above, 0 <= b < 1.
        steps: number of orthogonalisation iterations, 1 to 5.
        mesh: the devices that share the work, each for some of the layers; None: one device.
    """

    def init(params: Params) -> Momentum:
        return Momentum(jax.tree.map(jnp.zeros_like, params))

    def mix(m: jax.Array, g: jax.Array) -> jax.Array:
        return momentum * m + (1 - momentum) * g

    def update(gradient: Params, state: Momentum, params: Params | None = None) -> tuple[Params, Momentum]:
        mean = jax.tree.map(mix, state.mean, gradient)
        return sharding.map_over_data(directions, mesh)(jax.tree.map(mix, mean, gradient)), Momentum(mean)

    def directions(tree: Params) -> Params:
        return _join_qkv(jax.tree.map(direction, _split_qkv(tree)))

    def direction(x: jax.Array) -> jax.Array:
        return orthogonal(x, steps) * max(1, x.shape[-1] / x.shape[-2]) ** 0.5

    return optax.GradientTransformation(init, update)


def _split_qkv(tree: Params) -> Params:
    """Reshape arrays [L, fan_in, ...] to [L, 1 or 3, fan_in, fan_out]: 3 for queries, keys and values."""

    def split(path: Path, x: jax.Array) -> jax.Array:
        matrices = 3 if any(key.key == "qkv" for key in path) else 1
        return x.reshape(*x.shape[:2], matrices, -1).swapaxes(1, 2)

    return jax.tree_util.tree_map_with_path(split, tree)


def _join_qkv(tree: Params) -> Params:
    return jax.tree.map(lambda x: x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1), tree)
