"""Remove Project Gutenberg's own text (headers, licences, credits) from a file with one or more of its books.

A file is a sequence of stretches: a head that ends with a start marker, a book, a tail that begins with an end marker,
perhaps more of them, and perhaps texts that are not from Project Gutenberg. A head extends back, and a tail extends
on, over the paragraphs that speak of licences and electronic texts; everything else is kept.

The markers, headings and credits are tables below. To support another wording or language, add a line.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

STARS = r"\*[ ]?\*[ ]?\*"
"""Three stars, perhaps with spaces."""

BOOK = r"PROJECT\s+GUTENBERG(?:\s*(?:™|-TM))?(?:(?:['’]|&rsquo;|&\#39;|&\#8217;|&apos;)?S)?\s+E-?(?:BOOKS?|TEXTE?S?)\b"
"""'Project Gutenberg EBook', in the spellings that occur."""

APOSTROPHE_S = r"(?:['’]|&rsquo;|&\#39;|&\#8217;|&apos;)\s*S\b"

TITLE = r"(?:(?:(?!\n[ \t]*\n)[\s\S]){0,500}?\*{3}|[^\n]*)"
"""The rest of a marker: it can span several lines, but no empty line; its closing stars can be missing."""

START_MARKERS = (
    rf"{STARS}\s*START\s+OF\s+(?:THE|THIS)\s+{BOOK}{TITLE}",
    # Until 2003 the licence was in front of the book.
    r"\*+\s*END\s*\**\s*THE\s+SMALL\s+PRINT[^\n]*",
)
"""What the last line of a head looks like, from the start of a line; the book begins after it."""

END_MARKERS = (
    rf"{STARS}\s*END\s+OF\s+(?:THE|THIS)\s+{BOOK}{TITLE}",
    rf"(?:THE\s+)?END\s+OF\s+(?:(?:THE|THIS)\s+)?(?:{BOOK}|PROJECT\s+GUTENBERG{APOSTROPHE_S})",
    r"(?:THE\s+)?END\s+OF\s+(?:THE|THIS)\s+E-?TEXT\b(?:[ \t]+OF\b|[ \t]*[.*]*[ \t]*$)",
    r"ENDE\s+(?:(?:DIESES|DES|VON)\s+)?PROJE[CK]TE?S?\s+GUTENBERG\b",
    r"FIN\s+(?:DU|DE\s+CE|DE\s+LA|DE)\s+PROJE[CT]T?\s+GUTENBERG\b",
    r"(?:FIN|FINE|FIM)\s+(?:DEL?|DO|DESTE|DI)\s+(?:PROYECTO|PROGETTO|PROJE[CT]TO|PROJECT)\s+GUTENBERG\b",
    r"EINDE\s+VAN\s+(?:HET\s+|DIT\s+)?PROJECT\s+GUTENBERG\b",
)
"""What the first line of a tail begins with, from the start of a line."""

HEADINGS = (
    rf"(?:THIS\s+IS\s+)?(?:THE\s+)?{BOOK}[ \t]*(?:OF\b|,|\#|\[|$)",
    rf"(?:THE\s+)?PROJECT\s+GUTENBERG{APOSTROPHE_S}[ \t]+\S[^\n]*,[ \t]+BY\b",
    r"WELCOME\s+TO\s+THE\s+WORLD\s+OF\s+FREE\s+PLAIN\s+VANILLA\b",
)
"""What the first line of a head looks like, from the start of a line."""

LAST_SENTENCES = (
    r"subscribe\s+to\s+our\s+email\s+newsletter\s+to\s+hear\s+about\s+new\s+e-?books\.?",
    r"END\s*\**\s*THE\s+SMALL\s+PRINT[^\n]*",
)
"""The last words of a tail. If they are missing, the tail ends with its last paragraph that has a word of WORDS."""

WORDS = (
    r"gutenberg|licen[cs]e|lizenz|copyright|trademark|public[ \t]domain|small[ \t]print|donations?\b|refund|warrant"
    r"|\be-?te?xte?s?\b|\be-?books?\b|electronic[ \t](?:work|text)s?\b|updated[ \t]editions"
    r"|^(?:title|author|editor|translator|illustrator|release[ \t]date|posting[ \t]date|language|credits)[ \t]*:"
    r"|character[ \t]set"
)
"""What paragraphs of heads and tails contain."""

LICENCE_NAMES = r"gutenberg(?:-tm|™|\(tm\)|[ \t]*licen[cs]e|[ \t]+literary|[ \t]+of[ \t]+australia)"
"""What the licence calls Project Gutenberg; a line with it that was kept is reported."""

LICENCE = (
    LICENCE_NAMES
    + r"|electronic[ \t]works\b|^[ \t]*1\.[A-F]\.|information[ \t]about[ \t]project[ \t]gutenberg|\bsmall[ \t]print!"
)
"""What only the licences contain. If a paragraph with one of these follows, paragraphs without WORDS are removed."""

CREDITS = (
    r"(?:This\s+(?:e-?book|e-?text|file)\s+was\s+)?(?:Produced|(?:E-?text\s+)?Prepared|Scanned|Transcribed|Digitized)"
    r"\s+(?:and\s+\w+\s+)?by\s+(?:the\s+)?(?-i:[A-Z])",
    r"(?:Produit\s+par|Produziert\s+von|Produzido\s+por|Producido\s+por|Prodotto\s+da)\s+(?-i:[A-Z])",
    r"Transcribed\s+from\s+the\s+[^\n]*\bedition\b",
    r"Credits\s*:",
)
"""What a credit begins with; the paragraphs at the start of a book that begin so are removed."""

NOTES = (r"\[?\s*\**\s*Transcriber(?:['’]?s)?['’]?\s+notes?\b", r"\[?\s*\**\s*Note\s+(?:by|of)\s+the\s+transcriber")
"""What may be a remnant, but also the author's: it is kept, and reported."""

