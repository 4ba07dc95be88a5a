"""The benchmarks run at tiny sizes and compute ratios, ranges and exponents correctly."""

import json
import re

import numpy as np
import pytest

from benchmarks import (
    baselines,
    compiled,
    implementations,
    range_test,
    reliability,
    scale_report,
    scaling,
    tables,
    time_to_loss,
    where,
)
from tests.corpus_text import write_words

TINY = {"seconds": 0.0, "count": 8}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("measure", "figures"),
    [
        ("training", {"tokens_per_second", "peak_mib", "own_mib"}),
        ("start", {"cold_seconds", "warm_seconds", "cold_mib", "warm_mib"}),
        ("generation", {"within_1", "within_32", "beyond_1", "first_seconds"}),
    ],
)
def test_every_measure_of_chargpt_jax_runs_in_its_own_process(measure, figures):
    rows = list(baselines.samples([measure], ["tiny"], {}, ["chargpt_jax", "nanoGPT"], 1, **TINY))
    assert {row["implementation"] for row in rows} == {"chargpt_jax"}
    found = {name: value for row in rows for name, value in row.items() if name in baselines.UNITS}
    assert found.keys() == figures
    assert all(value > 0 for value in found.values())


def test_a_failing_baseline_is_reported_and_the_rest_runs(tmp_path):
    """An empty folder is no checkout."""
    rows = list(baselines.samples(["training"], ["tiny"], {"nanodo": str(tmp_path)}, ["nanodo"], 2, **TINY))
    assert [row["round"] for row in rows] == [0, 1]
    assert all("No module named 'nanodo'" in row["error"] for row in rows)
    assert "- nanodo, tiny, training: ModuleNotFoundError" in baselines.report(rows, {"cpu": "some", "commits": {}})


ROWS = [
    {"implementation": "chargpt_jax", "config": "small", "round": 0, "tokens_per_second": 100.0, "peak_mib": 50.0},
    {"implementation": "nanoGPT", "config": "small", "round": 0, "tokens_per_second": 50.0, "peak_mib": 200.0},
    {"implementation": "chargpt_jax", "config": "small", "round": 1, "tokens_per_second": 40.0, "peak_mib": 50.0},
    {"implementation": "nanoGPT", "config": "small", "round": 1, "tokens_per_second": 10.0, "peak_mib": 100.0},
    {"implementation": "chargpt_jax", "config": "small", "round": 2, "tokens_per_second": 70.0, "peak_mib": 50.0},
]


def test_ratios_are_computed_within_a_round():
    assert baselines.ratios(ROWS, "small", "tokens_per_second", "nanoGPT") == [2.0, 4.0]
    assert baselines.ratios(ROWS, "small", "peak_mib", "nanoGPT") == [4.0, 2.0]
    assert baselines.ratios(ROWS, "nanogpt_cpu", "peak_mib", "nanoGPT") == []


def test_a_table_shows_median_range_and_ratio():
    text = "\n".join(baselines.tables(ROWS))
    assert "**small: training, tokens/s**" in text
    assert "| chargpt_jax | 70 | 40 to 100 |  |" in text
    assert "| nanoGPT | 30 | 10 to 50 | 3x (2x to 4x) |".replace("2x to 4x", "2 to 4") in text


def test_implementations_alternate(monkeypatch):
    seen = []

    def child(task, environment=None):
        seen.append(task["implementation"])
        return {"tokens_per_second": 1.0}, 1.0

    monkeypatch.setattr(baselines, "child", child)
    names = ["chargpt_jax", "nanoGPT", "original"]
    list(baselines.samples(["training"], ["small"], {"nanogpt": "a", "original": "b"}, names, 3, **TINY))
    assert [seen[i : i + 3] for i in (0, 3, 6)] == [names, names[1:] + names[:1], names[2:] + names[:2]]


@pytest.mark.parametrize("name", implementations.BATCH_SIZES)
def test_generation_within_the_context_fits_into_it(name):
    context = implementations.config_for(name).model.block_size
    how = baselines.generation_tasks(name, 500)
    assert all(how[task]["prompt"] + how[task]["count"] <= context for task in ("within_1", "within_32"))
    assert how["beyond_1"]["prompt"] == context


@pytest.mark.slow
def test_scaling_prints_a_row_per_size_and_an_exponent_per_field(capsys, tmp_path):
    scaling.main(["--small", "--rounds=1", f"--out={tmp_path}"])
    text = capsys.readouterr().out
    for field, sizes in scaling.SMALL.items():
        assert all(f"| {field} | {size:,} |" in text for size in sizes)
    rows = json.loads((tmp_path / "scaling.json").read_text())
    assert len(rows["training"]) == 2
    assert [row["position"] for row in rows["generation"]] == [1, 8, 15, 22]
    assert all(row["reading"] > 0 for row in rows["generation"])


def test_exponent_is_the_power_of_the_cost():
    sizes = [1.0, 2.0, 4.0, 8.0]
    assert scaling.exponent(sizes, [3 * x**1.5 for x in sizes]) == pytest.approx(1.5)


@pytest.mark.parametrize("length", [70, 64 * 64 + 6, 200])
def test_loss_of_predicts_each_validation_character_once(length):
    """Compare with an explicit sum, for a model that depends on the previous character and the position."""
    rng = np.random.default_rng(0)
    text, first, window = rng.integers(0, 5, length), 6, 8
    table = rng.normal(size=(5, window, 5))
    found = time_to_loss.loss_of(lambda rows: table[rows, np.arange(window)], text, first, window)
    expected = 0.0
    for i in range(first, length):
        logits = table[text[i - 1], (i - first) % window]
        expected += np.log(np.exp(logits).sum()) - logits[text[i]]
    assert found == pytest.approx(expected / (length - first), rel=1e-12)


