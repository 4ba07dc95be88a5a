"""Generation on a CPU in one kernel: a loop, branches included, that XLA compiles as one function.

By default XLA:CPU starts each operation of a program separately, which takes 0.1 microseconds. A small model has
hundreds of operations per token that take less than that.

The attribute behind this is undocumented, and XLA aborts the process if it is misused (see `fused`). It is therefore
used only with the JAX versions in `TESTED_JAX`, and never if the environment variable CHARGPT_FUSED_DECODING is 0.
Without it a batch is generated in lockstep by ordinary operations.
"""

import functools
import logging
import math
import os
from collections.abc import Callable
from contextvars import ContextVar
from functools import reduce
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.xla_metadata import set_xla_metadata

from chargpt_jax.ops.matmul import matmul

TESTED_JAX = ("0.7.2", "0.10.2", "0.12.0.1")
"""JAX versions with which the test suite has run fused kernels."""

MAX_PARAMETERS = 2**19
"""Largest model whose single sequence is generated in one kernel: a larger one is faster if all cores share a matmul,
which one kernel cannot do."""

MAX_VOCABULARY = 1024
"""Largest vocabulary for which sampling is a part of the kernel; XLA hands some work on a larger one to a library."""

TERMS, TERMS_IN_KERNEL = 16, 4
"""Products that are summed by one kernel before the next kernel adds the sums of so many.

Within one fused kernel another sum costs nothing, and reading fewer rows at once is faster.
"""

ROWS_OF_ONES = 1 if jax.__version_info__ >= (0, 10, 2) else 2
"""How many equal rows of ones add up the partial sums. With one row XLA up to jax 0.10.1 recomputes the sums element by
element, 7x slower for 10 M parameters; with two rows later versions are 14 % slower for a small model."""

Tree = TypeVar("Tree")

_FUSING = ContextVar("fusing", default=True)


@functools.cache
def fusion_available() -> bool:
    """Return whether fused kernels may be used; logs once if JAX's version forbids it."""
    if os.environ.get("CHARGPT_FUSED_DECODING", "1") == "0":
        return False
    if jax.__version__ in TESTED_JAX:
        return True
    logging.getLogger(__name__).warning(
        "fused decoding has not been tested with jax %s, so generation uses separate operations, which is slower",
        jax.__version__,
    )
    return False


def fused(result: Any) -> Any:
    """Mark the result of a call of a jitted function, inside jit: XLA:CPU compiles the call as one kernel on one core.

    The function must not sort, scatter, or contain an operation large enough for XLA to hand to a library (XLA raises
    UNIMPLEMENTED). Every input and captured array must still affect the result after optimisation, or XLA aborts the
    process; an index into an axis of length 1 counts as unused.
    """
    # XLA puts the first attribute on the smallest of its own loops. The second one keeps the call from being inlined.
    return set_xla_metadata(result, xla_cpu_small_call="true", inlineable="false") if _FUSING.get() else result


def is_fusible(vocab_size: int, sorts: bool) -> bool:
    """Return whether the generation loop can be one kernel: its sampler must not sort, nor the vocabulary be large."""
    return vocab_size <= MAX_VOCABULARY and not sorts and _FUSING.get()


class FusedJit:
    """jax.jit for functions that use `fused`; if XLA refuses to compile one, it is compiled again without fusion.

    Which operations a fused kernel may contain can change with every release of XLA.
    """

    def __init__(self, function: Callable[..., Any], **options: Any):
        """Jit a function of arrays; `options` are those of jax.jit."""
        self.fused = jax.jit(functools.partial(function), **options)
        self.unfused = jax.jit(functools.partial(function), **options)
        self.refused = False

    def __call__(self, *args: Any) -> Any:
        """Call the fused function, or the unfused one if XLA has refused to compile the former."""
        if not self.refused:
            try:
                return self.fused(*args)
            except jax.errors.JaxRuntimeError as error:
                if not str(error).startswith(("UNIMPLEMENTED", "INTERNAL")):
                    raise
            self.refused = True
            logging.getLogger(__name__).warning(
                "this version of XLA cannot compile a full decoding step as one kernel; generation will be slower"
            )
        token = _FUSING.set(False)
        try:
            return self.unfused(*args)
        finally:
            _FUSING.reset(token)


