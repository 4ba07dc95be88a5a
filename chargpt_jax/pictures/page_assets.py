"""Self-contained HTML: pages and fragments with scripts and styles of this package, and data as JSON.

A page loads no file and sends no request. Its content security policy allows the one script that the page contains, by
its hash, and no other one.
"""

import base64
import functools
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chargpt_jax.pictures import svg

_UNFIT = re.compile(
    "[^\t\n -~\xa0-\u061b\u061d-\u200d\u2010-\u2029\u202f-\u2065\u206a-\ud7ff"
    "\ue000-\ufdcf\ufdf0-\ufffd\U00010000-\U0010ffff]"
)
"""Characters that HTML does not allow, and bidirectional controls."""

DECIMALS = {"surprisal": 4, "entropy": 4, "surprise_surprise": 4, "sampled_probability": 5}
"""Decimals of the metrics in a page, which shows fewer."""


def document(
    title: str,
    body: str,
    *,
    scripts: Sequence[str] = (),
    styles: Sequence[str] = ("subline", "page"),
    data: Mapping[str, Any] | None = None,
    blocks: str = "",
) -> str:
    """Return a complete page.

    Args:
        title: of the page, plain text.
        body: HTML.
        scripts: names of files of pictures/page/ without .js; together they are one script at the end of the page.
        styles: names of files of pictures/page/ without .css.
        data: values for the scripts, as JSON can hold them, by the id of their element: `dataOf(id)` returns one.
        blocks: further HTML before the script.
    """
    code = script(*scripts) if scripts else ""
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    if code:
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        policy = policy.replace("; base-uri", f"; script-src 'sha256-{digest}'; base-uri")
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{plain(title)}</title>\n<style>\n{svg.CSS}",
        *(asset(f"{name}.css") for name in styles),
        "</style>",
        f'</head>\n<body class="chargpt">\n{body}',
        *(data_block(name, value) for name, value in (data or {}).items()),
        *([blocks] if blocks else []),
        *([f"<script>{code}</script>"] if code else []),
        "</body>\n</html>\n",
    ]
    return "\n".join(parts)


@functools.cache
def asset(name: str) -> str:
    """Return the text of a file of pictures/page/."""
    return (Path(__file__).with_name("page") / name).read_text(encoding="utf-8")


@functools.cache
def script(*names: str) -> str:
    """Return scripts of pictures/page/ as one, which leaves no name behind in the page."""
    return '(() => {\n"use strict";\n' + "\n".join(asset(f"{name}.js") for name in names) + "})();"


def data_block(name: str, value: Any) -> str:
    """Return an element with a value as JSON; no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{html.escape(name)}">{text}</script>'


def plain(text: str) -> str:
    """Return text escaped for HTML; characters that it does not allow, and bidi controls, become U+FFFD."""
    return html.escape(_UNFIT.sub("\ufffd", text.replace("\r\n", "\n")))


def live(pictures: Sequence[str], samples: Sequence[dict[str, Any]]) -> str:
    """Return sublines for a notebook, whose characters answer a pointer and the arrow keys if scripts may run.

    Args:
        pictures: SVG, which are shown without scripts.
        samples: the samples in them, as their JSON file holds them.
    """
    return "\n".join([*_places(pictures, samples), _live_code()])


def beside(captions: Sequence[str], pictures: Sequence[str], samples: Sequence[dict[str, Any]]) -> str:
    """Return sublines for a notebook side by side, below each other on a narrow page.

    Args:
        captions: plain text above each of them.
        pictures: as for `live`.
        samples: as for `live`.
    """
    figures = [
        f"<figure><figcaption>{plain(caption)}</figcaption>{place}</figure>"
        for caption, place in zip(captions, _places(pictures, samples), strict=True)
    ]
    return f'<div class="chargpt cg-beside"><div class="cg-columns">{"".join(figures)}</div></div>\n{_live_code()}'


def _places(pictures: Sequence[str], samples: Sequence[dict[str, Any]]) -> list[str]:
    """Return an element per subline: the picture, which a script replaces, and the sample's data."""
    return [
        f'<div class="chargpt cg-notebook" data-sample="{html.escape(json.dumps(compact(sample)))}">{picture}</div>'
        for picture, sample in zip(pictures, samples, strict=True)
    ]


def _live_code() -> str:
    """Return the styles and the script that make the sublines of a notebook answer."""
    style = f"<style>{svg.CSS}{asset('subline.css')}</style>"
    return f"{style}\n<script>{script('subline', 'notebook')}</script>"


def compact(sample: dict[str, Any]) -> dict[str, Any]:
    """Return a sample's data without what a page does not need, and with fewer decimals."""
    rounded = {
        name: [None if value is None else round(value, digits) for value in sample[name]]
        for name, digits in DECIMALS.items()
        if name in sample
    }
    names = ("prompt", "tokens", "vocab_size", "rank")
    kept: dict[str, Any] = {name: sample[name] for name in names if name in sample}
    if "alternatives" in sample:
        pairs = [found and [[text, round(p, 4)] for text, p in found] for found in sample["alternatives"]]
        kept["alternatives"] = pairs
    if "series" in sample:
        kept["series"] = {
            name: own | {"values": [None if value is None else round(value, 4) for value in own["values"]]}
            for name, own in sample["series"].items()
        }
    return {**kept, **rounded}
