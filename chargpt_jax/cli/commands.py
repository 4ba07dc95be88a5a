"""The modes of the command line: one function per mode, from a parsed command line to an exit code.

JAX is imported inside the functions, so that a mistyped command is answered at once.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, cast

from chargpt_jax.cli.command_line import Request, api_module
from chargpt_jax.cli.signals import ResilientStream, code_of
from chargpt_jax.cli.terminal import as_json, one_line, shown, warn
from chargpt_jax.cli.text_modes import generate, score
from chargpt_jax.devices import ending, processes
from chargpt_jax.errors import UserError
from chargpt_jax.results.facts import facts_in_words

if TYPE_CHECKING:
    from chargpt_jax.events import Event, Sampled

T = TypeVar("T")

RESUMED = ("run", "train", "sweep")
"""The modes that continue from a checkpoint."""


def silent(text: str) -> None:
    """Ignore a message that process 0 prints."""


def run(request: Request) -> int:
    """Do all stages: prepare the text, find a learning rate, train, generate samples, write the report."""
    with Session(request) as session:
        events = session.api.run(*_training(request, session.warn))
        for event in session.profiled(events):
            if session.show(event):
                break
    return session.finish(samples=True)


def train(request: Request) -> int:
    """Train, or resume training."""
    with Session(request) as session:
        events = session.api.train(*_training(request, session.warn))
        for event in session.profiled(events):
            if session.show(event):
                break
    return session.finish()


def _training(request: Request, warn: Callable[[str], None]) -> tuple[Any, ...]:
    """Return the arguments of `api.run` and `api.train`."""
    stop, began = request.signals.received, request.began
    return request.config, request.folder, warn, stop, request.minutes_left, request.parent, began


def sweep(request: Request) -> int:
    """Train several learning rates and seeds at once."""
    from chargpt_jax.lab.folder import SweepFolder, check_rates
    from chargpt_jax.lab.grid import check

    assert request.config is not None  # `read` has checked it
    check(request.config)  # before JAX is imported
    check_rates(request.config, SweepFolder(request.folder.path))
    with Session(request) as session:
        for event in session.api.sweep(
            request.config, request.folder, session.warn, request.signals.received, request.minutes_left
        ):
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
        for event in session.api.find_lr(request.config, request.folder, session.warn):
            session.show(event)
    if request.flags.json and session.first and isinstance(session.last, LRFinderResult):
        print(as_json(dataclasses.asdict(session.last)))
    return session.finish()


class Session:
    """What all modes that train share: the display of events, signals, and the messages at the end.

    The modes themselves iterate over the events, so that few frames lie between `main` and a training step.
    """

    def __init__(self, request: Request):
        """Check that the workdir can be written, and import JAX."""
        request.folder.check_writable()
        self.request, self.last = request, cast("Event | None", None)
        self.samples: Sampled | None = None
        self._track: Callable[[Event], None] = lambda event: None
        self._advise(_has_checkpoints(request))
        self.api, self._open = api_module(request), contextlib.ExitStack()
        self.first = request.flags.distributed is None or processes.is_first()
        self.warn = warn if self.first else silent
        # A ResilientStream has all that its stream has. (--distributed has replaced the standard streams.)
        self.out = cast(TextIO, ResilientStream(sys.stderr if request.flags.json else sys.stdout))

    def __enter__(self) -> "Session":
        """Begin to display events; of several processes, process 0 does that alone."""
        from chargpt_jax.cli import progress

        self._open.enter_context(ending.loss_named())
        if not self.first:
            self._display = lambda event: None
            return self
        self._display = self._open.enter_context(progress.display(self.out))
        if self.request.flags.track:
            from chargpt_jax import trackers

            assert self.request.config is not None  # `read` has checked it
            names = [name.strip() for name in self.request.flags.track.split(",")]
            self._track = self._open.enter_context(
                trackers.opened(names, self.request.folder, self.request.config, warn)
            )
        return self

    def __exit__(self, *exception: Any) -> None:
        """Stop displaying events."""
        self._open.__exit__(*exception)

    def _advise(self, saved: bool) -> None:
        """Set what a stopped command says, by whether there is a checkpoint to continue from."""
        told = " to continue from the newest checkpoint" if saved else "; no checkpoint was saved yet"
        self.request.signals.advice = f": run the same command again{told if self.request.mode in RESUMED else ''}"

    def show(self, event: "Event") -> bool:
        """Display an event; return whether the command must stop here, because a signal has ended the training."""
        from chargpt_jax.events import Compiled, Ended, Sampled, Saved

        if isinstance(event, Saved):
            self._advise(True)

        signals, ended = self.request.signals, isinstance(event, Ended)
        if isinstance(event, Sampled):
            self.samples = event
        else:
            self.last = event
        if isinstance(event, Sampled) and isinstance(self.last, Ended):
            return False  # printed in full by `finish`
        # From the first training step to the end of training a signal has to wait until a checkpoint is saved.
        signals.deferred = (signals.deferred or isinstance(event, Compiled)) and not ended
        self._display(event)
        self._track(event)
        return ended and signals.received() is not None

    def profiled(self, events: "Iterator[Event]") -> "Iterator[Event]":
        """Return the events, with a profiler trace of a few dispatches if --profile is set."""
        if not self.request.flags.profile or not self.first:
            return events
        from chargpt_jax.cli import profiler

        return profiler.profiled(events, self.request.folder.path / "profile")

    def finish(self, samples: bool = False) -> int:
        """Print what the run has written, and return the exit code."""
        from chargpt_jax.events import Ended

        signals, folder = self.request.signals, self.request.folder
        if self.request.flags.distributed is not None:
            with ending.loss_named():
                processes.finish()
        if signals.received() is not None:
            return signals.code
        if isinstance(self.last, Ended) and self.last.signal:  # it arrived at another process
            return code_of(self.last.signal)
        if not self.first:
            return 0
        if samples and isinstance(self.last, Ended) and self.last.complete:
            for text in self.samples.samples if self.samples else ():
                print(f"\n{shown(text, self.out)}", file=self.out)
            if folder.report.is_file():
                print(f"\nreport: {one_line(folder.report)}", file=self.out)
        if self.request.flags.profile:
            traces = sorted(folder.path.glob("profile/plugins/profile/*/perfetto_trace.json.gz"))
            written = f"trace: {traces[-1]}, for https://ui.perfetto.dev" if traces else ""
            print(one_line(written or "no trace written: too few dispatches remained"), file=self.out)
        return 0


def _has_checkpoints(request: Request) -> bool:
    """Return whether there is a checkpoint that the mode would continue from."""
    if request.mode != "sweep":
        return request.folder.has_checkpoints()
    from chargpt_jax.lab.folder import SweepFolder

    return SweepFolder(request.folder.path).has_checkpoints()


def evaluate(request: Request) -> int:
    """Compute the loss on the full validation set, or on the test set."""
    api = api_module(request)
    with ending.loss_named():
        first = processes.is_first()
        result = api.evaluate(request.folder, request.step, warn if first else silent, request.flags.split)
        processes.finish()
    if not first:
        return 0
    unit = "byte" if "bits_per_byte" in result else "character"
    text = f"{{loss:.4f}} nats = {{bits_per_character:.4f}} bits per {unit}, {{split}} set of {{tokens:,}} {unit}s"
    print(as_json(result) if request.flags.json else text.format(**result) + f" (step {result['step']:,})")
    return 0


def export(request: Request) -> int:
    """Write the model for Hugging Face transformers, for the original, or as a page."""
    out = request.flags.out
    if not out and request.flags.format == "html":
        raise UserError("--mode=export needs an output file: give --out, a new file whose name ends in .html.")
    if not out:
        raise UserError("--mode=export needs an output folder: give --out, a new or empty folder.")
    if request.flags.format == "run":
        return _export_run(request, out)
    for flag in ("seed", "learning_rate"):
        if request.flags[flag].present:
            raise UserError(f"--{flag} does not apply to --format={request.flags.format}: use it with --format=run.")
    print(one_line(api_module().export(request.workdir, out, request.flags.format, request.step, warn)))
    return 0


def _export_run(request: Request, out: str) -> int:
    """Write one run of a sweep as a run folder."""
    seed, rate = request.flags.seed, request.flags.learning_rate
    if seed is None:
        raise UserError("--format=run needs the run of a sweep to write: give --seed=0, for example.")
    print(one_line(api_module().extract(request.workdir, out, seed, rate, request.step, warn)))
    return 0


def import_original(request: Request) -> int:
    """Create a run from a checkpoint of the original."""
    file = request.parent
    if not file:
        raise UserError("--mode=import needs a checkpoint of the original: give --from, a file.")
    print(one_line(api_module().import_original(file, request.workdir, request.flags.text_file, warn)))
    return 0


def info(request: Request) -> int:
    """Print a run's settings, progress and speed."""
    if request.flags.json:
        print(as_json(api_module().info(request.folder, warn)))
        return 0
    api_module()
    from chargpt_jax.results.info import all_facts

    for group, rows in facts_in_words(all_facts(request.folder, warn)):
        for i, (name, value) in enumerate(rows):
            print(one_line(f"{'' if i else group:<10}{name:<15}{value}"))
    return 0


