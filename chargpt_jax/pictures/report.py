"""The report of a run as one self-contained HTML page: facts, curves, samples and passages.

Without its script the page shows everything that it has; with it, curves have a cursor and texts answer a pointer.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from chargpt_jax.pictures import svg
from chargpt_jax.pictures.page_assets import compact, document, plain
from chargpt_jax.pictures.plots.axes import NARROW, WIDTH
from chargpt_jax.pictures.plots.curves import Curve, readable, x_range

Plot = Callable[[float], str]
"""Returns a plot as SVG, for its width in pixels."""

Facts = Sequence[tuple[str, str]]
"""(name, value) pairs, plain text."""


@dataclass(frozen=True)
class Text:
    """A text with its metrics."""

    caption: str
    svg: str
    data: dict[str, Any]
    """As the JSON file of a sample holds it."""


@dataclass(frozen=True)
class Stage:
    """The samples after a number of training steps."""

    step: int
    caption: str
    texts: Sequence[Text]


@dataclass(frozen=True)
class Content:
    """What a report shows; what a run does not have is empty."""

    title: str
    lead: str = ""
    facts: Sequence[tuple[str, Facts]] = ()
    """Groups: (name, facts)."""
    search: Plot | None = None
    """The range test."""
    losses: Plot | None = None
    """The losses, over the common axis of `curves`."""
    curves: Sequence[Curve] = ()
    """All that a cursor reads: losses first, which have their own plot."""
    epoch_steps: int = 1
    samples: Sequence[Text] = ()
    stages: Sequence[Stage] = ()
    along: str = ""
    """Which samples `stages` has, in a sentence."""
    histograms: Sequence[Plot] = ()
    compared: str = ""
    """What the histograms compare, in a sentence."""
    passages: Sequence[Text] = ()
    sources: Sequence[tuple[str, Facts]] = ()
    environment: Facts = ()


def report(content: Content) -> str:
    """Return the page, light or dark like the reader's system, and light in print."""
    texts = [*content.samples, *content.passages]
    data: dict[str, Any] = {f"text-{i}": compact(text.data) for i, text in enumerate(texts)}
    data["data-curves"] = readable(content.curves, content.epoch_steps)
    data["data-stages"] = [
        {"step": stage.step, "caption": stage.caption, "texts": [compact(text.data) for text in stage.texts]}
        for stage in content.stages
    ]
    sections = [
        ("facts", "The run", _groups(content.facts)),
        ("search", "Learning-rate search", _search(content.search)),
        ("training", "Training", _training(content)),
        ("samples", "Samples", _texts(content.samples, 0, SAMPLES)),
        ("stages", "Learning to write", _stages(content.stages, content.along)),
        ("compared", "Does it write like the text?", _histograms(content)),
        ("passages", "Where it was surprised", _texts(content.passages, len(content.samples), PASSAGES)),
        ("sources", "The text", _groups(content.sources)),
        ("environment", "Environment", _facts(content.environment)),
    ]
    shown = [(name, title, body) for name, title, body in sections if body]
    links = "".join(f'<a href="#{name}">{title}</a> ' for name, title, _ in shown)
    parts = [f"<header><h1>{plain(content.title)}</h1>"]
    parts += [f'<p class="lead">{plain(content.lead)}</p>' if content.lead else ""]
    parts += [f'<nav aria-label="Sections">{links}</nav></header>\n<main>' if links else "</header>\n<main>"]
    parts += [f'<section id="{name}">\n<h2>{title}</h2>\n{body}\n</section>' for name, title, body in shown]
    scripts = ("subline", "cursor", "stages", "report")
    return document(content.title, "\n".join([*parts, "</main>"]), scripts=scripts, data=data)


SAMPLES = (
    "Text that the model generated. The prompt is bold. Three curves are below every character. Entropy: how unsure "
    "the model was before it. Surprisal: how unlikely the character was. S₂ (surprise-surprise): surprisal minus "
    "entropy, so above 0 the model was more surprised than it expected. All are fractions of the logarithm of the "
    "vocabulary size."
)
PASSAGES = (
    "The passages of the validation set with the highest loss, most surprising first. The model has not seen this text "
    "in training."
)


def _groups(groups: Sequence[tuple[str, Facts]]) -> str:
    return "\n".join(f"<h3>{plain(name)}</h3>\n{_facts(facts)}" for name, facts in groups)


def _facts(facts: Facts) -> str:
    rows = "\n".join(f"<div><dt>{plain(name)}</dt><dd>{plain(value)}</dd></div>" for name, value in facts)
    return f"<dl>\n{rows}\n</dl>" if rows else ""


def _search(plot: Plot | None) -> str:
    about = (
        "Every zoom trains the initial model with increasing learning rates, and plots the losses that are below all "
        "earlier ones. The next zoom covers a narrower range around the learning rate that the last zoom proposed."
    )
    return _figure(plot, about) if plot else ""


def _training(content: Content) -> str:
    if not content.losses:
        return ""
    axis = x_range(content.curves)
    plots: list[Plot] = [content.losses]
    plots += [functools.partial(curve.svg, axis) for curve in content.curves[2:] if curve.points]
    about = "Loss on the training batches and on the validation set, then learning rate, gradient norm and throughput."
    figures = "\n".join(_figure(plot, "", "curve") for plot in plots)
    return f'<p class="note">{about}</p>\n<div class="curves">\n<div id="cursor"></div>\n{figures}\n</div>'


def _texts(texts: Sequence[Text], first: int, about: str) -> str:
    if not texts:
        return ""
    figures = [
        f'<figure><figcaption>{plain(text.caption)}</figcaption><div data-text="text-{i}" '
        f'data-label="{plain(text.caption)}"><div class="static">{_unstyled(text.svg)}</div></div></figure>'
        for i, text in enumerate(texts, first)
    ]
    return "\n".join([f'<p class="note">{about}</p>', *figures])


def _stages(stages: Sequence[Stage], about: str) -> str:
    if len(stages) < 2:
        return ""
    static = "\n".join(
        f"<details><summary>{plain(stage.caption)}</summary>{''.join(_pre(text) for text in stage.texts)}</details>"
        for stage in stages
    )
    return f'<p class="note">{plain(about)}</p>\n<div id="watch"><div class="static">\n{static}\n</div></div>'


def _pre(text: Text) -> str:
    # HTML drops a line break directly after <pre>: this one is dropped instead of one of the text.
    return f"<pre>\n{plain(''.join(text.data['tokens']))}</pre>"


def _histograms(content: Content) -> str:
    if not content.histograms:
        return ""
    figures = [_figure(plot, "") for plot in content.histograms]
    return "\n".join([f'<p class="note">{plain(content.compared)}</p>', *figures])


def _figure(plot: Plot, caption: str, kind: str = "") -> str:
    """Return a plot in both widths, of which the style sheet shows one."""
    about = f"<figcaption>{plain(caption)}</figcaption>\n" if caption else ""
    return f'<figure class="{f"plot {kind}".rstrip()}">\n{about}<div class="wide">{_unstyled(plot(WIDTH))}</div>' + (
        f'<div class="narrow">{_unstyled(plot(NARROW))}</div>\n</figure>'
    )


def _unstyled(picture: str) -> str:
    """Return a picture without its style, which the page has once."""
    return picture.replace(f"<style>{svg.CSS}</style>", "", 1)
