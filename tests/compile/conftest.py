"""A CPU device with invented figures, which takes the place of an accelerator."""

from collections.abc import Callable

import jax
import pytest

from chargpt_jax.compile.accelerators import Accelerator
from chargpt_jax.compile.compiled import Compiled, compile_program
from chargpt_jax.compile.programs import programs
from chargpt_jax.compile.topology import Topology
from tests.compile.test_least_bytes import small


@pytest.fixture(scope="package")
def cpu() -> Callable[..., Topology]:
    """cpu(memory, bandwidth, **fields): a topology of one CPU device."""

    def topology(memory: float = 1e12, bandwidth: float = 1e9, **fields) -> Topology:
        own = Topology("cpu", jax.devices()[:1], "cpu", {}, Accelerator(int(memory), bandwidth))
        return own._replace(**fields)

    return topology


@pytest.fixture(scope="package")
def training(cpu) -> Compiled:
    """Training of a small config, as compiled for the CPU."""
    config = small(n_layer=1)
    return compile_program(next(programs(config, jax.devices()[:1])), config, cpu())
