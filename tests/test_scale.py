"""benchmarks/scale.py and scale_report.py: trainings of the dial, their results, and the page that shows them."""

import json
import xml.etree.ElementTree as ET

import pytest

from benchmarks import leaderboard, scale, scale_report, tables
from benchmarks.scale import Cell
from chargpt_jax.config.files import load_config
from chargpt_jax.config.saved import flatten
from chargpt_jax.errors import UserError
from tests.corpus_text import write_words

PAGE = "# Page\n\nBefore.\n\n<!-- scale: begin -->\n\nOld.\n\n<!-- scale: end -->\n\nAfter.\n"


def result(size=0.3, minutes=1.0, seed=0, variant="dial", bits=2.0, text="Book", cores=2):
    """Invent a result."""
    cell = Cell(size, minutes, seed, variant)
    return {
        **{"size": size, "minutes": minutes, "seed": seed, "variant": variant, "settings": cell.settings()},
        **{"text": {"name": text, "sha256": text, "characters": 10_000, "held_out": 1_000}},
        **{"parameters": round(1e6 * size), "steps": 100, "seconds": 60.0, "machine": {"cpu": "CPU", "cores": cores}},
        **{"nats": {"windows": bits / 1.5}, "bits": {"windows": bits, "half_windows": bits - 0.01}},
    }


RESULTS = [
    *(result(0.1, 1, bits=2.5), result(0.1, 10, bits=2.25), result(0.3, 1, bits=2.4), result(0.3, 1, 1, bits=2.6)),
    *(result(1, 10, bits=2.125), result(0.3, 1, 1, "half batch", 2.75), result(0.1, 10, 0, "more layers", 2.125)),
]


def rows_of(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


# Trainings


@pytest.mark.parametrize("variant", scale_report.VARIANTS)
def test_variant_changes_its_own_quantity(variant):
    dial, other = (flatten(Cell(0.3, 1.0, 0, name).config()) for name in ("dial", variant))
    changed = {name for name, value in other.items() if value != dial[name]}
    field = {"rate": "optimizer.learning_rate", "batch": "data.batch_size", "layers": "model.n_layer"}
    name = field.get(variant.split()[-1])
    if name is None:
        assert not changed
    else:
        assert name in changed
        assert (other[name] > dial[name]) == (variant.split()[0] in ("double", "more"))
        assert name == "model.n_layer" or changed == {name}
        assert not any(field.startswith("scheduler.") for field in changed)


@pytest.mark.parametrize("size", [0.05, 0.1, 0.3, 1.0, 3.0, 10.0])
def test_command_of_a_variant_gives_its_config(size, tmp_path):
    for variant in scale_report.VARIANTS:
        cell = Cell(size, 2.5, 3, variant)
        config = leaderboard.config_of(cell.attempt("60", "").command)
        assert (config.scheduler.minutes, config.seed, config.data.train_split) == (2.5, 3, 0.9)
        own, expected = flatten(config), flatten(cell.config())
        assert {name: own[name] for name in scale.SETTINGS} == {name: expected[name] for name in scale.SETTINGS}


def test_names_of_all_cells_differ():
    every = list(scale.cells((0.1, 0.3, 1.0), (10.0, 1.0), (0, 1), scale_report.VARIANTS))
    assert len({cell.name("60") for cell in every}) == len(every) == 3 * 2 * 2 * 7
    assert [cell.minutes for cell in every] == sorted(cell.minutes for cell in every)


def test_leaderboard_has_a_name_for_each_argument():
    names = [leaderboard.Attempt(config, "60", 0).name for config in ("sized:0.3", "configs/sized.py:0.1", "book")]
    assert names == ["sized-0.3-60-0", "sized-0.1-60-0", "book-60-0"]
    assert leaderboard.Attempt("configs/book.py", "pg60.txt", 2).name == "book-pg60-2"


def invented(monkeypatch, failing=()):
    """Replace the training; return the list of the cells that are trained."""
    trained = []

    def measured(cell, source, text, workdir):
        trained.append(cell)
        if cell.size in failing:
            raise UserError("It failed.")
        return result(cell.size, cell.minutes, cell.seed, cell.variant)

    monkeypatch.setattr(scale, "measured", measured)
    return trained


def test_finished_cells_are_not_trained_again(tmp_path, monkeypatch):
    trained = invented(monkeypatch)
    command = ["--source=60", "--sizes=0.1,0.3", "--minutes=1", f"--out={tmp_path}"]
    scale.main(command)
    assert trained == [Cell(0.1, 1.0, 0), Cell(0.3, 1.0, 0)]
    scale.main(command)
    assert len(trained) == 2
    scale.main([*command, "--seeds=0,1"])
    assert [cell.seed for cell in trained[2:]] == [1, 1]
    scale.main([*command, "--variants"])
    assert [cell.variant for cell in trained[4:]] == [*scale_report.NEIGHBOURS] * 2


def test_failing_training_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    trained = invented(monkeypatch, failing=(0.1,))
    command = ["--source=60", "--sizes=0.1,0.3", "--minutes=1", f"--out={tmp_path}"]
    for expected in (2, 3):
        with pytest.raises(UserError, match=r"Trainings failed \(60-0.1-1-0-dial\): see above"):
            scale.main(command)
        assert len(trained) == expected
    assert "It failed." in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["60-0.3-1-0-dial.json"]


def test_result_of_other_settings_is_refused(tmp_path, monkeypatch):
    invented(monkeypatch)
    command = ["--source=60", "--sizes=0.1", "--minutes=1", f"--out={tmp_path}"]
    scale.main(command)
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text(encoding="utf-8"))
    found["settings"]["model.n_layer"] += 1
    path.write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(UserError, match="has other settings than configs/sized.py sets: remove it"):
        scale.main(command)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="is not a result"):
        scale.main(command)


