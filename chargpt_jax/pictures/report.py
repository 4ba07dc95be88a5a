"""The report of a run as one self-contained HTML page: facts, figures and texts."""

import html
import re
from collections.abc import Sequence

CSS = """
:root{color-scheme:light dark;--paper:#fdfcf9;--ink:#2b2926;--muted:#6d6961;--rule:#ebe7de}
@media screen and (prefers-color-scheme:dark){:root{--paper:#17181b;--ink:#dedbd4;--muted:#99958c;--rule:#2a2b2f}}
body{max-width:720px;margin:0 auto;padding:4rem 1.5rem 6rem;background:var(--paper);color:var(--ink);
font:16px/1.55 Charter,"Iowan Old Style","Palatino Linotype",Palatino,Georgia,"DejaVu Serif",serif}
h1{margin:0 0 2rem;font-size:1.9rem;font-weight:500;line-height:1.2;letter-spacing:-.01em;overflow-wrap:anywhere}
dl{margin:0 0 3rem;border-top:1px solid var(--rule);font-size:.9rem}
dl div{display:grid;grid-template-columns:minmax(8rem,1fr) 2.6fr;column-gap:1.5rem;padding:.34rem 0;
border-bottom:1px solid var(--rule)}
dt{color:var(--muted)}
dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums lining-nums}
figure{margin:0 0 3rem}
figure>svg{display:block;max-width:100%;height:auto;margin:0 -16px}
figcaption{margin:0 0 .7rem;font-size:.9rem;font-style:italic;color:var(--muted)}
pre{margin:0;padding:.1rem 0 .1rem 1.1rem;border-left:2px solid var(--rule);white-space:pre-wrap;
overflow-wrap:anywhere;font:13px/1.55 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
@media print{@page{margin:18mm}body{background:#fff;max-width:none;padding:0;font-size:11pt}
figure,dl div{break-inside:avoid}
figure.text{break-inside:auto}figcaption,h1{break-after:avoid}}
"""
"""Style of the page; its background is that of the pictures."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""Content security policy: inline styles only. The page runs no script and loads no file."""

_UNFIT = re.compile(
    "[^\t\n -~\xa0-\u061b\u061d-\u200d\u2010-\u2029\u202f-\u2065\u206a-\ud7ff"
    "\ue000-\ufdcf\ufdf0-\ufffd\U00010000-\U0010ffff]"
)
"""Characters that HTML does not allow, and bidirectional controls."""


def report(
    title: str,
    facts: Sequence[tuple[str, str]],
    figures: Sequence[tuple[str, str]],
    texts: Sequence[tuple[str, str]] = (),
) -> str:
    """Return a self-contained HTML page, light or dark like the reader's system, and light in print.

    Args:
        title: the page's heading, plain text.
        facts: (name, value) pairs, plain text, as a table.
        figures: (caption, SVG) pairs; captions are plain text, SVGs are inserted unchanged.
        texts: (caption, text) pairs, plain text; line breaks and spaces are preserved.
    """
    rows = "\n".join(f"<div><dt>{_plain(name)}</dt><dd>{_plain(value)}</dd></div>" for name, value in facts)
    parts = [f"<h1>{_plain(title)}</h1>", f"<dl>\n{rows}\n</dl>" if rows else ""]
    parts += [_figure(caption, svg) for caption, svg in figures]
    # HTML drops a line break directly after <pre>: this one is dropped instead of one of the text.
    parts += [_figure(caption, f"<pre>\n{_plain(text)}</pre>", ' class="text"') for caption, text in texts]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_plain(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, parts))
        + "\n</main>\n</body>\n</html>\n"
    )


def _figure(caption: str, content: str, attributes: str = "") -> str:
    return f"<figure{attributes}>\n<figcaption>{_plain(caption)}</figcaption>\n{content}\n</figure>"


def _plain(text: str) -> str:
    """Return text escaped for HTML; characters that it does not allow, and bidi controls, become U+FFFD."""
    return html.escape(_UNFIT.sub("\ufffd", text.replace("\r\n", "\n")))
