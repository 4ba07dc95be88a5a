"""The choice of operations: the only file outside devices/ that asks which device a program is for.

To add a fast operation: write it in a file of ops/, choose it here, and add it to the tests that compare every choice
with `plain.py`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from chargpt_jax.devices import layout
from chargpt_jax.devices.platform import GPUS, compiler_options, cuda_capability, on_cpu, writing_options
from chargpt_jax.ops import blockwise_attention, cpu_decode, cpu_kv_cache, kv_cache, plain, rounded_matmul
from chargpt_jax.ops.cpu_kv_cache import BlockedKVCache, CpuKVCache
from chargpt_jax.ops.dropout import NONE, Dropout
from chargpt_jax.ops.gpu import decode, layers, operations
from chargpt_jax.ops.kernels import trial
from chargpt_jax.ops.kv_cache import KVCache
from chargpt_jax.ops.matmul import deterministic_lookup
from chargpt_jax.ops.plain import Ops
from chargpt_jax.ops.sharded import sharded

BLOCKS, KERNEL, CUDNN = ATTENTIONS = ("blocks", "kernel", "cudnn")
"""The attentions that training steps can use.

- blocks: blockwise_attention.py, on every device.
- kernel: kernels/attention.py, with dropout inside.
- cudnn: cuDNN's kernels, without dropout.
"""

TOKENS_AT_ONCE = 256
"""Characters in the training steps of the models that a CPU core trains at once, at most."""

MIN_CAPABILITY = 8.0
"""Compute capability of the oldest GPUs (Ampere) that attention kernels are compiled for."""

TPUS_WITHOUT_KERNELS = ("TPU v2", "TPU v3")
"""TPUs whose kernels cannot multiply in bfloat16."""


def ops_for(
    dtype: DTypeLike = jnp.float32,
    query_block: int = 64,
    platform: str | None = None,
    attention: str = BLOCKS,
    mesh: Mesh | None = None,
) -> Ops:
    """Return the fastest operations for a device.

    Args:
        dtype: of matrix multiplications.
        query_block: queries whose attention scores are in memory together.
        platform: 'cpu', or that of an accelerator; None: JAX's default.
        attention: one of ATTENTIONS for training steps, in which seeds are given. Without seeds, as in validation and
            generation, attention is computed in blocks. A CPU interprets the kernel, which only tests need.
        mesh: if it splits the parameters, the operations are those of one of its devices.
    """
    platform = platform or jax.default_backend()
    if platform in GPUS and not layout.splits_parameters(mesh):
        ops = _gpu_ops(jnp.dtype(dtype), query_block)
    else:
        ops = _ops(jnp.dtype(dtype), query_block, on_cpu(platform))
    if attention != BLOCKS:
        ops = _trained_with(ops, attention, platform)
    return sharded(ops, mesh) if layout.splits_parameters(mesh) else ops


def runs_at_once(runs: int, tokens: int, platform: str | None = None) -> int:
    """Return how many models a device trains at once under jax.vmap, a divisor of `runs`.

    An accelerator trains all of them. A CPU core saves no work with several models at once. It saves only the cost of
    starting operations, which matters if a step of one model is very short.

    Args:
        runs: models of the device.
        tokens: characters in a training step of one model.
        platform: as for `ops_for`.
    """
    if not on_cpu(platform):
        return runs
    return max(n for n in range(1, runs + 1) if runs % n == 0 and (n == 1 or n * tokens <= TOKENS_AT_ONCE))


def ops_for_many(dtype: DTypeLike = jnp.float32, query_block: int = 64, platform: str | None = None) -> Ops:
    """Return the fastest operations for several models of one shape in one program, under jax.vmap.

    Under vmap an operation works on the arrays of all models. Operations written for one model's sizes are left out:
    the loop over a few heads at a time on a CPU, and the unrolled layers of a GPU.

    Args:
        dtype: of matrix multiplications.
        query_block: queries whose attention scores are in memory together.
        platform: as for `ops_for`.
    """
    ops = _ops(jnp.dtype(dtype), query_block, on_cpu(platform or jax.default_backend()))
    return dataclasses.replace(ops, attention=blockwise_attention.attention_in_blocks(query_block, chunked=False))


def attentions_for(device: jax.Device, dtype: DTypeLike, length: int, width: int, rate: float) -> tuple[str, ...]:
    """Return the attentions that a device can train with: 'blocks', then those that a trial has to compare with it.

    Args:
        device: of the training.
        dtype: of matrix multiplications.
        length: of the context.
        width: of one head.
        rate: of dropout.
    """
    capable = cuda_capability(device) >= MIN_CAPABILITY
    if not capable and (device.platform != "tpu" or device.device_kind in TPUS_WITHOUT_KERNELS):
        return (BLOCKS,)
    from chargpt_jax.ops.kernels import cudnn_attention  # imports of kernels take time, and a CPU has none
    from chargpt_jax.ops.kernels.tiles import Tiles

    names = [BLOCKS]
    if Tiles(length, width, jnp.dtype(dtype), _compiler(device.platform), Dropout(rate)).supported:
        names.append(KERNEL)
    narrow = width <= cudnn_attention.MAX_WIDTH and width % cudnn_attention.WIDTH_MULTIPLE == 0
    if capable and narrow and not rate and dtype in cudnn_attention.DTYPES:
        names.append(CUDNN)
    return tuple(names)


def try_attentions(
    names: tuple[str, ...], shape: trial.Shape, dtype: DTypeLike, query_block: int, mesh: Mesh
) -> tuple[trial.Tried, ...]:
    """Run attentions on the first device of a mesh, at the shape of a training there; return the results.

    Args:
        names: of ATTENTIONS; the first is 'blocks'.
        shape: of one layer's attention.
        dtype: of matrix multiplications.
        query_block: as for `ops_for`.
        mesh: the devices of the training.
    """
    device = mesh.devices.flat[0]
    candidates = {name: ops_for(dtype, query_block, device.platform, name).attention for name in names}
    exact = ops_for(jnp.float32, query_block, device.platform).attention
    return trial.try_all(candidates, exact, shape, dtype, device, compiler_options(mesh))


@functools.cache
def _trained_with(ops: Ops, attention: str, platform: str) -> Ops:
    from chargpt_jax.ops.kernels.attention import attention_in_kernels
    from chargpt_jax.ops.kernels.cudnn_attention import cudnn_attention

    in_blocks = ops.attention
    in_training = attention_in_kernels(_compiler(platform)) if attention == KERNEL else cudnn_attention

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, seeds: jax.Array | None = None, how: Dropout = NONE
    ) -> jax.Array:
        # XLA cannot split a kernel over devices, and only training steps run in a shard_map, which does.
        return (in_blocks if seeds is None else in_training)(q, k, v, seeds, how)

    return dataclasses.replace(ops, attention=attend)


def _compiler(platform: str) -> str:
    """Return which compiler of Pallas makes a platform's kernels, one of `tiles.COMPILERS`."""
    return {"tpu": "mosaic", "cpu": "interpret"}.get(platform, "triton")


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
    linear = cpu_decode.linear if full_precision else functools.partial(rounded_matmul.rounding_linear, dtype=dtype)
    return Ops(
        activations=wide,
        residual=wide,
        embedding_lookup=_lookup,
        linear=linear,
        linear_out=linear,
        unembed=plain.unembed if full_precision else functools.partial(rounded_matmul.rounding_unembed, dtype=dtype),
        attention=blockwise_attention.attention_in_blocks(query_block, chunked=True),
        query_attention=cpu_kv_cache.query_attention,
        decode_layers=_cpu_decode_layers if full_precision else plain.decode_layers,
        cache_type=_cpu_cache_type if full_precision else _cpu_lockstep_cache,
    )


@functools.cache
def _gpu_ops(dtype: Any, query_block: int) -> Ops:
    return dataclasses.replace(
        _ops(dtype, query_block, cpu=False),
        layer_norm=operations.layer_norm,
        linear=decode.linear,
        linear_out=decode.linear,
        unembed=decode.unembed,
        cache_type=decode.cache_type,
        dropout=operations.dropout,
        rotate=operations.rotate,
        layers=layers.layers_in(dtype),
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
