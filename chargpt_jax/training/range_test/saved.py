"""The result of a range test, read back from lr_finder.json."""

from collections.abc import Sequence
from typing import Any

from chargpt_jax.config.sections import LR_METHODS
from chargpt_jax.events import LRFinderResult, Zoom

LISTS = ("lrs", "losses", "lowest_losses", "highest_losses", "seed_rates")
"""Fields of a zoom that are lists of learning rates or losses."""


def result_from(saved: Any) -> LRFinderResult:
    """Return the range test's result from the content of lr_finder.json.

    Raises:
        ValueError: if the content is invalid: the file is untrusted input.
    """
    try:
        zooms = tuple(_zoom_from(**{**zoom, "method": saved["method"]}) for zoom in saved["zooms"])
        rate, start_lr, end_lr = (_number(saved[name]) for name in ("learning_rate", "start_lr", "end_lr"))
        if saved["method"] not in LR_METHODS:
            raise ValueError("it has no valid method")
        seeds = saved.get("seeds", 1)
        if type(seeds) is not int or not 1 <= seeds < 1e6:
            raise ValueError("it has no valid number of seeds")
        return LRFinderResult(rate, saved["method"], start_lr, end_lr, zooms, seeds)
    except (TypeError, LookupError) as error:
        raise ValueError(f"it is not the result of a range test: {type(error).__name__}") from None


def _zoom_from(*, number: int, method: str, seed_falls: Sequence[float] = (), **given: Any) -> Zoom:
    lists = {name: given.pop(name) for name in LISTS if name in given}
    if type(number) is not int or not all(isinstance(values, list) for values in (*lists.values(), [*seed_falls])):
        raise ValueError("a zoom must have a number, and lists of learning rates and losses")
    count = len(lists["lrs"])
    bands = [lists.get(name) or [0.0] * count for name in ("lowest_losses", "highest_losses")]
    if any(len(values) != count for values in (lists["losses"], *bands)):
        raise ValueError("a zoom must have as many losses as learning rates")
    falls = tuple(_number(abs(fall)) * (1 if fall >= 0 else -1) for fall in seed_falls)
    numbers: dict[str, Any] = {name: tuple(map(_number, values)) for name, values in lists.items()}
    numbers |= {name: _number(rate) for name, rate in given.items()}
    return Zoom(number=number, method=method, seed_falls=falls, **numbers)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e30:
        raise ValueError("a learning rate or loss must be a number of at least 0")
    return float(value)
