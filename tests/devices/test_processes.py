import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt_jax.cli.command_line import parse
from chargpt_jax.cli.flags import EXIT_CODES
from chargpt_jax.config import Config, MeshConfig
from chargpt_jax.devices import ending, layout, processes, sharding
from chargpt_jax.errors import NoCheckpoint, NonFiniteLoss, ProcessLost, SaveFailed, UserError
from tests.devices.test_sharding import Device
from tests.process_group import Group

# The flag


@pytest.mark.parametrize(
    "words", [["--distributed"], ["-distributed"], ["--distributed=auto"], ["--distributed", "--mode=run"]]
)
def test_flag_without_a_value_means_auto(words):
    flags, _, _ = parse(["chargpt", "--config=tiny", *words])
    assert flags.distributed == "auto"


@pytest.mark.parametrize("mode", ["generate", "score", "prepare", "export", "info", "report", "selftest", "compile"])
def test_other_modes_reject_the_flag_in_a_sentence(mode):
    with pytest.raises(UserError, match=f"--distributed does not apply to --mode={mode}: use it with --mode=run or"):
        parse(["chargpt", "--config=tiny", f"--mode={mode}", "--distributed"])


def test_a_lost_process_has_an_exit_code_of_its_own():
    codes = [kind.exit_code for kind in (UserError, NoCheckpoint, NonFiniteLoss, SaveFailed, ProcessLost)]
    assert len(set(codes)) == len(codes)
    assert set(codes) <= set(EXIT_CODES)


def test_several_processes_are_rejected_until_asked_for(monkeypatch):
    processes.check()
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(UserError, match=r"jax.process_count\(\) is 2, .* without --distributed: add --distributed"):
        processes.check()
    monkeypatch.setattr(processes, "_started", True)
    processes.check()


@pytest.mark.parametrize("counts", [(2, 2, 1), (1, 1, 4), (3, 2)])
def test_processes_with_other_numbers_of_devices_are_rejected(counts):
    devices = [Device("cpu", process_index=index) for index, count in enumerate(counts) for _ in range(count)]
    odd = next(index for index, count in enumerate(counts) if count != counts[0])
    said = f"The number of devices is {counts[odd]} in process {odd}, but {counts[0]} in process 0, and all"
    with pytest.raises(UserError, match=said):
        processes._check_devices(devices)
    processes._check_devices([Device("cpu", process_index=index) for index in range(3) for _ in range(2)])


# Agreement


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=900),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=30, deadline=None)
@given(st.lists(values, min_size=1, max_size=4))
def test_gathered_gives_every_process_all_values(sent):
    with pytest.MonkeyPatch.context() as monkeypatch:
        received = Group(len(sent), monkeypatch).results(lambda index: processes.gathered(sent[index]))
    assert received == [sent] * len(sent)


@pytest.mark.parametrize("length", [processes.SLOT - 7, processes.SLOT - 6, processes.SLOT - 5, 5 * processes.SLOT])
def test_gathered_joins_long_and_short_values(monkeypatch, length):
    sent = ["a" * length, None, "b" * 3]
    received = Group(3, monkeypatch).results(lambda index: processes.gathered(sent[index]))
    assert received == [sent] * 3


def test_gathered_returns_the_value_itself_with_one_process():
    value = object()
    assert processes.gathered(value)[0] is value


def test_agreed_is_the_value_of_process_0(monkeypatch):
    assert Group(3, monkeypatch).results(lambda index: processes.agreed(10 + index)) == [10] * 3


def test_on_first_calls_the_function_in_process_0_alone(monkeypatch):
    called = []

    def one(index: int) -> object:
        return processes.on_first(lambda: called.append(index) or "result")

    assert Group(3, monkeypatch).results(one) == ["result", None, None]
    assert called == [0]


@pytest.mark.parametrize("kind", [UserError, NoCheckpoint, NonFiniteLoss, SaveFailed])
def test_on_first_raises_an_error_in_every_process(monkeypatch, kind):
    def fail() -> None:
        raise kind("The disk is full: make room.")

    found = Group(3, monkeypatch).results(lambda index: processes.on_first(fail))
    assert [type(error) for error in found] == [kind] * 3
    assert [str(error) for error in found] == ["The disk is full: make room."] + [
        "Process 0: The disk is full: make room."
    ] * 2


def test_check_same_names_the_processes_that_differ(monkeypatch):
    group = Group(4, monkeypatch)
    assert group.results(lambda index: processes.check_same("The config", {"a": 1})) == [None] * 4
    found = group.results(lambda index: processes.check_same("The config", {"a": index % 2}))
    assert {type(error) for error in found} == {UserError}
    assert {str(error).partition(" differs")[0] for error in found} == {"The config in process 1, 3"}


