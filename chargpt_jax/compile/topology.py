"""From the name of a topology to devices that JAX can compile for, without such a device.

libtpu compiles for TPUs, JAX's CUDA plugin for GPUs. Both are optional packages.
"""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from chargpt_jax.compile.accelerators import GPUS, TPUS, Accelerator, usable_memory
from chargpt_jax.devices.platform import WITHOUT_GPU
from chargpt_jax.errors import UserError

OFFLINE = "TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_WORKER_HOSTNAMES=localhost TPU_ACCELERATOR_TYPE=v4-8"
"""Environment variables without which libtpu queries the network for the machine's type, and prints errors."""

SLICES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
"""The shapes of v5e and v6e slices; source: Google's Cloud TPU documentation."""

ONE_CHIP = {"chips_per_host_bounds": (1, 1, 1)}  # libtpu assumes 2x2 chips per host
TOPOLOGIES: dict[str, dict[str, Any]] = {
    **{f"{version}:{shape}": ONE_CHIP if shape == "1x1" else {} for version in ("v5e", "v6e") for shape in SLICES},
    "v4:2x2x1": {"chip_config_name": "megacore"},  # the two cores of a chip are one device, as in JAX
    **{name: {} for name in ("v5p:2x2x1", "v3:2x2")},
}
"""{some of the TPU topologies that libtpu knows: options that it needs in addition to the name}."""

MAX_GPUS = 16
"""Largest number of GPUs on one host."""


class Topology(NamedTuple):
    """Devices to compile for."""

    name: str
    """As the user gave it."""
    devices: Sequence[Any]
    lowering_platform: str
    """JAX's name for the platform when a program is lowered."""
    compiler_options: dict[str, Any]
    """For XLA, in addition to those of the program."""
    accelerator: Accelerator | None
    """The figures of one device; None: unknown."""

    @property
    def kind(self) -> str:
        """JAX's name for the kind of the devices."""
        return str(self.devices[0].device_kind)

    @property
    def is_gpu(self) -> bool:
        """Whether the devices are GPUs."""
        return self.lowering_platform == "cuda"


def open_topology(name: str) -> Topology:
    """Return the devices of a topology: 'h100' or 'h100:8' (GPUs of one host), 'v5e:2x4' (a TPU slice).

    Raises:
        UserError: if the topology is unknown, or the package that compiles for it is missing.
    """
    gpu, _, count = name.lower().partition(":")
    if gpu in GPUS:
        return _gpus(name, gpu, count)
    if not re.match(r"(tpu|v)\d", name.lower()):
        raise UserError(f"--topology is {name[:80]!r}, but it must be one of {_known()}.")
    return _tpus(name)


def _known() -> str:
    return f"{', '.join(GPUS)} (several GPUs: h100:8), {', '.join(TOPOLOGIES)}"


def _gpus(name: str, gpu: str, count: str) -> Topology:
    if count and not (re.fullmatch(r"[1-9]\d?", count) and int(count) <= MAX_GPUS):
        raise UserError(
            f"--topology is {name[:80]!r}, but the number of GPUs must be from 1 to {MAX_GPUS}: use {gpu}:8, for "
            "example."
        )
    usable_memory(GPUS[gpu])  # raises if the user has set an invalid fraction
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # without it, the plugin logs that there is no GPU
    _without_devices()
    _load_cuda()
    shape = f"1x1x{count or 1}"
    target = GPUS[gpu].target()
    devices = topologies.get_topology_desc(gpu, "cuda", topology=shape, target_config=target).devices
    return Topology(name, devices, "cuda", WITHOUT_GPU, GPUS[gpu])


def _tpus(name: str) -> Topology:
    if importlib.util.find_spec("libtpu") is None:
        fix = f"pip install libtpu, in the version that jax[tpu] names for jax {jax.__version__}"
        raise UserError(f"--mode=compile needs the TPU's compiler, libtpu, which is not installed: {fix}.")
    for variable in OFFLINE.split():
        os.environ.setdefault(*variable.split("="))
    _without_devices()
    try:
        devices = topologies.get_topology_desc(name, "tpu", **TOPOLOGIES.get(name, {})).devices
    except jax.errors.JaxRuntimeError:
        raise UserError(
            f"--topology is {name[:80]!r}, but libtpu knows {', '.join(TOPOLOGIES)} and more; GPUs are "
            f"{', '.join(GPUS)}: choose one of them."
        ) from None
    found = Topology(name, devices, "tpu", {}, None)
    return found._replace(accelerator=TPUS.get(found.kind))


def _without_devices() -> None:
    """Make JAX use the CPU, unless the user has chosen: a plugin without its device would be an error."""
    if not os.environ.get("JAX_PLATFORMS"):  # no effect if JAX is already initialised
        jax.config.update("jax_platforms", "cpu")


def _load_cuda() -> None:
    """Load JAX's CUDA plugin, which JAX itself loads only where it finds a GPU.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import jax_plugins.xla_cuda12 as plugin
    except ImportError:
        try:
            import jax_plugins.xla_cuda13 as plugin
        except ImportError:
            raise UserError(
                "--mode=compile needs JAX's CUDA plugin to compile for a GPU, but it is not installed: "
                'pip install "chargpt_jax[cuda12]".'
            ) from None
    jax.devices()  # may have loaded the plugin already
    try:
        plugin.initialize()
    except jax.errors.JaxRuntimeError as error:
        if "already exists" not in str(error).lower():
            raise
