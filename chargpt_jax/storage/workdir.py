"""A run's folder: its files, and how they are read and written.

    config.json   corpus/{tokens.npy, vocabulary.json, sources.json, manifest.json}   lr_finder.{json, svg}
    metrics.jsonl   attention.json   speed.json   schedule.json   checkpoints/   samples/   loss.svg   report.html
    sweep/

Every file but metrics.jsonl is written atomically (atomic.py).
"""

import copy
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from chargpt_jax import atomic
from chargpt_jax.config import Config
from chargpt_jax.config.files import naming
from chargpt_jax.config.json_file import MAX_JSON, file_version, read_json, read_json_once
from chargpt_jax.config.saved import MAY_CHANGE, MAY_CHANGE_BEFORE_A_CHECKPOINT, differences, from_dict, to_json
from chargpt_jax.config.values import shown
from chargpt_jax.data.tokenizer import CharTokenizer
from chargpt_jax.errors import UserError, reason, remedy
from chargpt_jax.storage import manifest, saved_json
from chargpt_jax.storage.arrays.npy_header import Writable, map_tokens, pieces_of, write_npy, write_npy_pieces
from chargpt_jax.storage.metrics_log import read_metrics

SAMPLE_SECONDS = 60.0
"""Age at which a temporary file of a sample is of a killed process."""

RESTORE = "restore it or start a new --workdir"
"""What a user can do about a damaged file of a run."""

T = TypeVar("T")


