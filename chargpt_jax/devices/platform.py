"""The choices that depend on the platform: the dtype of matrix multiplications, and XLA compiler options."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from chargpt_jax.config import AmpConfig
from chargpt_jax.errors import UserError

DTYPES: dict[str, DTypeLike] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}

Options = dict[str, str | int | bool]
"""XLA compiler options, as jax.jit takes them."""

GPUS = ("gpu", "cuda", "rocm")
"""JAX's names for the platform of a GPU."""

BFLOAT16_ON_CPU = (0, 9, 0)
"""The first JAX version that was found to multiply bfloat16 into float32 on a CPU; 0.8.0 fails at run time."""


def compute_dtype(amp: AmpConfig, device: jax.Device | None = None) -> DTypeLike:
    """Return the dtype of matrix multiplications.

    TPU: bfloat16. GPU: bfloat16 from compute capability 8.0 (Ampere) on, float16 before (the T4 is 7.5). CPU: float32.

    Args:
        amp: the config section; a dtype other than 'auto' is used as it is.
        device: a JAX device; None: the first local device.

    Raises:
        UserError: for bfloat16 on a CPU if the JAX version does not support it.
    """
    if not amp.enabled:
        return jnp.float32
    device = jax.local_devices()[0] if device is None else device
    if amp.dtype == "bfloat16" and device.platform == "cpu" and jax.__version_info__ < BFLOAT16_ON_CPU:
        raise UserError(
            f"amp.dtype is 'bfloat16', but jax {jax.__version__} cannot multiply that on a CPU: use 'float32' (as fast "
            "there), or jax 0.9 or newer."
        )
    if amp.dtype != "auto":
        return DTYPES[amp.dtype]
    if device.platform == "tpu":
        return jnp.bfloat16
    if device.platform in GPUS:
        capability = float(getattr(device, "compute_capability", "8.0"))
        return jnp.bfloat16 if capability >= 8 else jnp.float16
    return jnp.float32


def cuda_capability(device: jax.Device) -> float:
    """Return an NVIDIA GPU's compute capability, such as 8.0; 0.0 for other devices."""
    try:
        return float(getattr(device, "compute_capability", 0.0)) if device.platform in GPUS else 0.0
    except ValueError:  # an AMD GPU's is 'gfx90a', for example
        return 0.0


def on_cpu(platform: str | None) -> bool:
    """Return whether a platform is a CPU; None: JAX's default platform."""
    return (platform or jax.default_backend()) == "cpu"


ON_CPU: Options = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_cpu_use_fusion_emitters": False,
}
"""XLA compiler options for training steps, validation and initialisation on a CPU.

- Memory-optimised scheduling: the default order runs instructions concurrently, so devices that share the cores wait
  for each other (training steps take up to 1.35x as long).
- No MLIR emitters: they take longer and more than a MiB per kernel, for kernels that are no faster here.

Options that this XLA version does not know are dropped.
"""


ON_GPU: Options = {"xla_gpu_deterministic_ops": True}
"""The same for a GPU: deterministic kernels, chosen without autotuning, so that a resumed run, which is compiled again,
is bit-identical to an uninterrupted one."""


WITHOUT_GPU: Options = {"xla_gpu_autotune_level": 0}
"""For compiling for a GPU that is not there: autotuning would run kernels to compare them."""

WRITING_ON_CPU: Options = {"xla_cpu_prefer_vector_width": 512, "xla_backend_optimization_level": 1}
"""XLA compiler options for generation on a CPU; other platforms have none.

- The widest vectors that the CPU has; the default is half of them.
- Less unrolling: XLA would fully unroll the short loops of a small model, and then not vectorise them.
"""


def compiler_options(mesh: Mesh) -> Options | None:
    """Return the XLA compiler options for training on a mesh, for jax.jit's compiler_options."""
    platform = mesh.devices.flat[0].platform
    options = ON_CPU if platform == "cpu" else ON_GPU if platform in GPUS else {}
    return dict(_known(tuple(options.items()))) or None


def writing_options(platform: str) -> Options | None:
    """Return the XLA compiler options for generation on a platform, for jax.jit's compiler_options."""
    return dict(_known(tuple(WRITING_ON_CPU.items()))) or None if platform == "cpu" else None


@functools.cache
def _known(options: tuple[tuple[str, str | int | bool], ...]) -> tuple[tuple[str, str | int | bool], ...]:
    """Return the options that this XLA version knows; an unknown option is an error."""
    # First all at once, since each try takes 0.05 s.
    if not options or _accepted(options):
        return options
    return tuple(option for option in options if _accepted((option,)))


def _accepted(options: tuple[tuple[str, str | int | bool], ...]) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options=dict(options)).lower().compile()
    except RuntimeError:
        return False
    return True
