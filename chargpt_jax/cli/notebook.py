"""Live display of a run in a notebook: one figure, which is replaced in place.

The figure has the run's facts, two lines of numbers, the newest plot and the newest sample. Each update contains all of
it and no script, so that a page that was disconnected is complete again with the next update.
"""

import html
import time
from typing import Protocol

from chargpt_jax.events import (
    AttentionChosen,
    Compiled,
    Ended,
    Event,
    Fitted,
    LRFinderResult,
    LRFinderStep,
    Prepared,
    RunDiverged,
    Sampled,
    Saved,
    Steps,
    SweepStarted,
    SweepSteps,
    SweepValidated,
    TrainStarted,
    Validated,
    Zoom,
)
from chargpt_jax.pictures.plots.losses import loss_plot, lr_finder_plot

EVERY = 1.0
"""Least time between two updates, in seconds; only a new stage is shown at once."""

STAGES = (Prepared, Zoom, LRFinderResult, TrainStarted, Compiled, Ended)
"""The events that begin or end a stage."""

SAMPLE_HEIGHT = 330
"""Height of the newest sample, in pixels: enough for the default of 300 characters; a longer sample scrolls."""

LINE = "overflow:hidden;text-overflow:ellipsis;white-space:pre;margin:0;min-height:1.3em"
"""Style of a line that never wraps, so that the figure keeps its height."""

Bundle = dict[str, str]
"""One content by its MIME type."""


class _Handle(Protocol):
    """A displayed object of a notebook, which can be replaced in place."""

    def update(self, obj: Bundle, *, raw: bool) -> None: ...


class Notebook:
    """The state of a run as one figure."""

    def __init__(self) -> None:
        self._facts: dict[str, str] = {}
        self._numbers = self._validated = ""
        self._sample: Sampled | None = None
        self._zooms: list[Zoom] = []
        self._zoom, self._rates = (0, 0), list[tuple[float, float]]()  # of the unfinished zoom and seed: (rate, loss)
        self._training: list[tuple[float, float]] = []
        self._validation: list[tuple[float, float]] = []
        self._handle: _Handle | None = None
        self._due, self._stale = 0.0, False
        self._unit = "character"

    def show(self, event: Event, text: str | None) -> None:
        """Take an event, with its line of text if it has one, and update the figure if that is due."""
        self._note(event, text)
        self._stale = True
        if isinstance(event, STAGES) or time.monotonic() >= self._due:
            self._update()

    def close(self) -> None:
        """Show what has not been shown yet."""
        if self._stale:
            self._update()

    def _note(self, event: Event, text: str | None) -> None:
        """Take the content of an event into the state."""
        match event:
            case Prepared() | LRFinderResult():
                self._facts[type(event).__name__] = text or ""
                self._numbers = ""
                self._unit = event.unit if isinstance(event, Prepared) else self._unit
            case LRFinderStep():
                self._numbers = (
                    f"range test: step {event.step:,} of {event.total_steps:,}, zoom {event.zoom}, "
                    f"rate {event.learning_rate:.2e}, loss {event.loss:.4f}"
                )
                self._rates = self._rates if (event.zoom, event.seed) == self._zoom else []
                self._zoom = event.zoom, event.seed
                # As in a Zoom: only the steps that reached a new lowest loss.
                if event.loss < min((loss for _, loss in self._rates), default=float("inf")):
                    self._rates.append((event.learning_rate, event.loss))
            case Zoom():
                self._zooms.append(event)
                self._rates, self._numbers = [], text or ""
            case TrainStarted():
                self._facts["TrainStarted"], self._numbers = text or "", ""
                self._training, self._validation = list(event.training), list(event.validation)
            case Fitted():
                self._facts["Fitted"] = text or ""
            case Steps():
                self._numbers = f"step {event.step:,} (epoch {event.epoch:.2f}): {text}"
                self._training.append((event.step, event.loss))
            case Validated():
                self._validated = text or ""
                self._validation.append((event.step, event.loss))
            case Sampled():
                self._sample = event if event.svgs else self._sample
            case SweepStarted() | SweepSteps() | SweepValidated() | RunDiverged():
                self._numbers = text or self._numbers
            case Saved() | AttentionChosen():
                pass
            case Compiled() | Ended():
                self._numbers = text or ""

    def _update(self) -> None:
        """Display the figure, or replace it."""
        self._stale, self._due = False, time.monotonic() + EVERY
        lines = [*self._facts.values(), *self._lines()]
        bundle = {"text/html": self._html(), "text/plain": "\n".join(filter(None, lines))}
        if self._handle is not None:
            self._handle.update(bundle, raw=True)
            return
        from IPython.display import display

        self._handle = display(bundle, raw=True, display_id=True)

    def _lines(self) -> list[str]:
        """Return the lines of numbers: from the start of training there are two, also before they have a text."""
        return [self._numbers, self._validated] if "TrainStarted" in self._facts else [self._numbers]

    def _html(self) -> str:
        parts = [_preformatted(line, "white-space:pre-wrap;margin:0") for line in self._facts.values()]
        parts += [_preformatted(line, LINE) for line in self._lines()]
        parts.append(self._plotted())
        if self._sample is not None:
            more = len(self._sample.svgs) - 1
            note = f"; {more} more in samples/" if more else ""
            title = _preformatted(f"sample at step {self._sample.step:,}{note}", LINE)
            drawn = f'<div style="height:{SAMPLE_HEIGHT}px;overflow:auto">{self._sample.svgs[0]}</div>'
            parts += [title, drawn]
        return f"<div>{''.join(parts)}</div>"

    def _plotted(self) -> str:
        """Return the plot of the losses, before that of the range test, before that nothing."""
        if "TrainStarted" in self._facts:
            return loss_plot(self._training, self._validation, unit=self._unit)
        if not self._zooms and not self._rates:
            return ""
        curves = [(zoom.lrs, zoom.losses) for zoom in self._zooms]
        if self._rates:
            rates, losses = zip(*self._rates, strict=True)
            curves.append((rates, losses))
        best, method = (self._zooms[-1].best, self._zooms[-1].method) if self._zooms else (None, "")
        return lr_finder_plot(curves, [zoom.steepest for zoom in self._zooms], best, method, unit=self._unit)


def _preformatted(text: str, style: str) -> str:
    return f'<pre style="{style}">{html.escape(text)}</pre>'
