"""What compiled libraries print in a distributed run, filtered: one sentence instead of a stack trace.

If another process is lost, JAX may end this one from a thread of its own, before Python can report anything. Its
message is then replaced by a sentence. `python -m chargpt_jax.devices.native_output` is the filter: it copies its
standard input to its standard output, line by line.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator

FATAL = re.compile(r"Terminating process because the JAX distributed service detected fatal errors")
"""What JAX prints before it ends a process."""

NOT_CONNECTED = re.compile(r"RPC: \S*/RegisterTask")
"""What follows that if the processes have not found each other."""

STARTED_TWICE = re.compile(r"different incarnation")
"""What the fatal line contains if a second process has the index of another one."""

IGNORED = re.compile(r"\[Gloo\]|connected peer ranks|WARNING: All log messages before absl")
"""Lines that say nothing to a user."""

PRECEDING = re.compile(r"[EW]\d{4} .*(coordination_service|preemption_sync_manager)")
"""The first line of messages about a lost process; the fatal one follows."""

LOGGED = re.compile(r"[FEWI]\d{4} |Traceback")
"""The first line of any message."""

PREFIX = "chargpt: "
"""The beginning of the last sentence of a command that fails."""

LOST = (
    f"{PREFIX}This process has stopped, because another process has ended or cannot be reached: see the messages of "
    "the others, then run the same commands again; training continues from the newest checkpoint.\n"
)

NOT_FOUND = (
    f"{PREFIX}The processes of --distributed have not found each other in time: check the address of process 0, the "
    "INDEX and COUNT of each process, and that all have the same version of jax; start all of them.\n"
)

TWICE = (
    f"{PREFIX}Two processes were started with the same INDEX of --distributed, which ends all of them: start each "
    "INDEX once; training continues from the newest checkpoint.\n"
)


def filtered(lines: Iterable[str]) -> Iterator[str]:
    """Yield lines without the ignored ones, and one sentence in place of the fatal message and all that follows it.

    If the command has printed its own last sentence before, there is no other one.
    """
    rest, explained, preceding = iter(lines), False, False
    for line in rest:
        if FATAL.search(line):
            sentence = NOT_FOUND if NOT_CONNECTED.search("".join(rest)) else LOST
            sentence = TWICE if STARTED_TWICE.search(line) else sentence
            yield from [] if explained else [sentence]
            return
        explained = explained or line.startswith(PREFIX)
        if PRECEDING.match(line):
            preceding = True
        elif line.startswith(PREFIX) or LOGGED.match(line):
            preceding = False
        if not preceding and not IGNORED.search(line):
            yield line


def divert() -> None:
    """Send what compiled libraries print to the filter, and from there to stderr; Python's sys.stdout stays as it is.

    The filter is a process of its own, because it has to print after this process was ended. Errors that Python prints
    pass through it as well, so that it knows them.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    own_out, own_err = os.dup(1), os.dup(2)
    command = [sys.executable, "-m", "chargpt_jax.devices.native_output"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=own_err, env=environment, start_new_session=True)
    assert child.stdin is not None
    os.dup2(child.stdin.fileno(), 1)
    os.dup2(child.stdin.fileno(), 2)
    child.stdin.close()
    os.close(own_err)
    child.returncode = 0  # it ends after this process, which must not wait for it
    sys.stdout = open(own_out, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1)  # noqa: SIM115


def main() -> None:
    """Filter standard input until it ends."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    for line in filtered(sys.stdin):
        with contextlib.suppress(OSError):
            sys.stdout.write(line)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
