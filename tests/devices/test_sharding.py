"""Dtypes and compiler options by platform, and training on eight devices compared with one.

The eight devices are virtual, in another process: run as a script, this file trains on them and prints the results.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chargpt_jax.config import AmpConfig, ModelConfig
from chargpt_jax.devices import platform, sharding, startup
from chargpt_jax.devices.platform import BFLOAT16_ON_CPU, ON_CPU, compiler_options, compute_dtype
from chargpt_jax.errors import UserError
from chargpt_jax.generation.generate import decode, prefill
from chargpt_jax.generation.sampler import Sampler
from chargpt_jax.ops import blockwise_attention
from chargpt_jax.training import optimizer
from chargpt_jax.training import setup as training_setup
from chargpt_jax.training.dispatch.steps import jit_train_steps
from chargpt_jax.training.run import Run
from chargpt_jax.training.setup import Setup
from chargpt_jax.training.stages import prepare
from tests.corpus_text import write_words
from tests.devices.eight_devices import run_on_eight
from tests.pairing import built


@dataclass(frozen=True)
class Device:
    """The attributes of a device that the rules use."""

    platform: str
    compute_capability: str = ""
    id: int = 0
    device_kind: str = "imaginary"
    process_index: int = 0


RULE = {
    Device("tpu"): jnp.bfloat16,
    Device("gpu", "12.0"): jnp.bfloat16,
    Device("gpu", "9.0"): jnp.bfloat16,
    Device("gpu", "8.0"): jnp.bfloat16,
    Device("gpu", "7.5"): jnp.float16,
    Device("cuda", "7.0"): jnp.float16,
    Device("cpu"): jnp.float32,
}


@pytest.mark.parametrize("device", RULE, ids=lambda device: f"{device.platform}{device.compute_capability}")
def test_the_platform_chooses_the_dtype(device):
    assert compute_dtype(AmpConfig(), device) == RULE[device]


@pytest.mark.parametrize("device", RULE, ids=lambda device: f"{device.platform}{device.compute_capability}")
def test_disabled_amp_means_float32(device):
    assert compute_dtype(AmpConfig(enabled=False, dtype="bfloat16"), device) == jnp.float32


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("platform", ["tpu", "cpu"])
def test_a_dtype_that_is_given_is_taken_on_any_platform(name, platform, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", BFLOAT16_ON_CPU)
    assert compute_dtype(AmpConfig(dtype=name), Device(platform)) == jnp.dtype(name)


def test_bfloat16_on_cpu_is_rejected_with_old_jax(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 8, 0))
    with pytest.raises(UserError, match="cannot multiply that on a CPU: use 'float32'"):
        compute_dtype(AmpConfig(dtype="bfloat16"), Device("cpu"))
    assert compute_dtype(AmpConfig(dtype="bfloat16"), Device("tpu")) == jnp.bfloat16


@pytest.mark.parametrize(("batch_size", "used"), [(16, 8), (8, 8), (12, 4), (6, 2), (5, 1), (1, 1)])
def test_mesh_size_divides_the_batch_and_the_slice(batch_size, used):
    # 6 of 8 would divide a batch of 12, but a TPU's all-reduce needs groups that divide the slice: libtpu aborts.
    mesh = sharding.data_mesh(batch_size, [Device("gpu", id=i) for i in range(8)])
    assert mesh.size == used
    assert mesh.axis_names == ("data",)
    assert sharding.describe(mesh) == f"{used} x imaginary"


@pytest.mark.parametrize(
    ("batch_size", "devices", "used"),
    [
        (16, 3, 2),
        (16, 5, 4),
        (16, 6, 4),
        (16, 8, 8),
        (12, 8, 6),
        (6, 2, 2),
        (7, 8, 7),
        (11, 8, 1),
        (1, 4, 1),
        (9, 1, 1),
    ],
)
def test_cpu_mesh_has_the_largest_size_that_divides_the_batch(batch_size, devices, used):
    mesh = sharding.data_mesh(batch_size, [Device("cpu", id=i) for i in range(devices)])
    assert mesh.size == used
    expected = f"{used} of {devices} x imaginary" if used < devices else f"{used} x imaginary"
    assert sharding.describe(mesh, devices) == expected


def test_a_large_array_is_cut_where_the_devices_divide_it():
    mesh = sharding.data_mesh(4, [Device("gpu", id=i) for i in range(4)])
    least = sharding.MIN_SHARDED_SIZE
    cut = lambda *shape: tuple(sharding.sharded(mesh, jax.ShapeDtypeStruct(shape, jnp.float32)).spec)  # noqa: E731
    assert cut(4, least) == ("data",)
    assert cut(3, 8, least) == (None, "data")
    assert cut(3, 5, 4 * least) == (None, None, "data")
    assert cut(3, least + 1) == ()
    assert cut(4, least // 4 - 1) == ()
    assert cut() == ()
    alone = sharding.data_mesh(1, [Device("gpu", id=0)])
    assert tuple(sharding.sharded(alone, jax.ShapeDtypeStruct((4, least), jnp.float32)).spec) == ()


def test_devices_that_stay_idle_are_said(caplog):
    sharding.data_mesh(16, [Device("gpu", id=i) for i in range(8)])
    assert not caplog.messages
    sharding.data_mesh(12, [Device("gpu", id=i) for i in range(8)])
    assert caplog.messages == ["batch of 12 is split over 4 of 8 devices; the others are idle"]


def counted(first: str = "pass", **environment: str) -> int:
    """Return the number of devices of a process that makes each of four cores a device."""
    code = "import os, jax; os.sched_getaffinity = lambda _: range(4); from chargpt_jax.devices import startup; "
    code += f"{first}; startup.use_every_core(); print(jax.device_count())"
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
def test_a_cpu_counts_as_one_device_a_core_up_to_a_limit():
    assert counted() == 4
    assert counted("startup.MAX_CORES = 3") == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen",
    [{"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, {"JAX_NUM_CPU_DEVICES": "2"}],
    ids=["XLA's flag", "JAX's variable"],
)
def test_a_number_of_devices_that_the_user_chose_is_left_alone(chosen):
    assert counted(**chosen) == 2


TRAINING = """
import os, sys
os.sched_getaffinity = lambda _: range(4)
from chargpt_jax.training import stages
from chargpt_jax.events import TrainStarted
from tests.corpus_text import small_config
from pathlib import Path
for event in stages.train(small_config(Path(sys.argv[1])), sys.argv[2]):
    if isinstance(event, TrainStarted):
        print(event.first_step, event.device)
