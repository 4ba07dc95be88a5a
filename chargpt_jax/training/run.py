"""A run, resolved once: its workdir, config and corpus are read and checked here and then passed to every stage."""

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optax

from chargpt_jax.config import Config, validate
from chargpt_jax.config.saved import as_dict, as_saved, differences, from_dict
from chargpt_jax.data import batches
from chargpt_jax.data.corpus import changed_files, read_corpus
from chargpt_jax.data.sources import folders
from chargpt_jax.data.streams.journal import Journal
from chargpt_jax.data.tokenizer import ByteTokenizer, CharTokenizer
from chargpt_jax.devices import processes
from chargpt_jax.errors import UserError
from chargpt_jax.events import Prepared
from chargpt_jax.storage.arrays.npy_header import pieces_of
from chargpt_jax.storage.checkpoint import Checkpoints
from chargpt_jax.storage.lock import NAME, Lock, NoLock, holder, writer
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training import optimizer

SEEN_SECONDS, SEEN_TRIES = 0.5, 20
"""How often, and how many times, to look for the lock file of process 0."""

Warn = Callable[[str], None]
"""Receives a message for the user."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The workdir, config and corpus of one run."""

    workdir: Workdir
    config: Config
    """As saved in the workdir, with the fields that depend on the corpus filled in."""
    tokenizer: CharTokenizer
    tokens: np.ndarray
    """Integers [N] of the least width that holds all ids, the whole corpus: a map of the file."""
    sources: Sequence[dict[str, Any]] = ()
    """Where the text comes from; only `prepare` reads it."""
    attention: str = "blocks"
    """Of training steps: one of `ops.choose.ATTENTIONS`. A stage that trains sets it."""

    @classmethod
    def load(cls, workdir: str | Path | Workdir) -> "Run":
        """Read a prepared workdir.

        Raises:
            UserError: if a file is missing or damaged.
        """
        folder = Workdir(workdir)
        config, tokenizer, tokens = folder.load_config(), folder.load_tokenizer(), folder.load_tokens()
        folder.check_corpus(tokenizer, tokens)
        return cls(folder, config, tokenizer, tokens)

    @classmethod
    def prepare(cls, config: Config, folder: Workdir, warn: Warn, known: Iterable[str] = ()) -> "Run":
        """Resume a run, or create it: load the text, encode it and write it to the workdir with the config.

        The caller holds the workdir's lock. The vocabulary of a new run has the characters of `known` as well. With
        several processes, process 0 does this, and the others read what it has written.

        Raises:
            UserError: if the config, the workdir or the text is invalid; nothing has been written then.
        """
        run = processes.on_first(lambda: cls._prepare(config, folder, warn, known)) or cls.load(folder)
        processes.check_same("The text or config in --workdir", processes.several() and run.record())
        return run

    @classmethod
    def _prepare(cls, config: Config, folder: Workdir, warn: Warn, known: Iterable[str]) -> "Run":
        folder.check_config(config)
        folder.sweep()
        if folder.has_corpus() and folder.config.exists():
            saved = cls.load(folder)
            filled_in = _with_vocabulary(_merge(saved.config, config), saved.tokenizer)
            run = dataclasses.replace(saved, config=filled_in, sources=folder.load_sources())
            for path in changed_files(config.data, run.sources):
                warn(
                    f"{path} has changed since this run began: the run keeps its own text; use a new --workdir for it."
                )
            _check_lengths(run.config, len(run.tokens), folder)
        else:
            run = cls._create(config, folder, warn, known)
        folder.save_config(run.config)
        return run

    @classmethod
    def _create(cls, config: Config, folder: Workdir, warn: Warn, known: Iterable[str]) -> "Run":
        for path in folders(config.data):
            if folder.is_of_a_run(path):
                raise UserError(
                    f"data.source names the folder {str(path)!r}, which holds a run or is the --workdir, and the files "
                    "of a run are no text: give another --workdir, or a folder of texts."
                )
        journal = Journal(folder.path, config.data)
        try:
            run = cls._written(config, folder, warn, known, journal)
        except UserError:
            journal.remove()
            raise
        except BaseException:  # a signal, or the end of the time limit
            journal.interrupt()
            raise
        journal.remove()
        return run

    @classmethod
    def _written(cls, config: Config, folder: Workdir, warn: Warn, known: Iterable[str], journal: Journal) -> "Run":
        """Read the texts of a new run, and write its corpus."""
        found = read_corpus(config.data, warn=warn, folder=folder.path, journal=journal)
        tokenizer = ByteTokenizer() if config.data.unit == "byte" else CharTokenizer({*found.characters, *known})
        sources = list(map(dataclasses.asdict, found.sources))
        if tokenizer.n_ids < 3:
            raise UserError(
                f"The text of data.source has one distinct character, {min(found.characters)!r}, but must have at "
                "least two: give another."
            )
        config = _with_vocabulary(config, tokenizer)
        _check_lengths(config, len(found.text), folder)
        folder.save_corpus_in_pieces(tokenizer, len(found.text), found.ids(tokenizer), sources)
        return cls(folder, config, tokenizer, folder.load_tokens(), sources)

    @property
    def n_train(self) -> int:
        """Characters in the training set."""
        return batches.sizes(len(self.tokens), self.config.data)[0]

    @property
    def epoch_steps(self) -> int:
        """Training steps in an epoch."""
        return _epoch_steps(self.config, len(self.tokens))

    @property
    def total_steps(self) -> int | None:
        """Training steps in the whole run; None if the config sets minutes."""
        return optimizer.total_steps(self.config.scheduler, self.epoch_steps)

    @property
    def warmup_steps(self) -> int:
        """Training steps of warm-up that the config asks for, which may be more than the run has."""
        return round(self.config.scheduler.warmup_epochs * self.epoch_steps)

    def schedule(self, total_steps: int | None = None) -> optax.Schedule:
        """Return the learning rate as a function of the step, in a run of `total_steps`; None: as the config says."""
        config, peak, scheduler = self.config, self.config.optimizer.learning_rate, self.config.scheduler
        assert peak is not None
        if total_steps is not None:
            scheduler = dataclasses.replace(scheduler, max_steps=total_steps, minutes=None)
        return optimizer.warmup_cosine(scheduler, peak, self.epoch_steps, config.ancestor.decay)

    def with_learning_rate(self, learning_rate: float) -> "Run":
        """Return this run with a learning rate, which is written to its config file as well."""
        found = dataclasses.replace(self.config.optimizer, learning_rate=learning_rate)
        run = dataclasses.replace(self, config=dataclasses.replace(self.config, optimizer=found))
        processes.on_first(lambda: self.workdir.save_config(run.config))
        return run

    def record(self) -> dict[str, Any]:
        """Return the description of this run that its checkpoints hold."""
        return record_of(self.config, self.tokenizer.vocabulary, self.tokens)

    def prepared(self) -> Prepared:
        """Return the event that describes the corpus."""
        return Prepared(
            titles=tuple(source["title"] for source in self.sources),
            characters=len(self.tokens),
            n_train=self.n_train,
            n_validation=batches.sizes(len(self.tokens), self.config.data)[1],
            n_ids=self.tokenizer.n_ids,
            vocab_size=self.config.model.vocab_size,
            stand_in_for=next((source["stand_in_for"] for source in self.sources if source["stand_in_for"]), None),
            notes=_notes(self.sources),
            unit=self.config.data.unit,
        )


