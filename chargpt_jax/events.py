"""Typed events that a run yields; terminals and notebooks display them. Losses are in nats per character."""

import math
from dataclasses import dataclass


def bits_per_character(nats: float) -> float:
    """Convert a loss in nats per character to bits per character."""
    return nats / math.log(2)


def perplexity(nats: float) -> float:
    """Return the perplexity, exp(loss), of a loss in nats per character; infinity if that overflows."""
    return math.exp(nats) if nats < 700 else math.inf


@dataclass(frozen=True)
class Prepared:
    """The corpus is ready."""

    titles: tuple[str, ...]
    characters: int
    n_train: int
    """Characters of the training set."""
    n_validation: int
    """Characters of the validation set."""
    n_ids: int
    """Distinct characters, plus one for the padding."""
    vocab_size: int
    stand_in_for: str | None
    """The source that could not be downloaded, if another text is used instead of it."""
    notes: tuple[str, ...] = ()
    """What was removed from, changed or found in the texts."""
    unit: str = "character"
    """What is counted: 'character' or 'byte'."""


@dataclass(frozen=True)
class Zoom:
    """One zoom of the learning-rate range test; it holds only the points whose loss is below all earlier ones."""

    number: int
    """Counted from 1."""
    low: float
    """Lowest learning rate."""
    high: float
    """Highest learning rate; the rates between are evenly spaced in log space."""
    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    """Nats per character."""
    steepest: float
    """Learning rate at the steepest descent of the loss."""
    lowest: float
    """Learning rate at the lowest loss of all zooms so far."""
    best: float
    """Learning rate that this zoom proposes."""
    method: str = "steepest"
    """How it was chosen: 'steepest', 'lowest', 'balanced', 'valley' or 'slide'."""
    lowest_losses: tuple[float, ...] = ()
    """With several seeds: the lowest of their losses at each of the points; `losses` has the mean."""
    highest_losses: tuple[float, ...] = ()
    """The same for the highest."""
    seed_falls: tuple[float, ...] = ()
    """How far the loss of each seed fell from the first of the points to the last, nats per character."""
    seed_rates: tuple[float, ...] = ()
    """The learning rate that each seed alone would propose; a seed whose loss does not fall is left out."""


@dataclass(frozen=True)
class LRFinderResult:
    """The result of the range test."""

    learning_rate: float
    method: str
    start_lr: float
    end_lr: float
    zooms: tuple[Zoom, ...]
    seeds: int = 1
    """Number of seeds; the last zoom has the learning rates that each of them proposes."""


@dataclass(frozen=True)
class LRFinderStep:
    """The range test has made one training step."""

    step: int
    """Counted from 1 over all zooms and seeds."""
    total_steps: int
    zoom: int
    """Counted from 1."""
    learning_rate: float
    loss: float
    """Nats per character, before this learning rate was applied; may be NaN."""
    seed: int = 0
    """Index of the seed, which is added to the run's."""


@dataclass(frozen=True)
class AttentionTried:
    """The result of one attention in a trial."""

    name: str
    error: float | None
    """Largest difference from float32, as a fraction of the largest value; None: it did not run."""
    seconds: float | None
    """Time of a forward and a backward pass of one layer; None: it was not measured."""
    fault: str = ""
    """Why it cannot be used, in words; '': it can."""


@dataclass(frozen=True)
class AttentionChosen:
    """The attention of the training steps, on a device that has several."""

    name: str
    """'blocks', 'kernel' or 'cudnn'."""
    source: str
    """'config', 'run' (kept since the run began) or 'trial'."""
    tried: tuple[AttentionTried, ...] = ()
    """The results of the trial, the known one first."""


@dataclass(frozen=True)
class TrainStarted:
    """Training is about to start, or to resume from a checkpoint."""

    parameters: int
    first_step: int
    """Number of training steps in the checkpoint; 0 for a new run."""
    total_steps: int | None
    """None: not known yet, in a run of given minutes."""
    epoch_steps: int
    epochs: float | None
    """In total; None as total_steps."""
    learning_rate: float
    """Peak of the schedule."""
    device: str
    dtype: str
    training: tuple[tuple[int, float], ...] = ()
    """(step, loss) of the training steps logged so far, nats per character."""
    validation: tuple[tuple[int, float], ...] = ()
    """(step, loss) of the validations so far, nats per character."""
    warmup_steps: int = 0
    """Training steps of warm-up that the config asks for, which may be more than the run has."""
    minutes: float | None = None
    """Length of the run, if the config sets it in minutes."""


@dataclass(frozen=True)
class Fitted:
    """The number of training steps that fit into the minutes of a run has been decided; it may be decided again."""

    step: int
    """Number of training steps so far: the schedule is that of the new total from here on."""
    total_steps: int
    epochs: float
    """In total."""
    minutes: float
    """Length of the run."""
    seconds: float
    """Time of the run so far."""
    warmup_steps: int
    """As in TrainStarted."""


