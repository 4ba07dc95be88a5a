"""benchmarks/kinds.py compares models of the same size, and reduces the steps of slower ones."""

import json
from pathlib import Path

import pytest

from benchmarks import kinds
from tests.corpus_text import write_words


def row(kind, seed, seconds, loss, equal="tokens", steps=60):
    facts = {"kind": kind, "optimizer": "muon", "seed": seed, "seconds": seconds, "loss": loss}
    return {**facts, "equal": equal, "steps": steps, "parameters": 1000}


ROWS = [row("gpt", 0, 10.0, 2.0), row("ngpt", 0, 15.0, 1.9), row("gpt", 1, 20.0, 2.2), row("ngpt", 1, 26.0, 1.8)]


def test_slowness_is_the_median_ratio_within_a_seed():
    assert kinds.slowness(ROWS, "ngpt", "muon") == pytest.approx((1.5 + 1.3) / 2)
    assert kinds.slowness(ROWS, "gpt", "muon") == 1.0


def test_table_has_mean_and_worst_loss():
    text = kinds.table([*ROWS, row("ngpt", 0, 10.0, 1.95, "minutes", 43)])
    assert "| gpt | muon | 1,000 | tokens | 60 | 2.1000 (2.2000) | 1.00 x gpt |" in text
    assert "| ngpt | muon | 1,000 | tokens | 60 | 1.8500 (1.9000) | 1.40 x gpt |" in text
    assert "| ngpt | muon | 1,000 | minutes | 43 | 1.9500 (1.9500) | 1.40 x gpt |" in text


def test_trainings_differ_in_nothing_but_kind_optimizer_rate_and_width():
    fields = [vars(kinds.config_for(kind, "muon", 4e-3, 10, "text.txt", 0).model) for kind in ("gpt", "ngpt", "modern")]
    differing = {name for name in fields[0] if len({str(each[name]) for each in fields}) > 1}
    assert differing == {"kind", "n_ff"}


@pytest.mark.slow
def test_slower_kind_is_trained_again_with_fewer_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kinds, "CHOSEN", {("gpt", "muon"): 4e-3, ("ngpt", "muon"): 4e-3})
    monkeypatch.setattr(kinds, "slowness", lambda rows, kind, optimizer: 2.0 if kind == "ngpt" else 1.0)
    text = write_words(tmp_path / "words.txt", 400)
    kinds.main([f"--text_file={text}", "--seeds=1", "--steps=4", f"--out={tmp_path}"])
    rows = json.loads((tmp_path / "kinds.json").read_text(encoding="utf-8"))["rows"]
    assert [(one["kind"], one["equal"], one["steps"]) for one in rows] == [
        *(("gpt", "tokens", 4), ("ngpt", "tokens", 4), ("ngpt", "minutes", 2))
    ]
    assert abs(rows[0]["parameters"] / rows[1]["parameters"] - 1) < 0.05
    assert "| ngpt | muon |" in capsys.readouterr().out


def test_page_has_the_table_of_the_committed_rows():
    root = Path(kinds.__file__).parents[1]
    rows = json.loads((root / "benchmarks" / "results" / "kinds.json").read_text(encoding="utf-8"))["rows"]
    assert kinds.table(rows) in (root / "docs" / "leaderboard.md").read_text(encoding="utf-8")
