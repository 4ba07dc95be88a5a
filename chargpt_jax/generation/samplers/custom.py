"""A sampler that is a function of the user's own."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from chargpt_jax.errors import UserError
from chargpt_jax.generation.samplers.contract import SamplerBase, State


@flax.struct.dataclass
class Custom(SamplerBase):
    """A function of (state, logits) that returns both, in operations of JAX: it is traced once.

    `state` is a `State`, `logits` are float32 [V], both of one sequence. A token that is excluded before stays
    excluded, and a result that excludes all tokens, or is NaN everywhere, is not used.
    """

    function: Callable[[State, jax.Array], tuple[State, jax.Array]] = flax.struct.field(pytree_node=False)
    memory: Any = ()
    """The memory before the first token: a tree of numbers and arrays."""
    height: float = flax.struct.field(pytree_node=False, default=1.0)
    """The value of `State.shown` at full height of a plot."""

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name of the function."""
        return self.function.__name__ if inspect.isfunction(self.function) else type(self.function).__name__

    @property
    def series(self) -> str:  # type: ignore[override]
        """The name of the function."""
        return self.name

    def __call__(self, state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        """Call the function, and check what it returns while it is traced."""
        after, changed = self._checked(self.function(state, logits), state, logits)
        allowed = jnp.where(jnp.isnan(changed) | jnp.isneginf(logits), -jnp.inf, changed.astype(logits.dtype))
        return replace(state, memory=after.memory, shown=after.shown), jnp.where(
            jnp.any(~jnp.isneginf(allowed)), allowed, logits
        )

    def first(self, vocab_size: int) -> Any:
        """Return the memory as arrays."""
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), self.memory)

    def top(self) -> float:
        """Return the height."""
        return float(self.height)

    def _checked(self, result: Any, state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        """Return what the function returned.

        Raises:
            UserError: if it has another type, shape or dtype than it must have.
        """

        def wrong(what: str, rule: str) -> UserError:
            return UserError(
                f"The sampler {self.name} returns {what}, but it must return {rule}: correct the function."
            )

        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], State):
            raise wrong(f"a {type(result).__name__}", "the state and the logits, (state, logits)")
        after, changed = result
        if getattr(changed, "shape", None) != logits.shape or not jnp.issubdtype(changed.dtype, jnp.floating):
            raise wrong(f"logits {_shape(changed)}", f"logits {_shape(logits)}")
        before = jax.tree.map(jnp.asarray, state.memory)
        kinds = [(jax.tree.structure(x), [_shape(leaf) for leaf in jax.tree.leaves(x)]) for x in (before, after.memory)]
        if kinds[0] != kinds[1]:
            raise wrong(f"a memory of {_tree(after.memory)}", f"one of {_tree(before)}, as at first")
        if after.shown is None:
            return after, changed
        if jnp.shape(after.shown):
            raise wrong(f"state.shown {_shape(after.shown)}", "one number there")
        return replace(after, shown=jnp.asarray(after.shown, jnp.float32)), changed


def _shape(x: Any) -> str:
    """Return an array's dtype and shape, as in float32[64]."""
    shape = ",".join(map(str, jnp.shape(x)))
    return f"{jnp.result_type(x)}[{shape}]"


def _tree(tree: Any) -> str:
    return ", ".join(map(_shape, jax.tree.leaves(tree))) or "no array"
