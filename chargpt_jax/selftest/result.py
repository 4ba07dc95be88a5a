"""Results of the self-test, and the table that it prints."""

import dataclasses
import statistics

INTERVAL = 4
"""Training steps between two checkpoints of a self-test's training."""


@dataclasses.dataclass
class Kills:
    """Trainings that were stopped by signals; each run is stopped several times before it is complete."""

    tried: int = 0
    bit_identical: int = 0
    """Kills whose run ended with the arrays and the log of an uninterrupted one."""
    most_steps_lost: int = 0
    """Maximum number of training steps that had to be repeated after one kill."""
    hangs: int = 0


@dataclasses.dataclass
class Signals:
    """Signals that a training handles: SIGTERM, SIGINT, SIGHUP."""

    tried: int = 0
    right_exit_code: int = 0
    verified_saves: int = 0
    """Signals after which training resumed from the very last training step."""
    seconds: list[float] = dataclasses.field(default_factory=list)
    """Time from each signal to the end of the process."""


@dataclasses.dataclass
class Corruptions:
    """Restores of damaged checkpoints."""

    tried: int = 0
    bit_identical: int = 0
    """The newest checkpoint was restored correctly: the damage had no effect."""
    fallbacks: int = 0
    """An older checkpoint was restored correctly."""
    refused: int = 0
    """The checkpoint was rejected with a clear message."""
    unclear: int = 0
    """Any other error."""
    silent_wrong: int = 0
    hangs: int = 0


@dataclasses.dataclass
class Result:
    """All results of a self-test."""

    kills: Kills = dataclasses.field(default_factory=Kills)
    signals: Signals = dataclasses.field(default_factory=Signals)
    corruptions: Corruptions = dataclasses.field(default_factory=Corruptions)
    broken: list[str] = dataclasses.field(default_factory=list)
    """One sentence for each check that failed."""
    seconds: float = 0.0

    def table(self) -> str:
        """Return the results as a table, followed by the failures."""
        kills, signals, damage = self.kills, self.signals, self.corruptions
        times = sorted(signals.seconds) or [0.0]
        rows = [
            ("kills and signals", kills.tried, "at random moments"),
            ("  bit-identical results", kills.bit_identical, f"of {kills.tried}"),
            ("  most steps lost to 1 kill", kills.most_steps_lost, f"must be at most {INTERVAL}"),
            ("  hangs", kills.hangs, "must be 0"),
            ("signals", signals.tried, f"ended in {statistics.median(times):.2f} s, at most {times[-1]:.2f} s"),
            ("  right exit codes", signals.right_exit_code, f"of {signals.tried}"),
            ("  verified saves", signals.verified_saves, f"of {signals.tried}"),
            ("corruptions", damage.tried, ""),
            ("  bit-identical", damage.bit_identical, "damage had no effect"),
            ("  fallbacks", damage.fallbacks, "to an older checkpoint, bit-identical"),
            ("  rejected", damage.refused, "with a clear message"),
            ("  unclear errors", damage.unclear, "must be 0"),
            ("  silent wrong restores", damage.silent_wrong, "must be 0"),
            ("  hangs", damage.hangs, "must be 0"),
        ]
        lines = [f"{name:<28}{count:>6}  {note}".rstrip() for name, count, note in rows]
        ends = [f"FAILED: {sentence}" for sentence in self.broken] or [f"All checks passed in {self.seconds:.0f} s."]
        return "\n".join([*lines, "", *ends])

    def to_dict(self) -> dict[str, object]:
        """Return the results for JSON."""
        return dataclasses.asdict(self)