@pytest.mark.parametrize("flag", ["--sizes=0.01", "--sizes=0.3,nan", "--minutes=0", "--minutes=-1"])
def test_wrong_numbers_train_nothing(flag, tmp_path, monkeypatch):
    trained = invented(monkeypatch)
    with pytest.raises(UserError, match="must be"):
        scale.main(["--source=60", "--sizes=0.1", "--minutes=1", flag, f"--out={tmp_path}"])
    assert not trained


def test_command_without_a_source_is_refused(capsys):
    with pytest.raises(SystemExit) as refused:
        scale.main(["--sizes=1"])
    assert refused.value.code == 2
    assert "give --source, or --write" in capsys.readouterr().err


# The page


def test_best_of_each_number_of_minutes_is_bold_and_missing_cells_are_empty():
    head, _, *rows = rows_of(scale_report.sizes_table(RESULTS))
    assert head[-2:] == ["bits, 1 minute", "bits, 10 minutes"]
    assert [[row[0], *row[-2:]] for row in rows] == [
        *(["0.1", "**2.5000**", "2.2500"], ["0.3", "**2.5000**", ""], ["1", "", "**2.1250**"])
    ]
    assert rows[1][2] == "5 x 80"


def test_details_have_the_seeds_and_the_epochs():
    head, _, *rows = rows_of(scale_report.details_table(RESULTS))
    row = dict(zip(head, rows[2], strict=True))
    assert (row["seeds"], row["bits"], row["worst"], row["bits, half windows"]) == (
        "0, 1",
        "2.5000",
        "2.6000",
        "2.4900",
    )
    epochs = 100 * load_config("sized:0.3").data.batch_size * 512 / 9_000
    assert float(row["epochs"]) == pytest.approx(epochs, rel=0.01)
    assert len(rows) == 4


def test_difference_is_over_the_seeds_that_both_have():
    assert scale_report.difference(RESULTS, (0.3, 1), "half batch") == pytest.approx(0.15)
    assert scale_report.difference(RESULTS, (0.1, 10), "more layers") == pytest.approx(-0.125)
    assert scale_report.difference(RESULTS, (0.3, 10), "half batch") is None
    head, _, *rows = rows_of(scale_report.variants_table(RESULTS))
    found = [{name: cell for name, cell in zip(head, row, strict=True) if cell} for row in rows]
    assert found[0] == {"size": "0.1", "minutes": "10", "dial": "2.2500", "more layers": "-0.1250"}
    assert found[1] == {"size": "0.3", "minutes": "1", "dial": "2.5000", "half batch": "+0.1500"}
    assert scale_report.variants_table(RESULTS[:5]) == ""