def test_check_sees_names_the_processes_that_do_not(monkeypatch):
    group = Group(3, monkeypatch)
    assert group.results(lambda index: processes.check_sees("runs/a", True)) == [None] * 3
    found = group.results(lambda index: processes.check_sees("runs/a", index != 2))
    assert {str(error).partition(" is not")[0] for error in found} == {"runs/a in process 2"}
    assert all("give a --workdir on a file system" in str(error) for error in found)


# A lost process

MESSAGES = [
    "UNKNOWN: Gloo AllGather failed: [external/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:1",
    "UNAVAILABLE: Task 1 heartbeat timeout.",
]


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
@pytest.mark.parametrize("message", MESSAGES)
def test_loss_named_turns_an_error_of_jax_into_a_sentence(monkeypatch, message, kind):
    monkeypatch.setattr(processes, "_started", True)
    monkeypatch.setattr(processes, "count", lambda: 2)
    with (
        pytest.raises(ProcessLost, match="Process 0 of 2 has stopped, because another process"),
        ending.loss_named(),
    ):
        raise kind(message)


@pytest.mark.parametrize(
    ("error", "started", "count"),
    [
        (RuntimeError("INVALID_ARGUMENT: shapes differ"), True, 2),
        (UserError("Connection closed by peer"), True, 2),
        (RuntimeError(MESSAGES[0]), False, 2),
        (RuntimeError(MESSAGES[0]), True, 1),
    ],
)
def test_loss_named_leaves_other_errors(monkeypatch, error, started, count):
    monkeypatch.setattr(processes, "_started", started)
    monkeypatch.setattr(processes, "count", lambda: count)
    with pytest.raises(type(error)) as found, ending.loss_named():
        raise error
    assert found.value is error


# Arrays


@pytest.mark.parametrize(
    ("batch_size", "hosts", "local", "used"),
    [(16, 2, 2, 4), (16, 2, 3, 4), (12, 2, 3, 6), (6, 2, 2, 2), (4, 4, 1, 4), (8, 1, 8, 8)],
)
def test_data_mesh_uses_as_many_devices_of_each_process(batch_size, hosts, local, used):
    devices = [Device("cpu", id=10 * host + i, process_index=host) for host in range(hosts) for i in range(local)]
    mesh = sharding.data_mesh(batch_size, devices)
    counts = np.bincount([device.process_index for device in mesh.devices.flat], minlength=hosts)
    assert counts.tolist() == [used // hosts] * hosts


def test_data_mesh_rejects_a_part_of_a_tpu_slice_that_is_no_rectangle(monkeypatch):
    """As jax.make_mesh does for two of the four devices of each process of v5e:2x4."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("jax_devices=[...] dims=(2, 3, 1) cores_per_chip=1")

    monkeypatch.setattr(jax, "make_mesh", fail)
    devices = [Device("tpu", id=i, process_index=i // 4) for i in range(8)]
    with pytest.raises(UserError, match=r"is 12, which 4 of 8 devices share, .*: make it a multiple of 8\."):
        sharding.data_mesh(12, devices)


def test_data_mesh_rejects_a_batch_that_processes_do_not_divide():
    devices = [Device("cpu", id=host, process_index=host) for host in range(3)]
    with pytest.raises(UserError, match="is 8, but it must be a multiple of the number of processes, 3"):
        sharding.data_mesh(8, devices)


def test_device_mesh_uses_as_many_devices_of_each_process():
    devices = [Device("cpu", id=10 * host + i, process_index=host) for host in range(2) for i in range(3)]
    config = Config(mesh=MeshConfig(data=1, fsdp=2, tensor=2))
    mesh = layout.device_mesh(config, devices)
    assert [device.id for device in mesh.devices.flat] == [0, 1, 10, 11]
    config.mesh.tensor = 1
    config.mesh.data = 2
    assert layout.device_mesh(config, devices).size == 4
    with pytest.raises(UserError, match="its product must be a multiple of 2, the number of processes"):
        layout.device_mesh(Config(mesh=MeshConfig(data=1, fsdp=1, tensor=1)), devices)


@pytest.mark.parametrize("x", [np.arange(6.0).reshape(2, 3), np.float32(2.5), jax.random.key(3)], ids=str)
def test_place_puts_the_same_values_on_the_devices(x):
    to = sharding.replicated(sharding.data_mesh(1))
    placed = sharding.place(jnp.asarray(x), to)
    assert placed.sharding == to
    assert placed.dtype == jnp.asarray(x).dtype
    data = jax.random.key_data if jax.dtypes.issubdtype(placed.dtype, jax.dtypes.prng_key) else np.asarray
    np.testing.assert_array_equal(data(placed), data(jnp.asarray(x)))


def test_on_host_with_one_process_is_the_tree_itself():
    tree = {"a": jnp.ones(3)}
    assert processes.on_host(tree) is tree
