"""Muon: momentum whose singular values are made equal, for the matrices of the layers.

A matrix W [fan_in, fan_out] with gradient G and momentum b moves along

    M <- b M + (1 - b) G      N = b M + (1 - b) G      sqrt(max(1, fan_out / fan_in)) polar(N)

where polar(N) = A B^T for the singular value decomposition N = A S B^T (Jordan et al. 2024, "Muon: An optimizer for
hidden layers in neural networks"). It is approximated by odd polynomials of the singular values,

    X <- a X + (b X X^T + c (X X^T)^2) X

whose coefficients are the best for singular values of 1e-3 to 1 (Amsel et al. 2025, "The Polar Express: Optimal matrix
sign methods and their application to the Muon algorithm"). Before the first, X is divided by its Schatten-4 norm,
(sum_i s_i^4)^(1/4) = |X X^T|^(1/2), which no singular value exceeds and which costs nothing, since X X^T is there.

Queries, keys and values are three matrices that lie side by side in one array; each is made orthogonal by itself.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from chargpt_jax.devices import sharding
from chargpt_jax.ops.matmul import product

POLYNOMIALS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
"""a, b and c of each. After all five, singular values of 1e-3 to 1 lie between 0.87 and 1.13; after three, above 0.13
and below 1.87."""

MARGIN = 1.01
"""What the largest singular value stays below 1 by, for rounding's sake."""


class Momentum(NamedTuple):
    """Muon's state."""

    mean: Any
    """M of every array that is moved, of its shape and dtype."""


def orthogonal(x: jax.Array, steps: int = len(POLYNOMIALS)) -> jax.Array:
    """Approximate polar(x) for matrices [..., m, n] with as many polynomials; 0 stays 0."""
    if x.shape[-2] > x.shape[-1]:  # the products of rows with rows are the smaller the fewer rows there are
        return orthogonal(x.swapaxes(-1, -2), steps).swapaxes(-1, -2)
    # So that no fourth power leaves float32: 1e-12 of the largest number is as good as nothing.
    x = x / jnp.maximum(jnp.max(jnp.abs(x), axis=(-1, -2), keepdims=True), jnp.finfo(x.dtype).tiny)
    for number, (a, b, c) in enumerate(POLYNOMIALS[:steps]):
        square = product("...mk,...nk->...mn", x, x)
        if number == 0:
            norm = MARGIN * jnp.sqrt(jnp.linalg.norm(square, axis=(-1, -2), keepdims=True))
            norm = jnp.where(norm > 0, norm, 1)
            x, square = x / norm, square / norm**2
        fourth = product("...mk,...kn->...mn", square, square)
        x = a * x + product("...mk,...kn->...mn", b * square + c * fourth, x)
    return x


def is_layer_matrix(path: tuple[Any, ...], x: Any) -> bool:
    """Say whether an array of the parameters, with its path, holds the layers' matrices, [L, fan_in, fan_out]."""
    return path[0].key == "blocks" and x.ndim == 3


def scale_by_muon(momentum: float, steps: int, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """Return the transform from gradients of the layers' matrices to the directions above; see there.

    Args:
        momentum: b, 0 to below 1.
        steps: how many polynomials, 1 to 5.
        mesh: the devices that share the layers, each making some orthogonal; None: one does it all.
    """

    def init(params: Any) -> Momentum:
        return Momentum(jax.tree.map(jnp.zeros_like, params))

    def update(gradient: Any, state: Momentum, params: Any = None) -> tuple[Any, Momentum]:
        mix = lambda m, g: momentum * m + (1 - momentum) * g  # noqa: E731
        mean = jax.tree.map(mix, state.mean, gradient)
        directions = sharding.map_over_data(partial(jax.tree.map, direction), mesh)
        return _joined(directions(_parted(jax.tree.map(mix, mean, gradient)))), Momentum(mean)

    def direction(x: jax.Array) -> jax.Array:
        return orthogonal(x, steps) * max(1, x.shape[-1] / x.shape[-2]) ** 0.5

    return optax.GradientTransformation(init, update)


def _parted(tree: Any) -> Any:
    """Turn arrays [L, fan_in, ...] into matrices [L, 1 or 3, fan_in, fan_out]: queries, keys and values are three."""
    parts = lambda path: 3 if any(key.key == "qkv" for key in path) else 1  # noqa: E731
    split = lambda path, x: x.reshape(*x.shape[:2], parts(path), -1).swapaxes(1, 2)  # noqa: E731
    return jax.tree_util.tree_map_with_path(split, tree)


def _joined(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1), tree)