MAX_GAP = 1_000
"""Characters without a word of WORDS that a licence can have in front of a paragraph with one of LICENCE."""

MAX_HEAD = 20_000
"""Maximum size of a head without a heading at the start of a file, characters."""


def _table(rows: Sequence[str], flags: int = 0) -> re.Pattern[str]:
    return re.compile(rf"^[ \t*\ufeff]*?(?:{'|'.join(rows)})", re.IGNORECASE | re.MULTILINE | flags)


_START, _END, _HEADING, _NOTES = map(_table, (START_MARKERS, END_MARKERS, HEADINGS, NOTES))
_WORDS, _LICENCE, _LICENCE_NAMES = (
    re.compile(row, re.IGNORECASE | re.MULTILINE) for row in (WORDS, LICENCE, LICENCE_NAMES)
)
# Each pattern of a table has one of these words, in lower case.
_OF_MARKERS, _OF_NOTES, _OF_LICENCES = map(re.compile, ("gutenberg|e-?text|small\\s+print", "transcriber", "gutenberg"))
_CASELESS = "\u0131\u0130\u017f\u212a"
"""The letters besides i, s and k that patterns take for these, because they ignore case."""

_LAST = re.compile("|".join(LAST_SENTENCES), re.IGNORECASE)
_CREDIT = re.compile(rf"\s*(?:{'|'.join(CREDITS)})(?:(?!\n[ \t]*\n)[\s\S])*", re.IGNORECASE)
_PARAGRAPH = re.compile(r"(?:[^\n]*\S[^\n]*(?:\n|\Z))+")
_EMPTY_LINES = re.compile(r"\s*\n")
_TITLE = re.compile(r"^Title:[ \t]*(\S.*(?:\n[ \t]+\S.*)*)", re.MULTILINE)


class Cut(NamedTuple):
    """A text without Project Gutenberg's own."""

    text: str
    """Everything that was kept; its parts are separated by an empty line."""
    title: str | None
    """The titles in the heads."""
    lines: tuple[tuple[int, int], ...]
    """The first and last line of each part that was removed, counted from 1."""
    notes: tuple[int, ...]
    """The lines at which a transcriber's note was kept."""
    certain: bool
    """Whether both the start and the end of a book were found."""


Span = tuple[int, int]
"""The positions of the first character of a part, and of the first one after it."""


class Found(NamedTuple):
    """The parts of a text that are Project Gutenberg's own."""

    removed: list[Span]
    """Heads with the credits behind them, and tails; adjacent ones are one part."""
    titles: list[str]
    """The titles in the heads."""
    heads: int
    """Number of heads."""
    tails: int
    """Number of tails."""
    complete: bool
    """Whether all of them would be the same if other text stood around this one."""


def cut(text: str) -> Cut | None:
    """Remove heads, tails and credits; return None if the text has no marker of Project Gutenberg."""
    found = find(text)
    if not found.removed:
        return None
    parts = [text[slice(*span)].strip() for span in kept(found.removed, len(text))]
    return Cut(
        text="\n\n".join(part for part in parts if part),
        title=title_of(found.titles),
        lines=tuple(lines_of(text, span) for span in found.removed),
        notes=tuple(lines_of(text, note)[0] for note in notes(text) if not inside(note[0], found.removed)),
        certain=bool(found.heads and found.tails),
    )


def find(text: str, at_start: bool = True, at_end: bool = True) -> Found:
    """Find heads, tails and credits.

    Args:
        text: a text, or a part of one between two empty lines.
        at_start: whether the text starts here.
        at_end: whether the text ends here.
    """
    heads, complete, first = [], True, len(text) - len(text.lstrip())
    for head, reached in _heads(text, at_start):
        heads.append(head)
        complete &= at_start or reached > first + MAX_GAP
    tails = []
    for tail, settled in _tails(text, heads):
        tails.append(tail)
        complete &= at_end or settled
    removed: list[Span] = []
    for start, end in sorted(heads + tails):
        if (start, end) in heads:
            while credit := _CREDIT.match(text, end):
                end = credit.end()
            complete &= at_end or bool(text[end:].strip())
        if removed and not text[removed[-1][1] : start].strip():
            start = removed.pop()[0]
        removed.append((start, end))
    titles = [" ".join(match[1].split()) for head in heads if (match := _TITLE.search(text, *head))]
    return Found(removed, titles, len(heads), len(tails), complete)


