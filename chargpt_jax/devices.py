"""One readable rule by platform: the dtype to compute in, the mesh, the compilation cache."""

import contextlib
import functools
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from chargpt_jax.config import AmpConfig, UserError

DTYPES: dict[str, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


GPUS = ("gpu", "cuda", "rocm")
"""What JAX calls the platform of a GPU."""


BFLOAT16_ON_CPU = (0, 9, 0)
"""The first JAX found to multiply bfloat16 into float32 on a CPU; 0.8.0 refuses when the program runs."""


WHOLE, PART = 2**20, 2**18
"""On a CPU an array of up to WHOLE bytes is worked on at once, a larger one by PART bytes, which a core keeps close."""


MOST_CORES = 8
"""A CPU counts as one device a core, up to so many; the rest serve them all."""


LEAST_SHARED = 2**17
"""Numbers in an array at least, for each device to hold a part of it only: to bring parts together takes time too."""


def use_every_core() -> None:
    """Let a CPU count as one device a core, which share a batch: a core works faster on rows of its own.

    Without effect once JAX has started its devices, or where XLA_FLAGS or JAX_NUM_CPU_DEVICES say how many there are.
    """
    said = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if said or getattr(jax.config, "jax_num_cpu_devices", -1) >= 0:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Refused where JAX has started: then there are as many as there are.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", min(cores, MOST_CORES))


def compute_dtype(amp: AmpConfig, device: Any = None) -> Any:
    """Choose the dtype of matrix products.

    TPU: bfloat16. GPU: bfloat16 from compute capability 8.0 (Ampere) on, float16 before (the T4 is 7.5). CPU: float32.

    Args:
        amp: as configured; a dtype other than 'auto' is taken as it is.
        device: a JAX device; None: the first one.

    Raises:
        UserError: for bfloat16 on a CPU with a JAX that cannot multiply it.
    """
    if not amp.enabled:
        return jnp.float32
    device = jax.local_devices()[0] if device is None else device
    if amp.dtype == "bfloat16" and device.platform == "cpu" and jax.__version_info__ < BFLOAT16_ON_CPU:
        raise UserError(
            f"amp.dtype is 'bfloat16', but jax {jax.__version__} cannot multiply that on a CPU: take 'float32' (no "
            "slower there), or jax 0.9 or newer."
        )
    if amp.dtype != "auto":
        return DTYPES[amp.dtype]
    if device.platform == "tpu":
        return jnp.bfloat16
    if device.platform in GPUS:
        capability = float(getattr(device, "compute_capability", "8.0"))
        return jnp.bfloat16 if capability >= 8 else jnp.float16
    return jnp.float32


def on_cpu(platform: str | None) -> bool:
    """Say whether a program that is made for a platform, None: JAX's default, is made for a CPU."""
    return (platform or jax.default_backend()) == "cpu"


def by_parts(f: Callable[..., Any], row_bytes: int, arrays: Any, platform: str | None = None) -> Any:
    """Call f on arrays [B, H, ...], whose B x H rows do not concern each other.

    CPU: where f's temporaries would leave the cache, on some rows after the others, as arrays [rows, 1, ...]. TPU,
    GPU: on all at once.

    Args:
        f: from arrays [B, H, ...] to a tuple of arrays [B, H, ...].
        row_bytes: what one row takes in the largest of f's temporaries.
        arrays: a tuple of arrays, or None.
        platform: that the program is made for, 'cpu' or another; None: JAX's default. Said by the caller, since
            jax.lax.platform_dependent would trace both ways, a quarter of the tracing of a training step.
    """
    B, H = arrays[0].shape[:2]
    parts = parts_of(B * H, row_bytes) if on_cpu(platform) else 1
    if parts == 1:
        return f(*arrays)
    # Every parts-th row makes a part, so that each device of a mesh holds a share of every part.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, 1, *x.shape[2:]).swapaxes(0, 1), arrays)
    done = jax.lax.map(lambda part: f(*part), split)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, H, *x.shape[3:]), done)


def parts_of(rows: int, row_bytes: int) -> int:
    """Return into how many equal parts a CPU divides its work on so many rows: as few as fit into its cache."""
    if rows * row_bytes <= WHOLE:
        return 1
    return next(n for n in range(1, rows + 1) if rows % n == 0 and (rows // n * row_bytes <= PART or n == rows))


def data_mesh(batch_size: int, devices: list[Any] | None = None, tell: bool = True) -> Mesh:
    """Make the mesh that shares a batch, one axis named 'data': as many local devices as divide it evenly.

    Their number also divides that of all devices: a TPU's all-reduce needs that. `tell`: log where some stay idle.
    """
    devices = jax.local_devices() if devices is None else devices
    count = math.gcd(batch_size, len(devices))
    if tell and count < len(devices) and devices[0].platform != "cpu":
        logging.getLogger(__name__).warning("%d sequences share %d of %d devices", batch_size, count, len(devices))
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device holds whole: parameters and the corpus."""
    return NamedSharding(mesh, PartitionSpec())


def share(mesh: Mesh, x: Any) -> NamedSharding:
    """Return the sharding of what each device holds a part of, for an array or shape.

    It is cut along the first axis that the devices divide evenly. A small one, or one without such an axis, is whole.
    """
    axes = [axis for axis, length in enumerate(x.shape) if length % mesh.size == 0]
    if mesh.size == 1 or x.size < LEAST_SHARED or not axes:
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*[None] * axes[0], "data"))


def in_shares(mesh: Mesh | None, tree: Any) -> Any:
    """Inside jit, let each device work on its part of every array that `share` cuts; None: leave the tree alone."""
    return tree if mesh is None else jax.tree.map(lambda x: _laid(x, share(mesh, x), mesh), tree)


def whole(mesh: Mesh | None, tree: Any) -> Any:
    """Inside jit, let every device have the whole of every array that `share` cuts; None: leave the tree alone."""
    return tree if mesh is None else jax.tree.map(lambda x: _laid(x, replicated(mesh), mesh), tree)


def _laid(x: jax.Array, how: NamedSharding, mesh: Mesh) -> jax.Array:
    # What is never cut is whole already, and to say so of every small array makes a start longer.
    return x if share(mesh, x).is_fully_replicated else jax.lax.with_sharding_constraint(x, how)


def lying(shardings: Any, tree: Any) -> Any:
    """Return the shapes of a tree of arrays or shapes, said to lie as a tree of shardings, or one for all, has it."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda x, how: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=how), tree, shardings)


def shared(mesh: Mesh, batch: Any) -> Any:
    """Inside jit, split a batch's leading axis over the mesh."""
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, PartitionSpec("data")))


