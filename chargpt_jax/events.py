"""What a run tells while it goes, as typed events: the loop yields them, terminals and notebooks show them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prepared:
    """The corpus is ready."""

    titles: tuple[str, ...]
    characters: int
    n_train: int
    n_validation: int
    n_ids: int
    """Distinct characters and the padding."""
    vocab_size: int
    stand_in_for: str | None
    """The source that could not be had, where another text stands in for it."""


@dataclass(frozen=True)
class Zoom:
    """One zoom of the learning-rate range test; only points that lowered the loss are kept."""

    number: int
    """Counted from 1."""
    low: float
    """The rates went from here..."""
    high: float
    """...to here, evenly in log space."""
    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    """Nats per character."""
    steepest: float
    lowest: float
    """The rate at the least loss of any zoom so far: rates only go down."""
    best: float
    """What this zoom proposes."""


@dataclass(frozen=True)
class LRFinderResult:
    """The outcome of the range test."""

    learning_rate: float
    method: str
    start_lr: float
    end_lr: float
    zooms: tuple[Zoom, ...]


@dataclass(frozen=True)
class LRFinderStep:
    """The range test has made one more training step."""

    step: int
    """Counted from 1 over all zooms."""
    total_steps: int
    zoom: int
    """Counted from 1."""
    learning_rate: float
    loss: float
    """Nats per character, before this rate's update; may be nan."""


@dataclass(frozen=True)
class TrainStarted:
    """Training is about to begin, or to go on from a checkpoint."""

    parameters: int
    first_step: int
    """Updates already made."""
    total_steps: int
    epoch_steps: int
    epochs: float
    learning_rate: float
    """The schedule's peak."""
    device: str
    dtype: str
    training: tuple[tuple[int, float], ...] = ()
    """(step, loss) as logged so far, nats per character."""
    validation: tuple[tuple[int, float], ...] = ()
    """(step, loss) of the validations so far, nats per character."""


@dataclass(frozen=True)
class Compiled:
    """The updates are compiled, or taken from the compilation cache."""

    seconds: float
    """Of tracing and compiling; the first parameters are drawn meanwhile."""
    flops_per_step: float
    """Operations of one update, by `flops.training_flops`."""


@dataclass(frozen=True)
class Steps:
    """Updates have been made; numbers are those of the last one."""

    step: int
    """Updates made so far."""
    epoch: float
    loss: float
    """Nats per character."""
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    seconds: float
    """Of training and validation so far, interruptions left out."""
    seconds_left: float


@dataclass(frozen=True)
class Validated:
    """Every held-out character has been predicted once."""

    step: int
    epoch: float
    loss: float
    """Nats per character."""
    bits_per_character: float
    best: bool
    """Lower than at every validation before."""
    seconds: float
    """Of training and validation so far, interruptions left out."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint is on disk."""

    step: int
    path: str


@dataclass(frozen=True)
class Ended:
    """Training is over, or was stopped after a checkpoint: by a signal, or because time was up."""

    step: int
    seconds: float
    best_loss: float
    """Nats per character, of all validations."""
    signal: int | None = None
    """The number of the signal that ended it."""
    out_of_time: bool = False

    @property
    def complete(self) -> bool:
        """Whether the schedule's last step is made."""
        return self.signal is None and not self.out_of_time


Event = Prepared | LRFinderStep | Zoom | LRFinderResult | TrainStarted | Compiled | Steps | Validated | Saved | Ended