def _notes(sources: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return what was removed from, changed or found in the texts; with the title if there are several texts."""
    notes = [(source["title"], note) for source in sources for note in source.get("notes", ())]
    return tuple(f"{title}: {note}" if len(sources) > 1 else note for title, note in notes)


def checked_workdir(config: Config, workdir: str | Path | Workdir) -> Workdir:
    """Return the workdir, after checking the config, the number of processes and that the folder can hold a run."""
    validate(config)
    processes.check()
    processes.check_same("The config", as_dict(config))
    folder = Workdir(workdir)
    folder.check_writable()
    return folder


@contextlib.contextmanager
def locked(folder: Workdir) -> Iterator[Lock]:
    """Hold the lock of a workdir; with several processes, process 0 holds it for all.

    Raises:
        UserError: if another training holds it, or a process does not see the folder of process 0.
    """
    with contextlib.ExitStack() as held:
        lock = processes.on_first(lambda: held.enter_context(writer(folder.path))) or NoLock()
        if processes.several():
            processes.check_sees(folder.path, _sees(folder.path / NAME, processes.agreed(holder(folder.path / NAME))))
        yield lock


def _sees(path: Path, expected: str) -> bool:
    """Return whether a lock file has the expected content, or gets it soon: a network disk may be slow."""
    for _ in range(SEEN_TRIES):
        if holder(path) == expected:
            return True
        time.sleep(SEEN_SECONDS)
    return False


def record_of(config: Config, vocabulary: Sequence[str], tokens: np.ndarray) -> dict[str, Any]:
    """Return the description of a run that is saved in its checkpoints, as JSON can hold it.

    The sha256 of the corpus is that of its ids as int32, whatever width they are saved in.
    """
    sha256 = hashlib.sha256()
    for piece in pieces_of(tokens):
        sha256.update(piece.astype(np.int32).data)
    return {"config": as_saved(config), "vocabulary": list(vocabulary), "corpus_sha256": sha256.hexdigest()}


def check_record(saved: Mapping[str, Any], own: Mapping[str, Any], folder: Path) -> None:
    """Compare the record of a checkpoint with that of its run, as `record_of` returns it.

    Raises:
        UserError: if config, vocabulary or corpus differ, naming the fields.
    """
    lines = differences(from_dict(saved["config"]), from_dict(own["config"]))
    lines += [f"{name} differs" for name in ("vocabulary", "corpus_sha256") if saved[name] != own[name]]
    if lines:
        raise UserError(
            f"Checkpoint {saved['step']} in {folder} belongs to a different run ({'; '.join(lines[:6])}): "
            "use its saved values, or another --workdir."
        )


def _merge(saved: Config, given: Config) -> Config:
    """Return the given config, with the fields that the run has filled in taken from the saved one."""
    rate = given.optimizer.learning_rate or saved.optimizer.learning_rate
    model = dataclasses.replace(given.model, vocab_size=saved.model.vocab_size, used_ids=saved.model.used_ids)
    return dataclasses.replace(given, model=model, optimizer=dataclasses.replace(given.optimizer, learning_rate=rate))


def _with_vocabulary(config: Config, tokenizer: CharTokenizer) -> Config:
    """Fill in the fields that depend on the corpus.

    Raises:
        UserError: if the config sets them to values that do not fit.
    """
    size = config.model.vocab_size
    if size and size < tokenizer.n_ids:
        raise UserError(
            f"model.vocab_size is {size}, but must be at least {tokenizer.n_ids}, the token ids of the corpus with "
            "padding: leave it at 0."
        )
    if config.model.used_ids not in (0, tokenizer.n_ids):
        raise UserError(
            f"model.used_ids is {config.model.used_ids}, but must be {tokenizer.n_ids}, the token ids of the corpus "
            "with padding: leave it at 0."
        )
    model = dataclasses.replace(config.model, vocab_size=size or tokenizer.vocab_size, used_ids=tokenizer.n_ids)
    return dataclasses.replace(config, model=model)


def _epoch_steps(config: Config, n_tokens: int) -> int:
    """Return the number of training steps in an epoch of a corpus of `n_tokens`."""
    n_train, _ = batches.sizes(n_tokens, config.data)
    return batches.steps_per_epoch(n_train, config.model.block_size, config.data, config.ancestor.short_epochs)


def _check_lengths(config: Config, n_tokens: int, folder: Workdir) -> None:
    """Check the lengths of the training and validation sets and of the schedule.

    The schedule may grow, but not shrink below the steps already made. A folder beyond the schedule that is not a valid
    checkpoint does not count.
    """
    batches.split(np.broadcast_to(np.uint8(0), n_tokens), config.data, config.model.block_size)
    n_train = batches.sizes(n_tokens, config.data)[0]
    if config.train.stream == "never" and n_train > batches.MAX_ON_DEVICE:
        raise UserError(
            f"train.stream is 'never', but the training part has {n_train:,} characters, and a device can hold at most "
            f"{batches.MAX_ON_DEVICE:,}: leave it out."
        )
    scheduler, total = config.scheduler, optimizer.total_steps(config.scheduler, _epoch_steps(config, n_tokens))
    if total is None:
        return  # the steps made are never too many
    with contextlib.closing(Checkpoints(folder.checkpoints)) as store:
        made = max(store.steps(), default=0)
        if made > total:
            made = max(store.valid_steps(), default=0)
    if made > total:
        name = "epochs" if scheduler.max_steps is None else "max_steps"
        raise UserError(
            f"scheduler.{name} is {getattr(scheduler, name):g} ({total:,} training steps), but the run in "
            f"{folder.path} is already at step {made:,}: increase it, or use another --workdir."
        )