"""


@pytest.mark.slow
def test_a_training_takes_every_core_also_where_it_goes_on(tmp_path):
    write_words(tmp_path / "text.txt")
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    for first_step in (0, 30):
        command = [sys.executable, "-c", TRAINING, str(tmp_path / "text.txt"), str(tmp_path / "run")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.stdout == f"{first_step} 4 x cpu\n", done.stderr


@pytest.mark.slow
def test_devices_that_have_started_are_left_alone():
    assert counted("jax.devices()") == 1


@pytest.fixture
def cache_setting():
    """Return the name of JAX's setting, and restore its value afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], None)
    yield names[0]
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_cached_in_the_folder_that_is_named(cache_setting, monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    startup.use_compilation_cache(tmp_path)
    assert getattr(jax.config, cache_setting) == str(tmp_path)


def test_a_cache_that_the_user_chose_is_left_alone(cache_setting, monkeypatch, tmp_path):
    jax.config.update(cache_setting, "chosen in code")
    startup.use_compilation_cache(tmp_path)
    assert getattr(jax.config, cache_setting) == "chosen in code"
    jax.config.update(cache_setting, None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "chosen by environment"))
    startup.use_compilation_cache(tmp_path)
    assert getattr(jax.config, cache_setting) is None


def test_compiler_options_depend_on_platform_and_xla(monkeypatch):
    mesh = SimpleNamespace(devices=np.array([jax.devices("cpu")[0]]))
    options = compiler_options(mesh)
    if jax.__version_info__ >= (0, 10, 2):  # older versions, such as 0.7.2, do not know it
        assert options["xla_cpu_scheduler_type"] == ON_CPU["xla_cpu_scheduler_type"]
    if jax.__version_info__[:2] == (0, 10):
        assert options == ON_CPU
    assert options is None or options.items() <= ON_CPU.items()
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    assert compiler_options(SimpleNamespace(devices=np.array([SimpleNamespace(platform="tpu")]))) is None
    gpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]))
    assert compiler_options(gpu) == {"xla_gpu_deterministic_ops": True}
    future, old = {"xla_cpu_an_option_of_the_future": False}, {"xla_cpu_enable_fast_math": False}
    monkeypatch.setattr(platform, "ON_CPU", future)
    assert compiler_options(mesh) is None
    monkeypatch.setattr(platform, "ON_CPU", future | old)
    assert compiler_options(mesh) == old


