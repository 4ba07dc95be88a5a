"""Metrics by the position of a letter in its word, as SVG."""

from collections.abc import Sequence

import numpy as np

from chargpt_jax.pictures.plots.axes import BOTTOM, MARGIN, TOP, WIDTH, Axis, dots, finite, frame, line_path
from chargpt_jax.pictures.svg import Entry, figure, legend

HEIGHT = 318.0
KINDS = ("cg-line cg-s1", "cg-line cg-s2")
"""Classes of the curves: entropy and surprisal have the colours that they have under a text."""

STYLES = ("stroke-dasharray:5 3", "stroke-dasharray:none")
"""The curve of entropy is dashed, since the two colours are hard to tell apart on a dark page."""


def letters_plot(entropy: np.ndarray, surprisal: np.ndarray, names: Sequence[str], width: float = WIDTH) -> str:
    """Plot mean entropy and surprisal by the position in a word, as a self-contained SVG.

    Args:
        entropy: float [P], nats; NaN where there is no such letter.
        surprisal: float [P], nats.
        names: [P], the labels of the positions.
        width: in pixels.
    """
    curves = [finite(enumerate(values)) for values in (entropy, surprisal)]
    highest = max((y for curve in curves for _, y in curve), default=1.0)
    x = Axis(-0.4, len(names) - 0.6, MARGIN, width - MARGIN)
    y = Axis(0.0, 1.08 * highest or 1.0, BOTTOM, TOP)
    at = list(map(float, range(len(names))))
    body = [
        frame(x, y, "letter of the word", "mean of entropy and surprisal, nats", lambda _: list(names), ticks=at),
        *(line_path(curve, x, y, kind, style) for curve, kind, style in zip(curves, KINDS, STYLES, strict=True)),
        dots(curves[0], x, y, "cg-b1"),
        dots(curves[1], x, y, "cg-b3"),
    ]
    entries = [
        Entry(f'<path class="cg-curve {kind}" style="{style}" d="M0 0H16"/>', 16, name)
        for name, kind, style in zip(("entropy", "surprisal"), KINDS, STYLES, strict=True)
    ]
    body.append(legend(entries, MARGIN, HEIGHT - 14, width - 2 * MARGIN)[0])
    said = "; ".join(
        f"{name}: entropy {h:.2f}, surprisal {i:.2f}"
        for name, h, i in zip(names, entropy, surprisal, strict=True)
        if np.isfinite(h) and np.isfinite(i)
    )
    description = f"Mean entropy and surprisal in nats by the letter of the word. {said}."
    return figure(width, HEIGHT, "".join(body), name="Letters of words", description=description)
