"""Display of a run's events: a progress bar on a terminal, plain lines in a log, live plots in a notebook."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from chargpt_jax.cli.notebook import Notebook
from chargpt_jax.cli.terminal import one_line
from chargpt_jax.config.values import shown
from chargpt_jax.errors import UserError
from chargpt_jax.events import (
    AttentionChosen,
    AttentionTried,
    Compiled,
    Ended,
    Event,
    Fitted,
    LRFinderResult,
    LRFinderStep,
    Prepared,
    RunDiverged,
    Sampled,
    Steps,
    SweepStarted,
    SweepSteps,
    SweepValidated,
    TrainStarted,
    Validated,
    Zoom,
    bits_per_character,
)
from chargpt_jax.lab.text import sweep_numbers, sweep_text
from chargpt_jax.results.facts import duration

MAX_TITLES = 400
"""Maximum length of a list of titles, in characters; titles are untrusted input."""

MAX_SAMPLE = 200
"""Maximum length of the beginning of a sample, in characters."""

MAX_NOTES = 6
"""Maximum number of notes on the corpus in its line."""


def in_notebook() -> bool:
    """Return whether output goes to a Jupyter notebook."""
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return shell is not None and bool(shell) and hasattr(shell, "kernel")


def show(events: Iterable[Event], file: TextIO | None = None) -> None:
    """Consume a run's events and display them.

    Args:
        events: as `run`, `train`, `sweep`, `prepare` and `find_lr` yield them.
        file: where to print; None: the notebook if this is one, else standard output.
    """
    if isinstance(events, str) or not isinstance(events, Iterable):
        raise UserError(f"events is {shown(events)}, but it must be what run, train, prepare or find_lr return.")
    with display(file) as show_event:
        for event in events:
            show_event(event)


@contextlib.contextmanager
def display(file: TextIO | None = None) -> Iterator[Callable[[Event], None]]:
    """Return a function that displays one event; `file` as in `show`."""
    if file is None and in_notebook():
        notebook = Notebook()
        try:
            yield lambda event: notebook.show(event, numbers(event) if isinstance(event, Steps) else sentence(event))
        finally:
            notebook.close()
        return
    file = sys.stdout if file is None else file
    if not file.isatty():
        yield _Log(file).show
        return
    with _Terminal(file) as terminal:
        yield terminal.show


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that shows a growing number on stderr: in place on a terminal, else a line every 10 s."""
    terminal = sys.stderr.isatty()
    every = 0.5 if terminal else 10.0
    due = time.monotonic() + every

    def show(count: int) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + every
            with contextlib.suppress(OSError):
                print(f"{count:,} {what}", end="\r" if terminal else "\n", file=sys.stderr, flush=True)

    yield show
    if terminal:
        with contextlib.suppress(OSError):
            print(" " * 40, end="\r", file=sys.stderr, flush=True)


def _notes(notes: Sequence[str]) -> str:
    """Return the notes on a corpus, to be appended to its line."""
    more = f"; and {len(notes) - MAX_NOTES} more notes in corpus/sources.json" if len(notes) > MAX_NOTES else ""
    return "".join(f"; {one_line(note, MAX_TITLES)}" for note in notes[:MAX_NOTES]) + more


def sentence(event: Event) -> str | None:
    """Return an event as one line; None for an event that only moves the progress bar."""
    match event:
        case Prepared():
            stand_in = f" (stand-in for {one_line(event.stand_in_for, MAX_TITLES)})" if event.stand_in_for else ""
            titles = one_line(", ".join(event.titles), MAX_TITLES)
            return (
                f"corpus: {titles}{stand_in}: {event.characters:,} {event.unit}s ({event.n_ids - 1} distinct); "
                f"training set {event.n_train:,}, validation set {event.n_validation:,}{_notes(event.notes)}"
            )
        case Zoom():
            return (
                f"learning rate: zoom {event.number} from {event.low:.2e} to {event.high:.2e}, "
                f"steepest descent at {event.steepest:.2e}, proposed {event.best:.2e} ({event.method})"
            )
        case LRFinderResult():
            return f"learning rate: {event.learning_rate:.2e} ({event.method}){_spread(event)}"
        case AttentionChosen():
            sources = {
                "config": "as train.attention says",
                "run": "as before in this run",
                "trial": "by a trial on this device: " + ", ".join(map(_tried, event.tried)),
            }
            return f"attention: {event.name}, {sources[event.source]}"
        case TrainStarted():
            return (
                f"training: {event.parameters:,} parameters on {event.device} in {event.dtype}; {_length(event)}, peak "
                f"learning rate {event.learning_rate:.2e}{_long_warmup(event.warmup_steps, event.total_steps)}"
            )
        case Fitted():
            return (
                f"schedule: {_steps(event.total_steps)} ({event.epochs:.4g} epochs) for {event.minutes:g} min, "
                f"from step {event.step:,} after {duration(event.seconds)}"
                f"{_long_warmup(event.warmup_steps, event.total_steps)}"
            )
        case Compiled():
            return f"compiled in {event.seconds:.1f} s; {event.flops_per_step / 1e9:,.3g} GFLOP per training step"
        case Validated():
            return (
                f"validation: epoch {event.epoch:.2f}, step {event.step:,}: {event.loss:.4f} nats = "
                f"{event.bits_per_character:.4f} bits per {event.unit}{' (best)' if event.best else ''}, "
                f"{duration(event.seconds)}"
            )
        case SweepStarted() | SweepValidated() | RunDiverged():
            return sweep_text(event)
        case Sampled() if event.samples:
            return f"sample at step {event.step:,}: {one_line(event.samples[0], MAX_SAMPLE)}"
        case Ended(out_of_time=True):
            return f"time limit reached after step {event.step:,}; run the same command again to resume"
        case Ended(signal=None):
            return (
                f"done: {_steps(event.step)} in {duration(event.seconds)}, best validation loss "
                f"{event.best_loss:.4f} nats per {event.unit}"
            )
        case Ended():
            return f"stopped by signal {event.signal} after step {event.step:,}; run the same command again to resume"
    return None


