"""The operations on which a training step spends its time on a CPU, from JAX's profiler.

    python -m benchmarks.where [--config=small] [--steps=3] [--out=FOLDER]

Traces some training steps and sums, over all threads, the time of each instruction of the compiled program, in groups.
Waiting threads are not counted, so the shares are of the work, not of the elapsed time.
"""

import argparse
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.profiler import ProfileData

from benchmarks.baselines import machine
from benchmarks.implementations import config_for, corpus
from chargpt_jax.devices import sharding, startup
from chargpt_jax.model.init import create
from chargpt_jax.ops.choose import ops_for
from chargpt_jax.training import optimizer
from chargpt_jax.training.dispatch.steps import jit_train_steps, state_sharding
from chargpt_jax.training.step import create_state

INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', re.MULTILINE)


def group(name: str, origin: str) -> str:
    """Return the group of an instruction, from its name and the operation that it was compiled from."""
    matmul = origin.endswith("dot_general") or name.startswith("dot")
    if name.startswith("all-reduce"):
        return "all-reduce over devices"
    attention = re.search(r"branch_|jit\(_(outputs|gradients)\)", origin)
    if attention or (not origin and name.startswith("ynn")):
        return (
            f"attention: {'matrix multiplications' if matmul or name.startswith('ynn') else 'softmax, dropout, copies'}"
        )
    if matmul:
        return "linear layers and logits: matrix multiplications"
    if "jvp" not in origin:
        return "optimizer, batches, loops"
    if origin.endswith(("dynamic_update_slice", "dynamic_slice", "slice", "concatenate")):
        return "storing activations and gradients of layers, rotary positions"
    return "norms, GELU, dropout, residuals, loss"


def own_times(events: Iterable[tuple[float, float, str]]) -> Iterator[tuple[str, float]]:
    """Yield each event's time without the events inside it; events are (start, duration, name) of one thread."""
    stack: list[list] = []
    for start, duration, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while stack and stack[-1][0] <= start:
            _, done, own = stack.pop()
            yield done, own
        if stack:
            stack[-1][2] -= duration
        stack.append([start + duration, name, duration])
    yield from ((name, own) for _, name, own in stack)


def main(words: Sequence[str] | None = None) -> None:
    """Trace, sum and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="small")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(words)
    startup.use_every_core()
    config = config_for(args.config)
    graphdef, params = create(config.model, 0, ops_for(query_block=config.model.attention_block))
    mesh = sharding.data_mesh(config.data.batch_size)
    tx = optimizer.make_optimizer(config, 1e-3, mesh)
    state = create_state(params, tx, 0)
    state = jax.device_put(state, state_sharding(state, mesh))
    tokens = jax.device_put(corpus(config), sharding.replicated(mesh))
    dispatch = jit_train_steps(config, graphdef, tx, mesh, state).lower(state, tokens, np.int32(1)).compile()
    origin = dict(INSTRUCTION.findall(dispatch.as_text()))
    names = set(re.findall(r"^\s*(?:ROOT )?%?([\w.\-]+) = ", dispatch.as_text(), re.MULTILINE))
    state, history = dispatch(state, tokens, np.int32(1))
    np.asarray(history["loss"])
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            state, history = dispatch(state, tokens, np.int32(args.steps))
            np.asarray(history["loss"])
        trace = ProfileData.from_file(str(next(Path(folder).rglob("*.xplane.pb"))))
    times: Counter[str] = Counter()
    for plane in trace.planes:
        for line in plane.lines:
            for name, own in own_times((e.start_ns, e.duration_ns, e.name) for e in line.events):
                if name in names and not name.startswith(("while", "conditional", "call")):
                    times[group(name, origin.get(name, ""))] += own / 1e6 / args.steps
    total = sum(times.values())
    rows = "\n".join(f"| {name} | {own:.1f} | {100 * own / total:.0f} % |" for name, own in times.most_common())
    text = (
        f"Machine: {', '.join(f'{name} {value}' for name, value in machine().items())}.\n\n"
        f"| {args.config}, batch size {config.data.batch_size}: operations of one step | ms, all threads | share |\n"
        f"|---|---:|---:|\n{rows}\n"
    )
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"where_{args.config}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
