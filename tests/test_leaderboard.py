"""benchmarks/leaderboard.py: the protocol, at a tiny size."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks import leaderboard, leaderboard_report
from benchmarks.leaderboard import Attempt, Journal
from benchmarks.markdown import between_markers
from chargpt_jax import api
from chargpt_jax.config import Config
from chargpt_jax.errors import UserError
from chargpt_jax.storage.workdir import Workdir
from tests.corpus_text import write_words

CONFIG = """
from chargpt_jax.config import Config
def get_config():
    config = Config()
    for name, value in {"block_size": 32, "n_embd": 16, "n_head": 2, "n_head_dim": 8, "n_ff": 32, "n_layer": 2}.items():
        setattr(config.model, name, value)
    config.data.batch_size = 4
    config.optimizer.learning_rate = 1e-2
    config.scheduler.max_steps = 12
    return config
"""


@pytest.fixture(scope="module")
def entered(tmp_path_factory):
    """Two seeds, trained and scored by the command; the folder, and the printed table."""
    folder = tmp_path_factory.mktemp("leaderboard")
    (folder / "mine.py").write_text(CONFIG, encoding="utf-8")
    write_words(folder / "words.txt")
    return folder


@pytest.fixture(scope="module")
def command(entered):
    return [
        *(f"--config={entered / 'mine.py'}", f"--source={entered / 'words.txt'}", "--seeds=0,1", "--title=Mine"),
        *(f"--workdirs={entered / 'runs'}", f"--out={entered / 'entries'}"),
    ]


@pytest.fixture(scope="module")
def entries(entered, command):
    leaderboard.main(command)
    return {one["seed"]: one for one in leaderboard.load_entries(entered / "entries")}


def run_of(entered, seed=0):
    return entered / "runs" / f"mine-words-{seed}" / "run"


@pytest.mark.slow
def test_held_out_tenth_is_scored_whole(entered, entries):
    tokens = Workdir(run_of(entered)).load_tokens()
    text = entries[0]["text"]
    assert text["characters"] == len(tokens)
    assert text["held_out"] == len(tokens) - int(0.9 * len(tokens))
    assert api.evaluate(run_of(entered), "latest")["tokens"] == text["held_out"]


@pytest.mark.slow
def test_losses_are_those_of_the_model_in_each_window(entered, entries):
    model, tokens = api.load(run_of(entered), "latest"), Workdir(run_of(entered)).load_tokens().astype(np.int32)
    predict = jax.jit(lambda p, t: jax.nn.log_softmax(nnx.merge(model.graphdef, p)(t)))
    first, T = int(0.9 * len(tokens)), 32

    def loss(at, start):
        window = np.zeros((1, T), np.int32)
        window[0, : at - start] = tokens[start:at]
        return -float(predict(model.params, window)[0, at - start - 1, tokens[at]])

    windows, halves = entries[0]["nats"]["windows"], entries[0]["nats"]["half_windows"]
    positions = range(first, len(tokens))
    alone = [loss(at, first - 1 + (at - first) // T * T) for at in positions]
    assert windows == pytest.approx(np.mean(alone), abs=1e-5)
    begin = first - T
    overlapping = [loss(at, begin + max(0, -((begin + T - at) // (T // 2))) * (T // 2)) for at in positions]
    assert halves == pytest.approx(np.mean(overlapping), abs=1e-5)
    assert entries[0]["bits"]["windows"] == pytest.approx(windows / np.log(2))


@pytest.mark.slow
def test_entry_says_what_was_trained(entries):
    assert {one["steps"] for one in entries.values()} == {12}
    assert entries[0]["processes"] == 1
    assert entries[0]["seconds"] > 0
    assert (entries[1]["seed"], entries[1]["config"], entries[1]["text"]["name"]) == (1, "mine.py", "words")
    assert entries[0]["nats"] != entries[1]["nats"]
    training, validation = (entries[0]["curve"][kind] for kind in ("training", "validation"))
    assert len(training) == 12 // Config().train.log_every
    assert validation[-1][1] == pytest.approx(entries[0]["nats"]["windows"], abs=1e-4)
    assert validation[-1][0] <= entries[0]["seconds"]


@pytest.mark.slow
def test_finished_entries_are_not_trained_again(entered, command, entries, capsys, monkeypatch):
    monkeypatch.setattr(leaderboard, "train", lambda *_: pytest.fail("trained again"))
    leaderboard.main(command)
    table = capsys.readouterr().out
    worst = max(one["bits"]["windows"] for one in entries.values())
    assert f"| {worst:.4f} |" in table
    assert "| Mine (`mine.py`) |" in table
    assert table == leaderboard_report.tables(entries.values()) + "\n"


@pytest.mark.slow
def test_interrupted_training_is_continued_and_its_time_counts(entered, entries, tmp_path):
    attempt = Attempt(str(entered / "mine.py"), str(entered / "words.txt"), 0)
    config = leaderboard.config_of(attempt.command)
    for number, _ in enumerate(api.train(config, tmp_path / "run", stop=lambda: None, max_minutes=0.0001)):
        assert number < 100
    assert not leaderboard.finished(attempt, tmp_path / "run")
    times = [{"began": 100.0}, {"ended": 130.0}, {"began": 1000.0}]
    (tmp_path / "times.jsonl").write_text("".join(json.dumps(line) + "\n" for line in times), encoding="utf-8")
    journal = leaderboard.train(attempt, tmp_path)
    assert leaderboard.finished(attempt, tmp_path / "run")
    assert journal.processes == 3
    assert journal.seconds() > 30.0
    assert api.evaluate(tmp_path / "run", "latest")["loss"] == entries[0]["nats"]["windows"]


def test_process_without_an_end_counts_up_to_the_newest_file(tmp_path):
    journal = Journal(tmp_path / "times.jsonl", lambda: 150.0)
    journal.add(began=100.0)
    assert Journal(journal.path, lambda: 150.0).seconds() == 50.0
    journal.settle()
    journal.add(began=200.0)
    journal.add(ended=210.0)
    assert Journal(journal.path, lambda: 999.0).seconds() == 60.0
    assert Journal(journal.path, lambda: 0.0).processes == 2


def test_command_without_a_config_is_refused(capsys):
    with pytest.raises(SystemExit) as refused:
        leaderboard.main(["--source=60"])
    assert refused.value.code == 2
    assert "give --config and --source" in capsys.readouterr().err


@pytest.mark.parametrize("seeds", ["a", "0,", "0;1"])
def test_seeds_must_be_numbers(seeds, capsys):
    with pytest.raises(SystemExit) as refused:
        leaderboard.main(["--config=tiny", "--source=60", f"--seeds={seeds}"])
    assert refused.value.code == 2
    assert f"invalid numbers value: '{seeds}'" in capsys.readouterr().err


def test_file_that_is_no_entry_is_named(tmp_path):
    (tmp_path / "mine.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"mine\.json is not an entry .*: remove it"):
        leaderboard.main(["--write", f"--out={tmp_path}"])


@pytest.mark.slow
def test_failing_training_is_reported_and_leaves_no_entry(entered, tmp_path):
    wrong = [f"--config={entered / 'mine.py'}", f"--source={tmp_path / 'missing.txt'}", "--seeds=0"]
    with pytest.raises(UserError, match="ended with exit code 2: see above"):
        leaderboard.main([*wrong, f"--workdirs={tmp_path / 'runs'}", f"--out={tmp_path / 'entries'}"])
    assert not (tmp_path / "entries").exists()


@pytest.mark.parametrize("count", [0, 1, 7, leaderboard.MAX_POINTS, 1001])
def test_many_losses_become_means_that_cover_all(count, tmp_path):
    rng = np.random.default_rng(count)
    lines = [{"event": "validation", "step": 1, "loss": 9.0, "bits_per_character": 13.0, "seconds": 0.5}]
    lines += [{"event": "step", "step": i + 1, "loss": rng.uniform(1, 3), "seconds": i + 1.0} for i in range(count)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found = leaderboard.losses(tmp_path, "step")
    assert len(found) == min(count, leaderboard.MAX_POINTS)
    assert [seconds for seconds, _ in found] == sorted(seconds for seconds, _ in found)
    if count <= leaderboard.MAX_POINTS:
        assert found == [[line["seconds"], round(line["loss"], 4)] for line in lines[1:]]
    else:
        assert np.mean([loss for _, loss in found]) == pytest.approx(np.mean([x["loss"] for x in lines[1:]]), rel=0.01)
    assert leaderboard.losses(tmp_path, "validation") == [[0.5, 9.0]]


def made(config: str, seed: int, bits: float, **changes: object) -> dict:
    scores = {"windows": bits, "half_windows": bits - 0.01}
    return {
        **{"title": "Mine", "config": config, "flags": [], "seed": seed, "parameters": 1000, "seconds": 599.6},
        **{"text": {"name": "Book", "sha256": "1", "characters": 10_000, "held_out": 1000}},
        **{"nats": {name: 0.7 * value for name, value in scores.items()}, "bits": scores},
        **{"curve": {"training": [[6.0, 2.0], [60.0, 1.0]], "validation": [[61.0, 0.7 * bits]]}},
        **{"machine": {"cpu": "EPYC", "cores": 2}, **changes},
    }


def test_rows_are_configs_with_the_mean_and_the_worst_of_their_seeds():
    entries = [made("a.py", 0, 2.0), made("b.py", 0, 1.5), made("a.py", 1, 2.1)]
    entries.append(made("a.py", 0, 1.9, machine={"cpu": "Xeon", "cores": 4}))
    rows = [line for line in leaderboard_report.tables(entries).splitlines() if line.startswith("| Mine")]
    assert rows == [
        "| Mine (`b.py`) | 2 cores of EPYC | 1,000 | 600 | 0 | 1.5000 | 1.5000 | 1.0500 | 1.4900 |",
        "| Mine (`a.py`) | 4 cores of Xeon | 1,000 | 600 | 0 | 1.9000 | 1.9000 | 1.3300 | 1.8900 |",
        "| Mine (`a.py`) | 2 cores of EPYC | 1,000 | 600 | 0, 1 | 2.0500 | 2.1000 | 1.4350 | 2.0400 |",
    ]


def test_write_renews_tables_and_figures(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n\n<!-- leaderboard: begin -->\n\nOld.\n\n<!-- leaderboard: end -->\n\nB.\n", encoding="utf-8")
    entries = [made("a.py", 0, 2.0), made("a.py", 1, 3.0)]
    leaderboard_report.write(entries, page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# A\n\n<!-- leaderboard: begin -->\n\n**Book**: 10,000 characters")
    assert text.endswith("|\n\n<!-- leaderboard: end -->\n\nB.\n")
    assert "Old." not in text
    assert [path.name for path in tmp_path.glob("*.svg")] == ["loss_a.svg"]
    assert "best validation 1.400 nats" in (tmp_path / "loss_a.svg").read_text(encoding="utf-8")


def test_page_and_figures_are_those_of_the_committed_entries():
    """To renew them: python -m benchmarks.leaderboard --write"""
    entries = leaderboard.load_entries(leaderboard.ENTRIES)
    page = leaderboard_report.PAGE.read_text(encoding="utf-8")
    assert between_markers(page, "leaderboard", leaderboard_report.tables(entries)) == page
    found = {p.name: p.read_text(encoding="utf-8") for p in leaderboard_report.PAGE.parent.glob("loss_*.svg")}
    assert found == leaderboard_report.pictures(entries)