def summed(f: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Let each device of a mesh call f(whole, rows) on rows of its own; bring the results together once.

    Left to itself the compiler would sum the gradient of each layer inside the loop over layers, and the devices would
    wait for each other there.

    Args:
        f: returns two trees, of which the first is summed over the devices and the second's least is taken.
        mesh: as of `data_mesh`; `rows` are split over it, `whole` is what every device holds.
    """
    if mesh.size == 1:
        return f

    def on_each(whole: Any, rows: Any) -> Any:
        sums, least = f(whole, rows)
        least = jax.tree.map(lambda x: jax.lax.pmin(x.astype(jnp.float32), "data").astype(x.dtype), least)
        return jax.lax.psum(sums, "data"), least

    specs = (PartitionSpec(), PartitionSpec("data"))
    return jax.shard_map(on_each, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)


def divided(f: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """Let each device of a mesh call f on some rows of a tree of arrays.

    Of results whose rows the devices divide evenly each keeps its own, of the others every device has all.

    Args:
        f: of a tree of arrays whose rows do not concern each other, to one of as many rows.
        mesh: as of `data_mesh`; None: one device does it all.
    """
    if mesh is None or mesh.size == 1:
        return f

    def shared_out(tree: Any) -> Any:
        # Zeros make up for rows that are lacking.
        even = jax.tree.map(lambda x: jnp.pad(x, ((0, -len(x) % mesh.size), *((0, 0),) * (x.ndim - 1))), tree)
        made = jax.shard_map(f, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))(even)
        everywhere = lambda y: jax.lax.with_sharding_constraint(y, replicated(mesh))  # noqa: E731
        return jax.tree.map(lambda x, y: y if len(x) % mesh.size == 0 else everywhere(y)[: len(x)], tree, made)

    return shared_out


def describe(mesh: Mesh) -> str:
    """Name the devices in use: '1 x cpu', '8 x TPU v5 lite'."""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}"


ON_CPU: dict[str, Any] = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_cpu_use_fusion_emitters": False,
}
"""What XLA is told when it compiles an update, a validation or a first state for a CPU, where it knows of it.

To take a program's instructions in the order that needs least memory: left alone it takes one by which several can run
at once, and devices that share the cores then wait for each other, up to 1.35 times as long an update. And to write
kernels without MLIR, which takes more than a MiB for each and longer, for kernels that are no faster here.
"""


ON_GPU: dict[str, Any] = {"xla_gpu_deterministic_ops": True}
"""The same for a GPU: to take kernels that add in one order, and always the same ones rather than the quickest of a
race, so that a run that goes on after a crash, compiled anew, has the bits that it would have had."""


WRITING_ON_CPU: dict[str, Any] = {"xla_cpu_prefer_vector_width": 512, "xla_backend_optimization_level": 1}
"""What XLA is told when it compiles the writing of text for a CPU, where it knows of it. Elsewhere nothing is told.

To take the widest vectors, where the CPU has them, and not half of them. And to unroll less: loops over the few dozen
numbers of a small model it would unroll whole, one number after the other, and then find no vectors in them.
"""


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """Return what XLA is told when it compiles for a mesh, in the terms of jax.jit's compiler_options."""
    platform = mesh.devices.flat[0].platform
    options = ON_CPU if platform == "cpu" else ON_GPU if platform in GPUS else {}
    return dict(_known(tuple(options.items()))) or None


def writing_options(platform: str) -> dict[str, Any] | None:
    """Return what XLA is told when it compiles the writing of text for a platform, in the terms of jax.jit."""
    return dict(_known(tuple(WRITING_ON_CPU.items()))) or None if platform == "cpu" else None


@functools.cache
def _known(options: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
    """Return those of these options that this XLA knows: one that it does not know would end the program."""
    # All at once first, since each try takes a twentieth of a second.
    if not options or _taken(options):
        return options
    return tuple(option for option in options if _taken((option,)))


def _taken(options: tuple[tuple[str, Any], ...]) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options=dict(options)).lower().compile()
    except RuntimeError:
        return False
    return True


def use_compilation_cache(folder: Path) -> None:
    """Keep compiled programs in a folder, so that the next start is quick; JAX_COMPILATION_CACHE_DIR goes first."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR") or getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # The small ones too: each is quicker read than compiled.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
