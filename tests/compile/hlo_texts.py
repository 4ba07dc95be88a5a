"""Small programs as XLA compiled them, for tests that have no such compiler; and how they were made.

`python -m tests.compile.hlo_texts` writes them again. It needs libtpu and JAX's CUDA plugin; no GPU or TPU.

The program is a loop of unknown length. One iteration multiplies x, [8, 64] on each device, by three matrices in an
inner loop, chooses one of two branches, and sums over the devices.
"""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

FOLDER = Path(__file__).parent
TEXTS = {"h100:2": "h100_2.txt", "v5e:2x2": "v5e_2x2.txt"}
"""{topology: file}."""

LAYERS, WIDTH, SEQUENCES = 3, 64, 8


def text_for(topology: str) -> str:
    """Return the text of the program for a topology, as it is stored."""
    return (FOLDER / TEXTS[topology]).read_text(encoding="utf-8")


def step(x: jax.Array, matrices: jax.Array) -> jax.Array:
    """Do one iteration on one device: x [8, 64], matrices [3, 64, 64]."""
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, matrices)
    x = jax.lax.cond(x[0, 0] > 0, lambda x: jnp.sort(x, axis=-1), lambda x: x * 2, x)
    return jax.lax.psum(x, "data")


def program(devices: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the jitted program and the shapes of its arguments, on a mesh of devices."""
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    split, whole = PartitionSpec("data"), PartitionSpec()
    one = jax.shard_map(step, mesh=mesh, in_specs=(split, whole), out_specs=whole, check_vma=False)

    def loop(x: jax.Array, matrices: jax.Array, count: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, count, lambda _, x: jnp.tile(one(x, matrices), (len(devices), 1)), x)

    shapes = (
        jax.ShapeDtypeStruct((SEQUENCES * len(devices), WIDTH), jnp.float32, sharding=NamedSharding(mesh, split)),
        jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32, sharding=NamedSharding(mesh, whole)),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, whole)),
    )
    return jax.jit(loop), shapes


def compiled_text(topology: str) -> str:
    """Compile the program for a topology; return its optimised HLO, without metadata."""
    from chargpt_jax.compile.topology import open_topology

    target = open_topology(topology)
    function, shapes = program(target.devices)
    lowered = function.trace(*shapes).lower(lowering_platforms=(target.lowering_platform,))
    text = lowered.compile(compiler_options=target.compiler_options or None).as_text()
    text = re.sub(r", metadata=\{[^}]*\}|, frontend_attributes=\{(?:[^{}]|\{[^}]*\})*\}", "", text)
    tables = r"^(FileNames|FunctionNames|FileLocations|StackFrames)\n(?:.+\n)*\n*"
    text = re.sub(tables, "", text, flags=re.MULTILINE)
    return re.sub(r'"(?:flag_configs|scoped_memory_configs|used_scoped_memory_configs)":\[[^\]]*\],?', "", text)


def main() -> None:
    """Write the files."""
    for topology, file in TEXTS.items():
        (FOLDER / file).write_text(compiled_text(topology), encoding="utf-8")


if __name__ == "__main__":
    main()
