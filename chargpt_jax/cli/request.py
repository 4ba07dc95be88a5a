"""A parsed command line: what the functions of the modes get."""

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from absl.flags import FlagValues

from chargpt_jax.cli.flags import NEEDS_CONFIG, parse
from chargpt_jax.cli.signals import Signals
from chargpt_jax.config import Config, validate
from chargpt_jax.devices import startup
from chargpt_jax.errors import UserError

if TYPE_CHECKING:
    from chargpt_jax.storage.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Request:
    """A parsed command line."""

    flags: FlagValues
    config: Config | None
    """The named config with its overrides."""
    workdir: str
    signals: Signals
    began: float
    """When the command line was read, by time.monotonic()."""

    @property
    def mode(self) -> str:
        """The value of --mode."""
        return str(self.flags.mode)

    @functools.cached_property
    def folder(self) -> "Workdir":
        """The workdir; each of its files that are read to resolve the run is read once."""
        from chargpt_jax.storage.workdir import Workdir

        return Workdir(self.workdir)

    @property
    def step(self) -> str | int:
        """The checkpoint that --step selects: 'best', 'latest' or a number.

        Raises:
            UserError: for any other value.
        """
        step = self.flags.step or "best"
        number = step.isdecimal() and len(step) < 19
        if step not in ("best", "latest") and not number:
            raise UserError(f"--step is {step[:80]!r}, but it must be 'best', 'latest' or a number.")
        return int(step) if number else str(step)

    @property
    def minutes_left(self) -> float | None:
        """The minutes that --max_minutes leaves; None without a limit."""
        minutes = self.flags.max_minutes
        return minutes and minutes - (time.monotonic() - self.began) / 60


def read(argv: Sequence[str], signals: Signals) -> Request:
    """Parse a command line, the program's name first, and check what its mode needs.

    Raises:
        UserError: if a flag, a config field or a value is invalid, or a flag that the mode needs is missing.
    """
    began = time.monotonic()
    flags, config, name = parse(argv)
    mode, minutes = flags.mode, flags.max_minutes
    if not flags.help:
        if mode in NEEDS_CONFIG:
            if config is None:
                raise UserError(f"--mode={mode} needs a config: give --config=small, or the path of a config file.")
            validate(config)
        elif not flags.workdir and name is None and mode != "selftest":
            raise UserError(f"--mode={mode} needs the folder of a run: give --workdir.")
        if minutes is not None and not 0 < minutes < math.inf:
            raise UserError(f"--max_minutes is {minutes}, but it must be a number above 0: give 50, for example.")
    workdir = flags.workdir or ("." if mode == "selftest" else f"runs/{name}")
    return Request(flags, config, workdir, signals, began)


def api_module() -> ModuleType:
    """Import the API, and with it JAX; compiled programs are cached on disk."""
    with startup.gc_paused():
        from chargpt_jax import api
        from chargpt_jax.data import download
    startup.use_compilation_cache(download.default_cache() / "xla")
    return api
