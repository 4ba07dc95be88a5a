"""Output of a run in a log, a terminal and a notebook, from a list of events and without JAX."""

import dataclasses
import io
import math
import re
from itertools import pairwise

import pytest

from chargpt_jax.cli import progress
from chargpt_jax.cli.progress import numbers, sentence, show
from chargpt_jax.errors import UserError
from chargpt_jax.events import (
    AttentionChosen,
    AttentionTried,
    Compiled,
    Ended,
    Event,
    Fitted,
    LRFinderResult,
    LRFinderStep,
    Prepared,
    Sampled,
    Saved,
    Steps,
    TrainStarted,
    Validated,
    Zoom,
)

LAST = Steps(1000, 10.0, 2 * math.log(2), 1.5e-3, 0.7, 12_345.6, 600.0, 0.0)
ZOOM = Zoom(1, 1e-10, 10.0, (1e-3, 1e-2), (4.0, 3.0), 3.2e-3, 1e-2, 3.2e-3)
RUN: list[Event] = [
    Prepared(("Python's own help texts",), 465_000, 400_000, 65_000, 97, 128, "60"),
    *[LRFinderStep(n, 2, 1, 10.0**-n, 4.5 - n) for n in (1, 2)],
    ZOOM,
    LRFinderResult(3.2e-3, "steepest", 1e-10, 10.0, (ZOOM,)),
    TrainStarted(213_504, 0, 1000, 100, 10.0, 3.2e-3, "1 x cpu", "float32"),
    Compiled(4.2, 2.5e10),
    *[Steps(n, n / 100, 3.0, 1e-3, 0.7, 10_000.0, 0.1 * n / 2, 7260.0) for n in range(1, 1000)],
    LAST,
    Validated(1000, 10.0, 1.7, 1.7 / math.log(2), True, 605.0),
    Saved(1000, "runs/x/checkpoints/1000"),
    Ended(1000, 605.0, 1.7),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def log(events: list[Event]) -> str:
    file = io.StringIO()
    show(events, file)
    return file.getvalue()


@pytest.fixture
def terminal(monkeypatch):
    """Return a function that shows events on a terminal of some width, and returns the final text on it."""

    def draw(events: list[Event], columns: int) -> str:
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "JUPYTER_COLUMNS"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", str(columns))
        file = Terminal()
        show(events, file)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())

    return draw


# A log


def test_progress_line_has_loss_bits_rate_speed_and_time():
    line = numbers(Steps(10, 0.1, 2 * math.log(2), 1.5e-3, 0.7, 12_345.6, 100.0, 720.0))
    assert line == "loss 1.3863 nats (2.0000 bits/char)  rate 1.50e-03  12,346 tokens/s  12 min left"


def test_attention_line_gives_source_and_trial_results():
    tried = (
        AttentionTried("blocks", 1e-3, 3.9e-4),
        AttentionTried("kernel", 2e-3, 2.12e-4),
        AttentionTried("cudnn", None, None, "did not run (no \x1b[31mcuDNN)"),
    )
    assert sentence(AttentionChosen("kernel", "trial", tried)) == (
        "attention: kernel, by a trial on this device: blocks 0.39 ms per layer, kernel 0.212 ms per layer, "
        "cudnn did not run (no \N{REPLACEMENT CHARACTER}[31mcuDNN)"
    )
    assert sentence(AttentionChosen("blocks", "run")) == "attention: blocks, as before in this run"
    assert sentence(AttentionChosen("kernel", "config")) == "attention: kernel, as train.attention says"


def test_log_has_each_stage_in_order():
    lines = log(RUN).splitlines()
    assert lines[0].startswith("corpus: Python's own help texts (stand-in for 60): 465,000 characters (96 distinct)")
    assert "learning rate: 3.20e-03 (steepest)" in lines
    (training,) = [line for line in lines if line.startswith("training:")]
    for words in ("213,504 parameters", "1 x cpu", "float32", "starting, 1,000 steps", "10 epochs of 100"):
        assert words in training
    (last,) = [line for line in lines if line.startswith("step 1,000 (epoch 10.00): ")]
    assert last.endswith(numbers(LAST))
    (validation,) = [line for line in lines if line.startswith("validation:")]
    assert "1.7000 nats = 2.4526 bits per character (best), 10 min" in validation
    assert lines[-1] == "done: 1,000 steps in 10 min, best validation loss 1.7000 nats per character"


