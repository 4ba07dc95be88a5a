"""A sweep end to end: each run is an ordinary training, kills and divergence included."""

import contextlib
import dataclasses
import itertools
import json
import shutil
import sys

import jax
import numpy as np
import pytest

from chargpt_jax import api
from chargpt_jax.config import Config
from chargpt_jax.config.sections import SweepConfig
from chargpt_jax.errors import NoCheckpoint, NonFiniteLoss, UserError
from chargpt_jax.events import Ended, RunDiverged, Saved, SweepStarted, SweepSteps, SweepValidated, Validated
from chargpt_jax.lab import many
from chargpt_jax.lab.folder import SweepFolder
from chargpt_jax.lab.setup import SweepSetup
from chargpt_jax.ops import choose
from chargpt_jax.storage.arrays.state_arrays import on_host
from chargpt_jax.storage.checkpoint import Checkpoints
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training import optimizer
from chargpt_jax.training.run import Run
from chargpt_jax.training.setup import Setup
from tests.corpus_text import small_config, write_words
from tests.devices.eight_devices import run_on_eight

RATES, SEEDS = (1e-2, 1e-3), 3
TOKENS = 256
"""Characters in a training step of one run."""


@pytest.fixture(autouse=True, scope="module")
def groups_of_two():
    """Train two runs at once; a CPU would train these one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "TOKENS_AT_ONCE", 2 * TOKENS)
        yield


def quiet(_: str) -> None:
    pass


def sweep_config(source, **changes):
    config = small_config(source)
    config.optimizer.learning_rate = None
    config.scheduler.max_steps, config.train.validate_every = 20, 0.2
    config.sweep.seeds, config.sweep.learning_rates = SEEDS, RATES
    for path, value in changes.items():
        section, _, name = path.partition("__")
        setattr(getattr(config, section), name, value)
    return config


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """Sweep without interruption."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, list(api.sweep(sweep_config(text), workdir, quiet))


@pytest.fixture(scope="module")
def ordinary(text, tmp_path_factory):
    """Train the run with seed 2 and the first learning rate alone."""
    workdir = tmp_path_factory.mktemp("ordinary")
    config = dataclasses.replace(sweep_config(text), seed=2, sweep=SweepConfig())
    config.optimizer.learning_rate = RATES[0]
    return workdir, list(api.train(config, workdir, quiet))


def swept(workdir):
    """Return the arrays of a sweep's newest checkpoint."""
    folder = SweepFolder(workdir)
    with contextlib.closing(Checkpoints(folder.checkpoints)) as store:
        return store.load("latest", lambda record: many.state_shapes(folder.load_config()))[2]


def trained(workdir):
    """Return the state of an ordinary run's newest checkpoint."""
    setup = Setup.of(Run.load(workdir))
    like = setup.initial_state(optimizer.empty(setup.config))
    with contextlib.closing(Checkpoints(Workdir(workdir).checkpoints)) as store:
        return store.load("latest", lambda record: like)[2]


def same_bits(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def logged(workdir):
    lines = SweepFolder(workdir).load_metrics()
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def without_key_bias(arrays, config: Config):
    """Return arrays without the keys' biases, whose gradient is 0 but for rounding: Adam makes steps of its signs."""
    width = config.model.n_head * config.model.n_head_dim
    found = dict(arrays)
    for name, x in arrays.items():
        if name.endswith("attn.qkv.bias"):
            found[name] = np.delete(x, slice(width, 2 * width), axis=-1)
    return found


def test_events_come_in_order(whole):
    _, events = whole
    started = next(event for event in events if isinstance(event, SweepStarted))
    assert started.runs == tuple((seed, rate) for rate in RATES for seed in range(SEEDS))
    steps = [event.step for event in events if isinstance(event, SweepSteps)]
    assert steps == sorted(set(steps))
    assert steps[-1] == 20
    assert [type(event) for event in events[-3:]] == [SweepValidated, Saved, Ended]
    assert events[-3].last
    assert events[-1].complete
    assert events[-1].best_loss == min(row.mean for row in events[-3].rows)


def test_a_run_has_the_losses_of_the_ordinary_training(whole, ordinary):
    alone = [event.loss for event in ordinary[1] if isinstance(event, Validated)]
    together = [event.losses[2] for event in whole[1] if isinstance(event, SweepValidated)]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6)
    alone = {line["step"]: line["loss"] for line in Workdir(ordinary[0]).load_metrics() if line["event"] == "step"}
    together = {line["step"]: line["losses"][2] for line in logged(whole[0]) if line["event"] == "sweep_step"}
    assert together.keys() == alone.keys() == set(range(1, 21))
    np.testing.assert_allclose(list(together.values()), list(alone.values()), rtol=0, atol=1e-6)


