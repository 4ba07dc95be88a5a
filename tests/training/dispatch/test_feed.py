"""Training that streams its text gives the same bits as training with the text on the device."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from chargpt_jax.config import Config, MeshConfig
from chargpt_jax.data import batches
from chargpt_jax.errors import UserError
from chargpt_jax.events import LRFinderResult, LRFinderStep, Saved, Steps
from chargpt_jax.storage.arrays.state_arrays import digest, on_host
from chargpt_jax.storage.workdir import Workdir
from chargpt_jax.training import optimizer, stages
from chargpt_jax.training.dispatch import feed
from chargpt_jax.training.run import Run
from chargpt_jax.training.setup import Setup
from tests.corpus_text import small_config, write_words
from tests.devices.eight_devices import run_on_eight

STEPS = 12


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(autouse=True)
def short_dispatches(monkeypatch):
    """A dispatch has room for at most three steps of windows."""
    monkeypatch.setattr(feed, "MAX_BYTES", 3 * 8 * 33)


def config_for(text: Path, stream: str, parts: int = 1, steps: int = STEPS) -> Config:
    config = small_config(text)
    config.train.stream, config.optimizer.accumulation_steps, config.scheduler.max_steps = stream, parts, steps
    return config


def quiet(_: str) -> None:
    pass


def trained(config: Config, workdir: Path) -> str:
    for _ in stages.train(config, workdir, quiet):
        pass
    return state_of(workdir)


def state_of(workdir: Path) -> str:
    """Return the digest of the newest checkpoint."""
    setup = Setup.of(Run.load(workdir))
    fresh = setup.initial_state(optimizer.empty(setup.config))
    return digest(on_host(stages.restored(setup, fresh, Workdir(workdir).checkpoints, quiet)))


@pytest.fixture(scope="module")
def expected(text, tmp_path_factory):
    """Train with the text on the device."""
    return trained(config_for(text, "never"), tmp_path_factory.mktemp("never"))


@pytest.mark.slow
def test_streamed_training_is_bit_identical_if_resumed(text, tmp_path, expected):
    steps = []
    for event in stages.train(config_for(text, "always"), tmp_path, quiet):
        steps += [event.step] if isinstance(event, Steps) else []
        if isinstance(event, Saved) and event.step >= 4:
            break
    assert max(np.diff([0, *steps])) <= 3  # a dispatch is limited by the bytes of its windows
    assert trained(config_for(text, "always"), tmp_path) == expected


@pytest.mark.slow
def test_streaming_may_change_when_a_run_is_resumed(text, tmp_path, expected):
    for how, last in (("always", 4), ("never", 8), ("always", STEPS)):
        for event in stages.train(config_for(text, how), tmp_path / "mixed", quiet):
            if isinstance(event, Saved) and event.step >= last:
                break
    assert state_of(tmp_path / "mixed") == expected


@pytest.mark.slow
def test_streamed_training_in_microbatches_is_bit_identical(text, tmp_path):
    one, other = (trained(config_for(text, how, 2), tmp_path / how) for how in ("never", "always"))
    assert one == other


@pytest.mark.slow
def test_streamed_range_test_has_the_same_losses(text, tmp_path):
    found = []
    for how in ("never", "always"):
        config = config_for(text, how)
        config.optimizer.learning_rate, config.lr_finder.num_zooms = None, 2
        events = list(stages.find_lr(config, tmp_path / how, quiet))
        assert isinstance(events[-1], LRFinderResult)
        found.append([(event.learning_rate, event.loss) for event in events if isinstance(event, LRFinderStep)])
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def setup(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("setup")
    list(stages.prepare(config_for(text, "always"), workdir, quiet))
    return Setup.of(Run.load(workdir))


def test_streamed_windows_follow_any_order_of_steps(setup):
    streamed = feed.feed_of(setup, quiet)
    key = jax.random.fold_in(jax.random.key(setup.config.seed), 0)
    for step, count in ((0, 1), (1, 3), (4, 2), (6, 3), (100, 2), (102, 1), (1, 2)):
        text = streamed.text_for(step, count)
        assert jax.tree.map(np.shape, text) == jax.tree.map(np.shape, streamed.shape)
        for at in range(step, step + count):
            ours, theirs = (
                batches.batch_at(one, key, np.int32(at), 32, setup.config.data) for one in (text, setup.on_device)
            )
            assert np.array_equal(ours, theirs)
    streamed.close()


@pytest.mark.parametrize("asked", ["auto", "always", "never"])
def test_text_is_streamed_if_it_does_not_fit(setup, monkeypatch, asked):
    said, size = [], setup.n_train * setup.tokens.itemsize
    config = dataclasses.replace(setup.config, train=dataclasses.replace(setup.config.train, stream=asked))
    for free, fits in ((4 * size, True), (4 * size - 4, False)):
        monkeypatch.setattr(feed, "free_bytes", lambda mesh, free=free: free)
        found = feed.feed_of(dataclasses.replace(setup, config=config), said.append)
        assert isinstance(found, feed.OnDevice) == {"auto": fits, "always": False, "never": True}[asked]
        found.close()
    assert len(said) == (asked == "auto")
    assert all("batches are read from the file" in line for line in said)


def test_text_beyond_an_int32_is_always_streamed(monkeypatch):
    monkeypatch.setattr(feed, "free_bytes", lambda mesh: 10**12)
    tokens = np.broadcast_to(np.uint8(1), (2**32,))
    for n, expected in ((2**31 - 1, True), (2**31, False)):
        assert feed.fits(SimpleNamespace(n_train=n, tokens=tokens, mesh=None), quiet) is expected


def test_text_beyond_an_int32_is_refused_if_it_may_not_be_streamed(setup, tmp_path, monkeypatch, text):
    monkeypatch.setattr(batches, "MAX_ON_DEVICE", 1000)
    with pytest.raises(UserError, match=r"train.stream is 'never', but the training part has [\d,]+ characters"):
        list(stages.prepare(config_for(text, "never"), tmp_path / "run", quiet))
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").glob("*.json"))


# Eight virtual devices

MESHES = {"batch": MeshConfig(), "fsdp": MeshConfig(fsdp=2, tensor=2)}


@pytest.mark.slow
def test_streamed_training_on_eight_devices_is_bit_identical(text, tmp_path):
    (tmp_path / "text.txt").write_bytes(text.read_bytes())
    found, _ = run_on_eight(__file__, tmp_path)
    assert set(found) == {f"{name}, {parts}" for name in MESHES for parts in (1, 2) if (name, parts) != ("batch", 2)}
    for digests in found.values():
        assert len(set(digests)) == 1


def main(folder: Path) -> None:
    found = {}
    feed.MAX_BYTES = 3 * 8 * 33
    for name, mesh in MESHES.items():
        for parts in (1, 2):
            if (name, parts) != ("batch", 2):
                digests = []
                for how in ("never", "always"):
                    config = config_for(folder / "text.txt", how, parts, steps=5)
                    config.mesh = mesh
                    digests.append(trained(config, folder / f"{name}-{parts}-{how}"))
                found[f"{name}, {parts}"] = digests
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
