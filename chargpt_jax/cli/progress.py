"""Showing a run's events: a live bar on a terminal, plain lines in a log, live pictures in a notebook."""

import html
import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from chargpt_jax.cli.terminal import one_line
from chargpt_jax.events import (
    Compiled,
    Ended,
    Event,
    LRFinderResult,
    LRFinderStep,
    Prepared,
    Saved,
    Steps,
    TrainStarted,
    Validated,
    Zoom,
)
from chargpt_jax.pictures import plots

MOST_TITLE = 400
"""The longest list of titles that is told; they are what a text from the web calls itself."""


def in_notebook() -> bool:
    """Say whether output goes to a Jupyter notebook."""
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return shell is not None and bool(shell) and hasattr(shell, "kernel")


def show(events: Iterable[Event], file: TextIO | None = None) -> None:
    """Consume a run's events, showing them where they are best seen; `file` is standard output if not given."""
    if file is None and in_notebook():
        for _ in _notebook(events):
            pass
        return
    file = sys.stdout if file is None else file
    for _ in _terminal(events, file) if file.isatty() else _plain(events, file):
        pass


def duration(seconds: float) -> str:
    """Write seconds as people do: '48 s', '12 min', '3 h 05 min'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def sentence(event: Event) -> str | None:
    """Tell an event in one line; None for those that only move a bar."""
    match event:
        case Prepared():
            stand_in = f", standing in for {one_line(event.stand_in_for, MOST_TITLE)}" if event.stand_in_for else ""
            titles = one_line(", ".join(event.titles), MOST_TITLE)
            return (
                f"corpus: {titles}{stand_in}: {event.characters:,} characters, {event.n_ids - 1} "
                f"distinct; {event.n_train:,} to train on, {event.n_validation:,} held out"
            )
        case Zoom():
            return (
                f"learning rate: zoom {event.number} looked from {event.low:.2e} to {event.high:.2e}, "
                f"steepest at {event.steepest:.2e}"
            )
        case LRFinderResult():
            return f"learning rate: {event.learning_rate:.2e} ({event.method})"
        case TrainStarted():
            start = f"resuming after step {event.first_step:,}" if event.first_step else "starting"
            return (
                f"training: {event.parameters:,} parameters on {event.device} in {event.dtype}; {start} of "
                f"{event.total_steps:,} steps ({event.epochs:g} epochs of {event.epoch_steps:,}), peak rate "
                f"{event.learning_rate:.2e}"
            )
        case Compiled():
            return f"compiled in {event.seconds:.1f} s; an update asks for {event.flops_per_step / 1e9:,.3g} GFLOP"
        case Validated():
            return (
                f"validation: epoch {event.epoch:.2f}, step {event.step:,}: {event.loss:.4f} nats = "
                f"{event.bits_per_character:.4f} bits per character{' (best)' if event.best else ''}, "
                f"{duration(event.seconds)}"
            )
        case Ended(out_of_time=True):
            return f"out of time after step {event.step:,}; the same command goes on from there"
        case Ended(signal=None):
            return f"done: step {event.step:,} after {duration(event.seconds)}, best {event.best_loss:.4f} nats"
        case Ended():
            return f"stopped by signal {event.signal} after step {event.step:,}; the same command goes on from there"
    return None


def numbers(event: Steps, wide: bool = True) -> str:
    """Tell where training stands; not `wide`: in half the room."""
    pace = f"{event.tokens_per_second:,.0f} tokens/s  {duration(event.seconds_left)} left"
    if not wide:
        return f"loss {event.loss:.4f}  {pace}"
    bits = event.loss / math.log(2)
    return f"loss {event.loss:.4f} nats ({bits:.4f} bits/char)  rate {event.learning_rate:.2e}  {pace}"


def _plain(events: Iterable[Event], file: TextIO) -> Iterator[Event]:
    """Print a line an event, and a line for updates only now and then: at each doubling, then about every minute."""
    last, told = 0, 0.0
    for event in events:
        line = sentence(event)
        if isinstance(event, Steps):
            due = event.step >= 2 * last or event.seconds - told >= 60
            if due or event.seconds_left == 0:
                last, told = event.step, event.seconds
                line = f"step {event.step:,} (epoch {event.epoch:.2f}): {numbers(event)}"
        if line is not None:
            print(line, file=file, flush=True)
        yield event


def _terminal(events: Iterable[Event], file: TextIO) -> Iterator[Event]:
    """Keep one bar at the bottom and print what is worth keeping above it."""
    console = Console(file=file)
    wide = console.width >= 120
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None if wide else 10),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TextColumn("{task.fields[numbers]}"),
    )
    with Progress(*columns, console=console) as bars:
        bar: TaskID | None = None

        def move(description: str, done: int, total: int, text: str = "") -> None:
            nonlocal bar
            if bar is None:
                bar = bars.add_task(description, total=total, numbers="")
            bars.update(bar, completed=done, total=total, numbers=text, description=description)

        total_steps = 1
        for event in events:
            line = sentence(event)
            if line is not None:
                bars.console.print(escape(line), highlight=False, emoji=False)
            match event:
                case LRFinderStep():
                    text = f"zoom {event.zoom}  rate {event.learning_rate:.2e}  loss {event.loss:.4f}"
                    move("range test", event.step, event.total_steps, text)
                case TrainStarted():
                    total_steps = event.total_steps
                    move("training", event.first_step, total_steps)
                case Steps():
                    move("training", event.step, total_steps, numbers(event, wide))
            yield event


def _notebook(events: Iterable[Event]) -> Iterator[Event]:
    """Keep one line of numbers and one live picture for each stage."""
    from IPython.display import HTML, display

    line = display(HTML(""), display_id=True)
    picture: Any = None
    zooms: list[Zoom] = []
    training: list[tuple[float, float]] = []
    validation: list[tuple[float, float]] = []
    drawn = 0.0
    for event in events:
        text = numbers(event) if isinstance(event, Steps) else sentence(event)
        match event:
            case LRFinderStep():
                text = f"range test: step {event.step} of {event.total_steps}, rate {event.learning_rate:.2e}"
            case Zoom():
                zooms.append(event)
                steepest = [zoom.steepest for zoom in zooms]
                picture = picture or display(HTML(""), display_id=True)
                picture.update(HTML(plots.lr_finder_plot([(z.lrs, z.losses) for z in zooms], steepest, event.best)))
            case TrainStarted():
                print(text)
                training, validation = list(event.training), list(event.validation)
                curve = plots.loss_plot(training, validation) if validation else ""
                picture = display(HTML(curve), display_id=True)
            case Steps():
                training.append((event.step, event.loss))
                if event.seconds - drawn >= 10:
                    drawn = event.seconds
                    picture.update(HTML(plots.loss_plot(training, validation)))
            case Validated():
                validation.append((event.step, event.loss))
                picture.update(HTML(plots.loss_plot(training, validation)))
            case Saved():
                text = None
        if text is not None:
            line.update(HTML(f"<pre>{html.escape(text)}</pre>"))
        yield event
