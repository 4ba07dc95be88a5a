"""The modes generate and score: texts and their metrics, printed, saved and plotted."""

import contextlib
import itertools
import re
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from chargpt_jax.cli.command_line import Request, api_module
from chargpt_jax.cli.terminal import as_json, one_line, warn
from chargpt_jax.errors import UserError
from chargpt_jax.events import bits_per_character

if TYPE_CHECKING:
    from chargpt_jax.cli.text_display import TextDisplay
    from chargpt_jax.generation.passages import Passages
    from chargpt_jax.generation.sample import Sample, Samples
    from chargpt_jax.generation.trained_model import Model

MAX_SHORT = 4_000
"""Characters of a scored text up to which all of it is printed and plotted."""

BRANCH = {"at": "the position of --branch", "alternative": "the character of --branch"}
"""The parts of --branch by the names of the arguments of `Model.branch`."""

ESCAPES = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}
"""What a shell cannot easily write in --stop."""

T = TypeVar("T")


def generate(request: Request) -> int:
    """Continue prompts, or with --branch a generated sample from another character."""
    flags, how = request.flags, request.folder.load_config().sample
    streaming = flags.stream and not flags.json
    _check_subline(request)
    if flags.branch is not None:
        return _branch(request, streaming)
    if flags.sample is not None:
        raise UserError("--sample chooses the sample that --branch continues: give --branch too, or leave it out.")
    prompts = tuple(_given(flags.prompt, how.prompts))
    if streaming and len(prompts) > 1:
        raise UserError(f"--stream prints one sequence, but there are {len(prompts)} prompts: give one --prompt.")
    if streaming and flags.samples > 1:
        raise UserError(f"--stream prints one sequence, but --samples is {flags.samples}: leave one of them out.")
    model = api_module().load(request.folder, request.step, warn)
    display = _display(request, model.config.model.vocab_size)
    streams = {"on_sample": lambda _, part: display.add(part)} if streaming else {}
    count = _given(flags.max_new_tokens, how.max_new_tokens)
    options = {
        "skip_unknown": flags.skip_unknown,
        "n": flags.samples,
        **_sampling(request, model),
        **streams,
    }
    with _naming_flags(request):
        samples = model.generate(prompts, count, **options)
    if flags.skip_unknown:
        _tell_dropped(dict.fromkeys(character for prompt in prompts for character in model.unknown(prompt)))
    _save_and_print(request, samples, "generated", display, streamed=streaming)
    return 0


@contextlib.contextmanager
def _naming_flags(request: Request) -> Iterator[None]:
    """Name the flag that was given, where an error of the block begins with the name of a Python argument."""
    try:
        yield
    except UserError as error:
        name, verb, rest = str(error).partition(" is ")
        name = "samples" if name == "n" else name
        given = name in request.flags and request.flags[name].present
        flag = f"--{name}" if given else BRANCH.get(name)
        if not verb or flag is None:
            raise
        raise UserError(f"{flag[:1].upper()}{flag[1:]} is {rest}") from None


def _check_subline(request: Request) -> None:
    """Check that standard output can show the rows of --subline, if it is given."""
    if request.flags.subline:
        from chargpt_jax.cli import text_display

        text_display.check(sys.stdout, request.flags.json)


def _display(request: Request, vocab_size: int) -> "TextDisplay":
    # Imported here: NumPy, which it needs, would double the time until a mistyped command is answered.
    from chargpt_jax.cli.text_display import TextDisplay

    return TextDisplay(sys.stdout, vocab_size, request.flags.subline)


