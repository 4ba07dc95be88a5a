"""Histograms of several texts side by side, as SVG."""

from collections.abc import Sequence
from dataclasses import dataclass

from chargpt_jax.pictures.plots.axes import BOTTOM, MARGIN, TOP, WIDTH, Axis
from chargpt_jax.pictures.svg import Entry, escaped, figure, label, legend, number

HEIGHT = 318.0
KINDS = ("cg-b2", "cg-b1")
"""Classes of the bars of the first and the second text."""


@dataclass(frozen=True)
class Shares:
    """The part of a text's characters in each bin."""

    name: str
    """Of the text."""
    shares: tuple[float, ...]
    """One per bin, 0 to 1."""


def histogram(title: str, x_label: str, bins: Sequence[str], texts: Sequence[Shares], width: float = WIDTH) -> str:
    """Plot the shares of texts as bars side by side, as a self-contained SVG.

    Args:
        title: of the plot, plain text.
        x_label: what the bins are, with their unit.
        bins: a label per bin; an empty one is left out.
        texts: one or two, each with a share per bin.
        width: in pixels.

    Raises:
        ValueError: if a text does not have one share per bin.
    """
    for text in texts:
        if len(text.shares) != len(bins):
            raise ValueError(f"{text.name!r} has {len(text.shares)} shares, but there are {len(bins)} bins.")
    top = max((share for text in texts for share in text.shares), default=0.0) or 1.0
    y = Axis(0.0, 108 * top, BOTTOM, TOP)
    right = width - MARGIN
    step = (right - MARGIN) / max(1, len(bins))
    grid = "".join(f"M{MARGIN:g} {number(y(tick))}H{right:g}" for tick in y.ticks(4))
    parts = [
        f'<path class="cg-grid" d="{grid}"/><path class="cg-axis" d="M{MARGIN:g} {BOTTOM:g}H{right:g}"/>',
        *(label(MARGIN - 8, y(tick) + 4, f"{tick:g} %", "cg-end") for tick in y.ticks(4)),
        *(label(MARGIN + (i + 0.5) * step, BOTTOM + 18, name, "cg-middle") for i, name in enumerate(bins) if name),
        label(16, 22, f"{title}: fraction of the characters"),
        label(right, BOTTOM + 40, x_label, "cg-end"),
    ]
    bar = 0.8 * step / max(1, len(texts))
    for n, (text, kind) in enumerate(zip(texts, KINDS, strict=False)):
        for i, share in enumerate(text.shares):
            left, height = MARGIN + (i + 0.1) * step + n * bar, BOTTOM - y(100 * share)
            about = f"<title>{escaped(f'{text.name}: {100 * share:.1f} %')}</title>"
            box = f"M{number(left)} {BOTTOM:g}v{number(-height)}h{number(bar - 1)}v{number(height)}Z"
            parts.append(f'<path class="{kind}" d="{box}">{about}</path>')
    entries = [
        Entry(f'<path class="{kind}" d="M0 4V-4H12V4Z"/>', 12, text.name)
        for text, kind in zip(texts, KINDS, strict=False)
    ]
    parts.append(legend(entries, MARGIN, HEIGHT - 14, right - MARGIN)[0])
    said = "; ".join(
        f"{text.name}: "
        + ", ".join(
            f"{name or i} {100 * share:.0f} %" for i, (name, share) in enumerate(zip(bins, text.shares, strict=True))
        )
        for text in texts
    )
    return figure(width, HEIGHT, "".join(parts), name=title, description=f"{title} by {x_label}. {said}.")