def _tried(one: AttentionTried) -> str:
    """Return the result of one attention in a trial, in words."""
    result = one.fault if one.seconds is None else f"{1000 * one.seconds:.3g} ms per layer"
    return f"{one.name} {one_line(result, MAX_TITLES)}"


def _spread(result: LRFinderResult) -> str:
    """Return the learning rates that the seeds of a range test propose; '' if there is one seed."""
    if result.seeds == 1 or not (rates := result.zooms[-1].seed_rates):
        return ""
    left_out = f", {result.seeds - len(rates)} without a falling loss" if len(rates) < result.seeds else ""
    return f"; {min(rates):.2e} to {max(rates):.2e} by the {result.seeds} seeds alone{left_out}"


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count:,} steps"


def _length(event: TrainStarted) -> str:
    """Return where a run starts, and how long it is."""
    per_epoch = f"epochs of {_steps(event.epoch_steps)}"
    if event.total_steps is None:
        start = f"resuming after step {event.first_step:,}" if event.first_step else "starting"
        return f"{start}, {event.minutes:g} min ({per_epoch})"
    start = f"resuming after step {event.first_step:,} of {event.total_steps:,}"
    return f"{start if event.first_step else f'starting, {_steps(event.total_steps)}'} ({event.epochs:.4g} {per_epoch})"


def _long_warmup(warmup_steps: int, total_steps: int | None) -> str:
    """Return a note if the run ends before the warm-up that the config asks for."""
    if total_steps is None or warmup_steps < total_steps:
        return ""
    warmup = _steps(warmup_steps)
    return (
        f"; the warm-up of {warmup} is not shorter than the run, so the peak falls on the last step (with "
        "ancestor.decay=none, after it): lower scheduler.warmup_epochs"
    )


def numbers(event: Steps, wide: bool = True) -> str:
    """Return the state of training as text; a shorter one if not `wide`."""
    speed = f"{event.tokens_per_second:,.0f} tokens/s  {duration(event.seconds_left)} left"
    if not wide:
        return f"loss {event.loss:.4f}  {speed}"
    bits = bits_per_character(event.loss)
    unit = "char" if event.unit == "character" else event.unit
    return f"loss {event.loss:.4f} nats ({bits:.4f} bits/{unit})  rate {event.learning_rate:.2e}  {speed}"


class _Log:
    """Prints one line per event. Training steps get a line at each doubling, later about one per minute."""

    def __init__(self, file: TextIO):
        self._file, self._step, self._seconds = file, 0, 0.0

    def show(self, event: Event) -> None:
        line = sentence(event)
        if isinstance(event, Steps):
            due = event.step >= 2 * self._step or event.seconds - self._seconds >= 60
            if due or event.seconds_left == 0:
                self._step, self._seconds = event.step, event.seconds
                line = f"step {event.step:,} (epoch {event.epoch:.2f}): {numbers(event)}"
        if isinstance(event, SweepSteps) and (event.step >= 2 * self._step or event.seconds - self._seconds >= 60):
            self._step, self._seconds = event.step, event.seconds
            line = f"step {event.step:,}: {sweep_numbers(event)}"
        if line is not None:
            print(line, file=self._file, flush=True)


class _Terminal:
    """Keeps one progress bar at the bottom of a terminal and prints the other events above it."""

    def __init__(self, file: TextIO):
        console = Console(file=file)
        self._wide = console.width >= 120
        self._total: int | None = 1
        self._bar: TaskID | None = None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None if self._wide else 10),
            TextColumn("{task.fields[done]}"),
            TextColumn("{task.fields[numbers]}"),
        )
        self._progress = Progress(*columns, console=console)

    def __enter__(self) -> "_Terminal":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, event: Event) -> None:
        line = sentence(event)
        if line is not None:
            self._progress.console.print(escape(line), highlight=False, emoji=False)
        match event:
            case LRFinderStep():
                text = f"zoom {event.zoom}  rate {event.learning_rate:.2e}  loss {event.loss:.4f}"
                self._move("range test", event.step, event.total_steps, text)
            case TrainStarted():
                self._total = event.total_steps
                self._move("training", event.first_step, self._total)
            case Fitted():
                self._total = event.total_steps
                self._move("training", event.step, self._total)
            case Steps():
                self._move("training", event.step, self._total, numbers(event, self._wide))
            case SweepStarted():
                self._total = event.total_steps
                self._move("sweep", event.first_step, self._total)
            case SweepSteps():
                self._move("sweep", event.step, self._total, sweep_numbers(event))

    def _move(self, description: str, done: int, total: int | None, text: str = "") -> None:
        of = f"{done:,}/{total:,}" if total is not None else f"{done:,}"
        if self._bar is None:
            self._bar = self._progress.add_task(description, total=total, numbers="", done="")
        if total is None:  # rich would keep that of the range test
            self._progress.tasks[0].total = None
        self._progress.update(self._bar, completed=done, total=total, numbers=text, done=of, description=description)