def _sampling(request: Request, model: "Model") -> dict[str, Any]:
    """Return the options of `generate` and `branch` that flags and config set."""
    from chargpt_jax.results.samples import known_stops

    flags, how = request.flags, request.folder.load_config().sample
    options = {"seed": _given(flags.seed, model.config.seed), "alternatives": flags.alternatives}
    stops = [re.sub(r"\\[nt\\]", lambda found: ESCAPES[found[0]], one) for one in flags.stop or ()]
    options["stop"] = stops or known_stops(how.stop, model.tokenizer, model.repairs, warn)
    names = ("temperature", "top_k", "top_p")
    given = [name for name in names if flags[name].present]
    if flags.sampler is None and how.sampler and not given:
        from chargpt_jax.generation.sampler import Sampler

        return options | {"sampler": Sampler.of(how).samplers}
    if flags.sampler is None:
        return options | {name: _given(flags[name].value, getattr(how, name)) for name in names}
    if given:
        raise UserError(
            f"--sampler and --{given[0]} are both given, but a chain of samplers has its own settings: write "
            f"{given[0]} into the chain, or leave one of them out."
        )
    return options | {"sampler": flags.sampler}


def _branch(request: Request, streaming: bool) -> int:
    """Continue a sample of `_chosen` from another character, and save it as samples/branch.json."""
    flags, (at, alternative) = request.flags, _position_and_character(request.flags.branch)
    name, index = _chosen(_given(flags.sample, "0"))
    others = {"prompt": flags.prompt is not None, "skip_unknown": flags.skip_unknown, "samples": flags.samples != 1}
    if any(others.values()):
        given = "--" + next(name for name, wrong in others.items() if wrong)
        raise UserError(
            f"{given} does not apply to --branch, which continues a generated sample: leave one of them out."
        )
    api = api_module()
    from chargpt_jax.data.given_text import like_corpus

    sample = _saved_sample(request, name, index)
    model = api.load(request.folder, request.step, warn)
    alternative = like_corpus(alternative, model.tokenizer, model.repairs)
    display = _display(request, model.config.model.vocab_size)
    streams = {"on_sample": lambda _, part: display.add(part)} if streaming else {}
    how = {"max_new_tokens": flags.max_new_tokens, **_sampling(request, model), **streams}
    with _naming_flags(request):
        branch = model.branch(sample, at, alternative, **how)
    _save_and_print(request, api.Samples([branch]), "branch", display, streamed=streaming)
    return 0


def _position_and_character(branch: str) -> tuple[int, str]:
    """Return the two parts of --branch=POSITION:CHARACTER; a character and its marks become one if Unicode has it."""
    position, colon, character = branch.partition(":")
    character = unicodedata.normalize("NFC", character) if len(character) > 1 else character
    if not (position.isascii() and position.isdecimal() and len(position) < 10 and colon and len(character) == 1):
        raise UserError(
            f"--branch is {branch[:80]!r}, but it must be POSITION:CHARACTER, where the first position is 0: "
            "give 57:e, for example."
        )
    return int(position), character


def _chosen(sample: str) -> tuple[str, int]:
    """Return the name of the file and the index of the sample that a value of --sample chooses."""
    if sample == "branch":
        return "branch", 0
    if not re.fullmatch("-?[0-9]{1,9}", sample):
        raise UserError(f"--sample is {sample[:80]!r}, but it must be an index or 'branch': leave it out for 0.")
    return "generated", int(sample)


def _saved_sample(request: Request, name: str, index: int) -> "Sample":
    """Return a sample of a file in samples/ that --mode=generate writes."""
    from chargpt_jax.results.samples import load_samples

    path = request.folder.samples / f"{name}.json"
    command = "--mode=generate" if name == "generated" else "--branch without --sample"
    if not path.exists():
        raise UserError(f"{path} does not exist, so there is no sample to branch: run {command} first.")
    try:
        samples = load_samples(request.folder, path)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} cannot be used ({error}): run {command} again.") from None
    if not samples:
        raise UserError(f"{path} has no sample to branch: run {command} again.")
    if not 0 <= index < len(samples):
        if len(samples) == 1:
            raise UserError(f"--sample is {index}, but {path} has 1 sample: leave --sample out.")
        raise UserError(
            f"--sample is {index}, but the samples in {path} are 0 to {len(samples) - 1}: leave it out, for example."
        )
    return samples[index]


def _given(flag: T | None, default: T) -> T:
    return default if flag is None else flag


