"""Python's search for garbage, held off while a program gets under way."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Leave garbage lying while much is made that stays: what imports and tracing make.

    Python looks for cycles of garbage each time a quarter more is there than the last time, and looks at everything
    each time: a tenth of the time until the first update, for a few MiB. Afterwards it looks again, if it did before.
    """
    looked = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # What was made counts as old at once.
            gc.freeze()
            gc.unfreeze()
        if looked:
            gc.enable()
