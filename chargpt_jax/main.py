"""The `chargpt` command: from a command line to an exit code.

The modes are in cli/commands.py, the flags in cli/flags.py.

python -m chargpt_jax.main --config=small [--workdir=DIR] [--mode=MODE] [--config.SECTION.FIELD=VALUE ...]
"""

import contextlib
import errno
import re
import sys
from collections.abc import Sequence

from chargpt_jax.cli.commands import MODES
from chargpt_jax.cli.flags import help_text, read
from chargpt_jax.cli.signals import ResilientStream, Signals, ignore_signals, open_standard_streams
from chargpt_jax.cli.terminal import guard, one_line
from chargpt_jax.errors import ExpectedError, UserError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)
"""OS errors that only a user can fix: a full, read-only or broken disk, or missing permissions."""

JAX_REFUSES = re.compile(r"Unable to initialize backend|Invalid value .* for JAX flag|invalid truth value .* for env")
"""Messages of JAX about devices that are missing and environment variables that are invalid."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, `sys.argv` by default, and return its exit code."""
    open_standard_streams()
    with Signals() as signals:
        try:
            request = read(sys.argv if argv is None else argv, signals)
            code = MODES[request.mode](request) if not request.flags.help else _print_help()
            sys.stdout.flush()
            return code
        except UserError as error:
            return _complain(error, error.exit_code)
        except BrokenPipeError:
            ResilientStream(sys.stdout).mute()
            return 0
        except KeyboardInterrupt:
            return _complain(signals.message, signals.code)
        except Exception as error:
            if signals.interrupted:  # a library may have replaced the KeyboardInterrupt by an error of its own
                return _complain(signals.message, signals.code)
            if isinstance(error, ExpectedError):
                return _complain(error, error.exit_code)
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                what = f"Cannot use {error.filename or 'the disk'} ({error.strerror})"
                return _complain(f"{what}: fix this, then run the same command again.", 2)
            if isinstance(error, ValueError | RuntimeError) and JAX_REFUSES.match(str(error)):
                return _complain(f"JAX cannot start ({error}): correct or unset its environment variables.", 2)
            raise


def _print_help() -> int:
    print(help_text())
    return 0


def _complain(message: object, code: int) -> int:
    with contextlib.suppress(OSError):
        print(f"chargpt: {one_line(message)}", file=sys.stderr, flush=True)
    return code


def console() -> None:
    """Run `main` as the `chargpt` command of a shell."""
    guard()
    code = main()
    ignore_signals()
    sys.exit(code)


if __name__ == "__main__":
    console()
