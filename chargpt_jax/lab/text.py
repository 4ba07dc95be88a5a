"""The events of a sweep as text: one line each, and the table at the end."""

import math
import statistics

from chargpt_jax.events import RunDiverged, SweepStarted, SweepSteps, SweepValidated, bits_per_character
from chargpt_jax.results.facts import duration


def sweep_text(event: SweepStarted | SweepValidated | RunDiverged) -> str:
    """Return an event of a sweep as one line; the last validation with the table of the results."""
    match event:
        case SweepStarted():
            seeds, rates = ({run[i] for run in event.runs} for i in (0, 1))
            start = f"resuming after step {event.first_step:,} of {event.total_steps:,}"
            begun = start if event.first_step else f"starting, {event.total_steps:,} steps each"
            return (
                f"sweep: {len(event.runs)} runs ({len(rates)} learning rates x {len(seeds)} seeds) of "
                f"{event.parameters:,} parameters on {event.device} in {event.dtype}; {begun}"
            )
        case RunDiverged():
            return (
                f"diverged: seed {event.seed}, learning rate {event.learning_rate:g}, at step {event.step:,}; the "
                "other runs go on"
            )
    means = [row for row in event.rows if math.isfinite(row.mean)]
    best = min(means, key=lambda row: row.mean, default=None)
    line = f"validation: epoch {event.epoch:.2f}, step {event.step:,}: "
    if best is None:
        return f"{line}all runs have diverged"
    line += (
        f"lowest mean {best.mean:.4f} nats = {bits_per_character(best.mean):.4f} bits per {event.unit} at learning "
        f"rate {best.learning_rate:g}, {duration(event.seconds)}"
    )
    return f"{line}\n\n{sweep_table(event)}\n" if event.last else line


def sweep_numbers(event: SweepSteps) -> str:
    """Return the state of a sweep as text."""
    good = [loss for loss in event.losses if math.isfinite(loss)]
    median = statistics.median(good) if good else math.nan
    speed = f"{event.tokens_per_second:,.0f} tokens/s  {duration(event.seconds_left)} left"
    return f"median loss {median:.4f} nats  {speed}"


def sweep_table(event: SweepValidated) -> str:
    """Return the results of a sweep in aligned columns, in nats and in bits per character (or byte)."""
    unit = {"character": "char"}.get(event.unit, event.unit)
    cells = [("rate", "runs", "mean, nats", "95 % interval", "sd", f"bits/{unit}", "best", "seed")]
    for row in event.rows:
        runs = f"{row.runs} of {row.runs + row.diverged}" if row.diverged else str(row.runs)
        between = f"{row.low:.4f} to {row.high:.4f}" if math.isfinite(row.low) else "-"
        seed = "-" if row.best_seed is None else str(row.best_seed)
        bits = _number(bits_per_character(row.mean))
        numbers = _number(row.mean), between, _number(row.deviation), bits, _number(row.best)
        cells.append((f"{row.learning_rate:g}", runs, *numbers, seed))
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"
