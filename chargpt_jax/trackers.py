"""Send the numbers of a run to an experiment tracker: TensorBoard, Weights & Biases or trackio.

    with trackers.opened(["tensorboard"], "runs/tiny", config) as log:
        for event in chargpt_jax.run(config, "runs/tiny"):
            log(event)

Each tracker is an optional dependency with the name of its extra: pip install "chargpt_jax[tensorboard]".
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from chargpt_jax.config import Config
from chargpt_jax.config.saved import flatten
from chargpt_jax.errors import UserError
from chargpt_jax.events import Event, LRFinderStep, Steps, Validated

Log = Callable[[Mapping[str, float], int], None]
"""Records numbers by name at a step."""


def scalars(event: Event) -> tuple[dict[str, float], int] | None:
    """Return the numbers of an event by name, with its step; None if it has none.

    Losses are in nats per character. The steps of the range test ('search/...') and of training are counted separately.
    """
    match event:
        case LRFinderStep():
            return {"search/loss": event.loss, "search/learning_rate": event.learning_rate}, event.step
        case Steps():
            names: tuple[str, ...] = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "epoch")
            return {f"training/{name}": getattr(event, name) for name in names}, event.step
        case Validated():
            names = ("loss", "bits_per_character")
            return {f"validation/{name}": getattr(event, name) for name in names}, event.step
    return None


@contextlib.contextmanager
def opened(
    names: Sequence[str], workdir: str | os.PathLike[str], config: Config, warn: Callable[[str], None] = print
) -> Iterator[Callable[[Event], None]]:
    """Yield a function that sends an event's numbers to trackers. A tracker that fails is left out from then on.

    Args:
        names: of TRACKERS.
        workdir: of the run; a tracker that writes files writes them into its folder `tracking`.
        config: of the run, for trackers that show settings beside results.
        warn: called once with the error of a tracker that fails.

    Raises:
        UserError: if a name is unknown, or its package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"There is no tracker {name!r}: give one or more of {', '.join(TRACKERS)}.")
    folder = Path(workdir).expanduser().absolute()
    with contextlib.ExitStack() as stack:
        logs = {name: stack.enter_context(TRACKERS[name](folder, config)) for name in names}

        def send(event: Event) -> None:
            if (found := scalars(event)) is None:
                return
            for name in list(logs):
                try:
                    logs[name](*found)
                except Exception as error:  # a library's, of any type
                    del logs[name]
                    warn(f"The tracker {name} failed ({error}): the run continues without it.")

        yield send


@contextlib.contextmanager
def tensorboard(folder: Path, config: Config) -> Iterator[Log]:
    """Write event files for TensorBoard: tensorboard --logdir WORKDIR/tracking."""
    with _needs("tensorboardX", "tensorboard"):
        from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder / "tracking")) as writer:
        rows = "\n".join(f"| {name} | {value} |" for name, value in flatten(config).items())
        writer.add_text("config", f"| field | value |\n|---|---|\n{rows}", 0)

        def log(numbers: Mapping[str, float], step: int) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        yield log


@contextlib.contextmanager
def wandb(folder: Path, config: Config) -> Iterator[Log]:
    """Send numbers to Weights & Biases; WANDB_MODE=offline keeps them in the run's folder.

    A resumed run continues the same run there: its id is a hash of the folder's path.
    """
    with _needs("wandb", "wandb"):
        import wandb as package

    (folder / "tracking").mkdir(parents=True, exist_ok=True)
    run = package.init(
        project="chargpt_jax",
        name=folder.name,
        id=hashlib.sha256(str(folder).encode()).hexdigest()[:16],
        resume="allow",
        dir=str(folder / "tracking"),
        config=flatten(config),
    )
    for part in ("search", "training", "validation"):  # each has an axis of its own: W&B's own step never decreases
        run.define_metric(f"{part}/*", step_metric=f"{part}/step")
    try:
        yield lambda numbers, step: run.log({**numbers, f"{next(iter(numbers)).partition('/')[0]}/step": step})
    finally:
        run.finish()


@contextlib.contextmanager
def trackio(folder: Path, config: Config) -> Iterator[Log]:
    """Write numbers to trackio's database on this machine: trackio show --project chargpt_jax."""
    with _needs("trackio", "trackio"):
        import trackio as package

    run = package.init(project="chargpt_jax", name=folder.name, resume="allow", config=flatten(config))
    try:
        yield lambda numbers, step: run.log(dict(numbers), step=step)
    finally:
        package.finish()


Tracker = Callable[[Path, Config], contextlib.AbstractContextManager[Log]]

TRACKERS: dict[str, Tracker] = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}
"""The trackers by name."""


@contextlib.contextmanager
def _needs(package: str, extra: str) -> Iterator[None]:
    """Turn an ImportError of the block into a sentence."""
    try:
        yield
    except ImportError:
        raise UserError(
            f"The tracker {extra} needs the package {package}, which is not installed: pip install "
            f"'chargpt_jax[{extra}]'."
        ) from None