class Workdir:
    """The paths of one run; reads and writes all of its files but the checkpoints."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Set the run's folder. No folder is created yet; a relative path is made absolute now.

        Given another Workdir, this one shares what it has read: its config and vocabulary.

        Raises:
            UserError: if the path is invalid.
        """
        self._read: dict[Path, tuple[tuple[int, int, int], Any]] = path._read if isinstance(path, Workdir) else {}
        if not isinstance(path, str | os.PathLike):
            raise UserError(f"The workdir is {shown(path)}, but it must be a path: give the folder of a run.")
        path = os.fspath(path)
        if "\0" in str(path):
            raise UserError(f"--workdir is {str(path)!r}, but a path cannot contain NUL: give a folder.")
        check_name(str(path), "--workdir")
        try:
            self.path = Path(path).expanduser().absolute()
        except RuntimeError:
            raise UserError(f"--workdir is {str(path)!r}, but that user has no home folder: give a folder.") from None
        self.config = self.path / "config.json"
        self.corpus = self.path / "corpus"
        self.lr_finder = self.path / "lr_finder.json"
        self.metrics = self.path / "metrics.jsonl"
        self.attention = self.path / "attention.json"
        self.speed = self.path / "speed.json"
        self.schedule = self.path / "schedule.json"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.sweep_folder = self.path / "sweep"
        self.report = self.path / "report.html"

    def __fspath__(self) -> str:
        return str(self.path)

    def check_writable(self) -> None:
        """Check, before any work is done, that the folder can hold a run.

        Raises:
            UserError: if the path is a file or not writable.
        """
        try:
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"--workdir is {str(self.path)!r}, but that is not a folder: give one.")
            for part in (self.path, self.corpus, self.checkpoints, self.samples):
                if part.is_symlink() and not part.exists():
                    raise UserError(
                        f"{part} is a symbolic link that leads nowhere: remove it, or choose another folder."
                    )
                if part.exists() and not part.is_dir():
                    raise UserError(f"{part} must be a folder, but is something else: remove it.")
            nearest = next(p for p in (self.path, *self.path.parents) if p.exists())
        except OSError as error:
            raise UserError(
                f"Cannot use --workdir={str(self.path)[:80]!r} ({error.strerror}): choose another folder."
            ) from None
        if not nearest.is_dir():
            raise UserError(f"--workdir is {str(self.path)!r}, but {nearest} is not a folder: choose another.")
        read_only = bool(os.statvfs(nearest).f_flag & os.ST_RDONLY) if hasattr(os, "statvfs") else False
        if read_only or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"--workdir is {str(self.path)!r}, but {nearest} is not writable: choose another folder.")

    def check_config(self, given: Config) -> None:
        """Compare a config with the one that this run was started with.

        Raises:
            UserError: if they contradict each other, listing the fields.
        """
        if not self.config.exists():
            return
        may_change = MAY_CHANGE if self.has_checkpoints() else MAY_CHANGE_BEFORE_A_CHECKPOINT
        lines = differences(self.load_config(), given, may_change)
        if lines:
            shown = "; ".join(lines[:6]) + (f"; and {len(lines) - 6} more" if len(lines) > 6 else "")
            raise UserError(
                f"The run in {self.path} has a different config ({shown}): use the saved values, or another --workdir."
            )

    def is_of_a_run(self, path: Path) -> bool:
        """Return whether a folder is that of this run or of another one, or the folder of its corpus or samples."""
        path = path.resolve()
        runs = [path, *([path.parent] if path.name in (self.corpus.name, self.samples.name) else [])]
        return any(
            run == self.path.resolve() or (Workdir(run).config.exists() and Workdir(run).has_corpus()) for run in runs
        )

    def has_checkpoints(self) -> bool:
        """Return whether there is a checkpoint, valid or not."""
        return any(path.name.isdecimal() for path in self.checkpoints.glob("*"))

    def load_config(self) -> Config:
        """Read the run's config, including the fields that the run has resolved.

        Raises:
            UserError: if there is no run.
        """

        def read() -> Config:
            saved = self.load_json(self.config)
            with naming(self.config, RESTORE):
                return from_dict(saved)

        return copy.deepcopy(self._read_once(self.config, read))

    def _read_once(self, path: Path, read: Callable[[], T]) -> T:
        """Return read(), or the result of an earlier call if the file has not changed since."""
        try:
            version = file_version(path)
        except OSError:
            return read()
        if path not in self._read or self._read[path][0] != version:
            self._read[path] = version, read()
        return self._read[path][1]

    def sweep(self) -> None:
        """Remove the temporary files of killed processes. Only the process that holds the lock may call this.

        Processes without the lock write samples, so a young temporary file of them stays.
        """
        atomic.sweep(self.path)
        atomic.sweep(self.corpus)
        atomic.sweep(self.samples, SAMPLE_SECONDS)

    def save_config(self, config: Config) -> None:
        """Write the run's config."""
        self.write(self.config, to_json(config))
        self._read[self.config] = file_version(self.config), copy.deepcopy(config)

    def save_corpus(
        self, tokenizer: CharTokenizer, tokens: np.ndarray | None, sources: Sequence[dict[str, object]]
    ) -> None:
        """Write the encoded corpus, integers [N] (None: it is not known), its vocabulary and its sources.

        The ids are saved in the tokenizer's dtype.

        Raises:
            UserError: if files of other programs have these names; a killed run leaves tokens.npy, its first file.
        """
        if tokens is None:
            self._save_corpus(tokenizer, None, sources)
        else:
            self.save_corpus_in_pieces(tokenizer, len(tokens), pieces_of(tokens), sources)

    def save_corpus_in_pieces(
        self,
        tokenizer: CharTokenizer,
        count: int,
        pieces: Iterable[np.ndarray],
        sources: Sequence[dict[str, object]],
    ) -> None:
        """Write a corpus of `count` ids that come in pieces, integers [n] each, as `save_corpus` does."""

        def write(file: Writable) -> None:
            write_npy_pieces(file, tokenizer.dtype, count, pieces)

        self._save_corpus(tokenizer, write, sources)

    def _save_corpus(
        self,
        tokenizer: CharTokenizer,
        write_tokens: Callable[[Writable], None] | None,
        sources: Sequence[dict[str, object]],
    ) -> None:
        own = [name for name in ("vocabulary.json", "sources.json") if os.path.lexists(self.corpus / name)]
        if own and not any(os.path.lexists(self.corpus / name) for name in ("tokens.npy", manifest.NAME)):
            raise UserError(f"{self.corpus / own[0]} is not a file of a run: move it, or choose another --workdir.")
        self.corpus.mkdir(parents=True, exist_ok=True)
        (self.corpus / manifest.NAME).unlink(missing_ok=True)
        known = _facts_of(tokenizer)
        if write_tokens is not None:
            with atomic.replacing(self.corpus / "tokens.npy") as file:
                write_tokens(facts := manifest.Facts(file))
            known["tokens.npy"] = facts.result()
        self.write(self.corpus / "sources.json", json.dumps(list(sources), indent=2) + "\n")
        vocabulary = self.corpus / "vocabulary.json"
        self.write(vocabulary, _vocabulary_json(tokenizer))
        self._read[vocabulary] = file_version(vocabulary), tokenizer
        manifest.seal(self.corpus, known)

    def check_corpus(self, tokenizer: CharTokenizer, tokens: np.ndarray) -> None:
        """Compare the corpus, and these parts of it that were read, with its manifest.

        Workdirs of version 0.1.0 have none.

        Raises:
            UserError: if a file differs.
        """
        if not os.path.lexists(self.corpus / manifest.NAME):
            return
        try:
            array = manifest.Facts()
            write_npy(array, tokens)
            known = _facts_of(tokenizer) | {"tokens.npy": array.result()}
            manifest.verify(self.corpus, extra_files=True, known=known)
        except manifest.Damaged as error:
            unread = isinstance(error.__cause__, OSError)
            fix = remedy(error.__cause__, f"restore the files in {self.corpus}, or use a new --workdir")
            what = "cannot be checked" if unread else "has changed"
            raise UserError(f"The corpus of the run in {self.path} {what} ({error}): {fix}.") from None

    def has_corpus(self) -> bool:
        """Return whether the corpus is complete; the vocabulary is written last."""
        return (self.corpus / "vocabulary.json").exists()

    def load_tokenizer(self) -> CharTokenizer:
        """Read the vocabulary."""
        path = self.corpus / "vocabulary.json"
        return self._read_once(path, lambda: self._parsed(path, CharTokenizer.from_saved))

    def load_tokens(self) -> np.ndarray:
        """Map the corpus, integers [N] as they were saved, into memory. Its header is checked against the file size.

        Raises:
            UserError: if it is missing or damaged.
        """
        path = self.corpus / "tokens.npy"
        if self.has_corpus() and not path.exists():
            if self.load_sources():
                raise UserError(f"{path} is missing: restore it, or start a new --workdir.")
            raise UserError(
                f"{self.path} holds a model imported without its text, so it cannot be trained or evaluated: import it "
                "again with --text_file."
            )
        try:
            tokens, lowest, highest = map_tokens(path, saved_json.MAX_CORPUS)
        except MemoryError:
            raise
        except Exception as error:  # NumPy raises many types for a malformed header
            what = " ".join(reason(error).split())[:200]
            fix = remedy(error, "run --mode=prepare in a new --workdir")
            raise UserError(f"{path} cannot be read ({what}): {fix}.") from error
        n_ids = self.load_tokenizer().n_ids
        if len(tokens) and not 0 < lowest <= highest < n_ids:
            raise UserError(f"{path} holds unused token ids: run --mode=prepare in a new --workdir.")
        return tokens

    def load_sources(self) -> list[dict[str, Any]]:
        """Read the sources of the corpus."""
        return self._parsed(self.corpus / "sources.json", saved_json.sources)

    def save_lr_finder(self, result: Mapping[str, object]) -> None:
        """Write the result of the range test."""
        self.write(self.lr_finder, json.dumps(result, indent=2) + "\n")

    def save_attention(self, chosen: Mapping[str, object]) -> None:
        """Write which attention the training steps use, and the conditions that it was chosen under."""
        self.write(self.attention, json.dumps(chosen, indent=2) + "\n")

    def load_attention(self, warn: Callable[[str], None]) -> dict[str, Any]:
        """Read the same; {} if nothing was chosen yet, or the file is damaged, of which `warn` is told."""
        if not os.path.lexists(self.attention):
            return {}
        try:
            return self._parsed(self.attention, saved_json.attention, "restore it, or set train.attention")
        except UserError as error:
            warn(str(error))
            return {}

    def save_speed(self, speed: Mapping[str, object]) -> None:
        """Write the training speed."""
        self.write(self.speed, json.dumps(speed, indent=2) + "\n")

    def load_speed(self, warn: Callable[[str], None]) -> dict[str, Any]:
        """Read the training speed; {} if it was not measured yet, or the file is damaged, of which `warn` is told."""
        if not os.path.lexists(self.speed):
            return {}
        try:
            return self._parsed(self.speed, saved_json.speed, "remove it; until then, the training speed is not known")
        except UserError as error:
            warn(str(error))
            return {}

    def save_schedule(self, fits: Mapping[str, object]) -> None:
        """Write how many steps fit into the minutes of a run."""
        self.write(self.schedule, json.dumps(fits, indent=2) + "\n")

    def load_schedule(self, parse: Callable[[Any], list[T]]) -> list[T]:
        """Read the same; [] if nothing was fitted yet.

        Args:
            parse: converts the content, and raises ValueError if it is invalid.

        Raises:
            UserError: if the file is damaged.
        """
        if not os.path.lexists(self.schedule):
            return []
        fix = "restore it, or remove it: the run then measures its speed again"
        return self._parsed(self.schedule, parse, fix)

    def load_metrics(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl. Invalid lines, such as a last one truncated by a crash, are skipped.

        Raises:
            UserError: if the file exists, but is unreadable or too large.
        """
        return read_metrics(self.metrics)

    def load_json(self, path: Path, max_bytes: int = MAX_JSON, fix: str = RESTORE) -> Any:
        """Read a JSON file of this run.

        Raises:
            UserError: if it is missing, damaged or larger than `max_bytes`; `fix` is what a user can do about that.
        """
        try:
            return read_json_once(path) if path == self.config else read_json(path, max_bytes)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{self.path} has no {path.relative_to(self.path)}: give the --workdir of a run, or start one with "
                "--config=small."
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({reason(error)}): {remedy(error, fix)}.") from error

    def _parsed(self, path: Path, parse: Callable[[Any], T], fix: str = RESTORE) -> T:
        """Read a JSON file of this run, and convert it by a function that raises ValueError if it is invalid."""
        try:
            return parse(self.load_json(path, fix=fix))
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{path} cannot be used ({error}): {fix}.") from None

    def write(self, path: Path, text: str) -> None:
        """Write a text file atomically in UTF-8; lone surrogates are written as backslash escapes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_file(path, text.encode("utf-8", "backslashreplace"))


def check_name(path: str, flag: str) -> None:
    """Check the name of a folder that is to be written.

    Raises:
        UserError: if it is not UTF-8, which the library that writes arrays does not support.
    """
    try:
        os.fsencode(path).decode("utf-8")  # the name's bytes: under LC_ALL=C Python reads them as lone surrogates
    except UnicodeError:
        raise UserError(f"{flag} is {path!a}, but its name must be valid UTF-8: rename it, or give another.") from None


def _facts_of(tokenizer: CharTokenizer) -> dict[str, manifest.FileFacts]:
    """Return what the manifest of a corpus states of its vocabulary."""
    vocabulary = manifest.Facts()
    vocabulary.write(_vocabulary_json(tokenizer).encode())
    return {"vocabulary.json": vocabulary.result()}


def _vocabulary_json(tokenizer: CharTokenizer) -> str:
    return json.dumps(tokenizer.vocabulary) + "\n"
