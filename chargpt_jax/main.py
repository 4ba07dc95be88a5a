"""Train, use and look at a character-level GPT.

    python -m chargpt_jax.main --config=configs/small.py [--workdir=DIR] [--mode=MODE] [--config.x.y=v ...]

Modes: run (default) prepares the text, finds a learning rate, trains, writes samples and draws the report; prepare,
find_lr, train and eval do that stage alone; generate and score use a trained model; export writes it for Hugging Face
or for the PyTorch original, whose checkpoints import takes in; info says what a run is; compile builds the steps of a
config for a TPU that need not be there.

Exit codes: 0 done, 2 the user's mistake, 3 no usable checkpoint, 4 non-finite loss, 5 a checkpoint that could not be
written, 130 and 143 stopped by a signal after a checkpoint.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from absl.flags import FlagValues

from chargpt_jax.config import Config, UserError, validate
from chargpt_jax.flags import NEEDS_CONFIG, help_text, parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (`sys.argv` if none is given) and return its exit code."""
    try:
        return _main(sys.argv if argv is None else argv)
    except UserError as error:
        return _complain(error, 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _complain("Interrupted; the same command goes on from the last checkpoint.", 130)
    except Exception as error:
        # By name, so that a mistyped command is answered without importing JAX.
        code = {"NoCheckpoint": 3, "NonFiniteLoss": 4, "SaveFailed": 5}.get(type(error).__name__)
        if code is None:
            raise
        return _complain(error, code)


def _complain(error: object, code: int) -> int:
    print(f"chargpt: {error}", file=sys.stderr)
    return code


def _main(argv: Sequence[str]) -> int:
    values, config, name = parse(argv)
    if values.help:
        print(help_text(__doc__))
        return 0
    mode = values.mode
    if mode in NEEDS_CONFIG:
        if config is None:
            raise UserError(f"--mode={mode} needs a config: give --config=small, or the path of a config file.")
        validate(config)
    elif not values.workdir and name is None:
        raise UserError(f"--mode={mode} needs the folder of a run: give --workdir.")
    values["workdir"].value = values.workdir or f"runs/{name}"
    if mode in ("run", "prepare", "find_lr", "train"):
        assert config is not None
        return _stage(mode, config, values)
    modes: dict[str, Callable[[FlagValues, Config | None], int]] = {
        **{"eval": _eval, "generate": _generate, "score": _score, "info": _info, "compile": _compile},
        **{"export": _export, "import": _import},
    }
    return modes[mode](values, config)


def _stage(mode: str, config: Config, values: FlagValues) -> int:
    from chargpt_jax import corpus
    from chargpt_jax.workdir import Workdir

    folder = Workdir(values.workdir)
    folder.check_writable()
    folder.check_config(config)
    from chargpt_jax import devices

    devices.use_compilation_cache(corpus.default_cache() / "xla")
    from chargpt_jax import api, events, profile, progress

    out = sys.stderr if values.json else sys.stdout
    signals, last = Signals(), None
    warn = _warn
    stages: dict[str, Callable[[], Any]] = {
        "run": lambda: api.run(config, values.workdir, warn, signals.received),
        "train": lambda: api.train(config, values.workdir, warn, signals.received),
        "prepare": lambda: api.prepare(config, values.workdir, warn),
        "find_lr": lambda: api.find_lr(config, values.workdir, warn),
    }

    def watched() -> Any:
        nonlocal last
        happening = stages[mode]()
        if values.profile:
            happening = profile.profiled(happening, folder.path / "profile")
        for event in happening:
            if isinstance(event, events.TrainStarted):
                signals.install()
            if isinstance(event, events.Ended):
                signals.restore()
            last = event
            yield event

    progress.show(watched(), out)
    if isinstance(last, events.Ended) and last.signal is not None:
        return 128 + last.signal
    if mode == "run":
        _tell_samples(folder, out)
    if values.profile:
        _tell_trace(folder, out)
    if values.json and isinstance(last, events.LRFinderResult):
        import dataclasses

        print(json.dumps(dataclasses.asdict(last)))
    return 0


def _tell_samples(folder: Any, out: Any) -> None:
    newest = max(folder.samples.glob("step-*.json"), key=lambda path: path.stat().st_mtime)
    for sample in json.loads(newest.read_text(encoding="utf-8"))["samples"]:
        print(f"\n{printable(sample['text'])}", file=out)
    print(f"\nreport: {folder.report}", file=out)


def _tell_trace(folder: Any, out: Any) -> None:
    traces = sorted(folder.path.glob("profile/plugins/profile/*/perfetto_trace.json.gz"))
    told = f"{traces[-1]}, for https://ui.perfetto.dev" if traces else "none: too few dispatches were left to make"
    print(f"trace: {told}", file=out)


def _eval(values: FlagValues, _: Config | None) -> int:
    api = _api()
    result = api.evaluate(values.workdir, _step(values), _warn)
    shown = "{loss:.4f} nats = {bits_per_character:.4f} bits per character over {tokens:,} held-out characters"
    print(json.dumps(result) if values.json else shown.format(**result) + f" (step {result['step']:,})")
    return 0


def _generate(values: FlagValues, _: Config | None) -> int:
    from chargpt_jax.workdir import Workdir

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
    from chargpt_jax import corpus
    from chargpt_jax.workdir import Workdir

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
        print(json.dumps(samples.to_dict()))
    elif not quiet:
        for sample in samples:
            print(printable(sample.text))
    for sample, path in zip(samples, api.save_samples(folder, samples, name), strict=True):
        print(f"\n{sample.loss:.4f} nats per character; drawn in {path}", file=out)


def _export(values: FlagValues, _: Config | None) -> int:
    if not values.out:
        raise UserError("--mode=export needs a place to write to: give --out, a new folder.")
    print(_api().export(values.workdir, values.out, values.format, _step(values), _warn))
    return 0


def _import(values: FlagValues, _: Config | None) -> int:
    if not values["from"].value:
        raise UserError("--mode=import needs a checkpoint of the original: give --from, a file.")
    print(_api().import_original(values["from"].value, values.workdir, values.text_file, _warn))
    return 0


def _info(values: FlagValues, _: Config | None) -> int:
    facts = _api().info(values.workdir)
    print(json.dumps(facts) if values.json else "\n".join(f"{name}: {value}" for name, value in facts.items()))
    return 0


def _compile(values: FlagValues, config: Config | None) -> int:
    from chargpt_jax import compile

    assert config is not None
    for line in compile.for_tpu(config, values.topology or "v5e:2x4"):
        print(line, flush=True)
    return 0


def _api() -> Any:
    from chargpt_jax import corpus, devices

    devices.use_compilation_cache(corpus.default_cache() / "xla")
    from chargpt_jax import api

    return api


def _step(values: FlagValues) -> str | int:
    step = values.step or "best"
    if step not in ("best", "latest") and not step.isdecimal():
        raise UserError(f"--step is {step!r}, but it must be 'best', 'latest' or a number.")
    return int(step) if step.isdecimal() else step


def _warn(text: str) -> None:
    print(f"\n*** {text}\n", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Replace what could steer a terminal, but for newlines and tabs."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


class Signals:
    """While training: the first SIGINT, SIGTERM or SIGHUP asks for a checkpoint and an end, a second SIGINT insists."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._before: dict[int, Any] = {}

    def received(self) -> int | None:
        """Return the number of the signal that came, if one did."""
        return self._number

    def install(self) -> None:
        """Begin to listen."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                self._before[getattr(signal, name)] = signal.signal(getattr(signal, name), self._on_signal)

    def restore(self) -> None:
        """Stop listening."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._number = number


def console() -> None:
    """Be the `chargpt` command."""
    sys.exit(main())


if __name__ == "__main__":
    console()
