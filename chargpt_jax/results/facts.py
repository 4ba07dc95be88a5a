"""The facts of a run in words, for people: what `info` and the report show."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Group = tuple[str, list[tuple[str, str]]]
"""A heading, and (name, value) pairs in plain text."""

NOT_MEASURED = "not measured yet"

MAX_TITLES = 6
"""Number of texts of a corpus that are named."""

MAX_NOTES = 6
"""Number of notes on each of them."""

PREFIXES = ("", "k", "M", "G", "T", "P", "E")
"""SI prefixes of 1, 1000, 1000², ..."""


def facts_in_words(info: Mapping[str, Any]) -> list[Group]:
    """Return the facts of a run in words, in groups.

    Args:
        info: the result of `info`, or of `results.all_facts`, which has more. A fact that is missing is left out; one
            that is None is called not measured, or not known.

    Returns:
        (heading, [(name, value), ...]) pairs. The values can contain titles of texts and paths: untrusted, plain text.
    """
    groups = {
        "Text": [("titles", _titles(info)), ("length", _length(info))],
        "Model": [("shape", _shape(info))],
        "Training": [
            ("progress", _progress(info)),
            ("best loss", _best_loss(info)),
            ("learning rate", _learning_rate(info)),
        ],
        "Speed": [
            ("training", _speed(info)),
            ("arithmetic", _arithmetic(info)),
            ("attention", _attention(info)),
        ],
        "Devices": [("used", _devices(info))],
        "Files": [("checkpoints", _checkpoints(info)), ("report", _report(info))],
    }
    filled = {group: [(name, value) for name, value in rows if value] for group, rows in groups.items()}
    return [(group, rows) for group, rows in filled.items() if rows]


def duration(seconds: float) -> str:
    """Return a duration for people: '48 s', '12 min', '3 h 05 min'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def scaled(value: float, unit: str) -> str:
    """Return a quantity with three significant digits and an SI prefix: 28_040_000_000, 'FLOP' is '28 GFLOP'."""
    index = 0
    while abs(value) >= 999.5 and index + 1 < len(PREFIXES):
        value, index = value / 1000, index + 1
    return f"{_three_digits(value)} {PREFIXES[index]}{unit}"


def rate(value: float) -> str:
    """Return a learning rate with three significant digits, as a decimal number where it is short."""
    return f"{value:.2e}" if not 1e-6 <= value < 1e6 else _three_digits(value)


