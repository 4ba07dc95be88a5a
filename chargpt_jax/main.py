"""Train, use and look at a character-level GPT.

    python -m chargpt_jax.main --config=configs/small.py [--workdir=DIR] [--mode=MODE] [--config.x.y=v ...]

Modes: run (default) prepares the text, finds a learning rate, trains, writes samples and draws the report; prepare,
find_lr, train and eval do that stage alone; generate and score use a trained model; export writes it for Hugging Face
or for the PyTorch original, whose checkpoints import takes in; info says what a run is; compile builds the steps of a
config for a TPU that need not be there; selftest stops small trainings, damages their checkpoints and sees that nothing
is lost.

Exit codes: 0 done, also where --max_minutes ended it; 2 the user's mistake, 3 no usable checkpoint, 4 non-finite loss,
5 a checkpoint that could not be written; 130 stopped by SIGINT, and 143 by SIGTERM or SIGHUP, while training after a
checkpoint. A second SIGINT leaves at once.
"""

import contextlib
import errno
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from absl.flags import FlagValues

from chargpt_jax.cli.flags import NEEDS_CONFIG, help_text, parse
from chargpt_jax.cli.terminal import guard, one_line, printable
from chargpt_jax.config import Config, validate
from chargpt_jax.devices import startup
from chargpt_jax.errors import ExpectedError, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (`sys.argv` if none is given) and return its exit code."""
    _open_all_standard_streams()
    with Signals() as signals:
        try:
            code = _main(sys.argv if argv is None else argv, signals)
            sys.stdout.flush()
            return code
        except UserError as error:
            return _complain(error, error.exit_code)
        except BrokenPipeError:
            Lasting(sys.stdout).mute()
            return 0
        except KeyboardInterrupt:
            return _complain(f"Stopped by {signals.name}{signals.advice}.", signals.code)
        except Exception as error:
            if signals.interrupted:  # a library may have made something else of it
                return _complain(f"Stopped by {signals.name}{signals.advice}.", signals.code)
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                name = f"{error.filename} cannot be used" if error.filename else "The disk cannot be used"
                return _complain(f"{name} ({error.strerror}): mend that, then give the same command again.", 2)
            if not isinstance(error, ExpectedError):
                raise
            return _complain(error, error.exit_code)


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)
"""What a disk can do to us, and only a user can mend."""


def _open_all_standard_streams() -> None:
    """Fill streams that were closed, so that no file of ours takes their place and is written to as one."""
    for stream in (0, 1, 2):
        try:
            os.fstat(stream)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _complain(error: object, code: int) -> int:
    with contextlib.suppress(OSError):
        print(f"chargpt: {one_line(error)}", file=sys.stderr, flush=True)
    return code


def _main(argv: Sequence[str], signals: "Signals") -> int:
    began = time.monotonic()
    values, config, name = parse(argv)
    if values.help:
        print(help_text(__doc__))
        return 0
    mode = values.mode
    if mode in NEEDS_CONFIG:
        if config is None:
            raise UserError(f"--mode={mode} needs a config: give --config=small, or the path of a config file.")
        validate(config)
    elif not values.workdir and name is None and mode != "selftest":
        raise UserError(f"--mode={mode} needs the folder of a run: give --workdir.")
    if mode == "selftest":
        return _selftest(values, config)
    values["workdir"].value = values.workdir or f"runs/{name}"
    if mode in ("run", "prepare", "find_lr", "train"):
        assert config is not None
        minutes = values.max_minutes
        if minutes is not None and not 0 < minutes < math.inf:
            raise UserError(f"--max_minutes is {minutes}, but it must be a number above 0: give 50, for example.")
        signals.advice = ": the same command goes on from what is saved"
        return _stage(mode, config, values, signals, minutes and minutes - (time.monotonic() - began) / 60)
    modes: dict[str, Callable[[FlagValues, Config | None], int]] = {
        **{"eval": _eval, "generate": _generate, "score": _score, "info": _info, "compile": _compile},
        **{"export": _export, "import": _import},
    }
    return modes[mode](values, config)


def _stage(mode: str, config: Config, values: FlagValues, signals: "Signals", minutes: float | None) -> int:
    from chargpt_jax.storage.workdir import Workdir

    folder = Workdir(values.workdir)
    folder.check_writable()
    folder.check_config(config)
    api = _api()
    from chargpt_jax import events
    from chargpt_jax.cli import profiler, progress

    out: Any = Lasting(sys.stderr if values.json else sys.stdout)
    last = None
    stages: dict[str, Callable[[], Any]] = {
        "run": lambda: api.run(config, values.workdir, _warn, signals.received, minutes),
        "train": lambda: api.train(config, values.workdir, _warn, signals.received, minutes),
        "prepare": lambda: api.prepare(config, values.workdir, _warn),
        "find_lr": lambda: api.find_lr(config, values.workdir, _warn),
    }

    def watched() -> Any:
        nonlocal last
        happening = stages[mode]()
        if values.profile:
            happening = profiler.profiled(happening, folder.path / "profile")
        for event in happening:
            last = event
            # From here to the end of training there is something to save.
            signals.gentle = (signals.gentle or isinstance(event, events.Compiled)) and not isinstance(
                event, events.Ended
            )
            yield event
            if isinstance(event, events.Ended) and signals.received() is not None:
                return

    progress.show(watched(), out)
    if signals.received() is not None:
        return signals.code
    if mode == "run" and isinstance(last, events.Ended) and last.complete:
        _tell_samples(folder, out)
    if values.profile:
        _tell_trace(folder, out)
    if values.json and isinstance(last, events.LRFinderResult):
        import dataclasses

        print(as_json(dataclasses.asdict(last)))
    return 0


def _tell_samples(folder: Any, out: Any) -> None:
    # By the number in the name: clocks go backwards.
    found = {int(path.stem[5:]): path for path in folder.samples.glob("step-*.json") if path.stem[5:].isdecimal()}
    if not found:  # it could not be written, and that was said
        return
    for sample in folder.load_json(found[max(found)])["samples"]:
        print(f"\n{printable(sample['text'])}", file=out)
    print(f"\nreport: {one_line(folder.report)}", file=out)


def _tell_trace(folder: Any, out: Any) -> None:
    traces = sorted(folder.path.glob("profile/plugins/profile/*/perfetto_trace.json.gz"))
    told = f"{traces[-1]}, for https://ui.perfetto.dev" if traces else "none: too few dispatches were left to make"
    print(f"trace: {one_line(told)}", file=out)


def _eval(values: FlagValues, _: Config | None) -> int:
    api = _api()
    result = api.evaluate(values.workdir, _step(values), _warn)
    shown = "{loss:.4f} nats = {bits_per_character:.4f} bits per character over {tokens:,} held-out characters"
    print(as_json(result) if values.json else shown.format(**result) + f" (step {result['step']:,})")
    return 0


def _generate(values: FlagValues, _: Config | None) -> int:
    from chargpt_jax.storage.workdir import Workdir

    folder = Workdir(values.workdir)
    how = folder.load_config().sample
    given = lambda flag, default: default if flag is None else flag  # noqa: E731
    prompts = tuple(given(values.prompt, how.prompts))
    streaming = values.stream and not values.json
    if streaming and len(prompts) > 1:
        raise UserError(f"--stream shows one text, but there are {len(prompts)} prompts: give one --prompt.")
    step = _step(values)
    model = _api().load(values.workdir, step, _warn)
    if streaming:
        print(printable(prompts[0]), end="", flush=True)
    samples = model.generate(
        prompts,
        given(values.max_new_tokens, how.max_new_tokens),
        temperature=given(values.temperature, how.temperature),
        top_k=given(values.top_k, how.top_k),
        top_p=given(values.top_p, how.top_p),
        seed=given(values.seed, model.config.seed),
        skip_unknown=values.skip_unknown,
        on_text=(lambda _, text: print(printable(text), end="", flush=True)) if streaming else None,
    )
    _deliver(values, folder, samples, "generated", quiet=streaming)
    return 0


def _score(values: FlagValues, _: Config | None) -> int:
    from chargpt_jax.data import corpus
    from chargpt_jax.storage.workdir import Workdir

    if (values.text is None) == (values.text_file is None):
        raise UserError("--mode=score needs a text: give either --text or --text_file.")
    text = values.text if values.text is not None else corpus.read_text(Path(values.text_file))
    api = _api()
    model = api.load(values.workdir, _step(values), _warn)
    sample = model.score(text, stride=values.stride, skip_unknown=values.skip_unknown)
    _deliver(values, Workdir(values.workdir), api.Samples([sample]), "scored")
    return 0


def _deliver(values: FlagValues, folder: Any, samples: Any, name: str, quiet: bool = False) -> None:
    """Print samples and keep them, with their pictures, in the workdir."""
    api = _api()
    out = sys.stderr if values.json else sys.stdout
    if values.json:
        print(as_json(samples.to_dict()))
    elif not quiet:
        for sample in samples:
            print(printable(sample.text))
    try:
        paths = api.save_samples(folder, samples, name)
    except OSError as error:  # the text is told all the same
        _warn(f"The samples cannot be kept in {folder.samples}: {error.strerror or error}.")
        return
    for sample, path in zip(samples, paths, strict=True):
        print(f"\n{sample.loss:.4f} nats per character; drawn in {one_line(path)}", file=out)


def _export(values: FlagValues, _: Config | None) -> int:
    if not values.out:
        raise UserError("--mode=export needs a place to write to: give --out, a new folder.")
    print(one_line(_api().export(values.workdir, values.out, values.format, _step(values), _warn)))
    return 0


def _import(values: FlagValues, _: Config | None) -> int:
    if not values["from"].value:
        raise UserError("--mode=import needs a checkpoint of the original: give --from, a file.")
    print(one_line(_api().import_original(values["from"].value, values.workdir, values.text_file, _warn)))
    return 0


def _info(values: FlagValues, _: Config | None) -> int:
    facts = _api().info(values.workdir)
    lines = [one_line(f"{name}: {'not known' if value is None else value}") for name, value in facts.items()]
    print(as_json(facts) if values.json else "\n".join(lines))
    return 0


def _compile(values: FlagValues, config: Config | None) -> int:
    from chargpt_jax.cli import tpu_compile

    assert config is not None
    for line in tpu_compile.for_tpu(config, values.topology or "v5e:2x4"):
        print(line, flush=True)
    return 0


def _selftest(values: FlagValues, config: Config | None) -> int:
    counts: dict[str, Any] = {name: values[name].value for name in ("kills", "signals", "corruptions")}
    for name, count in counts.items():
        if not 0 <= count <= 100_000:
            raise UserError(f"--{name} is {count}, but it must be between 0 and 100,000: leave it out, for example.")
    from chargpt_jax.cli import selftest

    out: Any = sys.stderr if values.json else sys.stdout
    tell = lambda text: print(text, file=out, flush=True)  # noqa: E731
    result = selftest.check(values.workdir or ".", config, **counts, seed=values.seed or 0, tell=tell)
    print(json.dumps(result.to_dict()) if values.json else f"\n{result.table()}")
    return 1 if result.broken else 0


def _api() -> Any:
    with startup.gc_paused():
        from chargpt_jax import api
        from chargpt_jax.data import download
    startup.use_compilation_cache(download.default_cache() / "xla")
    return api


def _step(values: FlagValues) -> str | int:
    step = values.step or "best"
    number = step.isdecimal() and len(step) < 19
    if step not in ("best", "latest") and not number:
        raise UserError(f"--step is {step[:80]!r}, but it must be 'best', 'latest' or a number.")
    return int(step) if number else step


def _warn(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"\n*** {one_line(text)}\n", file=sys.stderr, flush=True)


def as_json(value: Any) -> str:
    """Return a value as one line of JSON, in printable ASCII: what is no number there, as NaN, becomes null."""
    return json.dumps(_finite(value), allow_nan=False).replace("\x7f", "\\u007f")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Lasting:
    """A stream whose reader may go away (`| head`, a closed terminal): training goes on, and is told to nobody."""

    def __init__(self, stream: Any):
        """Take the stream to write to."""
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, if there is still somebody to read."""
        with self._unbroken():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        with self._unbroken():
            self._stream.flush()

    def mute(self) -> None:
        """Lead what is still to be written to nowhere."""
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _unbroken(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.mute()


class Signals:
    """SIGINT, SIGTERM and SIGHUP end a command at once, or, while it is `gentle`, when the command sees fit.

    A second SIGINT ends it whatever it does: a thread of its own sees to that, since Python's handlers have to wait
    for compiled code to return.
    """

    def __init__(self) -> None:
        self.gentle = False
        self.interrupted = False
        """Whether a command was ended at once."""
        self.advice = ""
        self._number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        """Begin to listen, where this is the main thread: no other can."""
        if threading.current_thread() is not threading.main_thread():
            return self
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                self._before[getattr(signal, name)] = signal.signal(getattr(signal, name), self._on_signal)
        inner, outer = socket.socketpair()
        outer.setblocking(False)
        self._sockets, self._fd_before = (inner, outer), signal.set_wakeup_fd(outer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(inner,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        if self._before:
            signal.set_wakeup_fd(self._fd_before)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._sockets[1].close()  # the thread ends with it

    @property
    def name(self) -> str:
        """What the signal that came is called; Ctrl-C may also be told by an exception alone."""
        return signal.Signals(self._number or signal.SIGINT).name

    @property
    def code(self) -> int:
        """The exit code: 130 for SIGINT, 143 for the others."""
        return 130 if self._number in (None, signal.SIGINT) else 143

    def received(self) -> int | None:
        """Return the number of the signal that came, if one did."""
        return self._number

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._number = self._number or number
        if not self.gentle:
            self.interrupted = True
            raise KeyboardInterrupt

    def _watch(self, came: socket.socket) -> None:
        count = 0
        while number := came.recv(1):
            if count and number[0] == signal.SIGINT:
                os.write(2, b"\nchargpt: Left at once; what was saved before is whole.\n")
                os._exit(130)
            count += number[0] in self._before
        came.close()


def console() -> None:
    """Be the `chargpt` command."""
    guard()
    code = main()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # all is done: what comes now is too late to change the exit code
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.exit(code)


if __name__ == "__main__":
    console()
