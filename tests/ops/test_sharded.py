"""Operations of a device of a mesh that splits the parameters: which collectives they have, and whose dropout masks.

Their values are those of one device: tests/devices/test_layout.py trains with them on eight devices.
"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from chargpt_jax.config import ModelConfig
from chargpt_jax.devices import layout, per_device
from chargpt_jax.model.init import abstract_model
from chargpt_jax.ops import plain
from chargpt_jax.ops.choose import ops_for
from chargpt_jax.ops.dropout import Dropout, head_seeds
from chargpt_jax.training.step import gradients
from tests.ops.test_blockwise_attention import SEEDS, inputs

LAYERS = 3


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yield the equations of a jaxpr and of all jaxprs inside."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                if hasattr(getattr(item, "jaxpr", item), "eqns"):
                    yield from equations(item)


def gradient_program(remat: bool, dtype: Any, *sizes: int) -> Any:
    """Return the jaxpr of the loss and its gradient on a mesh data x fsdp x tensor, without devices."""
    mesh: Any = AbstractMesh(sizes, layout.AXES)
    model = ModelConfig(block_size=8, n_embd=32, n_head=4, n_head_dim=16, n_ff=96, n_layer=LAYERS, remat=remat)
    model.vocab_size = model.used_ids = 64
    graphdef, params = abstract_model(model, ops_for(dtype, platform="tpu", mesh=mesh))
    ints, seeds = jax.ShapeDtypeStruct((8, 8), jnp.int32), jax.ShapeDtypeStruct((8, 2), jnp.uint32)
    f = per_device.sum_over_batch(partial(gradients, graphdef=graphdef, microbatches=1), mesh, like=(0, params))
    return jax.make_jaxpr(f)((params, jax.ShapeDtypeStruct((), jnp.int32), None), (ints, ints, seeds))


@pytest.mark.parametrize("remat", [True, False])
@pytest.mark.parametrize("sizes", [(1, 4, 1), (1, 1, 4), (2, 2, 2)])
def test_collectives_of_a_layer(sizes, remat):
    """Four matrices: two gathers and one scattered sum of each; and two sums of activations in each direction."""
    _, fsdp, tensor = sizes
    loops = [eqn for eqn in equations(gradient_program(remat, jnp.bfloat16, *sizes)) if eqn.primitive.name == "scan"]
    inside = [eqn for loop in loops for eqn in equations(loop.params["jaxpr"])]
    found = Counter(eqn.primitive.name for eqn in inside)
    assert [loop.params["length"] for loop in loops] == [LAYERS, LAYERS]
    assert found["all_gather"] == (8 if fsdp > 1 else 0)
    assert found["reduce_scatter"] == (4 if fsdp > 1 else 0)
    sums = [eqn for eqn in inside if eqn.primitive.name.startswith("psum")]
    assert len(sums) == (4 if tensor > 1 else 0)
    assert all(eqn.invars[0].aval.ndim == 3 for eqn in sums)
    matmuls = [eqn for eqn in inside if eqn.primitive.name == "dot_general" and eqn.outvars[0].aval.ndim == 2]
    # One forward, two backward, and one that nothing uses, which XLA removes: rematerialisation repeats none.
    assert len(matmuls) == 4 * 4


@pytest.mark.parametrize("remat", [True, False])
def test_gathered_matrices_are_not_saved(remat):
    """A loop over layers has no result as large as all gathered matrices."""
    loops = [eqn for eqn in equations(gradient_program(remat, jnp.bfloat16, 1, 4, 1)) if eqn.primitive.name == "scan"]
    saved = {out.aval.shape for loop in loops for out in loop.outvars}
    full = {(LAYERS, 32, 192), (LAYERS, 64, 32), (LAYERS, 32, 96), (LAYERS, 96, 32)}
    assert saved
    assert not saved & full


def test_matrices_travel_in_the_dtype_of_the_multiplication():
    program = gradient_program(True, jnp.bfloat16, 1, 4, 1)
    moved = [eqn for eqn in equations(program) if re.match("all_gather|reduce_scatter", eqn.primitive.name)]
    assert {eqn.invars[0].aval.dtype for eqn in moved} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", ["plain", "blocks", "kernel"])
def test_heads_of_a_device_have_the_masks_of_the_model(name):
    attention = plain.attention if name == "plain" else ops_for(platform="cpu", attention=name).attention
    how, arrays = Dropout(0.3), inputs(13)
    every = attention(*arrays, SEEDS, how)
    some = attention(*(x[:, 1:] for x in arrays), head_seeds(SEEDS, 2, first=1), how)
    np.testing.assert_allclose(some, every[:, 1:], rtol=0, atol=1e-6)
    assert np.abs(attention(*(x[:, 1:] for x in arrays), SEEDS, how) - every[:, 1:]).max() > 0.1


def test_equal_meshes_have_equal_operations():
    """Equal `Ops` share a compilation. A mesh that keeps the parameters whole has the usual ones."""
    sizes = [(2, 2, 2), (1, 4, 2), (1, 8, 1)]
    found = [ops_for(mesh=AbstractMesh(each, layout.AXES)) for each in sizes]
    assert found[0] == ops_for(mesh=AbstractMesh(sizes[0], layout.AXES))
    assert found[0] == ops_for(mesh=AbstractMesh((4, 2, 2), layout.AXES))
    assert len(set(found)) == 3
    assert ops_for(mesh=AbstractMesh((4,), ("data",))) == ops_for()
