"""The benchmarks work, at tiny size, and their arithmetic is right; how fast anything is, they say elsewhere."""

import json
import re

import numpy as np
import pytest

from benchmarks import contestants, peers, range_test, reliability, scaling, time_to_loss, where
from tests.corpus_text import write_words

TINY = {"seconds": 0.0, "count": 8}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("measure", "figures"),
    [
        ("training", {"tokens_per_second", "peak_mib", "own_mib"}),
        ("start", {"empty_seconds", "filled_seconds", "empty_mib", "filled_mib"}),
        ("generation", {"inside 1", "inside 32", "past 1", "inside 1 first"}),
    ],
)
def test_every_measure_of_ours_is_taken_in_processes_of_their_own(measure, figures):
    rows = list(peers.samples([measure], ["tiny"], {}, ["ours", "nanoGPT"], 1, **TINY))
    assert {row["contestant"] for row in rows} == {"ours"}
    found = {name: value for row in rows for name, value in row.items() if name in peers.UNITS}
    assert found.keys() == figures
    assert all(value > 0 for value in found.values())


def test_a_contestant_that_fails_is_told_and_the_rest_goes_on(tmp_path):
    """An empty folder is no checkout."""
    rows = list(peers.samples(["training"], ["tiny"], {"nanodo": str(tmp_path)}, ["nanodo"], 2, **TINY))
    assert [row["round"] for row in rows] == [0, 1]
    assert all("No module named 'nanodo'" in row["error"] for row in rows)
    assert "- nanodo, tiny, training: ModuleNotFoundError" in peers.report(rows, {"cpu": "some", "commits": {}})


ROWS = [
    {"contestant": "ours", "setup": "small", "round": 0, "tokens_per_second": 100.0, "peak_mib": 50.0},
    {"contestant": "nanoGPT", "setup": "small", "round": 0, "tokens_per_second": 50.0, "peak_mib": 200.0},
    {"contestant": "ours", "setup": "small", "round": 1, "tokens_per_second": 40.0, "peak_mib": 50.0},
    {"contestant": "nanoGPT", "setup": "small", "round": 1, "tokens_per_second": 10.0, "peak_mib": 100.0},
    {"contestant": "ours", "setup": "small", "round": 2, "tokens_per_second": 70.0, "peak_mib": 50.0},
]


def test_ratios_are_taken_within_a_round_and_say_by_how_much_ours_is_better():
    assert peers.ratios(ROWS, "small", "tokens_per_second", "nanoGPT") == [2.0, 4.0]
    assert peers.ratios(ROWS, "small", "peak_mib", "nanoGPT") == [4.0, 2.0]
    assert peers.ratios(ROWS, "nanogpt_cpu", "peak_mib", "nanoGPT") == []


def test_a_table_shows_median_range_and_ratio():
    text = "\n".join(peers.tables(ROWS))
    assert "**small: training, tokens/s**" in text
    assert "| ours | 70 | 40 to 100 |  |" in text
    assert "| nanoGPT | 30 | 10 to 50 | 3x (2x to 4x) |".replace("2x to 4x", "2 to 4") in text


def test_contestants_take_turns(monkeypatch):
    seen = []

    def child(task, environment=None):
        seen.append(task["contestant"])
        return {"tokens_per_second": 1.0}, 1.0

    monkeypatch.setattr(peers, "child", child)
    names = ["ours", "nanoGPT", "original"]
    list(peers.samples(["training"], ["small"], {"nanogpt": "a", "original": "b"}, names, 3, **TINY))
    assert [seen[i : i + 3] for i in (0, 3, 6)] == [names, names[1:] + names[:1], names[2:] + names[:2]]


@pytest.mark.parametrize("setup", contestants.SETUPS)
def test_what_is_written_inside_a_window_fits_into_it(setup):
    window = contestants.setup_of(setup).model.block_size
    how = peers.writings(setup, 500)
    assert all(how[name]["prompt"] + how[name]["count"] <= window for name in ("inside 1", "inside 32"))
    assert how["past 1"]["prompt"] == window