def test_log_has_a_line_at_each_doubling_and_at_the_end():
    steps = [line.split()[1] for line in log(RUN).splitlines() if line.startswith("step ")]
    assert steps == ["1", "2", "4", "8", "16", "32", "64", "128", "256", "512", "1,000"]


def test_long_run_has_a_line_about_every_minute():
    """With doubling only, the second half of a run would have no line."""
    seconds, per_step = 3600, 10  # ten seconds per step, 1000 tokens per step
    events = [
        Steps(n, 1.0, 3.0, 1e-3, 0.7, 100.0, float(n * per_step), float(seconds - n * per_step))
        for n in range(1, seconds // per_step)
    ]
    steps = [int(line.split()[1]) for line in log(events).splitlines()]
    assert max(b - a for a, b in pairwise(steps)) * per_step <= 120


def test_a_corpus_is_named_as_a_stand_in_only_where_it_is_one():
    assert "stand-in" not in sentence(Prepared(("A Book",), 10, 8, 2, 5, 64, None))
    assert "A Book (stand-in for https://x.org/a.txt):" in sentence(
        Prepared(("A Book",), 10, 8, 2, 5, 64, "https://x.org/a.txt")
    )


def test_a_resumed_run_says_from_where():
    assert "resuming after step 1,234 of 5,000" in sentence(
        TrainStarted(1, 1234, 5000, 10, 500.0, 1e-3, "x", "float32")
    )


def test_a_warm_up_that_the_run_is_too_short_for_is_reported():
    started = TrainStarted(1, 0, 40, 10, 4.0, 1e-3, "x", "float32", warmup_steps=40)
    said = sentence(started)
    assert "the warm-up of 40 steps is not shorter than the run, so the peak falls on the last step" in said
    assert said.endswith("lower scheduler.warmup_epochs")
    assert "warm-up" not in sentence(dataclasses.replace(started, warmup_steps=39))


def test_a_run_of_given_minutes_shows_its_steps_when_they_are_known():
    started = TrainStarted(1, 0, None, 10, None, 1e-3, "x", "float32", minutes=2.5)
    assert "; starting, 2.5 min (epochs of 10 steps), peak learning rate 1.00e-03" in sentence(started)
    resumed = dataclasses.replace(started, first_step=40)
    assert "; resuming after step 40, 2.5 min (epochs of 10 steps)" in sentence(resumed)
    fitted = Fitted(40, 1234, 123.4, 2.5, 31.4, warmup_steps=10)
    assert sentence(fitted) == "schedule: 1,234 steps (123.4 epochs) for 2.5 min, from step 40 after 31 s"
    assert sentence(dataclasses.replace(fitted, total_steps=9)).endswith("lower scheduler.warmup_epochs")


def test_the_bar_of_a_run_of_given_minutes_gets_its_length_later():
    file = io.StringIO()
    terminal = progress._Terminal(file)
    terminal.show(LRFinderStep(3, 50, 1, 1e-3, 4.0))
    terminal.show(TrainStarted(1, 0, None, 10, None, 1e-3, "x", "float32", minutes=2.5))
    (task,) = terminal._progress.tasks
    assert (task.completed, task.total, task.fields["done"]) == (0, None, "0")
    terminal.show(Fitted(0, 1234, 123.4, 2.5, 31.4, warmup_steps=10))
    assert (task.total, task.fields["done"]) == (1234, "0/1,234")


def test_the_spread_of_seeds_is_named():
    zoom = dataclasses.replace(ZOOM, seed_rates=(1e-3, 5e-3))
    result = LRFinderResult(3.2e-3, "valley", 1e-10, 10.0, (zoom,), 3)
    assert sentence(result) == (
        "learning rate: 3.20e-03 (valley); 1.00e-03 to 5.00e-03 by the 3 seeds alone, 1 without a falling loss"
    )
    assert sentence(dataclasses.replace(result, seeds=1)) == "learning rate: 3.20e-03 (valley)"


def test_training_line_is_english_for_any_number():
    assert "; starting, 1 step (0.1 epochs of 10 steps)" in sentence(
        TrainStarted(1, 0, 1, 10, 0.1, 1e-3, "x", "float32")
    )
    assert "; resuming after step 4 of 4 (0.03774 epochs of 106 steps)" in sentence(
        TrainStarted(1, 4, 4, 106, 4 / 106, 1e-3, "x", "float32")
    )
    assert sentence(Ended(1, 2.0, 1.7)).startswith("done: 1 step in ")


def test_a_zoom_names_the_method_and_its_rate():
    line = sentence(dataclasses.replace(ZOOM, best=5.6e-3, method="balanced"))
    assert "steepest descent at 3.20e-03, proposed 5.60e-03 (balanced)" in line


def test_only_the_best_validation_is_marked():
    assert "(best)" not in sentence(Validated(1, 1.0, 1.7, 2.4, False, 1.0))


def test_the_first_sample_is_one_line_of_200_characters():
    event = Sampled(1204, ("The class is\n  a " + "x" * 500, "another one"), ("<svg/>", "<svg/>"))
    line = sentence(event)
    start = "sample at step 1,204: "
    assert line.startswith(start + "The class is   a xxx")
    assert len(line) == len(start) + 200
    assert line.endswith("x…")
    assert sentence(Sampled(1, (), ())) is None


def test_log_and_terminal_print_the_sample(terminal):
    events = [*RUN[:6], Sampled(204, ("The [red]class[/red] is\x1b[31m",), ("<svg/>",))]
    line = "sample at step 204: The [red]class[/red] is\ufffd[31m"
    assert log(events).splitlines()[-1] == line
    assert line in terminal(events, 160)


def test_a_stopped_run_is_not_called_done():
    line = sentence(Ended(7, 60.0, 1.7, 15))
    assert line is not None
    assert "7" in line
    assert not line.startswith("done")


def test_events_are_consumed_as_they_come():
    seen = []

    def events():
        for event in RUN[:4]:
            yield event
            seen.append(event)
        raise ValueError("the run failed")

    file = io.StringIO()
    with pytest.raises(ValueError, match="the run failed"):
        show(events(), file)
    assert seen == RUN[:4]
    assert file.getvalue().startswith("corpus:")


# A terminal


def test_wide_terminal_ends_with_a_full_bar(terminal):
    text = terminal(RUN, 160)
    assert numbers(LAST) in text
    assert "1,000/1,000" in text
    assert "━━━━━" in text
    for words in ("stand-in for 60", "learning rate: 3.20e-03", "done: 1,000 steps"):
        assert words in text


@pytest.mark.parametrize("columns", [80, 100])
def test_narrow_terminal_shows_step_loss_and_time_left(terminal, columns):
    last = Steps(900, 9.0, 2.1234, 1e-3, 0.7, 12_345.0, 100.0, 720.0)
    text = terminal([*RUN[:6], last], columns)
    for words in ("900/1,000", "2.1234", "12 min left"):
        assert words in text
    assert "…" not in text


def test_terminal_shows_the_range_test_live(terminal):
    text = terminal(RUN[:3], 160)
    assert "range test" in text
    assert "rate 1.00e-02  loss 2.5000" in text


def test_a_title_with_brackets_is_shown_as_it_is(terminal):
    titles = ("The [red]Scarlet[/red] Pimpernel [/] :heart:",)
    assert titles[0] in terminal([Prepared(titles, 10, 8, 2, 5, 64, None)], 160)


def test_cursor_is_visible_after_a_failed_run(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")

    def events():
        yield from RUN[:8]
        raise ValueError("the run failed")

    file = Terminal()
    with pytest.raises(ValueError, match="the run failed"):
        show(events(), file)
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")


# What is not events


@pytest.mark.parametrize("events", [None, 3, "tiny"])
def test_show_refuses_what_is_not_events(events):
    with pytest.raises(UserError, match="events is .*, but it must be what run, train"):
        show(events)