def test_picture_has_a_line_per_number_of_minutes_that_falls_with_the_bits():
    root = ET.fromstring(scale_report.picture(RESULTS))
    curves = [path.get("d") for path in root.iter() if "cg-curve" in (path.get("class") or "")]
    points = [[tuple(map(float, point.split())) for point in curve[1:].split("L")] for curve in curves]
    assert [len(line) for line in points] == [2, 2]
    (left, high), (right, low) = points[1]
    assert left < right
    assert high < low  # pixels grow downwards: fewer bits are lower
    spacing = (points[0][1][0] - points[0][0][0]) / (right - left)
    assert spacing == pytest.approx(0.477, abs=0.01)  # log 3 / log 10
    assert "1 minute: 2.500 bits at 100,000" in ET.tostring(root, encoding="unicode")


def test_picture_of_one_result_is_a_dot():
    root = ET.fromstring(scale_report.picture(RESULTS[:1]))
    circles = [one for one in root.iter() if one.tag.endswith("circle")]
    assert len(circles) == 2  # the result, and its mark in the legend
    (curve,) = [path.get("d") for path in root.iter() if "cg-curve" in (path.get("class") or "")] or [""]
    assert "L" not in curve


def test_texts_and_machines_are_kept_apart():
    found = [result(), result(text="Other"), result(cores=4), result(text="Book!", seed=1)]
    assert list(scale_report.groups(found)) == ["book", "other", "book_on_2", "book_on_3"]
    assert scale_report.section(found).count("![") == len(scale_report.pictures(found)) == 4


def test_writing_renews_results_page_and_figures(tmp_path):
    page, results = tmp_path / "page.md", tmp_path / "scale.json"
    page.write_text(PAGE, encoding="utf-8")
    (tmp_path / "scale_old.svg").touch()
    for given in (RESULTS, RESULTS[::-1]):
        scale_report.write(given, results, page)
        text = page.read_text(encoding="utf-8")
        assert text.startswith("# Page\n\nBefore.\n\n<!-- scale: begin -->\n\n**Book**: 10,000 characters")
        assert text.endswith("\n\n<!-- scale: end -->\n\nAfter.\n")
        assert "Old." not in text
        assert "](scale_book.svg)" in text
        assert {path.name for path in tmp_path.glob("*.svg")} == {"scale_book.svg"}
        loaded = scale_report.load(results)
        assert sorted(map(str, loaded)) == sorted(map(str, RESULTS))
        assert scale_report.section(loaded) in text
    assert scale_report.renewed(PAGE, []).count(scale_report.EMPTY) == 1
    with pytest.raises(ValueError, match="must have the markers"):
        scale_report.renewed("# Page\n", RESULTS)


def test_nothing_is_written_without_results(tmp_path):
    with pytest.raises(UserError, match="has no results: train first"):
        scale.main(["--write", f"--out={tmp_path}"])
    (tmp_path / "entry.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="has other files than results of this benchmark"):
        scale.main(["--write", f"--out={tmp_path}"])


def test_page_and_figures_are_those_of_the_committed_results():
    """To renew them: python -m benchmarks.scale --write"""
    results, page = scale_report.load(), scale_report.PAGE.read_text(encoding="utf-8")
    assert scale_report.renewed(page, results) == page
    docs = scale_report.PAGE.parent
    found = {path.name: path.read_text(encoding="utf-8") for path in docs.glob("scale_*.svg")}
    assert found == scale_report.pictures(results)
    assert scale_report.RESULTS.parent == tables.RESULTS


@pytest.mark.slow
def test_tiny_training_is_scored_and_kept(tmp_path, monkeypatch):
    text = write_words(tmp_path / "words.txt")
    command = [f"--source={text}", "--sizes=0.05", "--minutes=0.05", f"--workdirs={tmp_path / 'runs'}"]
    command.append(f"--out={tmp_path / 'out'}")
    scale.main(command)
    (found,) = leaderboard.load_entries(tmp_path / "out")
    assert found["settings"] == Cell(0.05, 0.05, 0).settings()
    assert found["steps"] >= 1
    assert 0 < found["bits"]["windows"] < 8
    monkeypatch.setattr(scale, "measured", lambda *_: pytest.fail("trained again"))
    scale.main(command)
    assert "| 0.05 |" in scale_report.section([found])
