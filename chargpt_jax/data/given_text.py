"""A prompt or a text to score, as a user gives it: it is repaired like the corpus, or converted to bytes."""

import re
from collections.abc import Sequence

from chargpt_jax.data.repair import repaired_as
from chargpt_jax.data.tokenizer import CharTokenizer, from_reader, named
from chargpt_jax.errors import UserError

LONE_SURROGATE = re.compile("[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]")
"""Half of a surrogate pair, which is not a character; repairs would replace it with U+FFFD."""


def like_corpus(text: str, tokenizer: CharTokenizer, repairs: Sequence[Sequence[str]]) -> str:
    """Return a text with the repairs of the corpus; it may have characters that are not in the vocabulary.

    Args:
        text: as it was given.
        tokenizer: of the model.
        repairs: the fixes that each source of the corpus got.

    Raises:
        UserError: if it has half of a surrogate pair.
    """
    if tokenizer.unit == "byte":
        return from_reader(text)
    if found := LONE_SURROGATE.search(text):
        raise UserError(
            f"The text has {named(found[0])} at character {found.start()}, which is half of a surrogate pair and "
            "not a character: remove it."
        )
    return repaired_as(text, tokenizer.vocabulary, repairs)


def without_unknown(text: str, tokenizer: CharTokenizer, repairs: Sequence[Sequence[str]]) -> tuple[str, list[str]]:
    """Return a text without the characters that are not in the vocabulary, and these characters, each once.

    Arguments as for `like_corpus`.
    """
    if tokenizer.unit == "byte":
        return from_reader(text), []
    lone = dict.fromkeys(LONE_SURROGATE.findall(text))
    text = repaired_as(LONE_SURROGATE.sub("", text), tokenizer.vocabulary, repairs)
    return tokenizer.drop_unknown(text), [*lone, *tokenizer.unknown(text)]