def test_time_counts_only_if_the_loss_was_reached():
    theirs = {"who": "nanoGPT", "round": 0, "parameters": 10, "steps": 5, "seconds": 60.0, "loss": 1.9}
    mine = {"who": "chargpt_jax", "round": 0, "parameters": 10, "steps": 3, "seconds": 15.0, "loss": 1.89}
    assert "takes 0.25 (0.25 to 0.25) of nanoGPT's time" in time_to_loss.report([theirs, mine], {"cpu": "some"}, ())
    assert "did not reach" in time_to_loss.report([theirs, mine | {"loss": 1.91}], {"cpu": "some"}, ())


def test_timed_raises_with_the_error_of_a_failing_command(tmp_path):
    with pytest.raises(RuntimeError, match="no such thing"):
        time_to_loss.timed(["python3", "-c", "raise SystemExit('no such thing')"], tmp_path)


@pytest.mark.slow
def test_range_test_cost_is_printed_as_a_ratio(capsys, tmp_path):
    range_test.main(["--config=tiny", "--rounds=1", f"--text_file={write_words(tmp_path / 'w.txt')}"])
    shown = re.search(r"takes ([\d.]+)x as long", capsys.readouterr().out)
    assert float(shown[1]) > 0


def test_own_time_of_an_event_excludes_nested_events():
    events = [(0, 10, "outer"), (1, 3, "first"), (2, 1, "inmost"), (5, 4, "second"), (20, 2, "after")]
    assert dict(where.own_times(events)) == {"outer": 3, "first": 2, "inmost": 1, "second": 4, "after": 2}


@pytest.mark.slow
def test_shares_of_a_training_step_sum_to_100_percent(capsys):
    where.main(["--config=tiny", "--steps=1"])
    shares = [int(share) for share in re.findall(r"\| (\d+) % \|", capsys.readouterr().out)]
    assert len(shares) >= 4
    assert abs(sum(shares) - 100) <= len(shares) / 2


@pytest.mark.slow
def test_reliability_prints_save_costs_and_survived_faults(capsys, tmp_path):
    reliability.main(["--saves=1", "--every=60", "--configs=tiny", f"--out={tmp_path}"])
    text = capsys.readouterr().out
    assert re.search(r"\| tiny \| [\d.]+ \(", text)
    tried = re.findall(r"\| (ENOSPC|EIO|SIGKILL) \| (\d+) \| (\d+) \|", text)
    assert len(tried) == 3
    assert all(int(count) == int(fine) > 1 for _, count, fine in tried)
    assert (tmp_path / "reliability.md").read_text().strip() == text.strip()


def test_details_page_is_what_tables_prints():
    """To renew the page: python -m benchmarks.tables > docs/benchmark_details.md"""
    assert tables.PAGE.read_text(encoding="utf-8") == tables.page()


def test_every_results_file_is_a_section_or_named_by_a_page():
    names = {path.stem for path in tables.RESULTS.glob("*.json")}
    pages = {"seed_statistics": "fidelity", "kinds": "leaderboard", "precision": "precision", "sweep": "sweep"}
    pages["temperature"] = "temperature"
    if scale_report.RESULTS.exists():  # none before the first
        pages["scale"] = "leaderboard"
    assert names == {*tables.SECTIONS, *pages}
    for name, page in pages.items():
        assert f"(../benchmarks/results/{name}.json)" in (tables.PAGE.parent / f"{page}.md").read_text("utf-8")


def test_tables_arrange_measurements_by_implementation():
    rows = [
        tables.Measurement(config="small", figure="peak_mib", implementation="chargpt_jax", values=[50.0]),
        tables.Measurement(
            config="small", figure="peak_mib", implementation="nanoGPT", values=[150.0, 99.5, 1200.0], ratio=[3.0, 2, 4]
        ),
    ]
    columns, lines = tables.measured(rows)
    assert columns == ["config", "implementation", "peak memory, MiB", "chargpt_jax: less memory by"]
    assert lines == [["small", "chargpt_jax", "50", ""], ["small", "nanoGPT", "150 (99.5 to 1,200)", "3x (2 to 4)"]]


def compiled_report(device: str, found: int | None) -> compiled.Report:
    sizes = {"argument_bytes": 2_000_000, "needed_bytes": 2_500_000}
    work = {"instructions": 70, "fusions": 50, "custom_calls": 5, "flop": 2.5e9, "bound_seconds": 2e-3}
    names = ("training", "validation", "prefill", "decoding", "beyond the context")
    program = {**sizes, **work, "least_bytes": {"parameters": 1_000_000, "batch": 200_000}}
    largest = {"batch_size": found} if found else None
    return {"device": device, "programs": [{"name": name, **program} for name in names], "largest_batch": largest}


def test_table_of_compiled_programs_adds_up_memory_and_bytes():
    reports = {
        ("tiny", "h100"): compiled_report("NVIDIA H100", 1234),
        ("tiny", "v5e:1x1"): compiled_report("TPU v5", None),
    }
    rows = list(compiled.training_table(reports))[2:]
    assert rows == [
        "| `tiny` | `h100` | 2.5 | 70 | 2.5 | 1.2 | 2 | 1,234 |",
        "| `tiny` | `v5e:1x1` | 2.5 | 55 | 2.5 | 1.2 | 2 |  |",
    ]
    for table in (compiled.training_table, compiled.other_table):
        assert len({row.count("|") for row in table(reports)}) == 1


def test_report_that_is_there_is_not_made_again(tmp_path):
    (tmp_path / "none-v5e-1x1.json").write_text(json.dumps({"devices": 1}))
    assert compiled.report("none", "v5e:1x1", tmp_path) == {"devices": 1}
