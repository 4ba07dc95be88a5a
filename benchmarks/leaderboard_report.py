"""The tables and the figures of the leaderboard in docs/leaderboard.md, from the entries of benchmarks/leaderboard.py.

`python -m benchmarks.leaderboard --write` renews them.
"""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import between_markers, table
from chargpt_jax.pictures.plots.losses import loss_plot

PAGE = Path(__file__).parents[1] / "docs" / "leaderboard.md"

Entry = dict[str, Any]
"""One training: config, text, seed, scores, curve and machine."""

HEAD = ("entry", "machine", "parameters", "seconds", "seeds", "bits", "worst", "nats", "bits, half windows")


def tables(entries: Iterable[Entry]) -> str:
    """Return the leaderboard as Markdown: a table for each text, a row for each config, the best first."""
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for one in entries:
        key = one["text"]["name"], one["text"]["sha256"], one["title"], one["config"], tuple(one["flags"])
        groups.setdefault((*key, one["machine"]["cpu"], one["machine"]["cores"]), []).append(one)
    parts = []
    for name, digest in dict.fromkeys(key[:2] for key in groups):
        own = sorted((found for key, found in groups.items() if key[:2] == (name, digest)), key=_mean_bits)
        text = own[0][0]["text"]
        parts += [
            f"**{name}**: {text['characters']:,} characters, of which the last {text['held_out']:,} are held out.",
            table(HEAD, list(map(_row, own)), left=2),
        ]
    return "\n\n".join(parts)


def _mean_bits(found: Sequence[Entry]) -> float:
    return statistics.mean(one["bits"]["windows"] for one in found)


def _row(found: Sequence[Entry]) -> list[str]:
    """Return the row of one config; `found` are its seeds."""
    first, bits = found[0], [one["bits"]["windows"] for one in found]
    return [
        f"{first['title']} (`{first['config']}`)",
        f"{first['machine']['cores']} cores of {first['machine']['cpu']}",
        f"{first['parameters']:,}",
        f"{statistics.mean(one['seconds'] for one in found):,.0f}",
        ", ".join(str(one["seed"]) for one in found),
        f"{statistics.mean(bits):.4f}",
        f"{max(bits):.4f}",
        f"{statistics.mean(one['nats']['windows'] for one in found):.4f}",
        f"{statistics.mean(one['bits']['half_windows'] for one in found):.4f}",
    ]


def pictures(entries: Iterable[Entry]) -> dict[str, str]:
    """Return the losses over the minutes by file name, as SVG: of the first entry of each config."""
    found: dict[str, str] = {}
    for one in entries:
        name = f"loss_{Path(one['config']).stem}.svg"
        if name not in found and "curve" in one:  # older entries have none
            curves = (
                [(seconds / 60, loss) for seconds, loss in one["curve"][kind]] for kind in ("training", "validation")
            )
            found[name] = loss_plot(*curves, x_label="minutes")
    return found


def write(entries: Sequence[Entry], page: Path = PAGE) -> None:
    """Renew the tables of the page, and the figures beside it."""
    text = between_markers(page.read_text(encoding="utf-8"), "leaderboard", tables(entries))
    page.write_text(text, encoding="utf-8")
    for name, svg in pictures(entries).items():
        (page.parent / name).write_text(svg, encoding="utf-8")
