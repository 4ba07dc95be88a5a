"""benchmarks/seed_statistics.py: its PyTorch side follows the rules of chargpt_jax, and its statistics are correct."""

import dataclasses
import json
from itertools import islice
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")

import chargpt_jax  # noqa: E402
from benchmarks import fidelity, seed_statistics  # noqa: E402
from chargpt_jax.config import DataConfig, validate  # noqa: E402
from chargpt_jax.config.files import load_config  # noqa: E402
from chargpt_jax.config.saved import differences  # noqa: E402
from chargpt_jax.data.batches import batch_at  # noqa: E402
from chargpt_jax.events import TrainStarted, Validated  # noqa: E402
from chargpt_jax.ops.dropout import seeds_for  # noqa: E402
from tests import pytorch_reference  # noqa: E402
from tests.corpus_text import small_config, write_words  # noqa: E402
from tests.pairing import built, by_name  # noqa: E402

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def same_draws_on_one_thread():
    """Use one PyTorch thread: for small arrays, several threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


# PyTorch's batches


def test_windows_are_consecutive_and_in_random_order():
    tokens, block_size = torch.arange(1000), 16
    for _ in range(20):
        starts = [int(window[0]) for window in islice(seed_statistics.windows(tokens, block_size), 61)]
        phase = min(starts) % block_size
        places = sorted((start - phase) // block_size for start in starts)
        assert [start % block_size for start in starts] == [phase] * 61
        assert len(set(places) & set(range(62))) == 61  # 62 windows fit where the phase is small
        assert starts != sorted(starts)


def test_each_pass_has_a_new_offset_and_full_windows():
    """A pass over 50 characters has two windows of 17."""
    rows = list(islice(seed_statistics.windows(torch.arange(50), 16), 600))
    assert {len(row) for row in rows} == {17}
    assert {int(row[0]) % 16 for row in rows} == set(range(16))
    assert {int(row[-1]) for row in rows} == set(range(16, 50))


def pad_lengths(inputs: np.ndarray, targets: np.ndarray) -> list[int]:
    """Return the number of padding inputs of each sequence, after checking the other rules of padding."""
    lengths = (inputs == 0).sum(axis=1)
    place = np.arange(inputs.shape[1])
    np.testing.assert_array_equal(inputs == 0, place < lengths[:, None])
    np.testing.assert_array_equal(targets == 0, place < lengths[:, None] - 1)
    return lengths.tolist()


def test_both_sides_pad_by_the_same_rule_on_a_copy():
    """The tolerance 0.027 is three standard deviations of 3000 samples with probability 0.4."""
    text = np.arange(1, 2000)
    tokens = torch.from_numpy(text.copy())
    inputs, targets = next(seed_statistics.torch_batches(tokens, 16, 3000, 0.4))
    theirs = pad_lengths(inputs.numpy(), targets.numpy())
    data = DataConfig(batch_size=3000, padding_chance=0.4)
    drawn = jax.jit(lambda step: batch_at(jnp.asarray(text), jax.random.key(0), step, 16, data))(0)
    ours = pad_lengths(*map(np.asarray, drawn))
    assert set(theirs) == set(ours) == set(range(16 // 3))
    for lengths in (theirs, ours):
        assert np.mean(np.array(lengths) > 0) == pytest.approx(0.4, abs=0.027)
    np.testing.assert_array_equal(tokens.numpy(), text)
    assert (targets[inputs > 0] - inputs[inputs > 0] == 1).all()


# PyTorch's dropout


@pytest.mark.slow
def test_dropout_changes_logits_as_much_on_both_sides():
    """From the same parameters, the mean and the standard deviation over 2,000 masks, at each of 24 elements."""
    tokens = np.broadcast_to(fidelity.batch(0)[0][1], (2000, 24))
    graphdef, _ = jax.eval_shape(lambda: built(dataclasses.replace(fidelity.CONFIG, dropout=0.5), 0, jnp.float32))
    _, params = fidelity.our_model("float32")
    seeds = seeds_for(jax.random.key(0), 2000)
    ours = np.asarray(jax.jit(lambda p: nnx.merge(graphdef, p)(tokens, seeds))(params))
    model = fidelity.torch_model(torch.float32, dropout=0.5)
    with torch.no_grad():
        theirs = model.train()(torch.from_numpy(tokens.copy()).long()).numpy()
    deviations = [np.sqrt(x.var(axis=0).mean(axis=-1)) for x in (ours, theirs)]
    np.testing.assert_allclose(*deviations, rtol=0.03)
    errors = np.sqrt((ours.var(axis=0) + theirs.var(axis=0)) / 2000)
    assert np.abs((ours.mean(axis=0) - theirs.mean(axis=0)) / errors).max() < 5


def test_dropout_is_off_outside_training():
    tokens, _ = fidelity.torch_batch(0)
    with torch.no_grad():
        plain, dropping = (fidelity.torch_model(torch.float32, dropout=rate).eval()(tokens) for rate in (0.0, 0.5))
    assert torch.equal(plain, dropping)


# The same run on both sides


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train a tiny model with the package; return its config, text, folder and events."""
    folder = tmp_path_factory.mktemp("seed_statistics")
    config = small_config(write_words(folder / "words.txt", 600), mask_unused_ids=False)
    config.scheduler.max_steps, config.scheduler.epochs = None, 2.0
    config.train.validate_every = 1.0
    events = list(chargpt_jax.train(config, folder / "run"))
    return config, chargpt_jax.corpus_text(folder / "run"), folder / "run", events


