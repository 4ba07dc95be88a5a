"""How several processes find each other: the value of --distributed, JAX's connection, and what all must have alike."""

import errno
import json
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from chargpt_jax.errors import UserError

AUTO = "auto"
"""The value of --distributed that lets JAX find the processes: on Cloud TPU, GKE, Slurm and Open MPI."""

CONNECT_SECONDS = 300.0
"""Time in which all processes must have started, if --connect_seconds does not say otherwise."""

MAX_CONNECT_SECONDS = 86_400.0
"""The longest time that it may say: a day."""

HEARTBEAT_SECONDS = 20
"""Time without a heartbeat after which a process counts as lost."""

ALIKE_SECONDS = 20
"""Time in which all connected processes must have said what `_check_alike` compares."""

RETRY_SECONDS, TELL_SECONDS = 0.5, 10.0
"""How often to look for process 0, and after which time to say that other processes are missing."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
"""Packages whose versions decide the programs and numbers of a training."""

ALIKE = "chargpt/alike/"
"""Keys of the coordination service: the facts that must be the same in all processes."""


def parsed(value: str | None) -> tuple[str, int, int] | None:
    """Return the address of process 0, the index of this process and their number; None for AUTO, or no value.

    Raises:
        UserError: if the value is neither AUTO nor HOST:PORT,INDEX,COUNT.
    """
    if value in (None, AUTO):
        return None
    match = re.fullmatch(r"([^\s,]+:\d{1,5}),(\d{1,6}),(\d{1,6})", value or "", re.ASCII)
    if match and 0 < int(match[1].rpartition(":")[2]) < 2**16 and int(match[2]) < int(match[3]):
        return match[1], int(match[2]), int(match[3])
    raise UserError(
        f"--distributed is {str(value)[:80]!r}, but it must be {AUTO} or HOST:PORT,INDEX,COUNT with an INDEX from 0 to "
        "COUNT - 1: give --distributed=10.0.0.1:1234,0,2 to the first of two processes, for example."
    )


def check_seconds(seconds: float) -> None:
    """Check the time in which all processes must have started.

    Raises:
        UserError: if it is not a number from 1 to MAX_CONNECT_SECONDS.
    """
    if not 1 <= seconds <= MAX_CONNECT_SECONDS:
        raise UserError(
            f"--connect_seconds is {seconds:g}, but it must be a number from 1 to {MAX_CONNECT_SECONDS:,.0f}: give "
            f"{CONNECT_SECONDS:g}, for example."
        )


def connect(value: str, seconds: float, alike: Mapping[str, object]) -> None:
    """Connect this process with the others; return when all of them are connected.

    Args:
        value: as `parsed` accepts it.
        seconds: time in which all processes must have started.
        alike: facts that must be the same in all processes, by name, in addition to the versions of PACKAGES.

    Raises:
        UserError: if the value is invalid, JAX finds no cluster or cannot connect, or the processes differ.
    """
    address, end = parsed(value), time.monotonic() + seconds
    check_seconds(seconds)
    missing = threading.Timer(TELL_SECONDS, print, [_waiting(value, seconds)], {"file": sys.stderr, "flush": True})
    missing.daemon = True
    missing.start()
    try:
        if address:
            _check_address(*address[:2], seconds, end)
        _initialize(value, address, max(1, round(end - time.monotonic())))
    finally:
        missing.cancel()
    if threading.current_thread() is threading.main_thread():
        # JAX has installed a handler of its own, of which Python does not know.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
    _check_alike(alike)


def _waiting(value: str, seconds: float) -> str:
    return (
        f"Waiting up to {seconds:g} s for the other processes of --distributed={value} (--connect_seconds sets this)."
    )


def _initialize(value: str, address: tuple[str, int, int] | None, seconds: int) -> None:
    """Start JAX's distributed service in process 0, and its client in every process."""
    import jax

    given = dict(zip(("coordinator_address", "process_id", "num_processes"), address or (), strict=False))
    try:
        jax.distributed.initialize(
            **given,  # type: ignore[arg-type]
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        raise UserError(
            f"--distributed={value} finds no cluster ({error}): give --distributed=HOST:PORT,INDEX,COUNT, with the "
            "address of process 0, the index of this process, and the number of processes."
        ) from error
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"--distributed={value} cannot connect the processes ({reason}): check the address of process 0, and "
            "start all processes."
        ) from error


def _check_address(address: str, index: int, seconds: float, end: float) -> None:
    """Check that process 0 can use its port, or wait until another process reaches it.

    JAX would end this process, with a segmentation fault or a stack trace.

    Raises:
        UserError: if it cannot.
    """
    host, _, port = address.rpartition(":")
    if index == 0:
        _check_port(int(port))
        return
    reason = ""
    while time.monotonic() < end:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=max(0.1, end - time.monotonic())).close()
            return
        except socket.gaierror as error:
            raise UserError(
                f"--distributed names the host {host!r}, which has no address ({error.strerror}): give the name or "
                "address of the machine of process 0."
            ) from None
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(RETRY_SECONDS)
    raise UserError(
        f"Process 0 of --distributed was not found at {address} within {seconds:g} s ({reason}): check its address, "
        "start it, or set --connect_seconds."
    )


def _check_port(port: int) -> None:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise UserError(
                f"--distributed names the port {port}, but process 0 cannot use it ({error.strerror}): choose another "
                "port."
            ) from None


def _check_alike(alike: Mapping[str, object]) -> None:
    """Check that all processes have the same facts, with messages of the coordination service.

    JAX's collectives cannot do this: with another number of processes, or another version, they may wait forever.

    Raises:
        UserError: in every process, naming a fact and its two values.
    """
    import importlib.metadata

    from jax._src.distributed import global_state as state

    versions = {f"The version of {name}": importlib.metadata.version(name) for name in PACKAGES}
    own = {"The COUNT of --distributed": state.num_processes, **versions, **alike}
    client: Any = state.client
    try:
        client.key_value_set(f"{ALIKE}{state.process_id}", json.dumps(own))
        client.wait_at_barrier(ALIKE, 1000 * ALIKE_SECONDS)
        found = {int(key.rpartition("/")[2]): json.loads(text) for key, text in client.key_value_dir_get(ALIKE)}
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"The processes of --distributed were lost while they started ({reason}): see the messages of the others, "
            "then start all of them again."
        ) from error
    for index, facts in sorted(found.items()):
        for name, value in facts.items():
            if value != found[0].get(name, value):
                raise UserError(
                    f"{name} is {value} in process {index}, but {found[0][name]} in process 0, and all must have the "
                    "same: start each process with the same command and packages, apart from its index."
                )
