"""An update that devices share: of Adam's moments each keeps a part, and moves that part of the parameters.

What shares a batch ends with the same gradient on every device, and left to itself each would make the same update of
all parameters. Here each makes a part of it, and the parameters are brought together afterwards (Xu et al. 2020,
"Automatic cross-replica sharding of weight update in data-parallel training"). The update is the same: Adam treats each
number by itself. Where an array is cut is devices.share's rule.
"""

from functools import partial
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from chargpt_jax import devices


def shared(tx: optax.GradientTransformation, mesh: Mesh | None) -> optax.GradientTransformation:
    """Let each device of a mesh make its share of a transform's updates and keep its share of the state.

    Args:
        tx: a transform that treats every number by itself.
        mesh: as of devices.data_mesh; None: each device makes and keeps all.
    """
    share = partial(devices.in_shares, mesh)

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = tx.update(share(gradient), share(state), share(params))
        return share(updates), share(state)

    return optax.GradientTransformation(tx.init, update)


def layout(state: optax.OptState, mesh: Mesh) -> Any:
    """Return how an optimizer's state, arrays or shapes, lies on a mesh: Adam's moments in shares, all else whole."""
    is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)  # noqa: E731

    def lie(node: Any) -> Any:
        how = partial(devices.share, mesh) if is_adam(node) else lambda _: devices.replicated(mesh)
        return jax.tree.map(how, node)

    return jax.tree.map(lie, state, is_leaf=is_adam)
