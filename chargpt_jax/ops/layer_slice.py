"""A layer's matrix that stays in the stack of all layers, for the product of one row.

A loop over layers cuts each matrix out of its stack, and XLA writes a copy, since its products take whole arrays. Where
many rows are multiplied by it that is nothing. For one row it takes longer than the product: on a CPU two thirds of a
character's time in a model of ten million parameters.
"""

import math
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp

from chargpt_jax.devices.platform import on_cpu
from chargpt_jax.ops.matmul import product

MOST_TERMS, IN_KERNEL = 16, 4
"""How many products of two numbers are summed in one kernel; the sums of so many are then added by another.

Where all is one kernel it costs nothing to begin another sum, and to read fewer rows at once is quicker.
"""

ROWS = 1 if jax.__version_info__ >= (0, 10, 2) else 2
"""How many equal rows of ones add them: by one alone XLA up to jax 0.10.1 makes them anew, a number at a time, seven
times as slowly in a model of ten million parameters; by two later ones take a seventh longer in a small model."""


class OfStack:
    """Matrix `number`, an int32 scalar, of a stack [L, C, F]."""

    def __init__(self, stack: jax.Array, number: jax.Array, terms: int = MOST_TERMS):
        """Name the matrix, without taking it out; `terms` as MOST_TERMS has them, at most."""
        self.stack, self.number, self.terms = stack, number, terms

    def __getitem__(self, _: Any) -> "OfStack":
        """Return the matrix itself, since a parameter's value is asked for as parameter[...]."""
        return self

    def times(self, row: jax.Array) -> jax.Array:
        """Multiply a row [1, C] of the stack's dtype by the matrix: [1, F].

        The sums are written out, so that the kernel that adds reads the matrix where it is.
        """
        L, C, F = self.stack.shape
        terms = math.gcd(C, self.terms)
        parts, x = self.stack.reshape(L, -1, terms, F), row.reshape(-1, terms, 1)
        number, size = jnp.asarray(self.number, int), (1, C // terms, 1, F)
        matrix = (jax.lax.dynamic_slice(parts, (number, 0, i, 0), size)[0, :, 0] for i in range(terms))
        sums = reduce(jnp.add, (x[:, i] * rows for i, rows in enumerate(matrix)))
        return product("nc,cf->nf", jnp.ones((ROWS, len(sums)), sums.dtype), sums)[:1]


def leaves_in_stack(rows: int, dtype: Any, platform: str | None) -> bool:
    """Say whether matrices are left in their stack: by a CPU, for one row, where products are float32 or wider.

    Args:
        rows: how many are multiplied by each matrix.
        dtype: of the products.
        platform: that the program is made for, 'cpu' or another; None: JAX's default.
    """
    return rows == 1 and jnp.finfo(dtype).bits >= 32 and on_cpu(platform)
