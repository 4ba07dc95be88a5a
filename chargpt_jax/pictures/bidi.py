"""The visual order of characters in lines that mix writing directions, by the Unicode Bidirectional Algorithm.

Implicit levels only (UAX #9, rules W2 to W7, N1, N2, I1, I2, L1, L2). The pictures replace explicit controls by
symbols, and brackets are neutral characters like others.
"""

import unicodedata
from collections.abc import Sequence
from itertools import groupby

STRONG = ("L", "R", "AL")
NUMBERS = ("EN", "AN")


def base_level(text: str) -> int:
    """Return 1 if most letters of a text are written from right to left, else 0."""
    strong = [kind for kind in map(unicodedata.bidirectional, text) if kind in STRONG]
    return int(2 * sum(kind != "L" for kind in strong) > len(strong))


def levels(characters: Sequence[str], base: int) -> list[int]:
    """Return the embedding level of each character: odd ones run from right to left.

    Args:
        characters: [N] strings, of which the first code point counts.
        base: the level of the paragraph, 0 or 1.
    """
    original = [unicodedata.bidirectional(text[0]) or "L" for text in characters]
    kinds = _neutrals_resolved(_weak_resolved(original, base), base)
    by_kind = {"L": base + base % 2, "R": 1, "EN": 2, "AN": 2}
    return [base if kind in ("B", "S") else by_kind[now] for kind, now in zip(original, kinds, strict=True)]


def visual_order(levels: Sequence[int], spaces: Sequence[bool], base: int) -> list[int]:
    """Return the indices of a line's characters from left to right (rules L1 and L2).

    Args:
        levels: [N], of the line's characters.
        spaces: [N], whether each is a space: spaces at the end of the line have the level `base`.
        base: the level of the paragraph.
    """
    found = list(levels)
    for i in reversed(range(len(found))):
        if not spaces[i]:
            break
        found[i] = base
    order = list(range(len(found)))
    for level in range(max(found, default=0), 0, -1):
        start = 0
        for high, run in groupby(order, key=lambda i: found[i] >= level):
            indices = list(run)
            if high:
                order[start : start + len(indices)] = indices[::-1]
            start += len(indices)
    return order


def _weak_resolved(kinds: Sequence[str], base: int) -> list[str]:
    """Resolve numbers and their separators (rules W2 to W7); what is left is L, R, EN, AN or a neutral, 'ON'."""
    found, strong = list(kinds), "R" if base else "L"
    for i, kind in enumerate(found):  # W2
        strong = kind if kind in STRONG else strong
        if kind == "EN" and strong == "AL":
            found[i] = "AN"
    found = ["R" if kind == "AL" else kind for kind in found]  # W3
    for i in range(1, len(found) - 1):  # W4
        before, kind, after = found[i - 1 : i + 2]
        if before == after and (before, kind) in (("EN", "ES"), ("EN", "CS"), ("AN", "CS")):
            found[i] = before
    start = 0
    for kind, run in groupby(list(found)):  # W5
        end = start + len(list(run))
        if kind == "ET" and "EN" in (found[start - 1 : start] + found[end : end + 1]):
            found[start:end] = ["EN"] * (end - start)
        start = end
    strong = "R" if base else "L"
    for i, kind in enumerate(found):  # W6, W7
        strong = kind if kind in STRONG else strong
        if kind == "EN" and strong == "L":
            found[i] = "L"
        elif kind not in STRONG + NUMBERS:
            found[i] = "ON"
    return found


def _neutrals_resolved(kinds: Sequence[str], base: int) -> list[str]:
    """Give neutrals the direction of both neighbours if it is the same, else the paragraph's (rules N1, N2)."""
    outer = "R" if base else "L"

    def direction(kind: str) -> str:
        return "R" if kind in NUMBERS else kind

    found: list[str] = []
    runs = [(kind, len(list(run))) for kind, run in groupby(kinds)]
    for i, (kind, length) in enumerate(runs):
        if kind == "ON":
            before = direction(runs[i - 1][0]) if i else outer
            after = direction(runs[i + 1][0]) if i + 1 < len(runs) else outer
            kind = before if before == after else outer
        found += [kind] * length
    return found
