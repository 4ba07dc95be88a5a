"""The modes of the command line: one function per mode, from a parsed command line to an exit code.

JAX is imported inside the functions, so that a mistyped command is answered at once.
"""

import contextlib
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TextIO, TypeVar, cast

from absl.flags import FlagValues

from chargpt_jax.cli.flags import NEEDS_CONFIG, parse
from chargpt_jax.cli.signals import ResilientStream, Signals
from chargpt_jax.cli.terminal import as_json, one_line, printable, warn
from chargpt_jax.config import Config, validate
from chargpt_jax.devices import startup
from chargpt_jax.errors import UserError

if TYPE_CHECKING:
    from chargpt_jax.events import Event
    from chargpt_jax.generation.sample import Samples
    from chargpt_jax.storage.workdir import Workdir

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Request:
    """A parsed command line."""

    flags: FlagValues
    config: Config | None
    """The named config with its overrides."""
    workdir: str
    signals: Signals
    began: float
    """When the command line was read, by time.monotonic()."""

    @property
    def mode(self) -> str:
        """The value of --mode."""
        return str(self.flags.mode)

    @functools.cached_property
    def folder(self) -> "Workdir":
        """The workdir; each of its files that are read to resolve the run is read once."""
        from chargpt_jax.storage.workdir import Workdir

        return Workdir(self.workdir)

    @property
    def step(self) -> str | int:
        """The checkpoint that --step selects: 'best', 'latest' or a number.

        Raises:
            UserError: for any other value.
        """
        step = self.flags.step or "best"
        number = step.isdecimal() and len(step) < 19
        if step not in ("best", "latest") and not number:
            raise UserError(f"--step is {step[:80]!r}, but it must be 'best', 'latest' or a number.")
        return int(step) if number else str(step)

    @property
    def minutes_left(self) -> float | None:
        """The minutes that --max_minutes leaves; None without a limit."""
        minutes = self.flags.max_minutes
        return minutes and minutes - (time.monotonic() - self.began) / 60


def read(argv: Sequence[str], signals: Signals) -> Request:
    """Parse a command line, the program's name first, and check what its mode needs.

    Raises:
        UserError: if a flag, a config field or a value is invalid, or a flag that the mode needs is missing.
    """
    began = time.monotonic()
    flags, config, name = parse(argv)
    mode, minutes = flags.mode, flags.max_minutes
    if not flags.help:
        if mode in NEEDS_CONFIG:
            if config is None:
                raise UserError(f"--mode={mode} needs a config: give --config=small, or the path of a config file.")
            validate(config)
        elif not flags.workdir and name is None and mode != "selftest":
            raise UserError(f"--mode={mode} needs the folder of a run: give --workdir.")
        if minutes is not None and not 0 < minutes < math.inf:
            raise UserError(f"--max_minutes is {minutes}, but it must be a number above 0: give 50, for example.")
    workdir = flags.workdir or ("." if mode == "selftest" else f"runs/{name}")
    return Request(flags, config, workdir, signals, began)


def run(request: Request) -> int:
    """Do all stages: prepare the text, find a learning rate, train, generate samples, write the report."""
    with Session(request) as session:
        events = session.api.run(request.config, request.folder, warn, request.signals.received, request.minutes_left)
        for event in session.profiled(events):
            if session.show(event):
                break
    return session.finish(samples=True)


def train(request: Request) -> int:
    """Train, or resume training."""
    with Session(request) as session:
        events = session.api.train(request.config, request.folder, warn, request.signals.received, request.minutes_left)
        for event in session.profiled(events):
            if session.show(event):
                break
    return session.finish()


def prepare(request: Request) -> int:
    """Load, clean and encode the text."""
    with Session(request) as session:
        for event in session.api.prepare(request.config, request.folder, warn):
            session.show(event)
    return session.finish()


def find_lr(request: Request) -> int:
    """Run the learning-rate range test."""
    from chargpt_jax.events import LRFinderResult

    with Session(request) as session:
        for event in session.api.find_lr(request.config, request.folder, warn):
            session.show(event)
    if request.flags.json and isinstance(session.last, LRFinderResult):
        print(as_json(dataclasses.asdict(session.last)))
    return session.finish()