def score(request: Request) -> int:
    """Compute the metrics of a given text; of a long text, print its loss and save its most surprising passages."""
    flags = request.flags
    if flags.text is not None and flags.text_file is not None:
        raise UserError("--text and --text_file are both given: leave one of them out.")
    if flags.text is None and flags.text_file is None:
        raise UserError("--mode=score needs a text: give either --text or --text_file.")
    _check_subline(request)
    pieces = _text_to_score(request)
    first = next(pieces, "")
    api = api_module()
    model = api.load(request.folder, request.step, warn)
    display = _display(request, model.config.model.vocab_size)
    how = {"stride": flags.stride, "skip_unknown": flags.skip_unknown, "alternatives": flags.alternatives}
    dropped: dict[str, None] = {}

    def noted(piece: str) -> str:
        if flags.skip_unknown:
            dropped.update(dict.fromkeys(model.unknown(piece)))
        return piece

    if len(first) > MAX_SHORT:
        from chargpt_jax.cli import progress

        with progress.counting("characters scored") as on_progress, _naming_flags(request):
            found = model.score_long(map(noted, itertools.chain([first], pieces)), on_progress=on_progress, **how)
        _tell_dropped(dropped)
        _print_passages(request, found, display)
        return 0
    with _naming_flags(request):
        sample = model.score(noted(first), **how)
    _tell_dropped(dropped)
    if not flags.json:
        print(_score_line(sample.loss, len(sample.tokens), sample.unit) + "\n")
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


def _score_line(loss: float, count: int, unit: str) -> str:
    return f"loss {loss:.4f} nats = {bits_per_character(loss):.4f} bits per {unit}, {count:,} {unit}s"


def _print_passages(request: Request, found: "Passages", display: "TextDisplay") -> None:
    """Print the loss of a long text, and save and name its first and its most surprising passages.

    With --subline they are printed as well.
    """
    out = sys.stderr if request.flags.json else sys.stdout
    unit = found.samples[0].unit
    print(as_json(found.to_dict()) if request.flags.json else _score_line(found.loss, found.characters, unit))
    paths = _saved(request, found.samples, "scored", found.to_dict())
    if not paths:
        return
    print(f"\nThe text is long, so only passages of {len(found.samples[0].tokens):,} {unit}s are plotted:", file=out)
    for i, (start, sample, path) in enumerate(zip(found.starts, found.samples, paths, strict=True)):
        which = "surprising" if i else "first"
        print(f"{which}, from {unit} {start:,} ({sample.loss:.2f} nats per {unit}): {one_line(path)}", file=out)
        if request.flags.subline:
            display.show(sample)
    if request.flags.subline:
        display.print_legend()


def _saved(request: Request, samples: "Samples", name: str, content: dict[str, Any] | None = None) -> list[Path]:
    """Save samples with their plots in the workdir; warn and return [] if that fails."""
    from chargpt_jax.results.samples import save_samples

    try:
        return save_samples(request.folder, samples, name, content)
    except OSError as error:
        warn(f"Cannot save the samples in {request.folder.samples}: {error.strerror or error}.")
        return []


def _save_and_print(
    request: Request, samples: "Samples", name: str, display: "TextDisplay", streamed: bool = False
) -> None:
    """Save samples with their plots in the workdir, and print each, unless it was streamed, with its loss."""
    if streamed:
        display.end()
    elif request.flags.json:
        print(as_json(samples.to_dict()))
    paths = _saved(request, samples, name)
    for i, sample in enumerate(samples):
        if not request.flags.json:
            if i:
                print()
            if not streamed:
                display.show(sample)
            if i == len(samples) - 1:
                display.print_legend()
        if paths:
            above = name == "scored" and not request.flags.json  # the loss is printed above the text
            loss = "" if above else f"loss {sample.loss:.4f} nats per {sample.unit}; "
            print(f"\n{loss}plot: {one_line(paths[i])}", file=sys.stderr if request.flags.json else sys.stdout)