def generates_one_by_one(sequences: int, elements: int, parameters: int) -> bool:
    """Choose between generating sequences one by one, each in one fused kernel, and in lockstep.

    One by one is faster for a single sequence of a small model, and for several if the KV cache of one has more
    elements than the model has parameters: it then stays in the CPU's cache, while in lockstep all KV caches are read
    from memory for every token.

    Args:
        sequences: in the batch.
        elements: keys and values in the cache of one sequence.
        parameters: of the model.
    """
    return parameters <= MAX_PARAMETERS if sequences == 1 else elements > parameters


def sequence_of(batch: Tree, b: jax.Array) -> Tree:
    """Return sequence b of a tree of arrays [B, ...], as arrays [1, ...]; b is an int32 scalar."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, b, 1), batch)


def with_sequence(batch: Tree, b: jax.Array, own: Tree) -> Tree:
    """Return a tree of arrays [B, ...] with sequence b replaced by arrays [1, ...]."""
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, b, 0), batch, own)


class LayerSlice:
    """The matrix of one layer, left in the stack [L, C, F] of all layers, for its product with one row.

    XLA's matrix multiplications take whole arrays, so a loop over layers copies each matrix out of the stack. That is
    negligible for many rows, but for one row it takes longer than the product.
    """

    def __init__(self, stack: jax.Array, layer: jax.Array, terms: int = TERMS):
        """Refer to a matrix without copying it; `layer` is an int32 scalar."""
        self.stack, self.layer, self.terms = stack, layer, terms

    def __getitem__(self, _: Any) -> "LayerSlice":
        """Return the matrix itself: a module reads its parameter's value as parameter[...]."""
        return self

    def times(self, row: jax.Array) -> jax.Array:
        """Multiply a row [1, C], of the stack's dtype, by the matrix: [1, F].

        The sums are written out, so that the kernel that adds reads the matrix where it is.
        """
        L, C, F = self.stack.shape
        terms = math.gcd(C, self.terms)
        parts, x = self.stack.reshape(L, -1, terms, F), row.reshape(-1, terms, 1)
        layer, size = jnp.asarray(self.layer, int), (1, C // terms, 1, F)
        matrix = (jax.lax.dynamic_slice(parts, (layer, 0, i, 0), size)[0, :, 0] for i in range(terms))
        sums = reduce(jnp.add, (x[:, i] * rows for i, rows in enumerate(matrix)))
        return matmul("nc,cf->nf", jnp.ones((ROWS_OF_ONES, len(sums)), sums.dtype), sums)[:1]


def linear(x: jax.Array, kernel: jax.Array | LayerSlice, bias: jax.Array) -> jax.Array:
    """Compute `plain.linear`, also for one row and a matrix that is left in its stack."""
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(kernel, LayerSlice):
        y = kernel.times(rows)
    else:
        y = matmul("rc,cf->rf", rows, kernel.astype(x.dtype), x.dtype)
    return (y.reshape(*x.shape[:-1], -1) + bias).astype(x.dtype)


def layers_in_place(
    layer: Callable[..., Any],
    blocks: nnx.Module,
    carry: Any,
    *,
    fused_kernel: bool = False,
    index_of: Callable[[jax.Array], jax.Array] | None = None,
) -> Any:
    """Compute `plain.decode_layers` for one sequence, with the layers' matrices left in their stack.

    Args:
        layer, blocks, carry: as for `plain.decode_layers`.
        fused_kernel: run all layers as one kernel.
        index_of: from a layer's index to the one that `layer` is called with: where the KV cache holds that layer.
    """
    graphdef, stacked = nnx.split(blocks)
    terms = TERMS_IN_KERNEL if fused_kernel else TERMS

    def body(i: jax.Array, carry: Any) -> Any:
        own = jax.tree.map(lambda x: LayerSlice(x, i, terms) if x.ndim == 3 else x[i], stacked)
        return layer(nnx.merge(graphdef, own), carry, i if index_of is None else index_of(i))[0]

    L = len(jax.tree.leaves(stacked)[0])
    run = functools.partial(jax.lax.fori_loop, 0, L, body)
    return fused(jax.jit(run)(carry)) if fused_kernel and _FUSING.get() else run(carry)
