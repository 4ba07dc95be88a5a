"""Figures of the accelerators to compile for: memory, memory bandwidth, and what XLA must know about a GPU.

Each figure has its source next to it. The peak FLOP/s are in model/flops.py, because training runs use them too.
"""

import dataclasses
import os

from chargpt_jax.errors import UserError

GIB = 2**30

FRACTION_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""Environment variables that set the fraction of a GPU's memory that JAX uses; the second name is the older one."""

DEFAULT_FRACTION = 0.75
"""JAX's default for that fraction; source: "GPU memory allocation" in JAX's documentation."""


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """What limits a program on one device, as JAX counts devices."""

    memory: int
    """Bytes."""
    bandwidth: float
    """Bytes per second between the memory and the chip."""


@dataclasses.dataclass(frozen=True)
class GPU(Accelerator):
    """A GPU, as XLA's compiler needs it described."""

    name: str
    """As CUDA reports it; JAX calls it device_kind."""
    capability: tuple[int, int]
    """CUDA compute capability, major and minor."""
    cores: int
    """Streaming multiprocessors."""
    fpus: int
    """float32 units per core."""
    threads: int
    """Maximum number of threads per core."""
    shared: int
    """Bytes of shared memory per core."""
    shared_per_block: int
    """Bytes of it that one block of threads may request."""
    l2: int
    """Bytes of the L2 cache."""
    clock: float
    """GHz."""

    def target(self) -> str:
        """Return XLA's description of this GPU, a GpuTargetConfigProto in text form."""
        major, minor = self.capability
        device = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 49152,
            "shared_memory_per_core": self.shared,
            "shared_memory_per_block_optin": self.shared_per_block,
            "threads_per_core_limit": self.threads,
            "core_count": self.cores,
            "fpus_per_core": self.fpus,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 65535,
            "block_dim_limit_z": 65535,
            "memory_bandwidth": int(self.bandwidth),
            "l2_cache_size": self.l2,
            "clock_rate_ghz": self.clock,
            "device_memory_size": self.memory,
            "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536,
        }
        fields = " ".join(f"{name}: {value}" for name, value in device.items())
        capability = f"cuda_compute_capability {{ major: {major} minor: {minor} }}"
        cudnn = "dnn_version_info { major: 9 minor: 10 patch: 0 }"
        return (
            f"gpu_device_info {{ {fields} {capability} }} "
            f'platform_name: "CUDA" {cudnn} device_description_str: "{self.name}"'
        )


GPUS = {
    # All figures: xla/backends/gpu/target_config/specs/h100_sxm.txtpb in the repository openxla/xla.
    "h100": GPU(
        memory=84_942_979_072,
        bandwidth=3.35232e12,
        name="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        cores=132,
        fpus=128,
        threads=2048,
        shared=233_472,
        shared_per_block=232_448,
        l2=52_428_800,
        clock=1.98,
    ),
    # All figures: h200.txtpb in the same folder.
    "h200": GPU(
        memory=151_397_597_184,
        bandwidth=4.8e12,
        name="NVIDIA H200 141GB HBM3e",
        capability=(9, 0),
        cores=132,
        fpus=128,
        threads=2048,
        shared=233_472,
        shared_per_block=232_448,
        l2=52_428_800,
        clock=1.98,
    ),
    # All figures: a100_sxm_40.txtpb in the same folder.
    "a100": GPU(
        memory=42_331_013_120,
        bandwidth=1.5552e12,
        name="NVIDIA A100-SXM4-40GB",
        capability=(8, 0),
        cores=108,
        fpus=64,
        threads=2048,
        shared=167_936,
        shared_per_block=166_912,
        l2=41_943_040,
        clock=1.41,
    ),
    # Bandwidth: NVIDIA's data sheet of the L4. Threads and shared memory: CUDA C++ Programming Guide, "Compute
    # Capabilities", column 8.9. The others: as the CUDA runtime reports an L4 (22,574 MiB with ECC).
    "l4": GPU(
        memory=22_574 * 2**20,
        bandwidth=3e11,
        name="NVIDIA L4",
        capability=(8, 9),
        cores=58,
        fpus=128,
        threads=1536,
        shared=102_400,
        shared_per_block=101_376,
        l2=50_331_648,
        clock=2.04,
    ),
    # Bandwidth: NVIDIA's data sheet of the T4. Threads and shared memory: CUDA C++ Programming Guide, column 7.5. The
    # others: as the CUDA runtime reports a T4.
    "t4": GPU(
        memory=15_843_721_216,
        bandwidth=3.2e11,
        name="Tesla T4",
        capability=(7, 5),
        cores=40,
        fpus=64,
        threads=1024,
        shared=65_536,
        shared_per_block=65_536,
        l2=4_194_304,
        clock=1.59,
    ),
}
"""{name for --topology: figures}."""

TPUS = {
    "TPU v2": Accelerator(int(7.48 * GIB), 350e9),
    "TPU v3": Accelerator(int(15.48 * GIB), 450e9),
    "TPU v4": Accelerator(int(30.75 * GIB), 1200e9),
    "TPU v5": Accelerator(int(95.74 * GIB), 2765e9),
    "TPU v5 lite": Accelerator(int(15.75 * GIB), 819e9),
    "TPU v6 lite": Accelerator(int(31.25 * GIB), 1638e9),
}
"""{JAX's device_kind: figures}; of TPU v2 and v3 a device is one core, half a chip.

Memory: what libtpu 0.0.42 calls available when it refuses a program. Bandwidth: Google's Cloud TPU documentation,
"System architecture" of each version.
"""


def usable_memory(accelerator: Accelerator) -> int:
    """Return the bytes that a program can use: of a GPU's memory the fraction that JAX allocates, of a TPU's all.

    Raises:
        UserError: if an environment variable sets the fraction to anything but a number between 0 and 1.
    """
    if not isinstance(accelerator, GPU):
        return accelerator.memory
    for variable in FRACTION_VARIABLES:
        if text := os.environ.get(variable):
            try:
                fraction = float(text)
            except ValueError:
                fraction = -1.0
            if not 0 < fraction <= 1:
                raise UserError(f"{variable} is {text[:80]!r}, but must be a number between 0 and 1: correct it.")
            return int(accelerator.memory * fraction)
    return int(accelerator.memory * DEFAULT_FRACTION)
