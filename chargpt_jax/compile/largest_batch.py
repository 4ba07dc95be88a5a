"""The largest batch size whose training fits, found by compiling at a few batch sizes.

Memory is close to linear in the batch size, so each guess is the crossing of a line through the two measurements that
are nearest to the limit. Near the limit a compiler may save memory by recomputing; then the search continues in growing
steps, and by halving. The answer is verified: it and a batch size at most 1.6 % larger have been compiled.

A TPU's compiler takes minutes near the limit. For it, `predicted_batch` compiles one size far below the limit and one
just below the crossing: it is verified that the answer fits, but not that a larger one does not.
"""

from collections.abc import Callable
from typing import NamedTuple

RESOLUTION = 64
"""Batch sizes that differ by less than this part are not distinguished; smaller ones than this are exact."""

MAX_COMPILES = 24
"""After so many compilations the search ends, even if the two batch sizes are further apart."""


FAR_BELOW = 0.125
"""The part of the predicted crossing that `predicted_batch` compiles first: arrays do not fit on the chip there."""

JUST_BELOW = (0.97, 0.9, 0.75, 0.5)
"""The parts of the predicted crossing that it compiles then, until one fits."""


CLOSE = 1.1
"""It compiles one more if the crossing, with all sizes that are known, has moved up by more than this factor."""


class Need(NamedTuple):
    """What compilation at one batch size showed."""

    bytes: float | None
    """That a device needs; None: the compiler refused the program and did not say."""
    fits: bool


class Found(NamedTuple):
    """The result of a search."""

    batch_size: int
    """The largest that was found to fit; 0: none."""
    need: Need | None
    """Of that batch size."""
    next_size: int
    """The smallest batch size that was found not to fit; 0: all that were tried fit."""
    compiles: int
    predicted: int = 0
    """Where the memory reaches the limit by prediction, which was not compiled; 0: the answer is verified."""


def predicted_batch(need_at: Callable[[int], Need], limit: float, start: int, unit: int, most: int) -> Found:
    """Find a batch size just below the one at which memory is predicted to reach the limit, with few compilations.

    The arguments are those of `largest_batch`.
    """
    top = most // unit
    guess = min(max(1, start // unit), top)
    known = {guess: need_at(guess * unit)}

    def guessed(part: float) -> int:
        line = _crossing(known, limit)
        end = min(known) if line is None else line  # the compiler refused all and named no size
        count = max(1, min(int(part * end), top))
        return count // _step(count) * _step(count)

    for _ in range(2):  # the first guess is by proportion alone, so it may be much too small
        guess = guessed(FAR_BELOW)
        if len(known) == 1 and guess <= max(known):
            guess = max(known) // 2 or 2
        if guess not in known and (len(known) == 1 or guess > 2 * max(known)):
            known[guess] = need_at(guess * unit)
    for part in JUST_BELOW:
        guess = guessed(part)
        if guess not in known:
            known[guess] = need_at(guess * unit)
        if known[guess].fits and guessed(part) <= CLOSE * guess:  # otherwise memory grows more slowly than it did
            break
    low = max((count for count, need in known.items() if need.fits), default=0)
    high = min((count for count, need in known.items() if not need.fits), default=0)
    end = min(_crossing(known, limit) or 0, top)
    return Found(low * unit, known.get(low), high * unit, len(known), predicted=max(low, end) * unit if low else 0)


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
    low, high, stride = 0, most // unit + 1, 1  # low fits; high does not, or is not allowed
    guess = min(max(1, start // unit), high - 1)
    while True:
        known[guess] = need_at(guess * unit)
        low, high = (guess, high) if known[guess].fits else (low, guess)
        step = _step(low)
        if high - low <= step or len(known) >= MAX_COMPILES:
            break
        line, middle, bounded = _crossing(known, limit), (low + high) // 2, high in known
        if line is None or (low and bounded and len(known) % 3 == 0):  # the line may approach from one side only
            guess = middle
        elif low < line < high:
            guess = line
        else:
            aside = low + step * stride if line <= low else high - step * stride
            guess, stride = aside, 2 * stride
            if bounded:
                guess = min(aside, middle) if line <= low else max(aside, middle)
        rounded = guess // step * step
        guess = min(rounded if rounded > low else low + step, high - 1)
    return Found(low * unit, known.get(low), high * unit if high in known else 0, len(known))


def _step(count: int) -> int:
    """Return the distance at which two batch sizes are distinguished: a power of two, so that answers are round."""
    return 1 << max(0, (count // RESOLUTION).bit_length() - 1)


def _crossing(known: dict[int, Need], limit: float) -> int | None:
    """Return where memory reaches the limit, by the two known points nearest to it; None: no point is known."""
    points = [
        (abs(need.bytes - limit), count, need.bytes)
        for count, need in known.items()
        if need.bytes and need.fits == (need.bytes <= limit)
    ]
    if len(points) < 2:
        # Memory grows less than in proportion, because a part of it does not depend on the batch.
        return int(points[0][1] * limit / points[0][2]) if points else None
    (_, a, bytes_a), (_, b, bytes_b) = sorted(points)[:2]
    if bytes_a == bytes_b:
        return max(a, b) * 2
    return int(a + (limit - bytes_a) * (b - a) / (bytes_b - bytes_a))
