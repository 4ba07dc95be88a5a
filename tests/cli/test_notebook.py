"""The live figure of a notebook: one display that is complete in every update, rarely updated, of constant height."""

import dataclasses
import re
import sys
from html import unescape
from types import SimpleNamespace

import pytest

from chargpt_jax.cli import notebook
from chargpt_jax.cli.progress import numbers, sentence, show
from chargpt_jax.events import Event, LRFinderStep, Prepared, Sampled, Steps, TrainStarted, Validated
from tests.cli.test_progress import LAST, RUN, ZOOM

SVG = "<svg>a sample</svg>"
SEARCH, TRAINING = RUN[:5], RUN[5:]
WITH_SAMPLES: list[Event] = [*RUN[:-1], Sampled(1000, ("The class", "def "), (SVG, "<svg>other</svg>")), RUN[-1]]


class Cell:
    """What a notebook's cell displays: the content of its displays, and of all updates."""

    def __init__(self) -> None:
        self.displays: list[dict[str, str]] = []
        self.contents: list[dict[str, str]] = []

    def display(self, content, *, raw, display_id):
        assert raw
        assert display_id
        self.displays.append(content)
        self.contents.append(content)
        return SimpleNamespace(update=self.update)

    def update(self, content, *, raw):
        assert raw
        self.contents.append(content)

    @property
    def pages(self) -> list[str]:
        return [content["text/html"] for content in self.contents]


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test advances: [seconds]."""
    now = [100.0]
    monkeypatch.setattr(notebook, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.fixture
def cell(monkeypatch):
    found = Cell()
    fake = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=None))
    monkeypatch.setitem(sys.modules, "IPython", fake)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=found.display))
    return found


def lines_of(page):
    return [unescape(line) for line in re.findall(r"<pre[^>]*>(.*?)</pre>", page)]


def test_one_display_is_updated_and_its_last_state_is_complete(cell):
    show(WITH_SAMPLES)
    assert len(cell.displays) == 1
    corpus, rate, training, numbers_line, validated, sample = lines_of(cell.pages[-1])
    assert corpus == sentence(RUN[0])
    assert rate == "learning rate: 3.20e-03 (steepest)"
    assert training.startswith("training: 213,504 parameters")
    assert numbers_line == "done: 1,000 steps in 10 min, best validation loss 1.7000 nats per character"
    assert validated == sentence(next(event for event in RUN if isinstance(event, Validated)))
    assert sample == "sample at step 1,000; 1 more in samples/"
    assert cell.pages[-1].count("<svg") == 2
    assert SVG in cell.pages[-1]
    assert cell.contents[-1]["text/plain"].splitlines() == [corpus, rate, training, numbers_line, validated]


def test_updates_come_once_a_second_and_at_new_stages(cell, clock):
    def events():
        for event in RUN:
            clock[0] += 0.01
            yield event

    show(events())
    stages = sum(isinstance(event, notebook.STAGES) for event in RUN)
    seconds = 0.01 * len(RUN)
    assert stages + seconds - 2 <= len(cell.contents) <= stages + seconds + 2


def test_an_event_that_was_not_due_is_shown_at_the_end(cell, clock):
    with pytest.raises(KeyboardInterrupt):
        show(event if event is not None else interrupt() for event in [*RUN[:6], LAST, None])
    assert f"step 1,000 (epoch 10.00): {numbers(LAST)}" in lines_of(cell.pages[-1])
    count = len(cell.contents)
    show([RUN[0]])
    assert len(cell.contents) == count + 1, "nothing is shown twice"


def interrupt():
    raise KeyboardInterrupt


def test_parts_keep_their_height_during_training(cell, clock):
    long = Sampled(2, ("b" * 999,), (SVG,))

    def events():
        for event in [*TRAINING[:40], Sampled(1, ("a",), (SVG,)), *TRAINING[40:80], long, *TRAINING[-4:]]:
            clock[0] += 1
            yield event

    show(events())
    heights = [re.findall(r'height:\d+px|<svg [^>]* height="\d+"|<pre style="overflow', page) for page in cell.pages]
    line = '<pre style="overflow'
    (plot,) = {part for page in heights for part in page if part.startswith("<svg")}
    without, with_sample = [line, line, plot], [line, line, plot, line, f"height:{notebook.SAMPLE_HEIGHT}px"]
    assert heights == [without] * 40 + [with_sample] * (len(heights) - 40)


def test_plot_of_the_range_test_grows_with_every_step(cell, clock, monkeypatch):
    curves = []
    monkeypatch.setattr(notebook, "lr_finder_plot", lambda found, *_, **__: curves.append(list(found)) or "<svg/>")

    def events():
        for event in (*(LRFinderStep(n, 9, 1, 10.0**n, 4.0 - n) for n in range(3)), LRFinderStep(4, 9, 1, 1e3, 9.0)):
            clock[0] += 1
            yield event
        yield ZOOM
        clock[0] += 1
        yield LRFinderStep(5, 9, 2, 0.5, 3.0)

    show(events())
    assert [len(found[0][0]) for found in curves[:4]] == [1, 2, 3, 3]
    assert curves[4] == [(ZOOM.lrs, ZOOM.losses)]
    assert curves[5] == [(ZOOM.lrs, ZOOM.losses), ((0.5,), (3.0,))]


def test_points_of_a_zoom_without_a_result_are_dropped(cell, clock, monkeypatch):
    curves = []
    monkeypatch.setattr(notebook, "lr_finder_plot", lambda found, *_, **__: curves.append(list(found)) or "<svg/>")
    steps = [LRFinderStep(1, 4, 1, 0.1, 4.0), LRFinderStep(2, 4, 1, 1.0, float("nan")), LRFinderStep(3, 4, 2, 0.2, 5.0)]
    show(steps)
    assert curves[-1] == [((0.2,), (5.0,))]


def test_range_test_can_be_plotted_after_any_step(cell, clock):
    for count in range(1, len(SEARCH) + 1):
        show(SEARCH[:count])
    assert all("nan" not in page for page in cell.pages)


@pytest.mark.parametrize("method", ["steepest", "lowest", "balanced"])
def test_plot_of_the_range_test_names_its_method(cell, method):
    show([dataclasses.replace(ZOOM, best=5.6e-3, method=method)])
    assert f"suggested ({method})" in cell.pages[-1]
    assert "0.0056" in cell.pages[-1]


def test_earlier_losses_of_a_resumed_run_are_plotted(cell, clock):
    past = {"training": ((1, 3.0), (2, 2.9)), "validation": ((2, 2.8),)}
    show([TrainStarted(1, 2, 5000, 10, 500.0, 1e-3, "x", "float32", **past)])
    assert "best validation 2.800 nats" in cell.pages[-1]
    show([TrainStarted(1, 2, 5000, 10, 500.0, 1e-3, "x", "float32", **past), Steps(3, 0.3, 2.7, 1e-3, 1, 1, 1, 1)])
    assert "best validation 2.800 nats" in cell.pages[-1]


def test_preparation_shows_a_line_and_no_plot(cell):
    show(RUN[:1])
    assert lines_of(cell.pages[-1]) == [sentence(RUN[0]), ""]
    assert "<svg" not in cell.pages[-1]


def test_titles_are_text_and_nothing_runs_a_script(cell):
    show([Prepared(("<script>alert(1)</script> & Co",), 10, 8, 2, 5, 64, None), *WITH_SAMPLES[1:]])
    assert not [page for page in cell.pages if "<script" in page or re.search(r"\son\w+=", page)]
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; Co" in cell.pages[0]


KERNEL = """
from chargpt_jax.cli.progress import show
from tests.cli.test_notebook import WITH_SAMPLES
show(WITH_SAMPLES)
"""


def test_a_real_kernel_keeps_one_output_that_is_updated(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(KERNEL)])
    client = nbclient.NotebookClient(page, timeout=100, kernel_name="python3")
    sent = []
    process = client.process_message

    def counted(message, *rest):
        sent.append(message["msg_type"])
        return process(message, *rest)

    client.process_message = counted
    client.execute()
    (output,) = page.cells[0].outputs
    assert sent.count("display_data") == 1
    assert sent.count("update_display_data") >= 5
    assert SVG in output.data["text/html"]
    assert output.data["text/plain"].splitlines()[0] == sentence(RUN[0])
    assert "done: 1,000 steps" in output.data["text/plain"]