def may_have_marker(text: str) -> Iterator[int]:
    """Yield the positions at which `find` can find a marker."""
    for pattern in (_START, _END) if _has_word(text, _OF_MARKERS) else ():
        for match in pattern.finditer(text):
            yield match.start()


def notes(text: str) -> Iterator[Span]:
    """Yield the transcriber's notes: each from the empty lines in front of it to the end of its heading."""
    return (match.span() for match in _NOTES.finditer(text)) if _has_word(text, _OF_NOTES) else iter(())


def kept(removed: Sequence[Span], length: int) -> list[Span]:
    """Return the parts of a text that remain, between those that are removed."""
    ends = [0, *(end for _, end in removed)]
    return list(zip(ends, [*(start for start, _ in removed), length], strict=True))


def title_of(titles: Sequence[str]) -> str | None:
    """Return the titles of several books as one."""
    return ", ".join(titles) or None


def licence_line(text: str) -> int | None:
    """Return the first line that may be part of a licence, counted from 1; None if there is none."""
    found = _LICENCE_NAMES.search(text) if _has_word(text, _OF_LICENCES) else None
    return text.count("\n", 0, found.start()) + 1 if found else None


def _has_word(text: str, words: re.Pattern[str]) -> bool:
    """Return whether a text has one of some words, in any case: much faster than a search for a table's patterns."""
    return any(letter in text for letter in _CASELESS) or words.search(text.lower()) is not None


def lines_of(text: str, span: Span) -> tuple[int, int]:
    """Return the first and the last line of a part, counted from 1, without the empty lines around it."""
    part = text[slice(*span)]
    first = text.count("\n", 0, span[0] + len(part) - len(part.lstrip())) + 1
    return first, first + part.strip().count("\n")


def inside(position: int, spans: Sequence[Span]) -> bool:
    """Return whether a position is in one of some parts."""
    return any(start <= position < end for start, end in spans)


def _heads(text: str, at_start: bool) -> Iterator[tuple[Span, int]]:
    """Yield the heads, each from its heading to its start marker, and where the search for its start ended."""
    floor = 0
    for marker in _START.finditer(text):
        start, reached = _head_start(text, floor, marker.start(), at_start)
        yield (start, marker.end()), reached
        floor = marker.end()


def _head_start(text: str, floor: int, marker: int, at_start: bool) -> tuple[int, int]:
    """Return where the head of a start marker begins, not before `floor`, and where its first paragraph does."""
    first, reached = marker, marker
    for start, end in reversed(_paragraphs(text, floor, marker)):
        if _WORDS.search(text, start, end):
            first, reached = start, start
        elif reached - start > MAX_GAP:
            break
    headings = [heading.start() for heading in _HEADING.finditer(text, floor, marker)]
    if later := [heading for heading in headings if heading >= first]:
        return later[0], first
    # Without a heading, all in front of the first marker is its head, unless it is too long to be one.
    whole = at_start and floor == 0 and marker <= MAX_HEAD and not headings
    return 0 if whole else first, first


def _tails(text: str, heads: Sequence[Span]) -> Iterator[tuple[Span, bool]]:
    """Yield the tails, each from its end marker to the end of the licence, at most to the next head.

    The second item tells whether the licence ends before the text does.
    """
    reached = 0
    for marker in _END.finditer(text):
        if marker.start() < reached or inside(marker.start(), heads):
            continue
        limit = min((start for start, _ in heads if start >= marker.end()), default=len(text))
        reached, settled = _tail_end(text, marker, limit)
        yield (marker.start(), reached), settled or limit < len(text)


def _tail_end(text: str, marker: re.Match[str], limit: int) -> tuple[int, bool]:
    """Return where the tail of an end marker ends, and whether that was found before the limit."""
    reached = _line_end(text, marker.end(), limit)
    while again := _END.match(text, _next_line(text, reached)):  # often twice, in two wordings
        reached = _line_end(text, again.end(), limit)
    for start, end in _paragraphs(text, reached, limit):
        if start - reached > MAX_GAP:
            return reached, True
        if markers := list(_END.finditer(text, start, end)):  # a text can follow the last one without an empty line
            line_end = _line_end(text, markers[-1].end(), end)
            end = end if _WORDS.search(text, line_end, end) else line_end
        if last := _LAST.search(text, start, end):
            return _line_end(text, last.end(), limit), True
        next_one = not text[reached:start].strip()
        if (_WORDS if next_one else _LICENCE).search(text, start, end):
            reached = max(reached, end)
    return reached, False


def _line_end(text: str, position: int, limit: int) -> int:
    found = text.find("\n", position, limit)
    return limit if found < 0 else found


def _next_line(text: str, position: int) -> int:
    """Return where the next line that is not empty starts."""
    match = _EMPTY_LINES.match(text, position)
    return match.end() if match else position


def _paragraphs(text: str, start: int, end: int) -> list[Span]:
    return [match.span() for match in _PARAGRAPH.finditer(text, start, end)]
