"""Repair a text with ftfy: which of its fixes run is a table.

A text from Project Gutenberg gets all of them, like the original's, so that its results can be compared. Any other text
keeps what its author may have meant: only the fixes of `DEFAULT` run.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

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
    for line in text.split("\n"):
        if plain and line.isascii() and line.isprintable():  # nothing to repair
            repaired.append(line)
            continue
        done = _whole(line, config)
        fixes |= dict.fromkeys(done.fixes)
        repaired.append(done.text)
        changed += done.text != line
    return Repaired("\n".join(repaired), tuple(fixes), changed)


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
    before, after = text.split("\n"), done.text.split("\n")
    changed = sum(a != b for a, b in zip(before, after, strict=False)) + abs(len(before) - len(after))
    return Repaired(done.text, fixes, changed)


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