@pytest.mark.slow
def test_both_sides_compute_the_same_validation_loss(run):
    config, text, workdir, _ = run
    model, tokens = seed_statistics.torch_model(config, text)
    found = by_name(chargpt_jax.load(workdir).params)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(found[name]))
    n_train, block_size = int(0.8 * len(tokens)), config.model.block_size
    assert (len(tokens) - n_train) % block_size  # the last window is a short one
    loss = seed_statistics.validation_loss(model.eval(), tokens, n_train, block_size)
    assert loss == pytest.approx(chargpt_jax.evaluate(workdir)["loss"], rel=1e-5)


def test_both_sides_run_the_same_number_of_steps_and_validations(run, monkeypatch):
    config, text, _, events = run
    losses, update = [], pytorch_reference.update
    monkeypatch.setattr(pytorch_reference, "update", lambda *how: losses.append(update(*how)) or losses[-1])
    curve = seed_statistics.theirs(config, text, 0)
    (started,) = (event for event in events if isinstance(event, TrainStarted))
    assert len(losses) == started.total_steps
    assert len(curve) == len([event for event in events if isinstance(event, Validated)]) == 2
    assert losses[-1] < losses[0] - 1


# Figures


def test_the_permutation_test_counts_splits():
    assert seed_statistics.permutation_p([1, 2], [3, 4]) == pytest.approx(2 / 6)
    assert seed_statistics.permutation_p([3, 4], [1, 2]) == pytest.approx(2 / 6)
    assert seed_statistics.permutation_p([1, 4], [2, 3]) == 1
    assert seed_statistics.permutation_p([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(2 / 252)
    assert seed_statistics.permutation_p([0.1] * 3, [0.1] * 3) == 1


def test_unigram_entropy_is_that_of_character_frequencies():
    assert seed_statistics.unigram_entropy("abab") == pytest.approx(np.log(2))
    assert seed_statistics.unigram_entropy("aaab") == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))


def test_table_states_difference_and_p_value():
    lines = list(seed_statistics.table({"PyTorch": [[9.0, 1.0], [9.0, 3.0]], "chargpt_jax": [[9.0, 4.0], [9.0, 6.0]]}))
    assert "| PyTorch | 2 | 2.0000 | 1.4142 | 1.0000 | 3.0000 |" in lines
    assert lines[-2] == "chargpt_jax - PyTorch: +3.0000 nats, standard error 1.4142."
    assert lines[-1].endswith("p = 0.333. The ranges do not overlap.")


# The command


def test_reduced_config_changes_only_size_learning_rate_and_mask():
    config = validate(seed_statistics.reduced("book.txt", 7))
    changed = {line.partition(":")[0] for line in differences(load_config("small"), config)}
    assert changed == {"data.source", "model.block_size", "model.n_layer", "model.mask_unused_ids", "amp.enabled"}
    assert (config.optimizer.learning_rate or 0) > 0
    assert config.scheduler.epochs == 7


def test_main_trains_every_seed_on_both_sides_and_saves_results(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(seed_statistics, "reduced", lambda text_file, epochs: run[0])
    assert seed_statistics.main(["--text_file=book.txt", "--seeds=2", f"--out={tmp_path / 'out'}"]) == 0
    found = json.loads((tmp_path / "out" / "seed_statistics.json").read_text(encoding="utf-8"))
    assert run[0].data.source not in json.dumps(found)
    curves = found["losses_by_epoch"]
    assert {side: [curve[-1] for curve in curves[side]] for side in curves} == found["final_losses"]
    finals = [loss for losses in found["final_losses"].values() for loss in losses]
    assert len(finals) == len(set(finals)) == 4
    assert found["text"]["characters"] == len(run[1])
    assert capsys.readouterr().out.splitlines() == list(seed_statistics.table(curves))
    drawn = ElementTree.fromstring((tmp_path / "out" / "seed_statistics.svg").read_text(encoding="utf-8"))
    assert len([circle for circle in drawn.iter() if circle.tag.endswith("circle")]) == 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--text_file=nowhere.txt"], "nowhere.txt"),
        (["--text_file=nowhere.txt", "--seeds=1"], "--seeds=1"),
        (["--text_file=nowhere.txt", "--epochs=1"], "--epochs=1"),
    ],
)
def test_invalid_arguments_fail_before_training(flags, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        seed_statistics.main(flags)
    assert said in capsys.readouterr().err
