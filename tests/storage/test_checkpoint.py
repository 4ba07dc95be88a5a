"""Checkpoints: saved bits, which ones are kept, and errors for damaged ones."""

import json
import shutil
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks.stored import RECORD, Store, bits, filled, state_at
from chargpt_jax.errors import NoCheckpoint, SaveFailed
from chargpt_jax.storage import manifest
from chargpt_jax.storage.checkpoint import UNVALIDATED, Checkpoints
from chargpt_jax.storage.checkpoint_record import FORMAT


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "checkpoints", keep_last=2)
    yield store
    store.close()


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder with the checkpoints 1, 2 and 3, of which 2 is the best."""
    folder = tmp_path_factory.mktemp("three") / "checkpoints"
    filled(folder).close()
    return folder


@pytest.fixture
def copy(three, tmp_path):
    """A copy of the three checkpoints, to be damaged."""
    shutil.copytree(three, tmp_path / "copy")
    store = Store(tmp_path / "copy")
    yield store
    store.close()


def change_record(folder: Path, **changes):
    """Change the record of a checkpoint, and write a new manifest."""
    path = folder / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    (folder / manifest.NAME).unlink()
    manifest.seal(folder)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_a_state_comes_back_bit_for_bit(store, dtype):
    state = state_at(5, dtype)
    store.save(state, RECORD, 1.0)
    back = store.restore(5, state_at(1, dtype))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert bits(back) == bits(state) != bits(state_at(1, dtype))
    assert back.key.dtype == state.key.dtype


def test_record_describes_the_checkpoint(store):
    folder = store.save(state_at(5), RECORD, 1.5)
    record = store.record(5)
    assert {**record, **RECORD} == record
    assert (record["format"], record["step"], record["loss"]) == (FORMAT, 5, 1.5)
    assert record["arrays"]["params.wte.embedding"] == ["float32", [64, 8]]
    assert set(record["versions"]) == {"jax", "flax", "optax", "orbax-checkpoint", "numpy"}
    assert len(record["digest"]) == len(record["config_sha256"]) == 64
    listed = json.loads((folder / manifest.NAME).read_text())
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(listed) == there - {manifest.NAME}


def test_config_with_old_field_names_is_verified_as_saved(store):
    config = {"data": {"short_epochs": True}, "scheduler": {"decay": "none"}, "model": {"dropout_bits": "hash"}}
    folder = store.save(state_at(5), {**RECORD, "config": config}, 1.0)
    assert store.load("latest", lambda record: state_at(1))[1]["config"] == config
    change_record(folder, config={**config, "seed": 1})
    with pytest.raises(NoCheckpoint, match="config that differs from the saved one"):
        store.load("latest", lambda record: state_at(1))


def test_arrays_come_back_on_the_devices_that_are_wanted(store):
    store.save(state_at(5), RECORD, 1.0)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
        state_at(1),
    )
    assert bits(store.restore(5, like)) == bits(state_at(5))


def test_the_newest_and_the_best_are_kept_also_after_a_restart(store, tmp_path):
    for step, loss in enumerate([3.0, 1.0, 2.0, 4.0, 5.0], start=1):
        store.save(state_at(step), RECORD, loss)
    assert store.steps() == [2, 4, 5]
    again = Store(tmp_path / "checkpoints", keep_last=2)
    again.save(state_at(6), RECORD, UNVALIDATED)
    assert again.steps() == [2, 5, 6]
    assert (again.choose("best"), again.choose("latest"), again.choose(5)) == (2, 6, 5)
    again.close()
    assert not store.heard + again.heard


def test_where_nothing_was_validated_the_newest_is_the_best(store):
    for step in (1, 2):
        store.save(state_at(step), RECORD, UNVALIDATED)
    assert store.choose("best") == 2


def test_an_empty_folder_and_an_absent_step_are_named(store):
    with pytest.raises(NoCheckpoint, match="holds no checkpoint: train first"):
        store.choose()
    store.save(state_at(3), RECORD, 1.0)
    with pytest.raises(NoCheckpoint, match="holds no checkpoint of step 4: it has 3"):
        store.choose(4)


@pytest.mark.parametrize("name", ["03", "٣"])
def test_a_renamed_checkpoint_is_reported_once(copy, name):
    (copy.folder / "3").rename(copy.folder / name)
    assert copy.choose("latest") == 2
    assert copy.steps() == [1, 2]
    assert copy.heard == [f"{copy.folder / name} is not used: the name of a checkpoint is its step, 3."]


def test_damaged_checkpoint_is_skipped_with_one_warning(copy):
    damaged = copy.folder / "3" / "record.json"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert copy.choose("latest") == 2
    assert bits(copy.load("latest", lambda record: state_at(1))[2]) == bits(state_at(2))
    (warning,) = copy.heard
    assert "Skipping checkpoint 3 in" in warning
    assert "record.json has" in warning
    with pytest.raises(NoCheckpoint, match=r"Checkpoint 3 in .* cannot be used: record.json has"):
        copy.choose(3)
    assert damaged.exists()


def test_damaged_best_checkpoint_gives_the_second_best(copy):
    path = copy.folder / "2" / "record.json"
    path.write_text(path.read_text().replace('"loss": 1.0', '"loss": 9.0'))
    assert copy.choose("best") == 3
    assert len(copy.heard) == 1


def test_unusable_checkpoints_are_listed_with_reasons(copy):
    (copy.folder / "3" / manifest.NAME).unlink()
    (copy.folder / "2" / "record.json").unlink()
    (copy.folder / "1" / "more").write_text("")
    reasons = r"3: manifest.json is missing; 2: record.json is missing; 1: more is not in the manifest"
    for which in ("best", "latest"):
        with pytest.raises(NoCheckpoint, match=reasons):
            copy.choose(which)
    assert len(copy.heard) == 3


def test_newer_format_is_skipped_for_an_older_checkpoint(copy):
    change_record(copy.folder / "3", format=FORMAT + 1)
    with pytest.raises(NoCheckpoint, match=f"has format {FORMAT + 1}, but .* up to {FORMAT}: install a newer chargpt"):
        copy.record(3)
    assert copy.choose("latest") == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"step": 2}, "is of step 2"),
        ({"digest": "0" * 64}, "arrays holds other values than were saved"),
        ({"vocabulary": ["", "é", "\n", "😀"]}, "single characters in order"),
        ({"vocabulary": ["", "\n", 3]}, "single characters in order"),
        ({"config": {**RECORD["config"], "seed": 1}}, "a config that differs from the saved one"),
        ({"config": None}, "has no config"),
        ({"arrays": {}}, "holds no array as 'key', but the model has"),
        ({"arrays": None}, "has no arrays"),
        ({"format": "2"}, "has format '2'"),
        ({"loss": "low"}, "has no loss"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_changed_record_with_a_new_manifest_is_rejected(copy, changes, reason):
    change_record(copy.folder / "3", **changes)
    with pytest.raises(NoCheckpoint, match=reason):
        copy.restore(3, state_at(1))


def test_another_model_is_refused_before_its_arrays_are_read(copy, monkeypatch):
    like = state_at(1)
    params = {**like.params, "more": jnp.zeros(3)}
    monkeypatch.setattr(copy.arrays._orbax, "restore", lambda *_, **__: pytest.fail("the arrays were read"))
    with pytest.raises(NoCheckpoint, match=r"holds no array as 'params.more', but the model has float32 \[3\]"):
        copy.restore(3, like.replace(params=params))


def test_record_larger_than_its_files_is_rejected(copy, monkeypatch):
    """The record and the requested model agree, as with a hostile config."""
    monkeypatch.setattr(copy.arrays._orbax, "restore", lambda *_, **__: pytest.fail("the arrays were read"))
    change_record(copy.folder / "3", arrays={"step": ["float32", [10**6, 10**6]]})
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    huge = jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32, sharding=here)
    like = state_at(1).replace(step=huge, params={}, opt_state=(), key=None)
    with pytest.raises(NoCheckpoint, match="claims 4,000,000,000,000 bytes of arrays in"):
        copy.restore(3, like)


def test_arrays_of_another_model_are_rejected(copy, monkeypatch):
    """The record is correct, but the array files belong to another model."""
    other = state_at(3).replace(params={}, opt_state=())
    elsewhere = Store(copy.folder.parent / "elsewhere")
    arrays = elsewhere.save(other, RECORD, 1.0) / "arrays"
    shutil.rmtree(copy.folder / "3" / "arrays")
    shutil.copytree(arrays, copy.folder / "3" / "arrays")
    change_record(copy.folder / "3")
    with pytest.raises(NoCheckpoint, match="arrays holds no array as 'opt_state"):
        copy.restore(3, state_at(1))


def test_stray_names_are_not_checkpoints(copy):
    """Copies of a file manager, other spellings of numbers, files, and temporary folders of orbax or chargpt_jax."""
    names = ["3 (1)", "003", "+3", "3.0", "٣", "3.damaged-1", "3.orbax-checkpoint-tmp-1", ".saving-9", "-1", "notes"]
    for name in names:
        shutil.copytree(copy.folder / "3", copy.folder / name)
    (copy.folder / "77").write_text("a file")
    (copy.folder / "78").symlink_to("nowhere")
    assert copy.steps() == [1, 2, 3]
    assert (copy.choose("latest"), copy.choose("best")) == (3, 2)
    assert not copy.heard


def test_empty_checkpoint_folder_is_skipped_and_not_deleted(copy):
    (copy.folder / "99").mkdir()
    assert copy.choose("latest") == 3
    (warning,) = copy.heard
    assert "99" in warning
    assert "manifest.json is missing" in warning
    copy.save(state_at(4), RECORD, 5.0)
    assert copy.steps() == [2, 3, 4, 99]


def test_symbolic_link_is_skipped(copy):
    (copy.folder / "3").rename(copy.folder / "elsewhere")
    (copy.folder / "3").symlink_to("elsewhere")
    assert copy.choose("latest") == 2
    assert "is a symbolic link" in copy.heard[0]


def test_damaged_checkpoint_is_not_counted_or_deleted(copy):
    (copy.folder / "3" / "record.json").unlink()
    copy.keep_last = 2
    copy.save(state_at(4), RECORD, 5.0)
    copy.save(state_at(5), RECORD, 5.0)
    assert copy.steps() == [2, 3, 4, 5]


def test_checkpoint_damaged_since_verification_is_not_deleted(store):
    store.save(state_at(1), RECORD, 9.0)
    store.save(state_at(2), RECORD, 1.0)
    (store.folder / "1" / "record.json").unlink()
    store.save(state_at(3), RECORD, 2.0)
    assert store.steps() == [1, 2, 3]


def test_damaged_checkpoint_of_the_same_step_is_moved(copy):
    for number in (1, 2):
        (copy.folder / "3" / "record.json").write_text("junk")
        assert copy.save(state_at(3), RECORD, 2.0) == copy.folder / "3"
        aside = copy.folder / f"3.damaged-{number}"
        assert (aside / "record.json").read_text() == "junk"
        copy._valid.clear()
    assert bits(copy.restore(3, state_at(1))) == bits(state_at(3))
    assert copy.steps() == [1, 2, 3]


def test_valid_checkpoint_of_the_same_step_is_replaced(copy):
    copy.save(state_at(3), RECORD, 0.5)
    assert copy.record(3)["loss"] == 0.5
    copy.sweep()
    assert sorted(path.name for path in copy.folder.iterdir()) == ["1", "2", "3"]


def test_files_that_orbax_writes_after_an_error_are_removed(copy, monkeypatch):
    writers = []

    def refuse(path, **_):
        def write_on():
            for number in range(10):
                (path / "deep").mkdir(parents=True, exist_ok=True)
                (path / "deep" / str(number)).write_bytes(b"late")
                time.sleep(0.03)

        writers.append(threading.Thread(target=write_on))
        writers[0].start()
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(copy.arrays._orbax, "save", refuse)
    with pytest.raises(SaveFailed, match="The checkpoint of step 3 is still valid: make room on the disk"):
        copy.save(state_at(4), RECORD, 0.5)
    writers[0].join()
    assert not list(copy.folder.glob(".*"))


def test_only_sweep_removes_temporary_folders(copy):
    for name in (".saving-4", ".deleting-1"):
        (copy.folder / name / "arrays").mkdir(parents=True)
    Store(copy.folder).choose("best")
    assert (copy.folder / ".saving-4").exists()
    copy.sweep()
    assert sorted(path.name for path in copy.folder.iterdir()) == ["1", "2", "3"]


@pytest.mark.parametrize("name", ["relative folder é", "../relative", "./a/../b"])
def test_a_relative_folder_is_made_absolute(tmp_path, monkeypatch, name):
    (tmp_path / "here" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    store = Checkpoints(Path(name))
    path = store.save(state_at(1), RECORD, 1.0)
    assert store.load("latest", lambda _: state_at(0))[0] == 1
    store.close()
    assert path.is_absolute()
    assert path.is_dir()


def test_links_in_the_place_of_temporary_folders_are_swept_and_not_followed(store, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    store.folder.mkdir()
    for name in (".saving-5", ".saving-6", ".deleting-2"):
        (store.folder / name).symlink_to(tmp_path / "mine")
    (store.folder / ".saving-7").symlink_to(tmp_path / "nothing")
    store.save(state_at(5), RECORD, 1.0)
    store.sweep()
    assert [path.name for path in store.folder.iterdir()] == ["5"]
    assert (tmp_path / "mine" / "file").exists()


def test_the_best_is_that_of_the_valid_checkpoints(copy, store):
    assert store.best() is None
    (copy.folder / "999").mkdir()
    assert copy.steps() == [1, 2, 3, 999]
    assert copy.valid_steps() == [1, 2, 3]
    step, loss = copy.best()
    assert (step, loss) == (2, copy.record(2)["loss"])
    (copy.folder / "2" / "record.json").write_text("{}")
    assert Store(copy.folder).best()[0] != 2
