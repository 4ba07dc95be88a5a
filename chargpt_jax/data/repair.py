"""Repair a text with ftfy: which of its fixes run is a table.

A text from Project Gutenberg gets all of them, like the original's, so that its results can be compared. Any other text
keeps what its author may have meant: only the fixes of `DEFAULT` run.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from chargpt_jax.data.streams.text_file import NeedsWhole
from chargpt_jax.errors import UserError

if TYPE_CHECKING:
    import ftfy

FIXES: dict[str, tuple[str, ...]] = {
    "mojibake": (
        "fix_encoding",
        "restore_byte_a0",
        "replace_lossy_sequences",
        "decode_inconsistent_utf8",
        "fix_c1_controls",
        "fix_surrogates",
    ),
    "line_ends": ("fix_line_breaks",),
    "nfc": ("normalization",),
    "entities": ("unescape_html",),
    "quotes": ("uncurl_quotes",),
    "width": ("fix_character_width",),
    "ligatures": ("fix_latin_ligatures",),
    "controls": ("remove_terminal_escapes", "remove_control_chars"),
}
"""Our name of a fix, and the fields of ftfy.TextFixerConfig that switch it on."""

DEFAULT = ("mojibake", "line_ends", "nfc")
"""The fixes for a text that is not from Project Gutenberg."""

ALL = tuple(FIXES)

NFC: Final = "NFC"
"""The Unicode normal form of a repaired text."""

BEFORE, BEHIND = 3, 2
"""Characters around others above ASCII that ftfy's search for mojibake considers."""

_ABOVE_ASCII = re.compile(r"[^\x00-\x7f]+")
_NOT_PLAIN = re.compile("[\r\x80-\x9f\u2028\u2029\ud800-\udfff]")
"""What the fixes of DEFAULT change, besides mojibake and what NFC composes."""


class Repaired(NamedTuple):
    """A text, and what was changed in it."""

    text: str
    fixes: tuple[tuple[str, str], ...] = ()
    """ftfy's explanation: pairs of action and parameter, each once, in order."""
    lines: int = 0
    """Lines of the text that were changed."""


def fixes_of(setting: str, from_gutenberg: bool) -> tuple[str, ...]:
    """Return the names of the fixes that `data.repair` asks for, in the order of FIXES.

    Raises:
        UserError: if it is not 'auto', 'all', 'none' or names of FIXES.
    """
    fixed = {"auto": ALL if from_gutenberg else DEFAULT, "all": ALL, "none": ()}.get(setting.strip())
    if fixed is not None:
        return fixed
    names = {name.strip() for name in setting.split(",")}
    if unknown := sorted(names - set(FIXES)):
        raise UserError(
            f"data.repair names {unknown[0]!r}, but must be 'auto', 'all', 'none', or a list of {', '.join(FIXES)}: "
            "correct it."
        )
    return tuple(name for name in FIXES if name in names)


def repair(text: str, names: Sequence[str]) -> Repaired:
    """Run the named fixes on a text.

    All fixes together run on the text as a whole, like the original's call of ftfy; some of them run line by line, so
    that one broken line is repaired in a text that is otherwise right.
    """
    if not names:
        return Repaired(text)
    config = _config(names)
    if set(names) == set(FIXES):
        return _whole(text, config)
    fixes: dict[tuple[str, str], None] = {}
    repaired, changed = [], 0
    plain = set(names) <= set(DEFAULT)
    if plain and _is_plain(text):
        return Repaired(text)
    for line in text.split("\n"):
        if plain and _is_plain(line):
            repaired.append(line)
            continue
        done = _whole(line, config)
        fixes |= dict.fromkeys(done.fixes)
        repaired.append(done.text)
        changed += done.text != line
    return Repaired("\n".join(repaired), tuple(fixes), changed)


class Repairs:
    """The repair of a text that comes in pieces: together they are what `repair` returns for the whole text."""

    def __init__(self, names: Sequence[str], has_tags: bool) -> None:
        """Begin a text.

        Args:
            names: of the fixes.
            has_tags: whether the text has a '<': then all fixes together leave its HTML entities as they are.
        """
        self._names, self._has_tags = names, has_tags
        self._rounds: list[set[str]] = []
        self._fixes: dict[tuple[str, str], None] = {}
        self.lines = 0
        """Lines of the text that were changed."""

    @property
    def fixes(self) -> tuple[tuple[str, str], ...]:
        """The explanation of ftfy: pairs of action and parameter, in order."""
        order = (*_fixers(), NFC)
        rounds = ((("normalize" if x == NFC else "apply"), x) for done in self._rounds for x in order if x in done)
        return (*self._fixes, *rounds)

    def repaired(self, pieces: Iterable[str]) -> Iterator[str]:
        r"""Yield the pieces of a text after repair.

        Args:
            pieces: each but the last one ends with \n.

        Raises:
            NeedsWhole: if the text may have mojibake, which all fixes together repair in the text as a whole.
        """
        for piece in pieces:
            if set(self._names) == set(FIXES):
                yield self._with_all_fixes(piece)
                continue
            done = repair(piece, self._names)
            self._fixes |= dict.fromkeys(done.fixes)
            self.lines += done.lines
            yield done.text

    def _with_all_fixes(self, piece: str) -> str:
        """Run all fixes, like ftfy.fix_and_explain, until they change nothing any more."""
        repaired, codes = piece, set(map(ord, set(piece)))
        for number in itertools.count():
            before = repaired
            repaired, done, codes = self._round(repaired, codes)
            if done:
                self._rounds += [set()] * (number + 1 - len(self._rounds))
                self._rounds[number] = self._rounds[number] | done
            if repaired == before:
                break
        if repaired != piece:
            self.lines += _changed_lines(piece, repaired)
        return repaired

    def _round(self, piece: str, codes: set[int]) -> tuple[str, set[str], set[int]]:
        """Run all fixes once on a piece with these code points.

        Returns:
            The piece, the names of the fixes that changed it, those of ftfy, and the code points that it has now.
        """
        done = set()
        for name, (fix, changes) in _fixers().items():
            skipped = name == "unescape_html" and self._has_tags
            if not skipped and any(code in changes for code in codes) and (fixed := fix(piece)) != piece:
                done.add(name)
                piece, codes = fixed, set(map(ord, set(fixed)))
            if name == "unescape_html" and may_be_bad(piece):
                raise NeedsWhole
        if (fixed := unicodedata.normalize(NFC, piece)) != piece:
            done.add(NFC)
            codes = set(map(ord, set(fixed)))
        return fixed, done, codes


