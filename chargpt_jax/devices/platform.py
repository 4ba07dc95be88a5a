"""What a program may do on a platform: the dtype of its matrix products, and the options for XLA."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from chargpt_jax.config import AmpConfig
from chargpt_jax.errors import UserError

DTYPES: dict[str, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


GPUS = ("gpu", "cuda", "rocm")
"""What JAX calls the platform of a GPU."""


BFLOAT16_ON_CPU = (0, 9, 0)
"""The first JAX found to multiply bfloat16 into float32 on a CPU; 0.8.0 refuses when the program runs."""


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
