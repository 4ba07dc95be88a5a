"""A run's folder: what is where, and how it is read and written.

    config.json   corpus/{tokens.npy, vocabulary.json, sources.json}   lr_finder.{json, svg}   metrics.jsonl
    speed.json   checkpoints/   samples/   loss.svg   report.html

Every file but metrics.jsonl is written whole: to a neighbour first, then renamed over the old one.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from chargpt_jax.config import MOST_STEPS, Config
from chargpt_jax.config_io import MOST_JSON, differences, from_dict, read_json, to_json
from chargpt_jax.data.tokenizer import CharTokenizer
from chargpt_jax.errors import UserError

MOST_CORPUS = 4 << 30
"""Bytes of tokens.npy: a thousand million characters."""

MOST_METRICS = 1 << 30
MOST_LINE = 1 << 16
"""Bytes of metrics.jsonl, and of a line in it; what is longer is cut into lines that make no sense."""

NUMBERS = {"step": ("loss",), "validation": ("loss", "bits_per_character", "seconds")}
"""What a line of metrics.jsonl must hold, by its event, besides its step; all are less than MOST_NUMBER."""

MOST_NUMBER = 1e30

Understood = TypeVar("Understood")


class Workdir:
    """Paths of one run, and reading and writing of all of them but the checkpoints."""

    def __init__(self, path: str | os.PathLike[str]):
        """Take the folder's path; nothing is made until something is written, and a relative path stays where it is."""
        if "\0" in str(path):
            raise UserError(f"--workdir is {str(path)!r}, but no name holds a NUL: give a folder.")
        try:
            self.path = Path(path).expanduser().absolute()
        except RuntimeError:
            raise UserError(f"--workdir is {str(path)!r}, but there is no such home: give a folder.") from None
        self.config = self.path / "config.json"
        self.corpus = self.path / "corpus"
        self.lr_finder = self.path / "lr_finder.json"
        self.metrics = self.path / "metrics.jsonl"
        self.speed = self.path / "speed.json"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.report = self.path / "report.html"

    def check_writable(self) -> None:
        """Refuse a place that cannot hold a run, before any work is done.

        Raises:
            UserError: where the path is a file or cannot be written.
        """
        try:
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"--workdir is {str(self.path)!r}, but that is a file: give a folder.")
            for part in (self.path, self.corpus, self.checkpoints, self.samples):
                if part.is_symlink() and not part.exists():
                    raise UserError(f"{part} is a link to nothing: remove it, or choose another place.")
                if part.exists() and not part.is_dir():
                    raise UserError(f"{part} is a file, but a run keeps a folder there: remove it.")
            nearest = next(p for p in (self.path, *self.path.parents) if p.exists())
        except OSError as error:
            raise UserError(
                f"--workdir is {str(self.path)[:80]!r}, but {error.strerror}: choose another place."
            ) from None
        read_only = bool(os.statvfs(nearest).f_flag & os.ST_RDONLY) if hasattr(os, "statvfs") else False
        if not nearest.is_dir() or read_only or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"--workdir is {str(self.path)!r}, but {nearest} cannot be written: choose another place.")

    def check_config(self, given: Config) -> None:
        """Refuse a config that contradicts the one this run was made with, listing the fields."""
        if not self.config.exists():
            return
        lines = differences(self.load_config(), given)
        if lines:
            shown = "; ".join(lines[:6]) + (f"; and {len(lines) - 6} more" if len(lines) > 6 else "")
            raise UserError(
                f"The run in {self.path} was made with another config ({shown}): give its values, or another --workdir."
            )

    def load_config(self) -> Config:
        """Read the run's config, with what the run has filled in.

        Raises:
            UserError: where there is no run.
        """
        return from_dict(self.load_json(self.config))

    def save_config(self, config: Config) -> None:
        """Write the run's config."""
        self.write(self.config, to_json(config))

    def save_corpus(self, tokenizer: CharTokenizer, tokens: np.ndarray, sources: Sequence[dict[str, Any]]) -> None:
        """Write the encoded corpus, int32 [N], its vocabulary and where it came from."""
        self.corpus.mkdir(parents=True, exist_ok=True)
        partial = self.corpus / "tokens.npy.partial"
        with replacing(partial, self.corpus / "tokens.npy"), partial.open("wb") as file:
            np.save(file, tokens, allow_pickle=False)
        self.write(self.corpus / "sources.json", json.dumps(list(sources), indent=2) + "\n")
        self.write(self.corpus / "vocabulary.json", json.dumps(tokenizer.vocabulary) + "\n")

    def has_corpus(self) -> bool:
        """Say whether the corpus is there; the vocabulary is written last."""
        return (self.corpus / "vocabulary.json").exists()

    def load_tokenizer(self) -> CharTokenizer:
        """Read the vocabulary."""
        path = self.corpus / "vocabulary.json"
        return self._understood(path, CharTokenizer.from_saved)

    def load_tokens(self) -> np.ndarray:
        """Read the corpus, int32 [N]; what its header claims is held against the file before memory is taken for it."""
        path = self.corpus / "tokens.npy"
        if self.has_corpus() and not path.exists():
            raise UserError(
                f"{self.path} holds a model imported without its text, and nothing to learn from or judge by: import "
                "it again with --text_file."
            )
        try:
            tokens = _read_tokens(path)
        except Exception as error:  # whatever a header that anybody wrote provokes in NumPy's reader
            what = " ".join(str(error).split())[:200]
            raise UserError(f"{path} cannot be read ({what}): run --mode=prepare in a new --workdir.") from error
        n_ids = self.load_tokenizer().n_ids
        if len(tokens) and not 0 < tokens.min() <= tokens.max() < n_ids:
            raise UserError(f"{path} holds ids that no character has: run --mode=prepare in a new --workdir.")
        return tokens

    def load_sources(self) -> list[dict[str, Any]]:
        """Read where the corpus came from."""
        return self._understood(self.corpus / "sources.json", _sources)

    def save_lr_finder(self, result: Any, svg: str) -> None:
        """Write the range test's result and its picture."""
        self.write(self.lr_finder, json.dumps(dataclasses.asdict(result), indent=2) + "\n")
        self.write(self.lr_finder.with_suffix(".svg"), svg)

    def save_speed(self, speed: dict[str, Any]) -> None:
        """Write how fast training goes."""
        self.write(self.speed, json.dumps(speed, indent=2) + "\n")

    def load_speed(self) -> dict[str, Any]:
        """Read how fast training went; nothing where it has not been found out."""
        return self._understood(self.speed, _facts) if self.speed.exists() else {}

    def load_metrics(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl; what is no line of ours, as a last one that a crash cut short, is left out.

        Raises:
            UserError: where it is there and cannot be read, or is of absurd size.
        """
        if not self.metrics.exists():
            return []
        try:
            if not self.metrics.is_file() or self.metrics.stat().st_size > MOST_METRICS:
                raise UserError(f"{self.metrics} cannot be read: it is no file of up to {MOST_METRICS >> 20} MiB.")
            with self.metrics.open("rb") as file:
                lines = map(_metrics_line, iter(lambda: file.readline(MOST_LINE), b""))
                return [line for line in lines if line is not None]
        except OSError as error:
            raise UserError(f"{self.metrics} cannot be read ({error.strerror}): mend or remove it.") from None

    def load_json(self, path: Path, most: int = MOST_JSON) -> Any:
        """Read a JSON file of this run, of at most so many bytes.

        Raises:
            UserError: where it is missing or damaged.
        """
        try:
            return read_json(path, most)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{self.path} holds no {path.relative_to(self.path)}: give the --workdir of a run, or make one with "
                "--config=small."
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}): restore it or start a new --workdir.") from error

    def _understood(self, path: Path, meaning: Callable[[Any], Understood]) -> Understood:
        """Read a JSON file of this run and return what a function, which raises ValueError, makes of it."""
        try:
            return meaning(self.load_json(path))
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{path} cannot be used ({error}): restore it or start a new --workdir.") from None

    def write(self, path: Path, text: str) -> None:
        """Write a text file whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with replacing(partial, path):
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")


class Log:
    """metrics.jsonl of a run in training: whole lines, and no end of the run where they cannot be written.

    Lines that the disk does not take wait in memory for one that does; what it took in part is cut off again.
    """

    def __init__(self, folder: Workdir, step: int, warn: Callable[[str], None]):
        """Open the log where training goes on after an update: what comes later in it is dropped.

        Args:
            folder: the run's.
            step: updates made.
            warn: told, once, that lines have to wait.
        """
        self.lines = [line for line in folder.load_metrics() if line["step"] <= step]
        """As they were found, without what was dropped."""
        self._folder, self._warn, self._told = folder, warn, False
        self._size: int | None = None
        """Bytes that are written and good; None: the whole file is to be written anew."""
        self._waiting = _json_lines(self.lines)
        self.add([])

    def add(self, lines: Sequence[dict[str, Any]], durably: bool = False) -> None:
        """Add lines at the end, each one JSON object; `durably`: they are to survive a power failure."""
        self._waiting += _json_lines(lines)
        with self._forgiving():
            if self._size is None:
                self._folder.write(self._folder.metrics, self._waiting)
                self._size = len(self._waiting)
            else:
                self._size = self._append(self._size, self._waiting.encode(), durably)
            self._waiting = ""

    def _append(self, size: int, data: bytes, durably: bool) -> int:
        with self._folder.metrics.open("ab") as file:
            size = min(size, os.fstat(file.fileno()).st_size)
            file.truncate(size)
            file.write(data)
            file.flush()
            if durably:
                os.fsync(file.fileno())
        return size + len(data)

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._told:
                self._told = True
                self._warn(
                    f"{self._folder.metrics} cannot be written ({error.strerror}): training goes on, and its "
                    "lines wait for a disk that takes them."
                )


@contextlib.contextmanager
def excused(what: str, warn: Callable[[str], None]) -> Iterator[None]:
    """Let the writing of something that can be done without fail, with a warning."""
    try:
        yield
    except OSError as error:
        warn(f"{what} cannot be written ({error.strerror}): the run goes on without.")


def _json_lines(lines: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _read_tokens(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = headers[np.lib.format.read_magic(file)](file)
        if dtype != np.int32 or len(shape) != 1:
            raise ValueError("it is no row of 32-bit integers")
        left = path.stat().st_size - file.tell()
        if left != 4 * shape[0] or left > MOST_CORPUS:
            raise ValueError(f"its header tells of {shape[0]:,} characters, but {left:,} bytes follow")
        return np.fromfile(file, np.int32, shape[0])


def _sources(saved: Any) -> list[dict[str, Any]]:
    """Return what sources.json holds, or raise ValueError where it is not a list of sources."""

    def good(source: Any) -> bool:
        return (
            isinstance(source, dict)
            and isinstance(source.get("title"), str)
            and type(source.get("characters")) is int
            and 0 <= source["characters"] <= MOST_CORPUS
            and isinstance(source.get("stand_in_for"), str | None)
        )

    if not isinstance(saved, list) or not all(map(good, saved)):
        raise ValueError("each source has a title and a number of characters")
    return saved


def _facts(saved: Any) -> dict[str, Any]:
    """Return what speed.json holds, or raise ValueError where it is not an object of numbers and words."""
    if not isinstance(saved, dict) or not all(isinstance(value, str | float | int | None) for value in saved.values()):
        raise ValueError("it is no object of numbers and words")
    return saved


def _metrics_line(data: bytes) -> dict[str, Any] | None:
    """Return a line of metrics.jsonl, or None where it is none."""
    try:
        line = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("event"), str) or type(line.get("step")) is not int:
        return None
    numbers: list[Any] = [line.get("seconds", 0), *(line.get(name) for name in NUMBERS.get(line["event"], ()))]
    known = all(type(number) in (int, float) and abs(number) < MOST_NUMBER for number in numbers)
    return line if known and 0 <= line["step"] < MOST_STEPS else None


@contextlib.contextmanager
def replacing(partial: Path, path: Path) -> Any:
    """Rename `partial` to `path` at the end of the block, or remove it where the block fails."""
    try:
        yield
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
