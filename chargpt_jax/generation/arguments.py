"""The arguments of a trained model's functions, checked: each function raises `UserError` for an invalid one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from chargpt_jax.config.sections import MAX_STOP, MAX_STOPS, MAX_TEXT
from chargpt_jax.config.values import argument, shown
from chargpt_jax.data.tokenizer import CharTokenizer, named
from chargpt_jax.errors import UserError
from chargpt_jax.generation.generate import bucket
from chargpt_jax.generation.sample import Sample

Callback = TypeVar("Callback", bound=Callable[..., Any])

NO_CHARACTER = "\ufffd"
"""Stands for a generated token id that has no character, which only a model without mask_unused_ids generates."""

MAX_CHARACTERS = 32 * MAX_TEXT
"""Characters of all prompts and continuations of one call, which are in memory together."""

MAX_SEED = 2**31
"""Seeds are below this."""

MAX_SAMPLES = 4096
"""Maximum number of samples per prompt."""

MAX_ALTERNATIVES = 64
"""Maximum number of alternatives that are given for every character."""


def check_scored(characters: int) -> None:
    """Check that a text has a character with context."""
    if characters < 2:
        raise UserError(
            f"The text has {characters} character{'' if characters else 's'}, but scoring needs at least 2, because "
            "the first has no context: give a longer text."
        )


def check_branched(sample: Sample, at: int, alternative: str, vocab_size: int, tokenizer: CharTokenizer) -> None:
    """Check that a model knows the characters of a sample, and the one to put at index `at`."""
    if tokenizer.unknown(alternative):
        raise UserError(
            f"alternative is {named(alternative)}, which is not in the vocabulary of this model: give another "
            "character."
        )
    unknown = [character for character in tokenizer.unknown("".join(sample.tokens)) if character != NO_CHARACTER]
    if unknown or sample.vocab_size != vocab_size:
        sizes = f"vocab_size {sample.vocab_size}, and this model has {vocab_size}"
        what = f"{named(unknown)}, not in the vocabulary of this model" if unknown else sizes
        raise UserError(f"The sample is of another model: it has {what}. Branch it with the model that generated it.")
    for i, token in enumerate(sample.tokens[:at]):
        if tokenizer.unknown(token) or not token:
            raise UserError(
                f"The sample has a token id without a character at position {i}, which a prompt cannot have: give a "
                f"position of at most {i}."
            )


def checked_prompts(prompts: str | Sequence[str]) -> list[str]:
    """Return prompts as a list of at least one string."""
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise UserError(f"prompts is {shown(prompts)}, but it must be a string, or a list of strings: try '\\n'.")
    found = [
        argument("A prompt", one, str, "try '\\n'") for one in ([prompts] if isinstance(prompts, str) else prompts)
    ]
    if not found:
        raise UserError("No prompt was given, but the model needs at least one character: try '\\n'.")
    return found


def checked_count(max_new_tokens: int) -> int:
    """Return a number of characters to generate."""
    count: int = argument("max_new_tokens", max_new_tokens, int, "try 500")
    if not 1 <= count <= MAX_TEXT:
        raise UserError(f"max_new_tokens is {shown(count)}, but it must be between 1 and {MAX_TEXT:,}: try 500.")
    return count


def checked_samples(n: int) -> int:
    """Return a number of samples per prompt."""
    n = argument("n", n, int, "try 4")
    if not 1 <= n <= MAX_SAMPLES:
        raise UserError(f"n is {shown(n)}, but it must be at least 1 and at most {MAX_SAMPLES:,}: try 4.")
    return n


def checked_stop(stop: str | Sequence[str]) -> list[str]:
    """Return stop strings as a list of strings of 1 to `MAX_STOP` characters."""
    if isinstance(stop, bytes) or not isinstance(stop, Iterable):
        raise UserError(f"stop is {shown(stop)}, but it must be a string, or a list of strings: try '\\n\\n'.")
    found = [argument("stop", one, str, "try '\\n\\n'") for one in ([stop] if isinstance(stop, str) else stop)]
    for one in found:
        if not 1 <= len(one) <= MAX_STOP:
            raise UserError(f"stop is {shown(one)}, but it must have 1 to {MAX_STOP} characters: try '\\n\\n'.")
    if len(found) > MAX_STOPS:
        raise UserError(f"stop has {len(found)} strings, but at most {MAX_STOPS} are possible: leave some out.")
    return found


def checked_alternatives(alternatives: int) -> int:
    """Return a number of alternatives to give for every character."""
    count: int = argument("alternatives", alternatives, int, "try 5, or 0 for none")
    if not 0 <= count <= MAX_ALTERNATIVES:
        raise UserError(
            f"alternatives is {shown(count)}, but it must be between 0 (none) and {MAX_ALTERNATIVES}: try 5."
        )
    return count


def checked_seed(seed: int) -> int:
    """Return a random seed."""
    seed = argument("seed", seed, int, "try 0")
    if not 0 <= seed < MAX_SEED:
        raise UserError(f"seed is {shown(seed)}, but it must be at least 0 and below {MAX_SEED:,}: try 0.")
    return seed


def checked_stride(stride: int | None) -> int | None:
    """Return a distance between windows; None: the default."""
    return None if stride is None else argument("stride", stride, int, "try 1, which is exact but slow")


def checked_skip(skip_unknown: bool) -> bool:
    """Return whether to drop unknown characters."""
    return bool(argument("skip_unknown", skip_unknown, bool, "leave it out to reject unknown characters"))


def checked_repair(repair: bool) -> bool:
    """Return whether to repair prompts."""
    return bool(argument("repair", repair, bool, "leave it out to repair the prompts like the corpus"))


def checked_callback(name: str, callback: Callback | None) -> Callback | None:
    """Return a callback of an index and what is new, by its argument's name; or None."""
    if callback is not None and not callable(callback):
        what = "a text" if name == "on_text" else "a sample"
        raise UserError(f"{name} is {shown(callback)}, but it must be a function of an index and {what}: leave it out.")
    return callback


