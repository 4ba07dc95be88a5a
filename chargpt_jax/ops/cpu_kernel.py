"""A computation that XLA compiles for a CPU as one kernel, loops and branches included.

Otherwise XLA starts each of a program's operations by itself there, in a tenth of a microsecond. For one character a
small model has hundreds of operations that take less.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata

from chargpt_jax.devices.platform import on_cpu

MOST_ALONE = 2**19
"""Parameters up to which a lone text is written in one kernel: for more of them all cores had better share a product,
which one kernel can't."""


_ALLOWED = ContextVar("allowed", default=True)


@contextmanager
def kernels_allowed(yes: bool) -> Iterator[None]:
    """Trace what `in_one_kernel` is asked for as one kernel, or as the operations that it consists of."""
    before = _ALLOWED.set(yes)
    try:
        yield
    finally:
        _ALLOWED.reset(before)


class WithKernels:
    """A jitted function with a static argument `kernels`: True, or False where XLA has once refused to make them.

    Which operations one kernel may hold is XLA's own affair, and may be another with its next release.
    """

    def __init__(self, compiled: Callable[..., Any]):
        """Call this function, all of whose arguments by name are static."""
        self.compiled = compiled
        self._refused: set[Any] = set()

    def __call__(self, *args: Any, **static: Any) -> Any:
        """Call it with kernels, or without."""
        what = frozenset(static.items()) if self._refused else None  # a hash of the whole model takes a while
        if what not in self._refused:
            try:
                return self.compiled(*args, **static, kernels=True)
            except jax.errors.JaxRuntimeError as error:
                if not str(error).startswith(("UNIMPLEMENTED", "INTERNAL")):
                    raise
            logging.getLogger(__name__).warning("this XLA makes no kernel of a whole step, so writing takes longer")
            self._refused.add(frozenset(static.items()))
        return self.compiled(*args, **static, kernels=False)


def in_one_kernel(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return f, from arrays to arrays, to be called inside jit as one kernel of a CPU. One core runs it.

    Nothing in f may sort or scatter, or be as large as what XLA leaves to a library: XLA refuses. And each array that f
    is called with or has at hand must matter to what it returns, also in the eyes of XLA's optimiser, for which the
    place on an axis of length 1 does not: over one that does not matter XLA ends the process.
    """

    def call(*args: Any) -> Any:
        if not _ALLOWED.get():
            return f(*args)
        # The first attribute is what XLA puts on the smallest of its loops. The second keeps the call a call.
        return set_xla_metadata(jax.jit(f)(*args), xla_cpu_small_call="true", inlineable="false")

    return call


def writes_alone(texts: int, kept: int, parameters: int, bits: int, platform: str | None = None) -> bool:
    """Say whether each text is written to its end in one kernel, one after the other, not all by a character in turn.

    A CPU does so with one text of a small model, and with several where a text's keys and values are more numbers
    than the parameters, all of which a character needs: in turn, every text's would come from memory again for every
    character, where those of one stay in the CPU's cache.

    Args:
        texts: how many there are.
        kept: the keys and values of one, numbers.
        parameters: how many the model has.
        bits: of a number in matrix products. Those of less than 32 are left to whole matrices, each rounded once.
        platform: that the program is made for, 'cpu' or another; None: JAX's default.
    """
    enough = parameters <= MOST_ALONE if texts == 1 else kept > parameters
    return enough and bits >= 32 and on_cpu(platform)
