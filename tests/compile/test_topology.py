"""Names of topologies, and what is said where one is unknown or its compiler is missing."""

import importlib.util
import os
import subprocess
import sys

import jax
import pytest

from chargpt_jax.compile.accelerators import GPUS
from chargpt_jax.compile.topology import TOPOLOGIES, open_topology
from chargpt_jax.errors import UserError

needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="JAX's CUDA plugin is not installed here"
)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU's compiler, is not installed here"
)


@pytest.fixture
def no_compilers(monkeypatch):
    for name in ("libtpu", "jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"):
        monkeypatch.setitem(sys.modules, name, None)
    before = dict(os.environ), jax.config.jax_platforms
    yield
    os.environ.clear()
    os.environ.update(before[0])
    jax.config.update("jax_platforms", before[1])


@pytest.mark.parametrize("name", ["h300", "8", "", "gpu", "cpu", "-v5e:2x4", "h1000", "x" * 500])
def test_unknown_topology_is_rejected_with_all_known_ones(name, no_compilers):
    with pytest.raises(UserError) as raised:
        open_topology(name)
    message = str(raised.value)
    assert message.startswith(f"--topology is {name[:80]!r}, but it must be one of h100, ")
    assert all(known in message for known in (*GPUS, *TOPOLOGIES))
    assert len(message) < 700


@pytest.mark.parametrize("name", ["h100:0", "h100:17", "h100:two", "h100:2x4", "h100:1.5", "h100:-1", "h100:²"])
def test_number_of_gpus_is_checked(name, no_compilers):
    with pytest.raises(UserError, match=r"the number of GPUs must be from 1 to 16: use h100:8, for example\."):
        open_topology(name)


@pytest.mark.parametrize("name", [*GPUS, "H100", "t4:2"])
def test_missing_cuda_plugin_is_an_error_with_a_fix(name, no_compilers):
    with pytest.raises(UserError, match=r'CUDA plugin .* is not installed: pip install "chargpt_jax\[cuda12\]"\.'):
        open_topology(name)


@pytest.mark.parametrize("name", ["v5e:2x4", "v6e:1x1", "tpu7x:2x2x1"])
def test_missing_libtpu_is_an_error_with_a_fix(name, no_compilers):
    before = dict(os.environ), jax.config.jax_platforms
    with pytest.raises(UserError, match=r"libtpu, which is not installed: pip install libtpu, in the version .* names"):
        open_topology(name)
    assert (dict(os.environ), jax.config.jax_platforms) == before


def in_another_process(name: str) -> list[str]:
    """Open a topology: number of devices, their kind, their platform, whether figures are known."""
    code = "from chargpt_jax.compile.topology import open_topology\n"
    code += f"t = open_topology({name!r})\n"
    code += "print(len(t.devices), t.kind, t.devices[0].platform, t.accelerator is not None, sep='|')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    return done.stdout.strip().splitlines()[-1].split("|")


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize("name", [*GPUS, "h100:8"])
def test_gpu_topology_has_devices_without_a_gpu(name):
    gpu, _, count = name.partition(":")
    assert in_another_process(name) == [count or "1", GPUS[gpu].name, "gpu", "True"]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_tpu_topology_has_devices_without_a_tpu(name):
    count, kind, platform, known = in_another_process(name)
    version, _, shape = name.partition(":")
    chips = 1
    for length in shape.split("x"):
        chips *= int(length)
    assert int(count) == chips * (2 if version == "v3" else 1)
    assert kind.startswith("TPU v")
    assert (platform, known) == ("tpu", "True")