def checked_step(step: str | int) -> str | int:
    """Return which checkpoint to load: 'best', 'latest' or a number, which may be given in digits."""
    fix = "give 'best', 'latest' or the step of a checkpoint"
    if not isinstance(step, str):
        return int(argument("step", step, int, fix))
    if step.isdecimal() and len(step) < 19:
        return int(step)
    if step not in ("best", "latest"):
        raise UserError(f"step is {shown(step)}, but there is no such choice: {fix}.")
    return step


def text_pieces(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the pieces of a text, each checked when it is read."""
    if isinstance(pieces, bytes) or not isinstance(pieces, Iterable):
        raise UserError(f"pieces is {shown(pieces)}, but it must be a list of strings: give the text to score in it.")
    return (argument("A piece of the text", piece, str, "decode it first") for piece in pieces)


def padded(encoded: list[np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return encoded prompts in one array, with space for `count` more tokens each.

    Returns:
        The tokens, int32 [B, N], left-aligned; the lengths of the prompts, int32 [B]; and int32 [B], 1 for a prompt and
        0 for a further row, which generates nothing. Further rows make B one of few: each is a compilation of its own.

    Raises:
        UserError: if they are too many.
    """
    longest = max(map(len, encoded))
    if len(encoded) * (longest + count) > MAX_CHARACTERS:
        raise UserError(
            f"{len(encoded):,} prompts of up to {longest + count:,} characters with their continuations are more than "
            f"{MAX_CHARACTERS:,} in total: ask for fewer or shorter ones."
        )
    rows = bucket(len(encoded), least=1)
    tokens = np.zeros((rows, bucket(longest + count)), np.int32)
    lengths, wanted = np.ones(rows, np.int32), np.zeros(rows, np.int32)
    for i, ids in enumerate(encoded):
        tokens[i, : len(ids)], lengths[i], wanted[i] = ids, len(ids), 1
    return tokens, lengths, wanted
