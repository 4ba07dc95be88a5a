"""Calls of samplers outside of generation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chargpt_jax.generation.sampler import SamplerState
from chargpt_jax.generation.samplers.chain import chain_of
from chargpt_jax.generation.samplers.contract import SamplerBase, State


def adjusted(state: SamplerState, logits: Any) -> jax.Array:
    """Return the logits [B, V] that a chain without memory samples from."""
    ones = jnp.ones(len(logits), jnp.int32)
    return jax.vmap(state.chain)(state.states(ones, ones[:, None], ones), jnp.asarray(logits))[1]


def state_of(sampler: SamplerBase, text: list[int], size: int, seed: int = 0) -> State:
    """Return the state of a sampler without memory so far, before a text of token ids is continued."""
    tokens = jnp.zeros(max(8, len(text) + 1), jnp.int32).at[: len(text)].set(jnp.array(text, jnp.int32))
    return State(tokens, jnp.int32(len(text)), jax.random.key(seed), sampler.first(size))


def probabilities(sampler: Any, p: Any, text: list[int] | None = None, characters: Any = ()) -> np.ndarray:
    """Return the distribution [V] that a sampler, or a chain as text, makes of another one."""
    chain = chain_of(sampler).bound(characters, len(p))
    with np.errstate(divide="ignore"):
        logits = jnp.asarray(np.log(np.asarray(p, np.float64)), jnp.float32)
    _, out = chain(state_of(chain, text or [0], len(p)), logits)
    return np.asarray(jax.nn.softmax(out), np.float64)