@dataclass(frozen=True)
class Compiled:
    """The training steps are compiled, or loaded from the compilation cache."""

    seconds: float
    """Time of tracing and compiling; the parameters are initialised in the meantime."""
    flops_per_step: float
    """Floating-point operations of one training step, by `flops.training_flops`."""


@dataclass(frozen=True)
class Steps:
    """Training steps have been made; the values are those of the last one."""

    step: int
    """Number of training steps so far."""
    epoch: float
    loss: float
    """Nats per character."""
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    seconds: float
    """Time of training and validation so far, without interruptions."""
    seconds_left: float
    """Estimated time to the last step."""
    unit: str = "character"
    """What a token is: 'character' or 'byte'."""


@dataclass(frozen=True)
class Validated:
    """The loss on the validation set has been computed."""

    step: int
    epoch: float
    loss: float
    """Nats per character."""
    bits_per_character: float
    best: bool
    """Whether the loss is below that of every earlier validation."""
    seconds: float
    """Time of training and validation so far, without interruptions."""
    unit: str = "character"
    """What a token is: 'character' or 'byte'; the loss is per token."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint is on disk."""

    step: int
    path: str


@dataclass(frozen=True)
class Sampled:
    """Samples of a checkpoint have been generated, and written to the run's folder."""

    step: int
    """Of the checkpoint."""
    samples: tuple[str, ...]
    """The texts, prompts included."""
    svgs: tuple[str, ...]
    """The same with their metrics, as SVG."""


@dataclass(frozen=True)
class Ended:
    """Training has ended: it is complete, or a signal or the time limit stopped it after a checkpoint."""

    step: int
    seconds: float
    """Time of training and validation, without interruptions."""
    best_loss: float
    """Lowest validation loss, nats per character."""
    signal: int | None = None
    """The number of the signal that stopped training."""
    out_of_time: bool = False
    """Whether the time limit stopped training."""

    unit: str = "character"
    """What a token is: 'character' or 'byte'."""

    @property
    def complete(self) -> bool:
        """Whether the last step of the schedule has been made."""
        return self.signal is None and not self.out_of_time


@dataclass(frozen=True)
class SweepStarted:
    """A sweep is about to start, or to resume from a checkpoint."""

    runs: tuple[tuple[int, float], ...]
    """(seed, peak learning rate) of each run."""
    parameters: int
    """Of one run."""
    first_step: int
    """Number of training steps in the checkpoint; 0 for a new sweep."""
    total_steps: int
    epoch_steps: int
    device: str
    dtype: str


@dataclass(frozen=True)
class SweepSteps:
    """All runs of a sweep have made training steps; the values are those of the last one."""

    step: int
    """Training steps of each run so far."""
    losses: tuple[float, ...]
    """Of each run, nats per character; NaN or infinite if it has diverged."""
    tokens_per_second: float
    """Of all runs together."""
    seconds: float
    """Time of training and validation so far, without interruptions."""
    seconds_left: float
    """Estimated time to the last step."""
    unit: str = "character"
    """What a token is: 'character' or 'byte'."""


@dataclass(frozen=True)
class SweepRow:
    """What the runs of one learning rate have reached, without those that diverged; NaN if none is left."""

    learning_rate: float
    runs: int
    """That did not diverge."""
    diverged: int
    mean: float
    """Of the validation losses, nats per character."""
    deviation: float
    """Standard deviation over seeds (n - 1); NaN for one run."""
    low: float
    """Lower end of the 95 % interval of the mean (Student's t); NaN for one run."""
    high: float
    """Its upper end."""
    best: float
    """The lowest loss."""
    best_seed: int | None
    """The seed of the run with the lowest loss."""


@dataclass(frozen=True)
class SweepValidated:
    """All runs of a sweep have been validated."""

    step: int
    epoch: float
    losses: tuple[float, ...]
    """On the validation set, of each run, nats per character; NaN or infinite if it has diverged."""
    rows: tuple[SweepRow, ...]
    """One per learning rate, in the order of the config."""
    seconds: float
    """Time of training and validation so far, without interruptions."""
    last: bool = False
    """Whether this is the validation after the last step."""
    unit: str = "character"
    """What a token is: 'character' or 'byte'."""


@dataclass(frozen=True)
class RunDiverged:
    """The loss or the gradient of one run of a sweep is NaN or infinite; the other runs go on."""

    seed: int
    learning_rate: float
    step: int
    """Where that was first so."""


Event = (
    Prepared
    | LRFinderStep
    | Zoom
    | LRFinderResult
    | AttentionChosen
    | TrainStarted
    | Fitted
    | Compiled
    | Steps
    | Validated
    | Saved
    | Sampled
    | SweepStarted
    | SweepSteps
    | SweepValidated
    | RunDiverged
    | Ended
)
