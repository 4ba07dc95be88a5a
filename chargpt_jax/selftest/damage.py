"""Damage to checkpoints for the self-test, and the outcome of a restore."""

import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from chargpt_jax.errors import NoCheckpoint, UserError
from chargpt_jax.storage.arrays.state_arrays import Arrays

HANG = 120.0
"""Seconds after which a process, or a restore, counts as hung."""


def outcome(restore: Callable[[], Arrays], valid: dict[int, Arrays], newest: int) -> str:
    """Restore a damaged run and return the outcome, as a name of a field of `Corruptions`.

    Args:
        restore: restores the run; it runs in a thread, which is abandoned if it hangs.
        valid: the arrays of each checkpoint before the damage, by step.
        newest: the step of the newest one.
    """
    found = "hangs"

    def run() -> None:
        nonlocal found
        try:
            state = restore()
        except (NoCheckpoint, UserError):
            found = "refused"
        except Exception:
            found = "unclear"
        else:
            step = int(state["step"])
            wrong = step not in valid or not same(state, valid[step])
            found = "silent_wrong" if wrong else "bit_identical" if step == newest else "fallbacks"

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(HANG)
    return found


def mutate(checkpoints: Path, steps: list[Path], rng: random.Random) -> str:
    """Damage one file or folder, mostly of the newest checkpoint; return a description of the damage."""
    step = checkpoints / (steps[-1] if rng.random() < 0.8 else rng.choice(steps)).name
    files = sorted(path for path in step.rglob("*") if path.is_file())
    path = rng.choice(files)
    kind = rng.choice(("flip", "flip", "truncate", "delete", "zero", "rename", "swap", "delete folder", "rename step"))
    data = bytearray(path.read_bytes())
    if kind in ("flip", "truncate", "zero") and not data:
        kind = "delete"
    if kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif kind == "truncate":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "zero":
        start, end = sorted((rng.randrange(len(data)), len(data)))
        path.write_bytes(data[:start] + bytes(end - start))
    elif kind == "delete":
        path.unlink()
    elif kind == "rename":
        path.rename(path.with_name(path.name + " (1)"))
    elif kind == "swap":
        other = rng.choice(files)
        other_data = other.read_bytes()
        other.write_bytes(data)
        path.write_bytes(other_data)
    elif kind == "delete folder":
        shutil.rmtree(rng.choice([step, *(p for p in step.rglob("*") if p.is_dir())]))
    else:
        step.rename(checkpoints / rng.choice((f"{step.name} (1)", str(int(step.name) + 1), f"0{step.name}")))
    return f"{kind} of {path.relative_to(checkpoints)}"


def same(one: Arrays, other: Arrays) -> bool:
    """Return whether all arrays are bit-identical."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].tobytes() == other[name].tobytes() for name in one
    )