class Session:
    """What all modes that train share: the display of events, signals, and the messages at the end.

    The modes themselves iterate over the events, so that few frames lie between `main` and a training step.
    """

    def __init__(self, request: Request):
        """Check that the workdir can be written, and import JAX."""
        request.folder.check_writable()
        request.signals.advice = ": run the same command again to continue from the saved state"
        self.request, self.last = request, cast("Event | None", None)
        # A ResilientStream has all that its stream has.
        self.out = cast(TextIO, ResilientStream(sys.stderr if request.flags.json else sys.stdout))
        self.api, self._open = _api(), contextlib.ExitStack()

    def __enter__(self) -> "Session":
        """Begin to display events."""
        from chargpt_jax.cli import progress

        self._display = self._open.enter_context(progress.display(self.out))
        return self

    def __exit__(self, *_: object) -> None:
        """Stop displaying events."""
        self._open.close()

    def show(self, event: "Event") -> bool:
        """Display an event; return whether the command must stop here, because a signal has ended the training."""
        from chargpt_jax.events import Compiled, Ended

        signals, ended = self.request.signals, isinstance(event, Ended)
        self.last = event
        # From the first training step to the end of training a signal has to wait until a checkpoint is saved.
        signals.deferred = (signals.deferred or isinstance(event, Compiled)) and not ended
        self._display(event)
        return ended and signals.received() is not None

    def profiled(self, events: "Iterator[Event]") -> "Iterator[Event]":
        """Return the events, with a profiler trace of a few dispatches if --profile is set."""
        if not self.request.flags.profile:
            return events
        from chargpt_jax.cli import profiler

        return profiler.profiled(events, self.request.folder.path / "profile")

    def finish(self, samples: bool = False) -> int:
        """Print what the run has written, and return the exit code."""
        from chargpt_jax.events import Ended

        signals, folder = self.request.signals, self.request.folder
        if signals.received() is not None:
            return signals.code
        if samples and isinstance(self.last, Ended) and self.last.complete:
            _print_samples(folder, self.out)
        if self.request.flags.profile:
            traces = sorted(folder.path.glob("profile/plugins/profile/*/perfetto_trace.json.gz"))
            written = f"trace: {traces[-1]}, for https://ui.perfetto.dev" if traces else ""
            print(one_line(written or "no trace written: too few dispatches remained"), file=self.out)
        return 0


def _print_samples(folder: "Workdir", out: TextIO) -> None:
    # The newest by the step in the name: clocks may go backwards.
    found = {int(path.stem[5:]): path for path in folder.samples.glob("step-*.json") if path.stem[5:].isdecimal()}
    if not found:  # they could not be written, and a warning said so
        return
    for sample in folder.load_json(found[max(found)])["samples"]:
        print(f"\n{printable(sample['text'])}", file=out)
    print(f"\nreport: {one_line(folder.report)}", file=out)


def evaluate(request: Request) -> int:
    """Compute the loss on the full validation set."""
    result = _api().evaluate(request.folder, request.step, warn)
    text = "{loss:.4f} nats = {bits_per_character:.4f} bits per character, validation set of {tokens:,} characters"
    print(as_json(result) if request.flags.json else text.format(**result) + f" (step {result['step']:,})")
    return 0


def generate(request: Request) -> int:
    """Continue prompts."""
    flags, folder = request.flags, request.folder
    sample = folder.load_config().sample
    prompts = tuple(_given(flags.prompt, sample.prompts))
    streaming = flags.stream and not flags.json
    if streaming and len(prompts) > 1:
        raise UserError(f"--stream prints one sequence, but there are {len(prompts)} prompts: give one --prompt.")
    model = _api().load(request.folder, request.step, warn)
    if streaming:
        _stream(0, prompts[0])
    samples = model.generate(
        prompts,
        _given(flags.max_new_tokens, sample.max_new_tokens),
        temperature=_given(flags.temperature, sample.temperature),
        top_k=_given(flags.top_k, sample.top_k),
        top_p=_given(flags.top_p, sample.top_p),
        seed=_given(flags.seed, model.config.seed),
        skip_unknown=flags.skip_unknown,
        on_text=_stream if streaming else None,
    )
    _save_and_print(request, samples, "generated", quiet=streaming)
    return 0


