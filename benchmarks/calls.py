"""Count the calls from `main` to the training step and to a sampled token: how far a reader has to follow the code.

    python -m benchmarks.calls

It runs the command line in this process on a small text, and records the stack while `train_step`, and the choice of a
token, are traced by JAX. A call leads from one function of chargpt_jax on that stack to the next, functions that are
defined inside others included; JAX's own functions do not count.
"""

import contextlib
import functools
import io
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import chargpt_jax
from chargpt_jax import main as command_line

PACKAGE = Path(chargpt_jax.__file__).parent

SIZES = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_head_dim": 8, "n_ff": 16, "block_size": 16, "attention_block": 16}
"""The model section of the config."""


def chain(frame: FrameType | None) -> list[str]:
    """Return the functions of the package on a stack, outermost first, from `main` on, as 'file.function'."""
    names: list[str] = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            file = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
            name = f"{file}.{frame.f_code.co_qualname.replace('.<locals>', '')}"
            names.append(name)
            if name == "main.main":
                break
        frame = frame.f_back
    return names[::-1]


@contextlib.contextmanager
def recorded(owner: Any, name: str) -> Iterator[list[list[str]]]:
    """Record the chain of calls to a function, by its name in a module or class, while a program is traced."""
    found: list[list[str]] = []
    original: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        target = f"{original.__module__.removeprefix('chargpt_jax.')}.{original.__qualname__}"
        found.append([*chain(sys._getframe(1)), target])
        return original(*args, **kwargs)

    with mock.patch.object(owner, name, wrapper):
        yield found


def command(*flags: str) -> None:
    """Run a command line in this process, without its output."""
    with contextlib.redirect_stdout(io.StringIO()):
        code = command_line.main(["chargpt", *flags])
    if code:
        raise RuntimeError(f"chargpt {' '.join(flags)} has exit code {code}")


def measured(folder: Path) -> tuple[list[str], list[str]]:
    """Return the chains to a training step and to a sampled token, of a run in a new folder."""
    from chargpt_jax.generation import sampler
    from chargpt_jax.training.dispatch import steps

    text, rng = folder / "text.txt", random.Random(0)
    text.write_text(" ".join(rng.choice(("ab", "cde", "fghi", "jk")) for _ in range(1000)))
    fields = {f"model.{name}": size for name, size in SIZES.items()} | {
        **{"data.source": text, "data.batch_size": 2, "scheduler.max_steps": 1},
        **{"optimizer.learning_rate": 0.01, "sample.max_new_tokens": 4},
    }
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    with recorded(steps, "train_step") as training:
        command("--config=tiny", f"--workdir={folder / 'run'}", *flags)
    with recorded(sampler.SamplerState, "sample") as generation:
        command("--mode=generate", f"--workdir={folder / 'run'}", "--prompt=ab", "--max_new_tokens=5")
    return training[0], generation[0]


def main(_: Sequence[str] | None = None) -> None:
    """Print both chains."""
    with tempfile.TemporaryDirectory() as folder:
        for title, names in zip(("a training step", "a sampled token"), measured(Path(folder)), strict=True):
            print(f"{len(names) - 1} calls to {title}:\n  " + "\n  ".join(names))


if __name__ == "__main__":
    main()
