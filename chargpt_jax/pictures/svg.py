"""SVG parts that all pictures use: colours for light and dark pages, the frame, the legend, characters and numbers.

Every CSS class starts with `cg-`, and every rule applies only inside `.chargpt`, the class of each picture's root. So
pictures on one page do not change each other's style, or that of the page.
"""

import hashlib
import html
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SANS = 'system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Noto Sans","DejaVu Sans",sans-serif'
MONO = 'ui-monospace,"SF Mono",Menlo,"Cascadia Mono",Consolas,"DejaVu Sans Mono","Liberation Mono",monospace'

LIGHT = (
    "--cg-paper:#fdfcf9;--cg-ink:#2b2926;--cg-muted:#6d6961;--cg-faint:#b3aea3;--cg-grid:#ebe7de;"
    "--cg-s1:#7d91a6;--cg-s2:#3f6c96;--cg-s3:#c2432c;--cg-s4:#3c8361;--cg-s5:#7c5aa6"
)
DARK = (
    "--cg-paper:#17181b;--cg-ink:#dedbd4;--cg-muted:#99958c;--cg-faint:#67645d;--cg-grid:#2a2b2f;"
    "--cg-s1:#7f95ad;--cg-s2:#86b3de;--cg-s3:#ff8a6b;--cg-s4:#74c79c;--cg-s5:#b99be6"
)
N_COLOURS = 5
"""Number of colours for series, `--cg-s1` to `--cg-s5`; a sixth series uses the first again."""

BIDI_CONTROLS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Bidirectional controls: characters that change the direction of the text around them."""

VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Five stops of matplotlib's viridis, dark to light, sRGB."""

_DARK_PAGES = "[data-theme=dark],[theme=dark],[data-jp-theme-light=false],.vscode-dark"
_LIGHT_PAGES = "[data-theme=light],[theme=light],[data-jp-theme-light=true],.vscode-light"


def themed(selector: str, light: str, dark: str) -> str:
    """Return the CSS that gives `.chargpt` + selector its light or dark declarations.

    The system's setting decides, unless the page names its theme, as documentation sites, JupyterLab, Colab and
    VS Code do. Print is always light.
    """
    rule = f".chargpt{selector}"
    return (
        f"{rule}{{{light}}}@media screen and (prefers-color-scheme:dark){{{rule}{{{dark}}}}}"
        f"@media screen{{:is({_DARK_PAGES}) {rule}{{{dark}}}:is({_LIGHT_PAGES}) {rule}{{{light}}}}}"
    )


TEXT_CSS = (
    f".chargpt .cg-text{{font:14px {MONO};font-variant-ligatures:none;text-anchor:middle;white-space:pre;"
    "unicode-bidi:bidi-override;fill:var(--cg-ink)}"
    ".chargpt .cg-prompt{font-weight:700}"
    ".chargpt .cg-stand-in{fill:var(--cg-muted)}"
    ".chargpt .cg-mark{stroke:var(--cg-muted);stroke-opacity:.8;stroke-width:1.5;stroke-linecap:round}"
    ".chargpt .cg-area{fill-opacity:.3}"
    ".chargpt .cg-line{stroke-width:1;stroke-linecap:round;stroke-linejoin:round}"
    ".chargpt .cg-dashed{stroke-dasharray:3 2.5}"
) + "".join(
    f".chargpt .cg-line.cg-s{i}{{stroke:var(--cg-s{i})}}.chargpt .cg-area.cg-s{i}{{fill:var(--cg-s{i})}}"
    for i in range(1, N_COLOURS + 1)
)
PLOT_CSS = (
    ".chargpt .cg-grid{stroke:var(--cg-grid)}"
    ".chargpt .cg-axis{stroke:var(--cg-faint)}"
    ".chargpt .cg-value{font-weight:600;fill:var(--cg-ink)}"
    ".chargpt .cg-curve{stroke-linecap:round;stroke-linejoin:round}"
    ".chargpt .cg-band{fill:var(--cg-s2);fill-opacity:.18}"
    ".chargpt .cg-raw{stroke:var(--cg-s2);stroke-width:.8;stroke-opacity:.35}"
    ".chargpt .cg-training{stroke:var(--cg-s2);stroke-width:1.4}"
    ".chargpt .cg-validation{stroke:var(--cg-s3);stroke-width:1.4}"
    ".chargpt .cg-dot{fill:var(--cg-s3)}"
    ".chargpt .cg-ring{fill:var(--cg-paper);stroke:var(--cg-s3);stroke-width:1.6}"
    ".chargpt .cg-path{stroke:var(--cg-ink);stroke-width:.8;stroke-opacity:.6}"
    ".chargpt .cg-step{fill:var(--cg-paper);stroke:var(--cg-ink);stroke-width:1.2}"
    ".chargpt .cg-guide{stroke:var(--cg-muted);stroke-dasharray:4 3}"
    ".chargpt .cg-cursor{stroke:var(--cg-muted)}"
    ".chargpt .cg-weight{stroke:var(--cg-s2);shape-rendering:crispEdges}"
    ".chargpt .cg-frame{stroke:var(--cg-faint);stroke-width:.6}"
    ".chargpt .cg-settled{fill:var(--cg-s3)}"
    ".chargpt .cg-small{font-size:9px;fill:var(--cg-muted)}"
    ".chargpt .cg-b3{fill:var(--cg-s2)}"
    ".chargpt .cg-b1{fill:var(--cg-s1)}.chargpt .cg-b2{fill:var(--cg-s3)}"
) + themed(" .cg-zoom", "stroke:var(--cg-on-light)", "stroke:var(--cg-on-dark)")
CSS = (
    themed("", LIGHT, DARK) + f".chargpt{{max-width:100%;height:auto;font:11px {SANS};direction:ltr}}"
    ".chargpt path{fill:none;stroke:none;stroke-width:1;stroke-dasharray:none}"
    ".chargpt text{stroke:none;letter-spacing:0;word-spacing:0;text-transform:none}"
    ".chargpt .cg-paper{fill:var(--cg-paper)}"
    ".chargpt .cg-title{font-size:13px;font-weight:600;fill:var(--cg-ink)}"
    ".chargpt .cg-label{font-size:11px;fill:var(--cg-muted)}"
    ".chargpt .cg-end{text-anchor:end}"
    ".chargpt .cg-middle{text-anchor:middle}"
    "@media print{.chargpt{--cg-paper:#fff}}" + TEXT_CSS + PLOT_CSS
)


