"""Where the time of a training step goes on a CPU, from JAX's own profile.

    python -m benchmarks.where [--setup=small] [--updates=3] [--out=FOLDER]

Traces some updates and adds up, over all threads, the time that each instruction of the compiled program took itself,
in groups. A thread that waits is not counted, so the shares are of the work that is done, not of the clock.
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

from benchmarks.contestants import corpus, setup_of
from benchmarks.peers import machine
from chargpt_jax.devices import sharding, startup
from chargpt_jax.model.gpt import create
from chargpt_jax.training import optimizer
from chargpt_jax.training.setup import compiled_updates, fresh_state

INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', re.MULTILINE)


def group(name: str, origin: str) -> str:
    """Say what an instruction is for, from its name and from the operation that it comes from."""
    product = origin.endswith("dot_general") or name.startswith("dot")
    if name.startswith("all-reduce"):
        return "sums over devices"
    attention = re.search(r"branch_|jit\(_(outputs|gradients)\)", origin)
    if attention or (not origin and name.startswith("ynn")):
        return "attention: products" if product or name.startswith("ynn") else "attention: softmax, dropout, copies"
    if product:
        return "linear layers and logits: products"
    if "jvp" not in origin:
        return "optimizer, batches, loops"
    if origin.endswith(("dynamic_update_slice", "dynamic_slice", "slice", "concatenate")):
        return "keeping layers' values and gradients, rotary positions"
    return "norms, GELU, dropout, residuals, loss"


def own_times(events: Iterable[tuple[float, float, str]]) -> Iterator[tuple[str, float]]:
    """Give each event's time without those inside it; events are (start, duration, name) of one thread."""
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
    """Trace, add up and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", default="small")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(words)
    startup.use_every_core()
    config = setup_of(args.setup)
    graphdef, params = create(config.model, 0)
    mesh = sharding.data_mesh(config.data.batch_size)
    tx = optimizer.transform(config.optimizer, 1e-3, mesh)
    state = fresh_state(params, tx, 0, np.float32, mesh)
    tokens = jax.device_put(corpus(config), sharding.replicated(mesh))
    dispatch = compiled_updates(config, graphdef, tx, mesh, state).lower(state, tokens, np.int32(1)).compile()
    origin = dict(INSTRUCTION.findall(dispatch.as_text()))
    names = set(re.findall(r"^\s*(?:ROOT )?%?([\w.\-]+) = ", dispatch.as_text(), re.MULTILINE))
    state, history = dispatch(state, tokens, np.int32(1))
    np.asarray(history["loss"])
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            state, history = dispatch(state, tokens, np.int32(args.updates))
            np.asarray(history["loss"])
        trace = ProfileData.from_file(str(next(Path(folder).rglob("*.xplane.pb"))))
    times: Counter[str] = Counter()
    for plane in trace.planes:
        for line in plane.lines:
            for name, own in own_times((e.start_ns, e.duration_ns, e.name) for e in line.events):
                if name in names and not name.startswith(("while", "conditional", "call")):
                    times[group(name, origin.get(name, ""))] += own / 1e6 / args.updates
    total = sum(times.values())
    rows = "\n".join(f"| {name} | {own:.1f} | {100 * own / total:.0f} % |" for name, own in times.most_common())
    text = (
        f"Machine: {', '.join(f'{name} {value}' for name, value in machine().items())}.\n\n"
        f"| {args.setup}, B={config.data.batch_size}: an update's work | ms, all threads | share |\n"
        f"|---|---:|---:|\n{rows}\n"
    )
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"where_{args.setup}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