def _three_digits(value: float) -> str:
    """Return a number with three significant digits and without an exponent: '60,900', '2.8', '0.0167'."""
    digits = 0 if value == 0 else 2 - math.floor(math.log10(abs(value)))
    text = f"{round(value, digits):,.{max(0, digits)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _number(value: object) -> float | None:
    """Return a number from 0 to 1e30; None for anything else: speed.json is untrusted input."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e30:
        return None
    return float(value)


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count:,} steps"


def _titles(info: Mapping[str, Any]) -> str:
    titles = info.get("sources", [])
    notes = info.get("source_notes") or [[]] * len(titles)
    named = [_with_notes(title, of) for title, of in zip(titles, notes, strict=False)][:MAX_TITLES]
    return ", ".join(named) + (f", and {len(titles) - MAX_TITLES:,} more" if len(titles) > MAX_TITLES else "")


def _with_notes(title: str, notes: Sequence[str]) -> str:
    """Return the title of a text with the notes on what was removed from it and repaired in it."""
    more = [f"{len(notes) - MAX_NOTES} more notes in corpus/sources.json"] if len(notes) > MAX_NOTES else []
    return f"{title} ({'; '.join([*notes[:MAX_NOTES], *more])})" if notes else title


def _length(info: Mapping[str, Any]) -> str:
    characters, distinct = info.get("characters"), info.get("vocabulary")
    if characters is None:
        return ""
    if characters == 0:
        return f"no text; the vocabulary has {distinct:,} characters" if distinct is not None else "no text"
    text = f"{characters:,} {_unit(info)}s" + (f", {distinct:,} distinct" if distinct is not None else "")
    n_train = info.get("n_train")
    if n_train is None:
        return text
    n_validation = info.get("n_validation", characters - n_train)
    left = characters - n_train - n_validation
    test = f", {left:,} left out for a test" if left else ""
    return f"{text}: {n_train:,} for training, {n_validation:,} for validation{test}"


def _unit(info: Mapping[str, Any]) -> str:
    return str(info.get("unit", "character"))


def _shape(info: Mapping[str, Any]) -> str:
    parts = []
    if {"n_layer", "n_embd", "n_head", "n_head_dim"} <= set(info):
        heads = "1 head" if info["n_head"] == 1 else f"{info['n_head']:,} heads"
        layers = "1 layer" if info["n_layer"] == 1 else f"{info['n_layer']:,} layers"
        parts = [f"{layers} of width {info['n_embd']:,}", f"{heads} of {info['n_head_dim']:,}"]
    if "block_size" in info:
        parts.append(f"context {info['block_size']:,} {_unit(info)}s")
    kind = {"ngpt": "nGPT, ", "modern": "modern GPT, "}.get(str(info.get("model_kind")), "")
    size = f"{kind}{info['parameters']:,} parameters" if "parameters" in info else ""
    return ": ".join(filter(None, (", ".join(parts), size)))


def _progress(info: Mapping[str, Any]) -> str:
    step, total, per_epoch = (info.get(name) for name in ("step", "total_steps", "steps_per_epoch"))
    if step is None or "total_steps" not in info:
        return ""
    if info.get("characters") == 0:
        return "imported without a text to train on"
    if total is None:  # the number of steps follows from the speed
        minutes = _number(info.get("minutes"))
        run = f"a run of {minutes:g} min" if minutes else "a run of given minutes"
        return f"{step:,} steps of {run}" if step else f"not started: {run}"
    epochs = f" ({total / per_epoch:.4g} epochs of {_steps(per_epoch)})" if per_epoch else ""
    if step == 0:
        return f"not started: 0 of {_steps(total)}{epochs}"
    seconds = _number(info.get("seconds"))
    time = "after a time that is not known" if seconds is None else f"in {duration(seconds)}"
    if step >= total:
        return f"complete: {_steps(step)}{epochs} {time}"
    return f"{step:,} of {_steps(total)}{epochs} {time}"


def _best_loss(info: Mapping[str, Any]) -> str:
    if "best_loss" not in info:
        return ""
    loss, bits, step = (info.get(name) for name in ("best_loss", "best_bits_per_character", "best_step"))
    if loss is None or bits is None or step is None:
        return NOT_MEASURED
    return f"{loss:.4f} nats = {bits:.4f} bits per {_unit(info)} on the validation set, after step {step:,}"


def _learning_rate(info: Mapping[str, Any]) -> str:
    if "learning_rate" not in info:
        return ""
    value, method = info["learning_rate"], info.get("learning_rate_method", "")
    if value is None:
        return "not found yet: the range test finds it before training"
    if method == "":
        return rate(value)
    return f"{rate(value)}, {f'found by the range test ({method})' if method else 'set in the config'}"


def _speed(info: Mapping[str, Any]) -> str:
    if "seconds_per_step" not in info:
        return ""
    seconds, compiling = _number(info["seconds_per_step"]), _number(info.get("compile_seconds"))
    if not seconds:
        return NOT_MEASURED
    parts = [f"at best {scaled(1000 * seconds, 'ms') if seconds < 1 else scaled(seconds, 's')} per step"]
    if "characters_per_step" in info:
        parts.append(f"{_three_digits(info['characters_per_step'] / seconds)} {_unit(info)}s per second")
    return ", ".join(parts) + (f"; compiled in {_three_digits(compiling)} s" if compiling is not None else "")


def _arithmetic(info: Mapping[str, Any]) -> str:
    if "flops_per_step" not in info:
        return ""
    per_step, per_second = scaled(info["flops_per_step"], "FLOP"), _number(info.get("flops_per_second"))
    if per_second is None:
        return f"{per_step} per step; per second: {NOT_MEASURED}"
    used = _number(info.get("mfu"))
    peak = "the device's peak is not known" if used is None else f"{100 * used:.2g} % of the device's peak"
    return f"{per_step} per step, {scaled(per_second, 'FLOP')} per second; {peak}"


def _attention(info: Mapping[str, Any]) -> str:
    """Return the attention of the training steps and why it is used."""
    if "attention" not in info:
        return ""
    if info["attention"] is None:
        return "not chosen yet: a trial before training chooses it"
    reasons = {
        "config": "set in the config",
        "device": "the only one of these devices",
        "run": "as since the run began",
        "trial": f"the fastest in a trial on {info.get('attention_device') or 'a device that is not known'}",
    }
    trial = info.get("attention_trial")
    tried = ", ".join(filter(None, map(_tried, trial if isinstance(trial, list) else [])))
    named = ", ".join(filter(None, (str(info["attention"]), reasons.get(info.get("attention_source", "")))))
    return f"{named}: {tried}" if tried else named


def _tried(one: Any) -> str:
    """Return the result of one attention in a trial; '' if it is malformed: attention.json is untrusted input."""
    if not isinstance(one, dict) or not isinstance(one.get("name"), str):
        return ""
    seconds = _number(one.get("seconds"))
    return f"{one['name']} {f'{1000 * seconds:.3g} ms per layer' if seconds else one.get('fault') or NOT_MEASURED}"


def _devices(info: Mapping[str, Any]) -> str:
    if "devices" not in info:
        return ""
    here = " in ".join(filter(None, (info["devices"], info.get("dtype"))))
    trained_on = info.get("trained_on")
    return here if trained_on in (None, info["devices"]) else f"{here}; trained on {trained_on}"


def _checkpoints(info: Mapping[str, Any]) -> str:
    if "checkpoints" not in info:
        return ""
    steps = [f"{step:,}" for step in info["checkpoints"]]
    if not steps:
        return "none yet"
    best = info.get("best_step")
    named = ("step " if len(steps) == 1 else "steps ") + " and ".join(filter(None, (", ".join(steps[:-1]), steps[-1])))
    return named + (f"; best: {best:,}" if best else "")


def _report(info: Mapping[str, Any]) -> str:
    return (info["report"] or "not written yet") if "report" in info else ""
