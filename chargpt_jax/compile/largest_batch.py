"""The largest batch size whose training fits, found by compiling at a few batch sizes.

Memory is close to linear in the batch size, so each guess is the crossing of a line through the two measurements that
are nearest to the limit. The answer is exact: it and the next larger batch size have been compiled.
"""

from collections.abc import Callable
from typing import NamedTuple

MAX_COMPILES = 24
"""After so many compilations the search ends, and the answer is not exact."""


class Need(NamedTuple):
    """What compilation at one batch size showed."""

    bytes: float | None
    """That a device needs; None: the compiler refused the program and did not say."""
    fits: bool


class Found(NamedTuple):
    """The result of a search."""

    batch_size: int
    """The largest that fits; 0: none."""
    need: Need | None
    """Of that batch size."""
    next_size: int
    """The smallest batch size that was found not to fit; 0: all that were allowed fit."""
    exact: bool
    """Whether the two are neighbours."""
    compiles: int


def largest_batch(need_at: Callable[[int], Need], limit: float, start: int, unit: int, most: int) -> Found:
    """Find the largest batch size that fits.

    Args:
        need_at: compiles training at a batch size.
        limit: bytes that a device has.
        start: the first batch size to try.
        unit: only multiples of it are considered.
        most: the largest batch size to consider.
    """
    known: dict[int, Need] = {}

    def fits(count: int) -> bool:
        known[count] = need_at(count * unit)
        return known[count].fits

    low, high, halve = 0, most // unit + 1, False
    guess = min(max(1, start // unit), high - 1)
    while high - low > 1 and len(known) < MAX_COMPILES:
        if fits(guess):
            low = guess
        else:
            high = guess
        line = _crossing(known, limit)
        # If a guess was wrong by more than rounding, memory is not linear here: halve the range every second time.
        halve = not halve and low in known and high in known and len(known) > 4
        middle = (low + high) // 2
        guess = min(max(middle if halve or line is None else line, low + 1), high - 1)
    bound = high if high * unit <= most else 0
    return Found(low * unit, known.get(low), bound * unit, high - low <= 1, len(known))


def _crossing(known: dict[int, Need], limit: float) -> int | None:
    """Return where memory reaches the limit, by the two known points nearest to it; None: no point is known."""
    points = [(abs(need.bytes - limit), count, need.bytes) for count, need in known.items() if need.bytes]
    if len(points) < 2:
        # Memory grows less than in proportion, because a part of it does not depend on the batch.
        return int(points[0][1] * limit / points[0][2]) if points else None
    (_, a, bytes_a), (_, b, bytes_b) = sorted(points)[:2]
    if bytes_a == bytes_b:
        return max(a, b) * 2
    return int(a + (limit - bytes_a) * (b - a) / (bytes_b - bytes_a))
