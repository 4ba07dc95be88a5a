"""A run's folder: what is where, and how it is read and written.

    config.json   corpus/{tokens.npy, vocabulary.json, sources.json}   lr_finder.{json, svg}   metrics.jsonl
    speed.json   checkpoints/   samples/   loss.svg   report.html

Every file but metrics.jsonl is written whole: to a neighbour first, then renamed over the old one.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chargpt_jax.config import Config, UserError, differences, from_dict, to_json
from chargpt_jax.tokenizer import CharTokenizer


class Workdir:
    """Paths of one run, and reading and writing of all of them but the checkpoints."""

    def __init__(self, path: str | os.PathLike[str]):
        """Take the folder's path; nothing is made until something is written."""
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
        return CharTokenizer(self.load_json(self.corpus / "vocabulary.json"))

    def load_tokens(self) -> np.ndarray:
        """Read the corpus, int32 [N]."""
        path = self.corpus / "tokens.npy"
        if self.has_corpus() and not path.exists():
            raise UserError(
                f"{self.path} holds a model imported without its text, and nothing to learn from or judge by: import "
                "it again with --text_file."
            )
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} cannot be read ({error}): run --mode=prepare in a new --workdir.") from error

    def load_sources(self) -> list[dict[str, Any]]:
        """Read where the corpus came from."""
        return self.load_json(self.corpus / "sources.json")

    def save_lr_finder(self, result: Any, svg: str) -> None:
        """Write the range test's result and its picture."""
        self.write(self.lr_finder, json.dumps(dataclasses.asdict(result), indent=2) + "\n")
        self.write(self.lr_finder.with_suffix(".svg"), svg)

    def save_speed(self, speed: dict[str, Any]) -> None:
        """Write how fast training goes."""
        self.write(self.speed, json.dumps(speed, indent=2) + "\n")

    def load_speed(self) -> dict[str, Any]:
        """Read how fast training went; nothing where it has not been found out."""
        return self.load_json(self.speed) if self.speed.exists() else {}

    def append_metrics(self, lines: Sequence[dict[str, Any]]) -> None:
        """Add lines to metrics.jsonl, each one JSON object."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def load_metrics(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl; a last line that a crash cut short is left out."""
        lines = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
        return lines

    def rewind_metrics(self, step: int) -> list[dict[str, Any]]:
        """Drop from metrics.jsonl what came after an update that training now goes on from; return the rest."""
        lines = [line for line in self.load_metrics() if line["step"] <= step]
        self.write(self.metrics, "".join(json.dumps(line) + "\n" for line in lines))
        return lines

    def load_json(self, path: Path) -> Any:
        """Read a JSON file of this run.

        Raises:
            UserError: where it is missing or damaged.
        """
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{self.path} holds no {path.relative_to(self.path)}: give the --workdir of a run, or make one with "
                "--config=small."
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}): restore it or start a new --workdir.") from error

    def write(self, path: Path, text: str) -> None:
        """Write a text file whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with replacing(partial, path):
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def replacing(partial: Path, path: Path) -> Any:
    """Rename `partial` to `path` at the end of the block, or remove it where the block fails."""
    try:
        yield
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