def test_a_run_ends_with_the_state_of_the_ordinary_training(whole, ordinary, text):
    one = jax.tree.map(lambda x: x[2], swept(whole[0]).runs)
    config = sweep_config(text)
    found, expected = (without_key_bias(on_host(state), config) for state in (one, trained(ordinary[0])))
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=0, atol=1e-6, err_msg=name)


def test_a_run_starts_with_the_bits_of_the_ordinary_training(whole, text):
    run = Run.load(SweepFolder(whole[0]))
    state = SweepSetup.of(run).initial_state()
    alone = Setup.of(dataclasses.replace(run, config=dataclasses.replace(run.config, seed=1)))
    expected = on_host(alone.initial_state(optimizer.empty(run.config)))
    for index in (1, SEEDS + 1):
        assert same_bits(on_host(jax.tree.map(lambda x, i=index: x[i], state.runs)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 6])
def test_losses_do_not_depend_on_the_runs_trained_at_once(whole, text, tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(choose, "TOKENS_AT_ONCE", at_once * TOKENS)
    events = list(api.sweep(sweep_config(text), tmp_path, quiet))
    assert SweepSetup.of(Run.load(SweepFolder(tmp_path))).at_once == at_once
    np.testing.assert_allclose(events[-3].losses, whole[1][-3].losses, rtol=0, atol=1e-6)


def test_results_and_picture_are_written(whole):
    workdir, events = whole
    found = json.loads((workdir / "sweep" / "results.json").read_text())
    assert found["step"] == 20
    assert [row["mean"] for row in found["learning_rates"]] == [row.mean for row in events[-3].rows]
    assert [run["loss"] for run in found["runs"]] == list(events[-3].losses)
    assert "95 % interval over 3 seeds" in (workdir / "sweep.svg").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [6, 9])
def test_a_stopped_sweep_resumes_bit_identically(whole, text, tmp_path, stop_after):
    calls = itertools.count()
    for _ in range(20):
        events = list(
            api.sweep(sweep_config(text), tmp_path, quiet, lambda: 15 if next(calls) % 10 >= stop_after else None)
        )
        if events[-1].complete:
            break
    assert events[-1].complete
    assert same_bits(on_host(swept(tmp_path)), on_host(swept(whole[0])))
    assert logged(tmp_path) == logged(whole[0])


@pytest.mark.slow
def test_a_sweep_killed_after_its_log_line_resumes_bit_identically(whole, text, tmp_path):
    with contextlib.closing(api.sweep(sweep_config(text), tmp_path, quiet)) as events:
        for event in events:
            if isinstance(event, SweepSteps) and event.step > 10:
                break
    assert same_bits(on_host(swept(tmp_path)), on_host(swept(whole[0]))) is False
    list(api.sweep(sweep_config(text), tmp_path, quiet))
    assert same_bits(on_host(swept(tmp_path)), on_host(swept(whole[0])))
    assert logged(tmp_path) == logged(whole[0])


def test_a_damaged_checkpoint_is_skipped(whole, text, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    record = tmp_path / "sweep" / "checkpoints" / "20" / "record.json"
    record.write_bytes(record.read_bytes().replace(b"config", b"conf1g", 1))
    warnings = []
    list(api.sweep(sweep_config(text), tmp_path, warnings.append))
    assert any("Skipping checkpoint 20" in text for text in warnings)
    assert same_bits(on_host(swept(tmp_path)), on_host(swept(whole[0])))


@pytest.mark.slow
def test_a_diverged_run_leaves_the_others_alone(whole, text, tmp_path):
    # Adam's steps have the size of the rate: with this one the parameters overflow within a few steps.
    config = sweep_config(text, sweep__learning_rates=(1e-2, 1e30, 1e-3))
    events = list(api.sweep(config, tmp_path, quiet))
    diverged = [event for event in events if isinstance(event, RunDiverged)]
    assert {event.learning_rate for event in diverged} == {1e30}
    assert sorted(event.seed for event in diverged) == list(range(SEEDS))
    good, bad, last = events[-3].rows
    assert (bad.runs, bad.diverged, good.diverged, last.diverged) == (0, SEEDS, 0, 0)
    own, expected = events[-3].losses, whole[1][-3].losses
    np.testing.assert_allclose((*own[:SEEDS], *own[2 * SEEDS :]), expected, rtol=0, atol=1e-6)
    assert "1e+30: all runs diverged" in (tmp_path / "sweep.svg").read_text()
    assert json.loads((tmp_path / "sweep" / "results.json").read_text())["runs"][SEEDS]["loss"] is None
    with pytest.raises(UserError, match="diverged at step"):
        api.extract(tmp_path, tmp_path / "out", 0, 1e30)


@pytest.mark.slow
def test_a_sweep_ends_if_all_runs_diverge(text, tmp_path):
    with pytest.raises(NonFiniteLoss, match="All 2 runs of the sweep have diverged"):
        list(api.sweep(sweep_config(text, sweep__learning_rates=(1e30,), sweep__seeds=2), tmp_path, quiet))


def test_a_sweep_is_not_resumed_with_other_runs(whole, text):
    with pytest.raises(UserError, match=r"sweep\.seeds: saved 3, given 4"):
        list(api.sweep(sweep_config(text, sweep__seeds=4), whole[0], quiet))


def test_a_sweep_without_a_rate_writes_nothing(text, tmp_path):
    with pytest.raises(UserError, match="needs a learning rate"):
        list(api.sweep(sweep_config(text, sweep__learning_rates=()), tmp_path / "new", quiet))
    assert not list(tmp_path.rglob("*.json"))


def test_an_extracted_run_is_an_ordinary_run(whole, ordinary, tmp_path, text):
    folder = api.extract(whole[0], tmp_path / "run", seed=2, learning_rate=RATES[0], step="latest")
    config = sweep_config(text)
    found, expected = (without_key_bias(on_host(trained(path)), config) for path in (folder, ordinary[0]))
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=0, atol=1e-6, err_msg=name)
    assert (folder / "config.json").read_text() == (ordinary[0] / "config.json").read_text()
    own, alone = (api.evaluate(path)["loss"] for path in (folder, ordinary[0]))
    assert own == pytest.approx(alone, abs=1e-6)
    assert api.load(folder).generate("ab c", max_new_tokens=5)[0].text.startswith("ab c")
    lines, expected_lines = (Workdir(path).load_metrics() for path in (folder, ordinary[0]))
    assert [(line["event"], line["step"]) for line in lines] == [(x["event"], x["step"]) for x in expected_lines]


