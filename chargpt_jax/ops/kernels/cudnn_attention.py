"""Causal attention without dropout by cuDNN's fused kernels, through JAX."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from chargpt_jax.ops.dropout import NONE, Dropout
from chargpt_jax.ops.plain import SAVED

DTYPES = (jnp.bfloat16, jnp.float16)
"""Dtypes of queries, keys and values that cuDNN accepts."""

MAX_WIDTH, WIDTH_MULTIPLE = 128, 8
"""The widest head on every GPU from compute capability 8.0 on, and the number that divides its width."""


def cudnn_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, seeds: jax.Array | None = None, how: Dropout = NONE
) -> jax.Array:
    """Attend to the past as `plain.attention` does without dropout.

    Args:
        q, k, v: [B, H, T, D], of one of DTYPES.
        seeds: not used.
        how: dropout, whose rate must be 0.

    Returns:
        [B, H, T, D], of the inputs' dtype.
    """
    assert not how.rate
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # cuDNN's order is [B, T, H, D]
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return checkpoint_name(out.swapaxes(1, 2), SAVED)