@pytest.mark.slow
def test_scaling_prints_a_row_for_every_size_and_an_exponent_for_every_field(capsys, tmp_path):
    scaling.main(["--small", "--rounds=1", f"--out={tmp_path}"])
    text = capsys.readouterr().out
    for field, sizes in scaling.SMALL.items():
        assert all(f"| {field} | {size:,} |" in text for size in sizes)
    rows = json.loads((tmp_path / "scaling.json").read_text())
    assert len(rows["training"]) == 2
    assert [row["place"] for row in rows["writing"]] == [1, 8, 15, 22]
    assert all(row["reading"] > 0 for row in rows["writing"])


def test_an_exponent_is_the_power_that_costs_follow():
    sizes = [1.0, 2.0, 4.0, 8.0]
    assert scaling.exponent(sizes, [3 * x**1.5 for x in sizes]) == pytest.approx(1.5)


@pytest.mark.parametrize("length", [70, 64 * 64 + 6, 200])
def test_the_evaluator_predicts_each_held_out_character_once(length):
    """Against the sum spelled out, with a model that knows a character by the one before it and its place."""
    rng = np.random.default_rng(0)
    text, first, window = rng.integers(0, 5, length), 6, 8
    table = rng.normal(size=(5, window, 5))
    found = time_to_loss.loss_of(lambda rows: table[rows, np.arange(window)], text, first, window)
    expected = 0.0
    for i in range(first, length):
        logits = table[text[i - 1], (i - first) % window]
        expected += np.log(np.exp(logits).sum()) - logits[text[i]]
    assert found == pytest.approx(expected / (length - first), rel=1e-12)


def test_a_time_counts_only_where_the_loss_was_reached():
    theirs = {"who": "nanoGPT", "round": 0, "parameters": 10, "updates": 5, "seconds": 60.0, "loss": 1.9}
    mine = {"who": "ours", "round": 0, "parameters": 10, "updates": 3, "seconds": 15.0, "loss": 1.89}
    assert "takes 0.25 (0.25 to 0.25) of nanoGPT's time" in time_to_loss.report([theirs, mine], {"cpu": "some"}, ())
    assert "did not reach" in time_to_loss.report([theirs, mine | {"loss": 1.91}], {"cpu": "some"}, ())


def test_failing_commands_tell_why(tmp_path):
    with pytest.raises(RuntimeError, match="no such thing"):
        time_to_loss.timed(["python3", "-c", "raise SystemExit('no such thing')"], tmp_path)


@pytest.mark.slow
def test_the_range_tests_cost_is_told_as_a_ratio(capsys, tmp_path):
    range_test.main(["--config=tiny", "--rounds=1", f"--text_file={write_words(tmp_path / 'w.txt')}"])
    shown = re.search(r"takes ([\d.]+) times as long", capsys.readouterr().out)
    assert float(shown[1]) > 0


def test_an_events_own_time_is_without_those_inside_it():
    events = [(0, 10, "outer"), (1, 3, "first"), (2, 1, "inmost"), (5, 4, "second"), (20, 2, "after")]
    assert dict(where.own_times(events)) == {"outer": 3, "first": 2, "inmost": 1, "second": 4, "after": 2}


@pytest.mark.slow
def test_the_work_of_an_update_is_shared_out_whole(capsys):
    where.main(["--setup=tiny", "--updates=1"])
    shares = [int(share) for share in re.findall(r"\| (\d+) % \|", capsys.readouterr().out)]
    assert len(shares) >= 4
    assert abs(sum(shares) - 100) <= len(shares) / 2


@pytest.mark.slow
def test_the_cost_of_a_save_is_told_and_some_faults_are_survived(capsys, tmp_path):
    reliability.main(["--saves=1", "--every=60", "--setups=tiny", f"--out={tmp_path}"])
    text = capsys.readouterr().out
    assert re.search(r"\| tiny \| [\d.]+ \(", text)
    tried = re.findall(r"\| (ENOSPC|EIO|SIGKILL) \| (\d+) \| (\d+) \|", text)
    assert len(tried) == 3
    assert all(int(count) == int(fine) > 1 for _, count, fine in tried)
    assert (tmp_path / "reliability.md").read_text().strip() == text.strip()