def report(request: Request) -> int:
    """Write a run's report again, and open it in the browser if a person with a display asked for it."""
    folder = request.folder
    folder.load_config()  # raises if this is not a run
    folder.check_writable()
    path = api_module().write_report(folder, warn)
    print(as_json({"report": str(path)}) if request.flags.json else one_line(f"report: {path}"))
    if request.flags.open and not request.flags.json and sys.stdout.isatty() and _has_display():
        import webbrowser  # it imports much that other modes do not need

        sys.stdout.flush()
        with contextlib.suppress(webbrowser.Error, OSError):
            webbrowser.open(path.as_uri())
    return 0


def _has_display() -> bool:
    """Return whether a browser can open a window here; elsewhere Python may start one in the terminal."""
    if sys.platform in ("win32", "darwin"):
        return not os.environ.get("SSH_CONNECTION")
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def compile_ahead(request: Request) -> int:
    """Compile a config's programs for an accelerator that need not be there."""
    from chargpt_jax.compile.mode import compile_config

    assert request.config is not None  # `read` has checked it
    flags = request.flags
    out = sys.stderr if flags.json else sys.stdout

    def tell(text: str) -> None:
        print(one_line(text), file=out, flush=True)

    def show(result: dict[str, Any]) -> None:
        if flags.json:
            print(as_json(result), flush=True)

    compile_config(request.config, flags.topology or "v5e:2x4", flags.largest_batch, tell, show)
    return 0


def selftest(request: Request) -> int:
    """Stop trainings, damage checkpoints, and check that no data is lost; return 1 if a guarantee was broken."""
    flags = request.flags
    counts = {name: int(getattr(flags, name)) for name in ("kills", "signals", "corruptions")}
    for name, count in counts.items():
        if not 0 <= count <= 100_000:
            raise UserError(f"--{name} is {count}, but it must be between 0 and 100,000: leave it out, for example.")
    from chargpt_jax.selftest.check import check

    out = sys.stderr if flags.json else sys.stdout

    def report(text: str) -> None:
        print(text, file=out, flush=True)

    result = check(request.workdir, request.config, **counts, seed=flags.seed or 0, tell=report)
    print(json.dumps(result.to_dict()) if flags.json else f"\n{result.table()}")
    return 1 if result.broken else 0


MODES: dict[str, Callable[[Request], int]] = {
    "run": run,
    "prepare": prepare,
    "find_lr": find_lr,
    "train": train,
    "sweep": sweep,
    "eval": evaluate,
    "generate": generate,
    "score": score,
    "export": export,
    "import": import_original,
    "info": info,
    "report": report,
    "compile": compile_ahead,
    "selftest": selftest,
}
"""The function of each mode."""
