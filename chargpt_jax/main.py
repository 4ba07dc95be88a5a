"""The `chargpt` command: from a command line to an exit code.

The modes are in cli/commands.py, the flags in cli/flags.py.

python -m chargpt_jax.main --config=small [--workdir=DIR] [--mode=MODE] [--config.SECTION.FIELD=VALUE ...]
"""

import contextlib
import errno
import re
import sys
from collections.abc import Sequence

from chargpt_jax.cli.signals import ResilientStream, Signals, open_standard_streams
from chargpt_jax.devices import ending
from chargpt_jax.errors import ExpectedError, ProcessLost, UserError, is_out_of_memory

DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),  # full, limited, read-only or broken
    *(errno.EACCES, errno.EPERM, errno.ENXIO, errno.ENODEV, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT),
    *(errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EBUSY, errno.ENOTEMPTY, errno.EXDEV),
    *(errno.EMFILE, errno.ENFILE),
)
"""OS errors that only a user can fix: of the disk, of permissions, of names that are something else, of limits."""

OUT_OF_MEMORY = (
    "There is not enough memory for this: reduce data.batch_size, model.block_size or the model, set model.remat=True "
    "or optimizer.accumulation_steps, or free memory."
)

NO_ROOM = re.compile(r"failed to map segment|[Cc]annot allocate memory")
"""Parts of the messages about a library for which no memory is left."""

JAX_REFUSES = re.compile(r"Unable to initialize backend|Invalid value .* for JAX flag|invalid truth value .* for env")
"""Messages of JAX about devices that are missing and environment variables that are invalid."""


def main(argv: Sequence[str] | None = None, last: bool = False) -> int:
    """Run a command line and return its exit code.

    Args:
        argv: the command line; None: `sys.argv`.
        last: the process ends with this command, so signals that arrive later are ignored.
    """
    open_standard_streams()
    with Signals(last) as signals:
        try:
            try:
                # Imported here, so that a signal during the imports is handled as well.
                from chargpt_jax.cli import command_line, commands, terminal

                if last:
                    terminal.guard()
                request = command_line.read(sys.argv if argv is None else argv, signals)
                code = commands.MODES[request.mode](request) if not request.flags.help else _print_help()
                sys.stdout.flush()
                return code
            except (Exception, KeyboardInterrupt) as error:
                return _reported(error, signals)
        except KeyboardInterrupt:  # a signal that arrived while an error was reported
            return _stopped(signals)


def _reported(error: Exception | KeyboardInterrupt, signals: Signals) -> int:
    """Print the message of an error and return its exit code; raise an error that is none of the user's."""
    signals.finished = True
    if isinstance(error, UserError):
        return _complain(error, error.exit_code)
    if isinstance(error, BrokenPipeError):
        ResilientStream(sys.stdout).mute()
        return 0
    if isinstance(error, ProcessLost) and (number := ending.announced()) is not None:
        signals.stopped_with(number)
    # A library may have replaced the KeyboardInterrupt by an error of its own.
    if signals.interrupted or isinstance(error, KeyboardInterrupt):
        return _stopped(signals)
    if isinstance(error, ExpectedError):
        return _complain(error, error.exit_code)
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        what = f"Cannot use {error.filename or 'the disk'} ({error.strerror})"
        return _complain(f"{what}: fix this, then run the same command again.", 2)
    if isinstance(error, ValueError | RuntimeError) and JAX_REFUSES.match(str(error)):
        return _complain(f"JAX cannot start ({error}): correct or unset its environment variables.", 2)
    if is_out_of_memory(error):
        return _complain(OUT_OF_MEMORY, 2)
    if isinstance(error, ImportError) and NO_ROOM.search(str(error)):
        return _complain(
            f"There is not enough memory to start ({error}): free some, or raise the limit (ulimit -v).", 2
        )
    raise error


def _print_help() -> int:
    from chargpt_jax.cli.flags import help_text

    print(help_text())
    return 0


def _stopped(signals: Signals) -> int:
    """Report the signal or the time limit, and return the exit code."""
    signals.report(lambda message: _complain(message, signals.code))
    return signals.code


def _complain(message: object, code: int) -> int:
    from chargpt_jax.cli.terminal import one_line

    with contextlib.suppress(OSError):
        print(f"chargpt: {one_line(message)}", file=sys.stderr, flush=True)
    return code


def console() -> None:
    """Run `main` as the `chargpt` command of a shell."""
    try:
        code = main(last=True)
    except Exception:
        ending.leave(1)
        raise
    ending.leave(code)
    sys.exit(code)


if __name__ == "__main__":
    console()
