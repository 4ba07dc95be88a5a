"""How several processes find each other, with a coordination service in memory; real processes in training/."""

import json
import socket
import threading
import time

import jax
import pytest

from chargpt_jax.devices import connecting, processes
from chargpt_jax.errors import UserError
from tests.devices.test_ending import Service


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("auto", None),
        ("10.0.0.1:1234,0,2", ("10.0.0.1:1234", 0, 2)),
        ("host-1.local:65535,3,4", ("host-1.local:65535", 3, 4)),
        ("[::1]:1,0,1", ("[::1]:1", 0, 1)),
    ],
)
def test_parsed_returns_address_index_and_count(value, expected):
    assert connecting.parsed(value) == expected


@pytest.mark.parametrize(
    "value",
    ["", "yes", "host,0,2", "host:1234", "host:1234,2,2", "host:0,0,2", "host:65536,0,2", "host:1,-1,2", "a b:1,0,2"],
)
def test_parsed_rejects_a_value_in_a_sentence(value):
    with pytest.raises(UserError, match=r"--distributed is .*, but it must be auto or HOST:PORT,INDEX,COUNT.*: give"):
        connecting.parsed(value)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e6])
def test_time_to_connect_is_limited(seconds):
    with pytest.raises(UserError, match=r"--connect_seconds is .*, but it must be a number from 1 to 86,400: give 300"):
        processes.start(seconds=seconds)


def test_start_without_a_cluster_names_the_explicit_form(monkeypatch):
    def fail(**_: object) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match=r"--distributed=auto finds no cluster .*: give --distributed=HOST:PORT,INDEX"):
        processes.start()


def test_start_names_a_port_that_is_in_use(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("JAX was started"))
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"names the port {port}, but process 0 cannot use it .*: choose another"):
            processes.start(f"localhost:{port},0,2")


@pytest.fixture
def connected(monkeypatch):
    """Make JAX's connection succeed without other processes; return the calls of it."""
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    monkeypatch.setattr(connecting, "_check_alike", lambda alike: None)
    return calls


def test_host_without_an_address_is_reported_at_once(connected, monkeypatch):
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unknown)
    with pytest.raises(UserError, match=r"names the host 'nowhere', which has no address .*: give the name"):
        connecting.connect("nowhere:1234,1,2", 60, {})
    assert connected == []


def test_missing_process_0_is_reported_in_time(connected):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"Process 0 of --distributed was not found at 127.0.0.1:{port} within 1 s"):
        connecting.connect(f"127.0.0.1:{port},1,2", 1, {})
    assert time.monotonic() - began < 5
    assert connected == []


def test_process_waits_for_process_0_and_says_so(connected, monkeypatch, capsys):
    monkeypatch.setattr(connecting, "TELL_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    late: list[socket.socket] = []
    threading.Timer(1.0, lambda: late.append(socket.create_server(("127.0.0.1", port)))).start()
    connecting.connect(f"127.0.0.1:{port},1,2", 30, {})
    late[0].close()
    assert (
        f"Waiting up to 30 s for the other processes of --distributed=127.0.0.1:{port},1,2" in capsys.readouterr().err
    )
    (given,) = connected
    assert (given["process_id"], given["num_processes"]) == (1, 2)
    assert 25 < given["initialization_timeout"] < 30


class State:
    """JAX's record of a connection."""

    def __init__(self, client: object, index: int, count: int = 2) -> None:
        self.client, self.process_id, self.num_processes = client, index, count


class Meeting(Service):
    """A coordination service in which the other processes have written their facts."""

    def __init__(self, **others: dict[str, object]) -> None:
        super().__init__()
        self.values.update({f"{connecting.ALIKE}{index[1:]}": json.dumps(facts) for index, facts in others.items()})

    def wait_at_barrier(self, name: str, milliseconds: int) -> None:
        pass


def facts_of(monkeypatch, alike=None, count=2):
    """Return what a process tells the others."""
    meeting = Meeting()
    monkeypatch.setattr("jax._src.distributed.global_state", State(meeting, 0, count))
    connecting._check_alike(alike or {})
    return json.loads(meeting.values[f"{connecting.ALIKE}0"])


CHANGES = [
    (
        {"The version of jax": "0.1"},
        r"The version of jax is 0.1 in process 1, but \d.* in process 0, and all must",
    ),
    ({"The COUNT of --distributed": 3}, "The COUNT of --distributed is 3 in process 1, but 2 in process 0"),
    ({"--mode": "eval"}, "--mode is eval in process 1, but train in process 0, and all must have the same: start"),
]


@pytest.mark.parametrize(("changed", "said"), CHANGES)
def test_process_0_rejects_a_process_that_differs(monkeypatch, changed, said):
    own = facts_of(monkeypatch, {"--mode": "train"})
    monkeypatch.setattr("jax._src.distributed.global_state", State(Meeting(_1={**own, **changed}), 0))
    with pytest.raises(UserError, match=said):
        connecting._check_alike({"--mode": "train"})


@pytest.mark.parametrize(("changed", "said"), CHANGES)
def test_process_that_differs_rejects_itself(monkeypatch, changed, said):
    others = facts_of(monkeypatch, {"--mode": "train"})
    own = {**others, **changed}
    monkeypatch.setattr("importlib.metadata.version", lambda name: own[f"The version of {name}"])
    state = State(Meeting(_0=others), 1, own["The COUNT of --distributed"])
    monkeypatch.setattr("jax._src.distributed.global_state", state)
    with pytest.raises(UserError, match=said):
        connecting._check_alike({"--mode": own["--mode"]})


def test_equal_processes_are_accepted(monkeypatch):
    own = facts_of(monkeypatch)
    monkeypatch.setattr("jax._src.distributed.global_state", State(Meeting(_1=own), 0))
    connecting._check_alike({})


def test_loss_of_a_process_at_the_start_is_a_sentence(monkeypatch):
    meeting = Meeting()

    def lost(name: str, milliseconds: int) -> None:
        raise RuntimeError("DEADLINE_EXCEEDED: barrier\nmore")

    meeting.wait_at_barrier = lost
    monkeypatch.setattr("jax._src.distributed.global_state", State(meeting, 0))
    with pytest.raises(
        UserError, match=r"were lost while they started \(DEADLINE_EXCEEDED: barrier\): see the messages"
    ):
        connecting._check_alike({})
