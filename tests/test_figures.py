"""Matplotlib figures hold the numbers of the run, where matplotlib is installed."""

import dataclasses
import sys

import pytest

from chargpt_jax import figures
from chargpt_jax.config import UserError
from chargpt_jax.events import LRFinderResult, Zoom
from chargpt_jax.workdir import Log, Workdir

ZOOMS = tuple(Zoom(n, 1e-4, 1.0, (1e-3, 1e-2), (4.0, 3.0 - n), 5e-3, 1e-2, 5e-3) for n in (1, 2))


@pytest.fixture
def workdir(tmp_path):
    folder = Workdir(tmp_path)
    lines = [{"event": "step", "step": n, "loss": 4.0 / n} for n in (1, 2, 3)]
    Log(folder, 0, print).add(
        [*lines, {"event": "validation", "step": 3, "loss": 1.5, "bits_per_character": 2.2, "seconds": 9.0}]
    )
    folder.save_lr_finder(LRFinderResult(5e-3, "steepest", 1e-10, 10.0, ZOOMS), "<svg/>")
    return tmp_path


def test_the_loss_figure_holds_the_log(workdir, tmp_path):
    pytest.importorskip("matplotlib")
    figure = figures.loss_figure(workdir)
    training, validation = figure.axes[0].get_lines()
    assert training.get_xydata().tolist() == [[1, 4.0], [2, 2.0], [3, 4.0 / 3]]
    assert validation.get_xydata().tolist() == [[3, 1.5]]
    figure.savefig(tmp_path / "loss.png")


def test_the_range_tests_figure_holds_its_zooms_and_its_proposal(workdir):
    pytest.importorskip("matplotlib")
    *zooms, proposal = figures.lr_finder_figure(workdir).axes[0].get_lines()
    assert [zoom.get_ydata().tolist() for zoom in zooms] == [list(zoom.losses) for zoom in ZOOMS]
    assert set(proposal.get_xdata()) == {5e-3}
    assert dataclasses.asdict(ZOOMS[0])["steepest"] in proposal.get_xdata()


def test_without_matplotlib_the_cure_is_named(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"chargpt_jax\[plot\]"):
        figures.loss_figure(workdir)
