"""FLOP of a traced program: its matrix multiplications, with two FLOP per multiply-add.

The count is of the program, not of the model. It includes what the backward pass recomputes, and leaves out blocks of
attention scores that causality excludes. `training_flops` in model/flops.py counts the other way round.
"""

import math
from collections.abc import Iterator
from typing import Any


def matmul_flop(jaxpr: Any) -> float:
    """Return the FLOP of one execution of a jaxpr on all devices together.

    A loop of unknown length counts as one iteration. Of a conditional the most expensive branch counts.
    """
    return sum(map(_flop, getattr(jaxpr, "jaxpr", jaxpr).eqns))


def _flop(eqn: Any) -> float:
    name, inner = eqn.primitive.name, [matmul_flop(jaxpr) for jaxpr in _jaxprs(eqn.params)]
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        lhs = eqn.invars[0].aval.shape
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracted)
    if name == "scan":
        return float(eqn.params["length"]) * sum(inner)
    if name == "cond":
        return max(inner)
    if name == "shard_map":  # its shapes are those of one device
        return float(eqn.params["mesh"].size) * sum(inner)
    if name == "pallas_call":
        return float(math.prod(eqn.params["grid_mapping"].grid)) * sum(inner)
    return sum(inner)


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """Yield the jaxprs among the parameters of an equation."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                yield item
