"""The modes generate and score: texts and their metrics, printed, saved and plotted."""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from chargpt_jax.cli import text_display
from chargpt_jax.cli.command_line import Request, api_module
from chargpt_jax.cli.terminal import as_json, one_line, shown, warn
from chargpt_jax.cli.text_display import TextDisplay
from chargpt_jax.errors import UserError
from chargpt_jax.events import bits_per_character

if TYPE_CHECKING:
    from chargpt_jax.generation.passages import Passages
    from chargpt_jax.generation.sample import Samples

MAX_SHORT = 4_000
"""Characters of a scored text up to which all of it is printed and plotted."""

T = TypeVar("T")


def generate(request: Request) -> int:
    """Continue prompts."""
    flags, folder = request.flags, request.folder
    sample = folder.load_config().sample
    prompts = tuple(_given(flags.prompt, sample.prompts))
    streaming = flags.stream and not flags.json
    if flags.subline:
        text_display.check(sys.stdout, flags.json)
    if streaming and len(prompts) > 1:
        raise UserError(f"--stream prints one sequence, but there are {len(prompts)} prompts: give one --prompt.")
    model = api_module().load(request.folder, request.step, warn)
    display = text_display.TextDisplay(sys.stdout, model.config.model.vocab_size, flags.subline)
    if streaming and display.plain:
        _stream(0, prompts[0])
    samples = model.generate(
        prompts,
        _given(flags.max_new_tokens, sample.max_new_tokens),
        temperature=_given(flags.temperature, sample.temperature),
        top_k=_given(flags.top_k, sample.top_k),
        top_p=_given(flags.top_p, sample.top_p),
        seed=_given(flags.seed, model.config.seed),
        skip_unknown=flags.skip_unknown,
        alternatives=flags.alternatives,
        on_text=_stream if streaming and display.plain else None,
        on_sample=(lambda _, part: display.add(part)) if streaming and not display.plain else None,
    )
    if streaming and not display.plain:
        display.end()
    if flags.skip_unknown:
        _tell_dropped(dict.fromkeys(character for prompt in prompts for character in model.unknown(prompt)))
    _save_and_print(request, samples, "generated", display, quiet=streaming)
    return 0


def _given(flag: T | None, default: T) -> T:
    return default if flag is None else flag


def _stream(_: int, text: str) -> None:
    print(shown(text, sys.stdout), end="", flush=True)


def score(request: Request) -> int:
    """Compute the metrics of a given text; of a long text, print its loss and save its most surprising passages."""
    flags = request.flags
    if (flags.text is None) == (flags.text_file is None):
        raise UserError("--mode=score needs a text: give either --text or --text_file.")
    if flags.subline:
        text_display.check(sys.stdout, flags.json)
    pieces = _text_to_score(request)
    first = next(pieces, "")
    api = api_module()
    model = api.load(request.folder, request.step, warn)
    display = text_display.TextDisplay(sys.stdout, model.config.model.vocab_size, flags.subline)
    how = {"stride": flags.stride, "skip_unknown": flags.skip_unknown, "alternatives": flags.alternatives}
    dropped: dict[str, None] = {}

    def noted(piece: str) -> str:
        if flags.skip_unknown:
            dropped.update(dict.fromkeys(model.unknown(piece)))
        return piece

    if len(first) > MAX_SHORT:
        from chargpt_jax.cli import progress

        with progress.counting("characters scored") as on_progress:
            found = model.score_long(map(noted, itertools.chain([first], pieces)), on_progress=on_progress, **how)
        _tell_dropped(dropped)
        _print_passages(request, found, display)
        return 0
    sample = model.score(noted(first), **how)
    _tell_dropped(dropped)
    if not flags.json:
        print(_score_line(sample.loss, len(sample.tokens)) + "\n")
    _save_and_print(request, api.Samples([sample]), "scored", display)
    return 0


def _tell_dropped(characters: dict[str, None]) -> None:
    """Name the characters that --skip_unknown has dropped, if there are any."""
    if characters:
        from chargpt_jax.data.tokenizer import named

        warn(f"Dropped the characters that are not in the vocabulary: {named(list(characters))}.")


def _text_to_score(request: Request) -> Iterator[str]:
    """Yield the text of --text or --text_file; a large file in pieces."""
    from chargpt_jax.data import corpus

    if request.flags.text_file is not None:
        corpus.check_exists(request.flags.text_file)
    config = request.folder.load_config().data
    if request.flags.text_file is not None:
        yield from corpus.text_pieces(request.flags.text_file, config, warn)
    else:
        yield request.flags.text


def _score_line(loss: float, characters: int) -> str:
    return f"loss {loss:.4f} nats = {bits_per_character(loss):.4f} bits per character, {characters:,} characters"


def _print_passages(request: Request, found: "Passages", display: TextDisplay) -> None:
    """Print the loss of a long text, and save and name its first and its most surprising passages.

    With --subline they are printed as well.
    """
    out = sys.stderr if request.flags.json else sys.stdout
    print(as_json(found.to_dict()) if request.flags.json else _score_line(found.loss, found.characters))
    paths = _saved(request, found.samples, "scored", found.to_dict())
    if not paths:
        return
    print(f"\nThe text is long, so only passages of {len(found.samples[0].tokens):,} characters are plotted:", file=out)
    for i, (start, sample, path) in enumerate(zip(found.starts, found.samples, paths, strict=True)):
        which = "surprising" if i else "first"
        print(f"{which}, from character {start:,} ({sample.loss:.2f} nats per character): {one_line(path)}", file=out)
        if request.flags.subline:
            display.show(sample)
    if request.flags.subline:
        display.print_legend()


def _saved(request: Request, samples: "Samples", name: str, content: dict[str, Any] | None = None) -> list[Path]:
    """Save samples with their plots in the workdir; warn and return [] if that fails: the text has been printed."""
    from chargpt_jax.results import save_samples

    try:
        return save_samples(request.folder, samples, name, content)
    except OSError as error:
        warn(f"Cannot save the samples in {request.folder.samples}: {error.strerror or error}.")
        return []


def _save_and_print(request: Request, samples: "Samples", name: str, display: TextDisplay, quiet: bool = False) -> None:
    """Print samples, unless they were streamed, and save them with their plots in the workdir."""
    out = sys.stderr if request.flags.json else sys.stdout
    if request.flags.json:
        print(as_json(samples.to_dict()))
    else:
        for sample in () if quiet else samples:
            display.show(sample)
        display.print_legend()
    for sample, path in zip(samples, _saved(request, samples, name), strict=False):
        above = name == "scored" and not request.flags.json  # the loss is printed above the text
        loss = "" if above else f"loss {sample.loss:.4f} nats per character; "
        print(f"\n{loss}plot: {one_line(path)}", file=out)