@pytest.mark.slow
def test_an_extracted_run_can_be_trained_further(whole, tmp_path, text):
    folder = api.extract(whole[0], tmp_path / "run", seed=1, learning_rate=RATES[1], step="latest")
    config = Workdir(folder).load_config()
    config.scheduler.max_steps = 24
    events = list(api.train(config, folder, quiet))
    assert events[-1].step == 24
    assert events[-1].complete


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 0}, "has 2 learning rates"),
        ({"seed": 9, "learning_rate": 1e-2}, "has the seeds 0 to 2"),
        ({"seed": 0, "learning_rate": 2e-2}, "learning_rate is 0.02, but"),
    ],
)
def test_extract_names_what_the_sweep_has(whole, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        api.extract(whole[0], tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_loading_a_sweep_says_how_to_take_a_run_out(whole):
    with pytest.raises(NoCheckpoint, match="--mode=export --format=run"):
        api.load(whole[0])


@pytest.mark.parametrize(
    ("count", "devices", "used", "places"), [(6, 8, 6, 6), (9, 8, 5, 10), (16, 8, 8, 16), (3, 1, 1, 3)]
)
def test_runs_are_spread_evenly(count, devices, used, places):
    class Mesh:
        size = -(-count // -(-count // devices))

    assert Mesh.size == used
    found = many.padded(count, Mesh)
    assert len(found) == places
    assert list(found[:count]) == list(range(count))
    assert set(found[count:]) <= {count - 1}


@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one(whole, text, tmp_path):
    found, _ = run_on_eight(__file__, tmp_path, CHARGPT_TEXT=str(text))
    assert found["devices"] == 6
    assert found["padded_devices"] == 5
    np.testing.assert_allclose(found["losses"], whole[1][-3].losses, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found["padded_losses"][:SEEDS], whole[1][-3].losses[:SEEDS], rtol=0, atol=1e-6)
    assert found["resumed"]


def on_eight(workdir: str) -> None:
    """Sweep on eight devices; then nine runs on five of them, once without and once with a stop."""
    import os
    from pathlib import Path

    def ended(config, folder, stop=lambda: None):
        return list(api.sweep(config, folder, quiet, stop))

    text, folder = Path(os.environ["CHARGPT_TEXT"]), Path(workdir)
    events = ended(sweep_config(text), folder / "six")
    nine = sweep_config(text, sweep__seeds=9, sweep__learning_rates=RATES[:1])
    padded = ended(nine, folder / "nine")
    calls = itertools.count()
    ended(nine, folder / "stopped", lambda: 15 if next(calls) > 6 else None)
    ended(nine, folder / "stopped")
    devices = [int(next(e for e in x if isinstance(e, SweepStarted)).device.split()[0]) for x in (events, padded)]
    resumed = same_bits(on_host(swept(folder / "stopped")), on_host(swept(folder / "nine")))
    print(
        json.dumps(
            {
                "devices": devices[0],
                "padded_devices": devices[1],
                "losses": events[-3].losses,
                "padded_losses": padded[-3].losses,
                "resumed": resumed,
            }
        )
    )


if __name__ == "__main__":
    on_eight(sys.argv[1])
