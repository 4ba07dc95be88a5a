"""Several processes that train one model: how they agree. connecting.py starts them, and ending.py ends them.

Every process runs the same code on the same corpus, and JAX exchanges the gradients. A decision that depends on time,
signals or files is made once and sent to all, since each process must run the same programs in the same order. Process
0 alone writes files. With one process, every function here returns its argument at once.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from chargpt_jax.devices import connecting, startup
from chargpt_jax.errors import NoCheckpoint, NonFiniteLoss, SaveFailed, UserError

SLOT = 512
"""Bytes of a message of `gathered`; a longer one takes a second exchange."""

KINDS = {kind.__name__: kind for kind in (UserError, NoCheckpoint, NonFiniteLoss, SaveFailed)}
"""The errors of process 0 that its other processes raise too."""

T = TypeVar("T")

_started = False
"""Whether `start` was called: several processes are refused until then."""


def started() -> bool:
    """Return whether `start` was called."""
    return _started


def start(
    value: str = connecting.AUTO,
    seconds: float = connecting.CONNECT_SECONDS,
    alike: Mapping[str, object] | None = None,
    connected: Callable[[], None] = lambda: None,
) -> None:
    """Connect this process with the others; call it in every process, before JAX finds its devices.

    Args:
        value: as `connecting.parsed` accepts it.
        seconds: time in which all processes must have started.
        alike: facts that must be the same in all processes, by name.
        connected: called when they are connected, before this process waits for the devices of the others.

    Raises:
        UserError: if the value is invalid, JAX finds no cluster, no device or cannot connect, or the processes differ.
    """
    global _started
    import jax

    startup.use_every_core()
    if not jax.distributed.is_initialized():
        try:
            connecting.connect(value, seconds, alike or {})
        finally:  # also if a signal has interrupted it
            _started = jax.distributed.is_initialized()
    _started = True
    connected()
    startup.start()
    _check_devices(jax.devices())


def _check_devices(devices: Sequence[Any]) -> None:
    """Check that all processes have the same number of devices, without which JAX cannot exchange their values.

    Raises:
        UserError: in every process, naming two of them.
    """
    counts = Counter(device.process_index for device in devices)
    index, number = max(counts.items(), key=lambda item: abs(item[1] - counts[0]))
    if number != counts[0]:
        raise UserError(
            f"The number of devices is {number} in process {index}, but {counts[0]} in process 0, and all processes "
            "must have as many: set JAX_NUM_CPU_DEVICES, or use machines with the same accelerators."
        )


def check() -> None:
    """Check the settings of JAX, and that this is its only process or `start` was called.

    Raises:
        UserError: if there are others, each of which would train alone; if a setting is unsupported, or JAX finds no
            device.
    """
    startup.check_settings()
    startup.start()
    if (number := count()) > 1 and not _started:
        raise UserError(
            f"jax.process_count() is {number}, but it must be 1 without --distributed: add --distributed to the "
            "command of each process, or start one process without jax.distributed.initialize."
        )


def count() -> int:
    """Return the number of processes."""
    import jax

    return jax.process_count()


def several() -> bool:
    """Return whether there are several processes."""
    return count() > 1


def index() -> int:
    """Return the index of this process, from 0."""
    import jax

    return jax.process_index()


def is_first() -> bool:
    """Return whether this is process 0, which prints, draws and writes files."""
    return index() == 0


def gathered(value: T) -> list[T]:
    """Return the values of all processes, by index; every process must call this.

    Args:
        value: anything that JSON can hold.
    """
    if count() == 1:
        return [value]
    message = json.dumps(value).encode()
    rows = _exchanged(_framed(message[: SLOT - 4], len(message)))
    sizes = [int.from_bytes(row[:4], "little") for row in rows]
    parts = [row[4 : 4 + size] for row, size in zip(rows, sizes, strict=True)]
    if (longest := max(sizes)) > SLOT - 4:
        rest = _exchanged(message[SLOT - 4 :].ljust(_rounded(longest), b"\0"))
        parts = [part + row[: size - len(part)] for part, row, size in zip(parts, rest, sizes, strict=True)]
    return [json.loads(part) for part in parts]


def _framed(message: bytes, size: int) -> bytes:
    return (size.to_bytes(4, "little") + message).ljust(SLOT, b"\0")


def _rounded(size: int) -> int:
    """Return the length of a second message: a power of two, so that few programs are compiled."""
    return 1 << (size - 1).bit_length()


def _exchanged(message: bytes) -> list[bytes]:
    """Return the messages of all processes, which must have the same length."""
    import numpy as np
    from jax.experimental import multihost_utils

    rows = multihost_utils.process_allgather(np.frombuffer(message, np.uint8))
    return [bytes(row) for row in np.asarray(rows).reshape(count(), len(message))]


def agreed(value: T) -> T:
    """Return the value of process 0; every process must call this, with anything that JSON can hold."""
    return gathered(value)[0]


def on_first(f: Callable[[], T]) -> T | None:
    """Call a function in process 0 alone; return its result there, and None in the others, once it has returned.

    Raises:
        ExpectedError: in every process, if the function raises one of KINDS.
    """
    if count() == 1:
        return f()
    result, error = None, None
    if is_first():
        try:
            result = f()
        except tuple(KINDS.values()) as raised:
            error = raised
    outcome = agreed([type(error).__name__, str(error)] if error else None)
    if error:
        raise error
    if outcome:
        raise KINDS[outcome[0]](f"Process 0: {outcome[1]}")
    return result


def check_same(name: str, value: object) -> None:
    """Check that a value, as a string, is the same in all processes.

    Raises:
        UserError: in every process, naming the processes that differ from process 0.
    """
    import hashlib

    hashes = gathered(hashlib.sha256(str(value).encode()).hexdigest())
    if others := [str(i) for i, one in enumerate(hashes) if one != hashes[0]]:
        raise UserError(
            f"{name} in process {', '.join(others)} differs from that in process 0, but all must be the same: start "
            "each process with the same command, apart from the index of --distributed."
        )


def check_sees(folder: object, sees: bool) -> None:
    """Check that every process sees a file that process 0 has written to a folder.

    Raises:
        UserError: in every process, naming the processes that do not see it.
    """
    if others := [str(i) for i, one in enumerate(gathered(sees)) if not one]:
        raise UserError(
            f"{folder} in process {', '.join(others)} is not the folder of process 0, but all processes must see the "
            "same one: give a --workdir on a file system that all of them share."
        )


def on_host(tree: Any) -> Any:
    """Return a tree of arrays that are split over processes as arrays of process 0; all processes must call this.

    The arrays are gathered one after the other, so that the devices hold one at a time in full. In the other processes
    the result is the given tree.
    """
    if count() == 1:
        return tree
    import jax
    import jax.numpy as jnp
    import numpy as np

    def gather(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                jnp.asarray(np.asarray(jax.random.key_data(x))), impl=jax.random.key_impl(x)
            )
        if not x.is_fully_replicated:
            x = _replicating(jax.sharding.NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec()))(x)  # type: ignore[attr-defined]
        return np.asarray(x) if is_first() else None

    arrays = jax.tree.map(gather, tree)
    return arrays if is_first() else tree


@functools.cache
def _replicating(sharding: Any) -> Callable[[Any], Any]:
    import jax

    return jax.jit(lambda x: x, out_shardings=sharding)


def finish() -> None:
    """Wait until every process has finished, and disconnect them; an error in one of them then disturbs none."""
    import jax

    if count() > 1:
        gathered(None)
        jax.distributed.shutdown()
