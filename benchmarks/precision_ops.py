"""Operations in low precision for benchmarks/precision.py: whole models, and one operation at a time.

A whole model in low precision has the operations that an accelerator has (`ops/choose.py`): activations, the inputs of
matrix multiplications and LayerNorm's output are bfloat16 or float16; the residual stream, softmax, sums of matrix
multiplications, logits, parameters and optimizer are float32. On a CPU the arrays have these dtypes too, and XLA
computes each operation in float32 and rounds its result: that is the emulation.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from chargpt_jax.ops import choose, plain
from chargpt_jax.ops.dropout import NONE, Dropout
from chargpt_jax.ops.matmul import matmul
from chargpt_jax.ops.plain import Ops

BLOCK = 64
"""Queries per attention block."""


def whole(dtype: Any) -> Ops:
    """Return the operations of an accelerator that computes in a dtype."""
    return choose.ops_for_many(dtype, BLOCK, platform="tpu")


def rounded_layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, dtype: Any, low: Any) -> jax.Array:
    """Compute `plain.layer_norm` with mean, variance and result in `low`; return `dtype`."""
    x, scale, bias = (each.astype(low) for each in (x, scale, bias))
    mean = jnp.mean(x, axis=-1, dtype=low)[..., None]
    variance = jnp.mean(jax.lax.square(x - mean), axis=-1, dtype=low)[..., None]
    inverse = jax.lax.rsqrt(variance + jnp.asarray(plain.LAYER_NORM_EPSILON, low))
    return ((x - mean) * (inverse * scale) + bias).astype(dtype)


def rounded_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, seeds: Any = None, how: Dropout = NONE, *, low: Any
) -> jax.Array:
    """Compute `plain.attention` without dropout, with queries, keys and scores rounded to `low`."""
    T, D = q.shape[2:]
    scores = (matmul("bhtd,bhsd->bhts", q.astype(low), k.astype(low)) * D**-0.5).astype(low).astype(q.dtype)
    past = jnp.arange(T) <= jnp.arange(T)[:, None]
    weights = jax.nn.softmax(jnp.where(past, scores, -jnp.inf), axis=-1)
    return matmul("bhts,bhsd->bhtd", weights, v)


def rounded_log_softmax(x: jax.Array, table: jax.Array, low: Any) -> jax.Array:
    """Compute `plain.unembed` and then log-softmax in `low`; return float32, which the loss normalises again."""
    return jax.nn.log_softmax(plain.unembed(x, table).astype(low), axis=-1).astype(jnp.float32)


def alone(name: str, low: Any) -> Ops:
    """Return float32 operations with one of ALONE in a low precision."""
    return dataclasses.replace(whole(jnp.float32), **{ALONE[name][0]: partial(ALONE[name][1], low=low)})


ALONE: dict[str, tuple[str, Callable[..., Any]]] = {
    "attention logits": ("attention", rounded_attention),
    "LayerNorm": ("layer_norm", rounded_layer_norm),
    "log-softmax": ("unembed", rounded_log_softmax),
}
"""The field of `Ops` and the function of each operation that is computed in low precision by itself."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to compute a model in training and afterwards."""

    name: str
    ops: Ops
    loss_scaling: bool = False


def variants() -> list[Variant]:
    """Return float32, the whole models in low precision, and the single operations."""
    found = [
        Variant("float32", whole(jnp.float32)),
        Variant("bfloat16", whole(jnp.bfloat16)),
        Variant("float16, loss scaling", whole(jnp.float16), loss_scaling=True),
        Variant("float16, no loss scaling", whole(jnp.float16)),
    ]
    for low in (jnp.bfloat16, jnp.float16):
        found += [Variant(f"{name} in {jnp.dtype(low).name}", alone(name, low)) for name in ALONE]
    return found
