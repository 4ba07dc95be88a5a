"""`--mode=compile`, on a CPU that takes the place of an accelerator, and with the compilers that are installed."""

import itertools
import json
import math
import re
import subprocess
import sys

import pytest

from chargpt_jax.compile import compiled, mode
from chargpt_jax.compile.accelerators import GPUS
from chargpt_jax.compile.programs import programs
from chargpt_jax.errors import UserError
from chargpt_jax.main import main
from tests.compile.test_least_bytes import small
from tests.compile.test_topology import needs_cuda, needs_libtpu

NAMES = ["training", "validation", "prefill", "decoding"]


@pytest.fixture
def on_cpu(cpu, monkeypatch):
    """Let the mode compile training and validation for the CPU; generation on a CPU is compiled in another way."""
    made = {"topology": cpu()}
    monkeypatch.setattr(mode, "open_topology", lambda name: made["topology"])
    two = lambda config, devices: itertools.islice(programs(config, devices), 2)  # noqa: E731
    monkeypatch.setattr(compiled, "programs", two)
    return made


def test_report_has_one_block_per_program_and_the_result(cpu, on_cpu, training):
    on_cpu["topology"] = cpu(2 * training.total)
    lines, results = [], []
    mode.compile_config(small(n_layer=1), "cpu", True, lines.append, results.append)
    text = "\n".join(lines)
    assert lines[0].startswith("Compiling for cpu (1 x cpu) without a TPU. This proves that the steps compile")
    assert lines[2] == "Attention of training steps: blocks."
    for name in NAMES[:2]:
        assert re.search(rf"^{name}: compiled for 1 x cpu of cpu in [\d.]+ s; per device [\d.]+ MB of arg", text, re.M)
    for words in ("\n    fits: ", "reads and writes at least", "a bound, not a prediction"):
        assert text.count(words) == 2
    assert text.count("\n    per training step: ") == text.count("\n    per batch: ") == 1
    (result,) = results
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["attention"] == "blocks"
    assert [program["name"] for program in result["programs"]] == NAMES[:2]
    largest = result["largest_batch"]
    assert lines[-1].startswith(f"largest batch that fits: data.batch_size={largest['batch_size']}, ")
    assert f"{largest['next_batch_size']} does not fit (both were compiled)" in lines[-1]


@pytest.mark.slow
def test_search_is_left_out_if_asked(on_cpu):
    lines, results = [], []
    mode.compile_config(small(n_layer=1), "cpu", False, lines.append, results.append)
    assert results[0]["largest_batch"] is None
    assert not [line for line in lines if "largest" in line]


@pytest.mark.slow
def test_training_that_does_not_fit_is_an_error_with_the_largest_batch(cpu, on_cpu, training):
    on_cpu["topology"] = cpu(training.total - 1)
    results = []
    with pytest.raises(
        UserError, match=r"training does not fit into cpu: lower data.batch_size to [123]\. It does not"
    ):
        mode.compile_config(small(n_layer=1), "cpu", True, lambda line: None, results.append)
    assert [program["fits"] for program in results[0]["programs"]] == [False, True]


@pytest.mark.slow
def test_model_that_no_batch_size_makes_fit_is_an_error(cpu, on_cpu, training):
    on_cpu["topology"] = cpu(training.arguments)
    lines = []
    with pytest.raises(
        UserError, match="training does not fit into cpu: .* choose a smaller model: no batch size fits"
    ):
        mode.compile_config(small(n_layer=1), "cpu", True, lines.append)
    assert lines[-1] == "largest batch that fits: none; data.batch_size=1 does not fit"


@pytest.mark.slow
def test_unknown_figures_leave_out_bound_and_search(cpu, on_cpu):
    on_cpu["topology"] = cpu(accelerator=None)
    lines = []
    mode.compile_config(small(n_layer=1), "cpu", True, lines.append)
    assert not [line for line in lines if "roofline" in line or "largest" in line]


@pytest.mark.slow
def test_json_prints_one_object_and_the_report_to_stderr(on_cpu, capsys):
    sizes = [f"--config.model.{name}=16" for name in ("n_embd", "n_ff", "block_size", "attention_block")]
    line = ["chargpt", "--config=tiny", "--mode=compile", "--largest_batch=false", "--json", *sizes]
    assert main(line) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert (result["topology"], result["devices"]) == ("cpu", 1)
    assert result["programs"][0]["bound_seconds"] > 0
    assert "Compiling for cpu" in err