def _given(flag: T | None, default: T) -> T:
    return default if flag is None else flag


def _stream(_: int, text: str) -> None:
    print(printable(text), end="", flush=True)


def score(request: Request) -> int:
    """Compute the metrics of a given text."""
    from chargpt_jax.data import corpus

    flags = request.flags
    if (flags.text is None) == (flags.text_file is None):
        raise UserError("--mode=score needs a text: give either --text or --text_file.")
    config = request.folder.load_config().data
    text = flags.text if flags.text is not None else corpus.read_text(Path(flags.text_file), config, warn)
    api = _api()
    model = api.load(request.folder, request.step, warn)
    sample = model.score(text, stride=flags.stride, skip_unknown=flags.skip_unknown)
    _save_and_print(request, api.Samples([sample]), "scored")
    return 0


def _save_and_print(request: Request, samples: "Samples", name: str, quiet: bool = False) -> None:
    """Print samples, unless they were streamed, and save them with their plots in the workdir."""
    folder, out = request.folder, sys.stderr if request.flags.json else sys.stdout
    if request.flags.json:
        print(as_json(samples.to_dict()))
    elif not quiet:
        for sample in samples:
            print(printable(sample.text))
    try:
        paths = _api().save_samples(folder, samples, name)
    except OSError as error:  # the text has been printed
        warn(f"Cannot save the samples in {folder.samples}: {error.strerror or error}.")
        return
    for sample, path in zip(samples, paths, strict=True):
        print(f"\nloss {sample.loss:.4f} nats per character; plot: {one_line(path)}", file=out)


def export(request: Request) -> int:
    """Write the model for Hugging Face transformers, or for the original."""
    out = request.flags.out
    if not out:
        raise UserError("--mode=export needs an output folder: give --out, a new or empty folder.")
    print(one_line(_api().export(request.workdir, out, request.flags.format, request.step, warn)))
    return 0


def import_original(request: Request) -> int:
    """Create a run from a checkpoint of the original."""
    file = request.flags["from"].value
    if not file:
        raise UserError("--mode=import needs a checkpoint of the original: give --from, a file.")
    print(one_line(_api().import_original(file, request.workdir, request.flags.text_file, warn)))
    return 0


def info(request: Request) -> int:
    """Print a run's settings, progress and speed."""
    facts = _api().info(request.folder)
    lines = [one_line(f"{name}: {'not known' if value is None else value}") for name, value in facts.items()]
    print(as_json(facts) if request.flags.json else "\n".join(lines))
    return 0


def compile_for_tpu(request: Request) -> int:
    """Compile a config's programs for a TPU."""
    from chargpt_jax.cli import tpu_compile

    assert request.config is not None  # `read` has checked it
    for line in tpu_compile.for_tpu(request.config, request.flags.topology or "v5e:2x4"):
        print(line, flush=True)
    return 0


def selftest(request: Request) -> int:
    """Stop trainings, damage checkpoints, and check that no data is lost; return 1 if a guarantee was broken."""
    flags = request.flags
    counts = {name: int(getattr(flags, name)) for name in ("kills", "signals", "corruptions")}
    for name, count in counts.items():
        if not 0 <= count <= 100_000:
            raise UserError(f"--{name} is {count}, but it must be between 0 and 100,000: leave it out, for example.")
    from chargpt_jax.cli import selftest

    out = sys.stderr if flags.json else sys.stdout

    def report(text: str) -> None:
        print(text, file=out, flush=True)

    result = selftest.check(request.workdir, request.config, **counts, seed=flags.seed or 0, tell=report)
    print(json.dumps(result.to_dict()) if flags.json else f"\n{result.table()}")
    return 1 if result.broken else 0


def _api() -> ModuleType:
    """Import the API, and with it JAX; compiled programs are cached on disk."""
    with startup.gc_paused():
        from chargpt_jax import api
        from chargpt_jax.data import download
    startup.use_compilation_cache(download.default_cache() / "xla")
    return api


MODES: dict[str, Callable[[Request], int]] = {
    "run": run,
    "prepare": prepare,
    "find_lr": find_lr,
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "score": score,
    "export": export,
    "import": import_original,
    "info": info,
    "compile": compile_for_tpu,
    "selftest": selftest,
}
"""The function of each mode."""
