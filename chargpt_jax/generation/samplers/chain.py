"""Chains of samplers: composition in the written order, and their form as text.

    min_p=0.05,temperature=0.8
    dry=0.8:allowed_length=8,mirostat=2.5

A sampler's name is followed by the value of its first setting, and by further settings, each behind a colon. A chain is
a sampler itself.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import numpy as np

from chargpt_jax.config.values import argument
from chargpt_jax.config.values import shown as code
from chargpt_jax.errors import UserError
from chargpt_jax.generation.samplers import feedback, filters, penalties, temperatures
from chargpt_jax.generation.samplers.contract import SamplerBase, State
from chargpt_jax.generation.samplers.custom import Custom
from chargpt_jax.generation.samplers.series import Series, Shown
from chargpt_jax.generation.samplers.temperatures import Temperature

SAMPLERS: dict[str, type[SamplerBase]] = {
    kind.name: kind
    for kind in (
        *(temperatures.Temperature, filters.TopK, filters.TopP, filters.MinP, filters.Typical, filters.Eta),
        *(filters.TopNSigma, filters.PLess, filters.XTC, temperatures.DynamicTemperature, temperatures.EDT),
        *(temperatures.Budget, temperatures.WordStart, feedback.Mirostat, feedback.AdaptiveP),
        *(penalties.Repetition, penalties.Presence, penalties.Frequency, penalties.DRY),
    )
}
"""The samplers by their names in text."""

Given = str | SamplerBase | Callable[[State, jax.Array], tuple[State, jax.Array]]
"""What a user can give as a sampler; a list of these is a chain."""

MAX_SAMPLERS = 32
"""Samplers of a chain: each takes time to compile."""


@flax.struct.dataclass
class Chain(SamplerBase):
    """Samplers, each of which gets the logits of the one before it."""

    samplers: tuple[SamplerBase, ...]
    name = "chain"

    @property
    def sorts(self) -> bool:  # type: ignore[override]
        """Whether one of the samplers does."""
        return any(sampler.sorts for sampler in self.samplers)

    @property
    def names(self) -> tuple[str, ...]:
        """The samplers' names, as their series have them: the second one of a name ends with _2."""
        names = [sampler.name for sampler in self.samplers]
        counts = (names[: i + 1].count(name) for i, name in enumerate(names))
        return tuple(f"{name}_{n}" if n > 1 else name for name, n in zip(names, counts, strict=True))

    def __call__(self, state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        """Call the samplers one after the other; `shown` is a dict of what they show, by name."""
        memory, values = [], {}
        for i, (name, sampler) in enumerate(zip(self.names, self.samplers, strict=True)):
            before = state.memory[i] if state.memory else ()
            own = dataclasses.replace(state, key=jax.random.fold_in(state.key, i), memory=before, shown=None)
            own, logits = sampler(own, logits)
            memory.append(own.memory)
            if own.shown is not None:
                values[name] = own.shown
        return dataclasses.replace(state, memory=tuple(memory) if state.memory else (), shown=values), logits

    def shown(self, values: Mapping[str, np.ndarray]) -> Series:
        """Return what the samplers showed, float32 [N] by name, with its labels and heights."""
        found = zip(self.names, self.samplers, strict=True)
        return {name: Shown(one.series, one.top(), values[name]) for name, one in found if name in values}

    def first(self, vocab_size: int) -> Any:
        """Return the memory of each sampler; () if none has any."""
        memory = tuple(sampler.first(vocab_size) for sampler in self.samplers)
        return memory if jax.tree.leaves(memory) else ()

    def bound(self, characters: Sequence[str], vocab_size: int) -> "Chain":
        """Return the chain with each sampler bound to the vocabulary."""
        return Chain(tuple(sampler.bound(characters, vocab_size) for sampler in self.samplers))

    def random(self) -> jax.Array | bool:
        """Return whether a token is sampled; False if a temperature is 0, so that the most likely one is chosen."""
        found: jax.Array | bool = True
        for sampler in self.samplers:
            if isinstance(sampler, Temperature):
                positive = sampler.temperature > 0
                found = positive if found is True else found & positive
        return found


def chain_of(given: Given | Iterable[Given]) -> Chain:
    """Return the chain of a text, a sampler, a function, or several of these, with valid settings.

    Raises:
        UserError: if one of them is invalid.
    """
    if isinstance(given, str) or callable(given):
        given = [given]
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise UserError(
            f"sampler is {code(given)}, but it must be a text, a function, or a list of these: try 'min_p=0.05'."
        )
    samplers = [sampler for one in given for sampler in _samplers_of(one)]
    if not samplers:
        raise UserError("sampler is empty, but a chain has at least one sampler: leave it out, or try 'temperature=1'.")
    if len(samplers) > MAX_SAMPLERS:
        raise UserError(
            f"sampler has {len(samplers)} samplers, but at most {MAX_SAMPLERS} are possible: leave some out."
        )
    for sampler in samplers:
        check(sampler)
    return Chain(tuple(samplers))


def _samplers_of(given: Any) -> Iterable[SamplerBase]:
    if isinstance(given, Chain):
        return given.samplers
    if isinstance(given, SamplerBase):
        return [given]
    if isinstance(given, str):
        return [parsed(item) for item in given.split(",")]
    if callable(given) and not isinstance(given, type):
        return [Custom(given)]
    raise UserError(f"sampler is {code(given)}, but it must be a text, a function or a sampler: try 'min_p=0.05'.")


def parsed(item: str) -> SamplerBase:
    """Return a sampler from its text, as in dry=0.8:base=1.75.

    Raises:
        UserError: if there is no such sampler or setting, or its value has another type.
    """
    first, *others = item.strip().split(":")
    name, equals, value = first.partition("=")
    name = name.strip()
    if name not in SAMPLERS:
        raise UserError(f"sampler is {code(item)}, but the samplers are {', '.join(SAMPLERS)}: choose from these.")
    kind, values = SAMPLERS[name], dict[str, Any]()
    names = [item.name for item in settings(kind)]
    if equals and not names:
        raise UserError(f"sampler is {code(item)}, but {name} has no settings: write {name}.")
    pairs = [(names[0], value)] if equals else []
    for other in others:
        key, equals, value = other.partition("=")
        if key.strip() not in names or not equals:
            raise UserError(f"sampler is {code(item)}, but {name} has the settings {', '.join(names)}: {usage(kind)}.")
        pairs.append((key.strip(), value))
    for key, value in pairs:
        if key in values:
            raise UserError(f"sampler is {code(item)}, but {key} is given twice: leave one of them out.")
        values[key] = _value(kind, key, value.strip())
    return kind(**values)


def written(chain: Chain) -> str:
    """Return the text of a chain, which `chain_of` reads.

    Raises:
        UserError: if a sampler is a function, which has no text.
    """
    return ",".join(map(_written, chain.samplers))


def settings(kind: type[SamplerBase] | SamplerBase) -> list[dataclasses.Field]:
    """Return the fields that a user can set."""
    return [item for item in dataclasses.fields(kind) if "about" in item.metadata]  # type: ignore[arg-type]


def usage(kind: type[SamplerBase]) -> str:
    """Return how a sampler is written, as in `write xtc=0.5:threshold=0.1`."""
    return f"write {_written(kind())}"


def check(sampler: SamplerBase) -> None:
    """Check the values of a sampler's settings.

    Raises:
        UserError: if one is invalid.
    """
    for item in settings(sampler):
        value, limits, name = getattr(sampler, item.name), item.metadata, f"{item.name} of {sampler.name}"
        argument(name, value, type(item.default), f"try {item.default!r}")
        rules = (
            ("at least", limits.get("least"), lambda low: value >= low),  # noqa: B023
            ("above", limits.get("above"), lambda low: value > low),  # noqa: B023
            ("at most", limits.get("most"), lambda high: value <= high),  # noqa: B023
            ("below", limits.get("below"), lambda high: value < high),  # noqa: B023
        )
        finite = not isinstance(value, float) or abs(value) < 1e30
        if not finite or not all(limit is None or holds(limit) for _, limit, holds in rules):
            must = " and ".join(f"{rule} {limit:g}" for rule, limit, _ in rules if limit is not None) or "finite"
            raise UserError(f"{name} is {code(value)}, but it must be {must}: try {item.default!r}.")


def _value(kind: type[SamplerBase], name: str, text: str) -> Any:
    (item,) = (item for item in settings(kind) if item.name == name)
    wanted: type = type(item.default)
    try:
        return json.loads(f'"{text}"') if wanted is str else wanted(text)
    except ValueError:
        what = {int: "an integer", float: "a number", str: "a text with the escapes of JSON"}[wanted]
        raise UserError(
            f"{name} of {kind.name} is {code(text)}, but it must be {what}: try {item.default!r}."
        ) from None


def _written(sampler: SamplerBase) -> str:
    if sampler.name not in SAMPLERS:
        raise UserError(f"The sampler {sampler.name} is a function, which has no text: use it from Python.")
    values = [(item.name, _text(getattr(sampler, item.name))) for item in settings(sampler)]
    parts = [f"{sampler.name}={value}" for _, value in values[:1]] or [sampler.name]
    return ":".join(parts + [f"{name}={value}" for name, value in values[1:]])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        return repr(value)
    return json.dumps(value)[1:-1].replace(",", "\\u002c").replace(":", "\\u003a").replace("=", "\\u003d")