@pytest.mark.parametrize("flag", ["--topology=t4", "--largest_batch=false"])
def test_flags_belong_to_compile_only(flag, capsys):
    assert main(["chargpt", "--config=tiny", "--mode=train", flag]) == 2
    assert "does not apply to --mode=train: use it with --mode=compile." in capsys.readouterr().err


def command(*flags: str) -> subprocess.CompletedProcess[str]:
    """Run --mode=compile in another process: libtpu cannot be unloaded."""
    words = [sys.executable, "-m", "chargpt_jax.main", "--config=tiny", "--mode=compile", *flags]
    return subprocess.run(words, capture_output=True, text=True, timeout=600)


SMALLER = ("--config.model.n_layer=1", "--config.model.block_size=64", "--config.sample.max_new_tokens=20")


@needs_libtpu
@pytest.mark.slow
def test_compile_mode_reports_memory_of_a_tpu():
    done = command(*SMALLER, "--largest_batch=false")
    assert done.returncode == 0, done.stderr
    assert "it does not run them" in done.stdout.splitlines()[0]
    programs_in_words = [line for line in done.stdout.splitlines() if ": compiled for " in line]
    for name, line, used in zip(NAMES, programs_in_words, (8, 8, 1, 1), strict=True):
        shown = rf"{name}: compiled for {used} x TPU v5 lite of v5e:2x4 in [\d.]+ s; per device ([\d.]+) MB of arg"
        assert float(re.match(shown, line)[1]) > 0
    assert re.search(r"\n    per training step: \d+ fusions, \d+ custom calls?; ", done.stdout)
    assert re.search(r"\n    collectives per training step: 1 all-reduce \([\d.]+ [kM]B\)\n", done.stdout)


@needs_libtpu
def test_unknown_tpu_topology_is_rejected_with_known_ones():
    done = command("--topology=v5e-8")
    assert done.returncode == 2
    assert "--topology is 'v5e-8', but libtpu knows v5e:1x1" in done.stderr
    assert len(done.stderr.splitlines()) <= 5


@needs_libtpu
@pytest.mark.slow
def test_model_larger_than_the_memory_is_rejected():
    done = command("--topology=v5e:1x1", "--config.model.n_embd=8192", "--config.model.n_ff=32768")
    assert done.returncode == 2
    assert "training does not fit into v5e:1x1" in done.stderr
    assert "RESOURCE_EXHAUSTED" in done.stderr


@needs_libtpu
@pytest.mark.slow
def test_batch_for_a_part_of_a_large_slice_is_rejected():
    done = command("--topology=v5e:16x16")
    assert done.returncode == 2
    assert "training uses 16 of the 256 devices of v5e:16x16" in done.stderr


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize("topology", [*GPUS, "h100:2"])
def test_compile_mode_counts_kernels_of_a_gpu(topology):
    done = command(*SMALLER, f"--topology={topology}", "--largest_batch=false", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    training = result["programs"][0]
    assert result["device"] == GPUS[topology.partition(":")[0]].name
    assert [program["name"] for program in result["programs"]] == NAMES
    for program in result["programs"]:
        assert program["fits"]
        assert program["instructions"] >= program["fusions"] > 10
        assert 0 < program["bound_seconds"] < 1e-3
        assert math.isclose(
            program["bound_seconds"], max(program["bound_seconds_of_flop"], program["bound_seconds_of_bytes"])
        )
    assert (training["collectives"] != {}) == (topology == "h100:2")


@needs_cuda
@pytest.mark.slow
def test_more_layers_of_a_gpu_program_are_more_kernels():
    def kernels(layers: int) -> int:
        flags = (*SMALLER[1:], f"--config.model.n_layer={layers}", "--topology=t4", "--largest_batch=false", "--json")
        done = command(*flags)
        return json.loads(done.stdout)["programs"][0]["instructions"]

    assert kernels(3) + 100 < kernels(5) < kernels(7) - 100


@needs_cuda
@pytest.mark.slow
def test_mesh_of_the_config_shards_the_parameters():
    def training(*flags: str) -> dict:
        done = command(*SMALLER, "--topology=t4:4", "--largest_batch=false", "--json", *flags)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["programs"][0]

    replicated, sharded = training(), training("--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    assert sharded["devices"] == replicated["devices"] == 4
    assert sharded["least_bytes"]["parameters"] < replicated["least_bytes"]["parameters"] / 2
    assert sharded["argument_bytes"] < replicated["argument_bytes"]
    assert sum(kind["count"] for kind in sharded["collectives"].values()) > 1