def test_cpu_splits_attention_only_beyond_the_cache():
    assert blockwise_attention.chunk_count(32, blockwise_attention.MAX_UNCHUNKED // 32) == 1
    for rows, row_bytes in ((32, 2**17), (48, 2**16), (7, 2**20), (6, 2**18)):
        parts = blockwise_attention.chunk_count(rows, row_bytes)
        assert rows % parts == 0
        assert rows // parts * row_bytes <= max(blockwise_attention.CHUNK, row_bytes)
        assert all(rows // n * row_bytes > blockwise_attention.CHUNK for n in range(1, parts) if rows % n == 0)


# Eight virtual devices

STEPS, DISPATCHES = 3, 2


def trained(workdir: Path, n_devices: int, parts: int, kind: str = "adamw", least: int = 2**17) -> dict[str, Any]:
    """Train like `train`, on n_devices with the batch in `parts`, in float64 to distinguish bugs from rounding.

    Arrays of `least` numbers and more are shared.

    (In float32, Adam amplifies rounding errors in the keys' biases that RoPE rotates slowest: their gradient is small.)
    """
    training_setup.compute_dtype = lambda amp: jnp.float64
    sharding.data_mesh = partial(data_mesh, devices=jax.devices()[:n_devices])
    sharding.MIN_SHARDED_SIZE = least
    setup = Setup.of(Run.load(workdir))
    params = setup.initial_params()
    setup = replace(setup, initial_params=lambda: jax.tree.map(lambda x: x.astype(jnp.float64), params))
    config = replace(setup.config, optimizer=replace(setup.config.optimizer, accumulation_steps=parts, kind=kind))
    tx = optimizer.make_optimizer(config, 1e-2, setup.mesh)
    state, count = setup.initial_state(tx), np.int32(STEPS)
    step = jit_train_steps(config, setup.graphdef, tx, setup.mesh, state)
    compiled = step.lower(state, setup.on_device, count).compile()
    losses: list[float] = []
    for _ in range(DISPATCHES):
        state, history = compiled(state, setup.on_device, count)
        losses += np.asarray(history["loss"])[
            :STEPS
        ].tolist()  # waits for the result: two dispatches in flight can deadlock
    fractions = [
        math.prod(x.sharding.shard_shape(x.shape)) / x.size for x in jax.tree.leaves(state.opt_state) if x.ndim
    ]
    batch = jax.jit(partial(sharding.shard_batch, setup.mesh))(jnp.zeros((config.data.batch_size, 2)))
    return {
        "losses": losses,
        "validation": setup.validator()(state.params, 0),
        "params": {jax.tree_util.keystr(k): x.tolist() for k, x in jax.tree_util.tree_leaves_with_path(state.params)},
        "operations": compiled.cost_analysis()["flops"],
        "collectives": [name for name in ("all-reduce", "all-gather") if f" {name}(" in compiled.as_text()],
        "fractions": sorted(set(fractions)),
        "rows": [shard.data.shape[0] for shard in batch.addressable_shards],
    }


data_mesh = sharding.data_mesh
CASES = {
    "one": (1, 1),
    "eight": (8, 1),
    "eight, in two parts": (8, 2),
    "one, Muon": (1, 1, "muon"),
    "eight, Muon": (8, 1, "muon"),
    "eight, in shares": (8, 1, "adamw", 1),
    "eight, Muon, in shares": (8, 1, "muon", 1),
}
ALONE = {name: "one, Muon" if "Muon" in name else "one" for name in CASES}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    from tests.corpus_text import small_config, write_words

    folder = tmp_path_factory.mktemp("shared")
    config = small_config(write_words(folder / "words.txt", 6000), dropout=0.2, n_layer=2)
    config.data.batch_size, config.data.padding_chance, config.data.train_split = 16, 0.5, 0.5
    list(prepare(config, folder / "run"))
    return run_on_eight(__file__, folder / "run", JAX_ENABLE_X64="1")[0]


SHARED = [pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in ALONE.values()]


@pytest.mark.parametrize("name", SHARED)
def test_eight_devices_have_the_losses_of_one(found, name):
    assert len(set(found[name]["losses"])) == STEPS * DISPATCHES
    np.testing.assert_allclose(found[name]["losses"], found[ALONE[name]]["losses"], rtol=1e-6)


@pytest.mark.parametrize("name", SHARED)
def test_eight_devices_end_with_the_parameters_of_one(found, name):
    alone = found[ALONE[name]]["params"]
    assert found[name]["params"].keys() == alone.keys()
    for path, expected in alone.items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found[name]["params"][path], expected, rtol=0, atol=1e-6 * scale, err_msg=path)


@pytest.mark.parametrize("name", SHARED)
def test_eight_devices_validate_as_one(found, name):
    np.testing.assert_allclose(found[name]["validation"], found[ALONE[name]]["validation"], rtol=1e-6)


@pytest.mark.slow
def test_batch_is_split_and_gradients_are_summed(found):
    assert found["one"]["rows"] == [16]
    assert found["eight"]["rows"] == [2] * 8
    assert found["one"]["collectives"] == []
    assert found["eight"]["collectives"] == ["all-reduce"]
    assert found["eight"]["operations"] < found["one"]["operations"] / 6


@pytest.mark.slow
def test_eight_devices_shard_muons_orthogonalisation(found):
    """Two layers on eight devices: six of the devices compute zeros."""
    assert found["one, Muon"]["collectives"] == []
    assert found["eight, Muon"]["collectives"] == ["all-reduce", "all-gather"]
    assert found["eight, Muon"]["losses"] != found["eight"]["losses"]


@pytest.mark.slow
def test_eight_devices_store_an_eighth_of_adam_moments_each(found):
    """Arrays that eight does not divide are replicated, and so is Muon's momentum."""
    whole, shares = found["eight"], found["eight, in shares"]
    assert (whole["fractions"], shares["fractions"]) == ([1], [0.125])
    assert found["eight, Muon, in shares"]["fractions"] == [0.125, 1]
    assert shares["collectives"] == ["all-reduce", "all-gather"]
    np.testing.assert_allclose(shares["losses"], whole["losses"], rtol=1e-14)
    for path, expected in whole["params"].items():
        np.testing.assert_allclose(shares["params"][path], expected, rtol=1e-10, atol=1e-13, err_msg=path)


@pytest.mark.slow
def test_psum_adds_sums_and_takes_minima(found):
    """If a gradient overflows on one device, all devices skip the update and halve the loss scale."""
    assert found["summed"] == [3 * sum(range(4, 36, 2)), [4, False]]


@pytest.mark.slow
def test_eight_devices_generate_like_one(found):
    one, eight = found["written"]
    assert (one["devices"], eight["devices"]) == (1, 8)
    assert one["tokens"] == eight["tokens"]
    np.testing.assert_allclose(one["surprisal"], eight["surprisal"], rtol=1e-5)


@pytest.mark.slow
def test_two_devices_generate_sequentially_like_one(found):
    one, two = found["written, text after text"]
    assert (one["devices"], two["devices"]) == (1, 2)
    assert one["apart"]
    assert two["apart"]
    assert not found["written"][0]["apart"]
    assert one["tokens"] == two["tokens"]
    np.testing.assert_allclose(one["surprisal"], two["surprisal"], rtol=1e-5)


@pytest.mark.slow
def test_microbatch_is_split_over_eight_devices(found):
    """Each device takes a sequence of each part: no gather, and no repeated computation."""
    assert found["eight, in two parts"]["collectives"] == ["all-reduce"]
    # The operations of a loop body are counted once, so a part counts as half a batch.
    assert found["eight, in two parts"]["operations"] < 0.7 * found["eight"]["operations"]


def written(n_devices: int, *, vocab_size: int = 64, n_embd: int = 8, block_size: int = 12) -> dict[str, Any]:
    """Continue eight prompts of different lengths, within and beyond the context, on n_devices."""
    shape = {"n_head": 2, "n_head_dim": 4, "n_ff": 16, "n_layer": 2, "used_ids": 30}
    config = ModelConfig(vocab_size=vocab_size, n_embd=n_embd, block_size=block_size, **shape)
    graphdef, params = built(config, 0)
    N, count = block_size + 28, block_size + 8
    tokens = np.random.default_rng(0).integers(1, 30, (8, N)).astype(np.int32)
    lengths, mesh = np.arange(3, 11, dtype=np.int32), data_mesh(8, jax.devices()[:n_devices])
    tokens *= np.arange(N) < lengths[:, None]
    params = jax.device_put(params, sharding.replicated(mesh))
    progress = prefill(params, tokens, lengths, graphdef=graphdef, width=10, mesh=mesh)
    apart = progress.cache.one_by_one
    drawing = Sampler().with_key(jax.random.key(3))
    done = decode(params, progress, count, drawing, graphdef=graphdef, mesh=mesh)
    return {
        "tokens": np.asarray(done.tokens).tolist(),
        "surprisal": np.nan_to_num(np.asarray(done.surprisal)).tolist(),
        "devices": len(done.tokens.sharding.device_set),
        "apart": apart,
    }


def summed() -> list[Any]:
    """Reduce two numbers per device on eight devices: three times the sum, the minimum, and whether none is 6."""
    rows = jnp.arange(16.0) * 2 + 4
    f = lambda whole, x: (whole * x.sum(), (x.min(), jnp.all(x != 6)))  # noqa: E731
    both = jax.jit(sharding.psum_over_data(f, data_mesh(16)))
    return jax.tree.map(lambda x: x.tolist(), both(jnp.float32(3), rows))


if __name__ == "__main__":
    found_here = {name: trained(Path(sys.argv[1]), *case) for name, case in CASES.items()}
    small = {"vocab_size": 32, "n_embd": 4, "block_size": 40}  # a KV cache larger than the parameters
    apart = {"written, text after text": [written(1, **small), written(2, **small)]}
    print(json.dumps({**found_here, "summed": summed(), "written": [written(1), written(8)], **apart}))
