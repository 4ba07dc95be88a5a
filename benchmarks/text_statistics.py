"""Statistics of generated texts: misspelt words, repetition, copies of the training text, diversity.

Each function takes the texts of one set and returns one number.
"""

import itertools
import re
import zlib
from collections.abc import Iterator, Sequence

LENGTH = 20
"""Characters of the substrings that are looked for again."""

WORDS = 4_000
"""Words of a set of which the different ones are counted: a longer set would have more of them."""

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")


def words(text: str) -> list[str]:
    """Return the words of a text in lower case: runs of letters, with an apostrophe between two of them.

    The last word is left out if the text ends inside it.
    """
    found = [match for match in _WORD.finditer(text) if match.end() < len(text)]
    return [match[0].lower() for match in found]


def unknown_words(texts: Sequence[str], known: set[str]) -> float:
    """Return the share of the words that are not among the known ones, 0 to 1."""
    found = [word for text in texts for word in words(text)]
    return sum(word not in known for word in found) / max(1, len(found))


def substrings(text: str, length: int = LENGTH) -> Iterator[str]:
    """Yield all substrings of a length, from left to right."""
    return (text[i : i + length] for i in range(len(text) - length + 1))


def repeated(texts: Sequence[str], length: int = LENGTH) -> float:
    """Return the share of the substrings that have occurred earlier in their own text, 0 to 1."""
    total = again = 0
    for text in texts:
        found = list(substrings(text, length))
        total, again = total + len(found), again + len(found) - len(set(found))
    return again / max(1, total)


def copied(texts: Sequence[str], source: set[str], length: int = LENGTH) -> float:
    """Return the share of the substrings that are among those of a source, 0 to 1."""
    found = [part for text in texts for part in substrings(text, length)]
    return sum(part in source for part in found) / max(1, len(found))


def longest_repetition(text: str) -> int:
    """Return the length of the longest substring that occurs twice; the two may overlap."""
    suffixes = sorted(text[i:] for i in range(len(text)))
    longest = 0
    for one, other in itertools.pairwise(suffixes):
        while longest < len(one) and one[: longest + 1] == other[: longest + 1]:
            longest += 1
    return longest


def mean_longest_repetition(texts: Sequence[str]) -> float:
    """Return the mean of the texts' longest repetitions, characters."""
    return sum(map(longest_repetition, texts)) / max(1, len(texts))


def distinct_words(texts: Sequence[str], count: int = WORDS) -> float:
    """Return how many of the first `count` words of a set are different, per 100 words."""
    found = [word for text in texts for word in words(text)][:count]
    return 100 * len(set(found)) / max(1, len(found))


def compressed_bits(texts: Sequence[str]) -> float:
    """Return the bits per character to which zlib compresses the joined texts; similar texts need fewer.

    zlib refers back 32,768 characters at most, so a larger set gains nothing more.
    """
    joined = "\n".join(texts).encode()
    return 8 * len(zlib.compress(joined, 9)) / max(1, len(joined))