@dataclass(frozen=True, repr=False)
class Picture:
    """A picture that a notebook shows."""

    svg: str
    """Self-contained."""

    def __repr__(self) -> str:
        return f"Picture({len(self.svg):,} characters of SVG)"

    def _repr_html_(self) -> str:
        return self.svg


def figure(width: float, height: float, body: str, *, name: str, description: str) -> str:
    """Return a self-contained SVG that shrinks on a narrow page.

    Args:
        width: in pixels.
        height: in pixels.
        body: markup, already escaped.
        name: accessible name, plain text.
        description: text for screen readers, plain text.
    """
    size = f'width="{number(width)}" height="{number(height)}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chargpt" role="img" aria-label="{escaped(name)}" {size} '
        f'viewBox="0 0 {number(width)} {number(height)}"><style>{CSS}</style>'
        f'<desc>{escaped(description)}</desc><rect class="cg-paper" {size} rx="6"/>{body}</svg>'
    )


def clip_path(content: object, left: float, top: float, right: float, bottom: float) -> tuple[str, str]:
    """Return the markup of a clipping rectangle and the reference to it; its id is a hash of `content`."""
    name = "cg-" + hashlib.sha256(repr(content).encode()).hexdigest()[:12]
    box = f"M{number(left)} {number(top)}H{number(right)}V{number(bottom)}H{number(left)}Z"
    return f'<clipPath id="{name}"><path d="{box}"/></clipPath>', f"url(#{name})"


class Entry(NamedTuple):
    """A legend's entry: markup of a sample (from x = 0, centred at y = 0), its width in pixels, and a label."""

    sample: str
    width: float
    label: str
    kind: str = ""


def legend(entries: Sequence[Entry], left: float, top: float, width: float) -> tuple[str, float]:
    """Return a legend's markup, wrapped to the width between entries, and the y of its last baseline."""
    parts, x, y = [], 0.0, top
    for sample, indent, name, kind in entries:
        indent += 6.0 if indent else 0.0
        if x and x + indent + text_width(name) > width:
            x, y = 0.0, y + 18
        at = f"translate({number(left + x)} {number(y - 4)})"
        parts.append(f'<g transform="{at}">{sample}{label(indent, 4, name, kind)}</g>')
        x += indent + text_width(name) + 14
    return "".join(parts), y


def label(x: float, y: float, text: str, kind: str = "") -> str:
    """Return small sans-serif text at a position; `kind` adds classes, such as `cg-end` for right-aligned text."""
    classes = f"cg-label {kind}".rstrip()
    return f'<text class="{classes}" x="{number(x)}" y="{number(y)}">{escaped(text)}</text>'


def viridis(t: float) -> str:
    """Return the colour of viridis at t in [0, 1], from dark to light, as hexadecimal sRGB."""
    stops = np.linspace(0.0, 1.0, len(VIRIDIS))
    return "#" + "".join(f"{round(np.interp(t, stops, channel)):02x}" for channel in zip(*VIRIDIS, strict=True))


def number(value: float) -> str:
    """Return a coordinate as text with at most one decimal."""
    return f"{round(value, 1) + 0.0:.1f}".removesuffix(".0")


def glyph(char: str) -> str:
    """Return the text that shows a character: a symbol for a control, U+FFFD for bidi controls and invalid XML."""
    code = ord(char)
    if char in "\n\u2028\u2029":
        return "↵"
    if char == "\t":
        return "→"
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    illegal = code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF or char in BIDI_CONTROLS
    return "\ufffd" if illegal or unicodedata.category(char) in ("Cc", "Cs") else char


def joins(char: str) -> bool:
    """Return whether a character takes no column: marks, format characters such as joiners, medial or final Hangul."""
    return unicodedata.category(char) in ("Mn", "Me", "Mc", "Cf") or "\u1160" <= char <= "\u11ff"


def columns(cluster: str) -> int:
    """Return the columns, 1 or 2, that a character with its combining characters takes in monospace text."""
    base = cluster[0]
    flag = "\U0001f1e6" <= base <= "\U0001f1ff"
    emoji = "\ufe0f" in cluster and base > "\u2000"  # a text symbol with the emoji variation selector
    return 2 if flag or emoji or unicodedata.east_asian_width(base) in "WF" else 1


def escaped(text: str) -> str:
    """Return text escaped for XML content and for attributes in double quotes."""
    return html.escape("".join(map(glyph, text)))


def text_width(text: str, size: float = 11.0) -> float:
    """Return an upper estimate of the width of sans-serif text, in pixels."""
    return sum(1.05 if unicodedata.east_asian_width(c) in "WF" else 0.54 for c in text) * size
