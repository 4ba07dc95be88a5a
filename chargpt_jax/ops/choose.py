"""The choice of operations: the only file outside devices/ that asks which device a program is for.

To add a fast operation: write it in a file of ops/, choose it here, and add it to the tests that compare every choice
with `plain.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from chargpt_jax.devices.platform import on_cpu, writing_options
from chargpt_jax.ops import blockwise_attention, cpu_decode, cpu_kv_cache, kv_cache, plain, rounded_matmul
from chargpt_jax.ops.cpu_kv_cache import BlockedKVCache, CpuKVCache
from chargpt_jax.ops.kv_cache import KVCache
from chargpt_jax.ops.matmul import deterministic_lookup
from chargpt_jax.ops.plain import Ops


def ops_for(dtype: DTypeLike = jnp.float32, query_block: int = 64, platform: str | None = None) -> Ops:
    """Return the fastest operations for a device.

    Args:
        dtype: of matrix multiplications.
        query_block: queries whose attention scores are in memory together.
        platform: 'cpu', or that of an accelerator; None: JAX's default.
    """
    return _ops(jnp.dtype(dtype), query_block, on_cpu(platform))


@functools.cache
def _ops(dtype: Any, query_block: int, cpu: bool) -> Ops:
    wide = jnp.promote_types(dtype, jnp.float32)
    if not cpu:
        return Ops(
            activations=dtype,
            residual=wide,
            embedding_lookup=_lookup,
            attention=blockwise_attention.attention_in_blocks(query_block, chunked=False),
            query_attention=kv_cache.query_attention,
        )
    full_precision = dtype == wide
    return Ops(
        activations=wide,
        residual=wide,
        embedding_lookup=_lookup,
        linear=cpu_decode.linear if full_precision else functools.partial(rounded_matmul.rounding_linear, dtype=dtype),
        unembed=plain.unembed if full_precision else functools.partial(rounded_matmul.rounding_unembed, dtype=dtype),
        attention=blockwise_attention.attention_in_blocks(query_block, chunked=True),
        query_attention=cpu_kv_cache.query_attention,
        decode_layers=_cpu_decode_layers if full_precision else plain.decode_layers,
        cache_type=_cpu_cache_type if full_precision else _cpu_lockstep_cache,
    )


def jit_for_generation(mesh: Any = None, platform: str | None = None) -> Callable[..., Callable[..., Any]]:
    """Return jax.jit, or what replaces it, with XLA's options for generation on the devices of a mesh or a platform."""
    if mesh is not None:
        platform = mesh.devices.flat[0].platform
    return _jit(cpu_decode.FusedJit if on_cpu(platform) else jax.jit, platform or jax.default_backend())


@functools.cache
def _jit(jit: Callable[..., Callable[..., Any]], platform: str) -> Callable[..., Callable[..., Any]]:
    return functools.partial(jit, compiler_options=writing_options(platform))


def _lookup(table: jax.Array, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
    return deterministic_lookup(table.astype(dtype), ids)


def _cpu_decode_layers(layer: plain.Layer, blocks: Any, carry: Any) -> Any:
    """Leave the matrices in their stack if there is one row to multiply them with."""
    one_row = len(carry[0]) == 1
    return (cpu_decode.layers_in_place if one_row else plain.decode_layers)(layer, blocks, carry)


def _cpu_cache_type(sequences: int, elements: int, parameters: int) -> type[KVCache]:
    alone = cpu_decode.generates_one_by_one(sequences, elements, parameters)
    return BlockedKVCache if alone and cpu_decode.fusion_available() else CpuKVCache


def _cpu_lockstep_cache(sequences: int, elements: int, parameters: int) -> type[KVCache]:
    return CpuKVCache
