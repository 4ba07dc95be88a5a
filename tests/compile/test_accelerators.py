"""The figures of GPUs and TPUs, and the part of a GPU's memory that JAX uses."""

import re
from types import SimpleNamespace

import pytest

from chargpt_jax.compile.accelerators import FRACTION_VARIABLES, GPUS, TPUS, usable_memory
from chargpt_jax.errors import UserError
from chargpt_jax.model.flops import peak_flops

KINDS = {**{gpu.name: gpu for gpu in GPUS.values()}, **TPUS}


@pytest.fixture(autouse=True)
def no_fraction(monkeypatch):
    for variable in FRACTION_VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize("kind", KINDS)
def test_accelerators_have_a_peak_in_the_dtype_that_they_compute_in(kind):
    capability = getattr(KINDS[kind], "capability", (8, 0))
    assert peak_flops(SimpleNamespace(device_kind=kind), "bfloat16" if capability >= (8, 0) else "float16")


@pytest.mark.parametrize("gpu", [gpu for gpu in GPUS.values() if gpu.capability >= (8, 0)], ids=lambda gpu: gpu.name)
def test_gpus_with_bfloat16_have_the_same_peak_in_float16(gpu):
    device = SimpleNamespace(device_kind=gpu.name)
    assert peak_flops(device, "float16") == peak_flops(device, "bfloat16")


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_bytes_and_not_gigabytes(kind):
    """All known devices have 4 to 200 GB, read in 10 to 100 ms."""
    figures = KINDS[kind]
    assert 4e9 < figures.memory < 2e11
    assert 0.01 < figures.memory / figures.bandwidth < 0.1


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_shared_memory_of_a_block_fits_into_that_of_a_core(gpu):
    assert gpu.shared_per_block <= gpu.shared
    assert gpu.threads % 32 == 0


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_target_has_the_figures(gpu):
    text = gpu.target()
    fields = dict(re.findall(r'(\w+): ("[^"]*"|[\d.]+)', text))
    assert fields["device_description_str"] == f'"{gpu.name}"'
    assert (int(fields["core_count"]), int(fields["device_memory_size"])) == (gpu.cores, gpu.memory)
    assert int(fields["memory_bandwidth"]) == gpu.bandwidth
    assert f"cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}" in text
    assert text.count("{") == text.count("}") == 3


def test_a_gpu_gives_three_quarters_of_its_memory_and_a_tpu_all():
    assert usable_memory(GPUS["h100"]) == 3 * GPUS["h100"].memory // 4
    assert usable_memory(TPUS["TPU v5 lite"]) == TPUS["TPU v5 lite"].memory


@pytest.mark.parametrize("variable", FRACTION_VARIABLES)
def test_fraction_of_the_environment_counts_for_gpus_only(variable, monkeypatch):
    monkeypatch.setenv(variable, "0.5")
    assert usable_memory(GPUS["t4"]) == GPUS["t4"].memory // 2
    assert usable_memory(TPUS["TPU v4"]) == TPUS["TPU v4"].memory


@pytest.mark.parametrize("text", ["most", "0", "1.5", "-1", "nan"])
def test_invalid_fraction_is_rejected(text, monkeypatch):
    monkeypatch.setenv(FRACTION_VARIABLES[0], text)
    with pytest.raises(UserError, match=f"XLA_CLIENT_MEM_FRACTION is '{text}', but must be a number between 0 and 1"):
        usable_memory(GPUS["t4"])