@functools.cache
def _fixers() -> dict[str, tuple[Callable[[str], str], Container[int]]]:
    """Return ftfy's fixes of a text without mojibake, in its order, each with the code points that it changes."""
    from ftfy import chardata, fixes

    return {
        "unescape_html": (fixes.unescape_html, (ord("&"),)),
        "fix_c1_controls": (fixes.fix_c1_controls, range(0x80, 0xA0)),
        "fix_latin_ligatures": (fixes.fix_latin_ligatures, chardata.LIGATURES),
        "fix_character_width": (fixes.fix_character_width, chardata.WIDTH_MAP),
        "uncurl_quotes": (fixes.uncurl_quotes, (0x2BC, *range(0x2018, 0x2020))),
        "fix_line_breaks": (fixes.fix_line_breaks, (0x0D, 0x85, 0x2028, 0x2029)),
        "fix_surrogates": (fixes.fix_surrogates, range(0xD800, 0xE000)),
        "remove_terminal_escapes": (fixes.remove_terminal_escapes, (0x1B,)),
        "remove_control_chars": (fixes.remove_control_chars, chardata.CONTROL_CHARS),
    }


def _changed_lines(before: str, after: str) -> int:
    one, other = before.split("\n"), after.split("\n")
    return sum(a != b for a, b in zip(one, other, strict=False)) + abs(len(one) - len(other))


def may_be_bad(text: str) -> bool:
    """Return whether ftfy's search can find mojibake in a text, or in one of its lines alone.

    Only what surrounds characters above ASCII is searched, and the same surroundings only once.
    """
    if text.isascii():
        return False
    from ftfy.badness import is_bad

    around = {text[max(0, m.start() - BEFORE) : m.end() + BEHIND] for m in _ABOVE_ASCII.finditer(text)}
    return any(is_bad(part) or any(map(is_bad, part.split("\n"))) for part in around)


def _is_plain(text: str) -> bool:
    """Return whether the fixes of DEFAULT leave a text as it is, each line by itself."""
    if text.isascii():
        return "\r" not in text
    return not _NOT_PLAIN.search(text) and unicodedata.is_normalized("NFC", text) and not may_be_bad(text)


def repaired_as(text: str, known: Iterable[str], ways: Sequence[Sequence[str]]) -> str:
    r"""Repair a prompt or a scored text the way the corpus was repaired.

    Args:
        text: as it was given.
        known: the characters of the vocabulary.
        ways: the fixes that each source of the corpus got. If they differ, the fewest fixes that leave no unknown
            character are used.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    vocabulary = set(known)
    for names in sorted(set(map(tuple, ways)) or {DEFAULT}, key=len):
        candidate = repair(text, names).text
        if vocabulary.issuperset(candidate):
            return candidate
    return candidate


def kinds(fixes: Iterable[tuple[str, str]]) -> list[str]:
    """Return the names of FIXES that an explanation of ftfy amounts to, each once."""
    ours = {field: name for name, fields in FIXES.items() for field in fields}
    known = {"normalize": "nfc"}
    return list(dict.fromkeys(ours.get(what, known.get(action, "mojibake")) for action, what in fixes))


def _whole(text: str, config: "ftfy.TextFixerConfig") -> Repaired:
    import ftfy

    done = ftfy.fix_and_explain(text, config)
    fixes = tuple((str(action), str(parameter)) for action, parameter in done.explanation or ())
    return Repaired(done.text, fixes, _changed_lines(text, done.text))


def _config(names: Sequence[str]) -> "ftfy.TextFixerConfig":
    """Return ftfy's settings for the named fixes; its default for all of them."""
    import ftfy

    off: dict[str, Any] = {}
    for name, fields in FIXES.items():
        if name not in names:
            off |= dict.fromkeys(fields, False)
    if "normalization" in off:
        off["normalization"] = None
    return ftfy.TextFixerConfig(**off)
