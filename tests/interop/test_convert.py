"""An imported checkpoint gives the original's results, and its export is bit-identical; invalid files are rejected."""

import copy
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from chargpt_jax import api
from chargpt_jax.errors import UserError
from chargpt_jax.interop import convert
from chargpt_jax.interop.ancestor import from_original, from_params, read
from chargpt_jax.interop.safetensors_file import read_npz, read_safetensors, write_safetensors
from chargpt_jax.main import main
from tests import reference
from tests.interop.test_torch_pickle import View, save
from tests.pairing import built

LETTERS = [" ", "\n", *"abcdefghijk", "é", "😀"]
CONFIG: dict[str, Any] = {
    "model": {
        **{"vocab_size": 64, "block_size": 64, "n_embd": 16, "n_head": 8, "n_head_dim": 8, "n_ff": 32, "n_layer": 2},
        "dropout": 0.1,
    },
    "tokenizer": {"vocabulary": LETTERS},
    "data": {"batch_size": 4, "oversample": 1.0, "train_split": 0.8, "padding_chance": 0.1},
    "optimizer": {"weight_decay": 0.1, "learning_rate": 0.001, "betas": [0.9, 0.95]},
    "scheduler": {"epochs": 2, "warmup_epochs": 0.5, "min_lr_factor": 0.1},
    "amp": {"enabled": True, "dtype": None},
}
HEADS = {"n_head": 8, "n_head_dim": 8}
KINDS = ("pt", "safetensors", "npz")
INV_FREQ = "transformer.blocks.1.attn.rotary_enc.inv_freq"


def original(seed: int = 0) -> dict[str, np.ndarray]:
    """Return a random state dict of the original."""
    sizes = {name: value for name, value in CONFIG["model"].items() if name not in ("block_size", "dropout")}
    arrays = reference.random_parameters(np.random.default_rng(seed), **sizes)
    arrays["lm_head.weight"] = arrays["transformer.wte.weight"]
    for i in range(sizes["n_layer"]):
        frequencies = 10_000.0 ** -(np.arange(0, 8, 2) / 8)
        arrays[f"transformer.blocks.{i}.attn.rotary_enc.inv_freq"] = frequencies
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def write(folder: Path, arrays: dict[str, Any], kind: str = "safetensors", config: Any = CONFIG) -> Path:
    """Write a checkpoint of the original without the package's own writers."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"checkpoint.{kind}"
    if kind == "pt":
        return save(path, {"model": arrays, "config": config, "metrics": None})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if kind == "npz":
        np.savez(path, **arrays)
        return path
    table, blob = {}, b""
    for name, array in arrays.items():
        span = [len(blob), len(blob) + array.nbytes]
        table[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": span}
        blob += array.tobytes()
    return framed(path, table, blob)


def framed(path: Path, table: Any, blob: bytes) -> Path:
    """Write the three parts of a .safetensors file."""
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + blob)
    return path


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """Return CONFIG with some fields ('section.field') changed, or removed if the value is `...`."""
    config = copy.deepcopy(CONFIG)
    for path, value in changes.items():
        section, _, name = path.partition(".")
        holder, key = (config[section], name) if name else (config, section)
        if value is ...:
            del holder[key]
        else:
            holder[key] = value
    return config


def logits(params: Any, model: Any, tokens: np.ndarray) -> np.ndarray:
    graphdef, _ = built(model, 0)
    return np.asarray(jax.jit(lambda p, x: nnx.merge(graphdef, p)(x))(params, tokens))


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A run imported from a .pt file, with its training text."""
    folder = tmp_path_factory.mktemp("imported")
    text = "".join(np.random.default_rng(0).choice(LETTERS[2:13], 3000))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    convert.import_original(write(folder, original(), "pt"), folder / "run", str(folder / "text.txt"))
    return folder / "run"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_model(tmp_path, kind):
    api.import_original(write(tmp_path, original(), kind), tmp_path / "run")
    model = api.load(tmp_path / "run")
    assert model.step == 0
    assert not model.config.model.mask_unused_ids
    assert model.config.optimizer.learning_rate == 0.001
    assert model.tokenizer.vocabulary == ("", *sorted(LETTERS))
    _, fresh = built(model.config.model, 0)
    assert jax.tree.map(np.shape, model.params) == jax.tree.map(np.shape, fresh)
    back = from_params(jax.tree.map(np.asarray, model.params), model.config.model)
    for name, array in original().items():
        if not name.endswith("inv_freq"):
            np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_logits_of_an_import_equal_the_originals(imported):
    model = api.load(imported)
    tokens = np.random.default_rng(1).integers(0, 64, (2, 64)).astype(np.int32)
    params = {name: array.astype(np.float64) for name, array in original().items()}
    expected = np.stack([reference.logits(params, row, **HEADS) for row in tokens])
    np.testing.assert_allclose(logits(model.params, model.config.model, tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_export_of_an_import_is_bit_identical(tmp_path, kind):
    api.import_original(write(tmp_path, original(), kind), tmp_path / "run")
    api.export(tmp_path / "run", tmp_path / "out", "original")
    arrays, metadata = read_safetensors(tmp_path / "out" / "model.safetensors")
    assert set(arrays) == set(original())
    for name, array in original().items():
        found = arrays[name].read()
        assert found.shape == array.shape
        if name.endswith("inv_freq"):
            np.testing.assert_allclose(found, array, rtol=1e-6)
        else:
            np.testing.assert_array_equal(found, array, err_msg=name)
    described = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert described == json.loads(metadata["config"]) == changed({"tokenizer.vocabulary": sorted(LETTERS)})
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_exported_file_contains_its_config(tmp_path, imported):
    api.export(imported, tmp_path / "out", "original")
    (tmp_path / "out" / "config.json").unlink()
    api.import_original(tmp_path / "out" / "model.safetensors", tmp_path / "run")
    again = api.load(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, api.load(imported).params, again.params)


def test_export_is_read_by_the_safetensors_package(tmp_path, imported):
    numpy_side = pytest.importorskip("safetensors.numpy")
    api.export(imported, tmp_path / "out", "original")
    found = numpy_side.load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(found["lm_head.weight"], original()["transformer.wte.weight"])


def test_tied_array_omitted_by_safetensors_is_restored(tmp_path):
    arrays = original()
    del arrays["transformer.wte.weight"]
    path = write(tmp_path, arrays)
    with pytest.raises(UserError, match="has no array 'transformer.wte.weight'"):
        convert.import_original(path, tmp_path / "run")
    write_safetensors(path, arrays, {"transformer.wte.weight": "lm_head.weight"})
    convert.import_original(path, tmp_path / "run")


def test_imported_run_generates_and_scores(imported):
    model = api.load(imported)
    assert model.generate("abc", 10, temperature=0)[0].text.startswith("abc")
    scored = model.score("abcdé😀")
    tokens = model.tokenizer.encode_text("abcdé😀")
    params = {name: array.astype(np.float64) for name, array in original().items()}
    rows = reference.logits(params, tokens, **HEADS)
    expected = [-reference.log_softmax(row)[token] for row, token in zip(rows, tokens[1:], strict=False)]
    np.testing.assert_allclose(scored.surprisal[1:], expected, rtol=1e-5)


@pytest.mark.slow
def test_imported_run_is_evaluated_and_trained(tmp_path, imported):
    shutil.copytree(imported, tmp_path / "run")
    before = api.evaluate(tmp_path / "run")
    assert before["tokens"] == 600
    config = api.Workdir(tmp_path / "run").load_config()
    list(api.train(config, tmp_path / "run", lambda text: None))
    after = api.evaluate(tmp_path / "run")
    assert after["step"] > 0
    assert after["loss"] < before["loss"]


@pytest.mark.slow
def test_command_trains_an_imported_run_with_its_config(tmp_path, imported, capsys):
    run = tmp_path / "run of mine"
    shutil.copytree(imported, run)
    assert main(["chargpt", "--mode=train", f"--workdir={run}", "--config.scheduler.warmup_epochs=3"]) == 2
    assert "scheduler.warmup_epochs" in capsys.readouterr().err
    assert main(["chargpt", "--mode=train", "--workdir", str(run), "--config.train.log_every=1"]) == 0
    assert api.evaluate(run, "latest")["step"] > 0
    assert {"event": "step", "step": 1}.items() <= api.Workdir(run).load_metrics()[0].items()
    assert not (tmp_path / "runs").exists()


def test_import_without_a_text_cannot_be_evaluated_or_trained(tmp_path):
    api.import_original(write(tmp_path, original()), tmp_path / "run")
    assert api.info(tmp_path / "run")["vocabulary"] == len(LETTERS)
    config = api.Workdir(tmp_path / "run").load_config()
    with pytest.raises(UserError, match="without its text.*--text_file"):
        api.evaluate(tmp_path / "run")
    with pytest.raises(UserError, match="without its text.*--text_file"):
        list(api.train(config, tmp_path / "run"))


def test_text_with_unknown_characters_is_rejected(tmp_path):
    (tmp_path / "text.txt").write_text("abc XYZ " * 500)
    with pytest.raises(UserError, match=r"'X' \(U\+0058\)"):
        api.import_original(write(tmp_path, original()), tmp_path / "run", str(tmp_path / "text.txt"))
    assert not (tmp_path / "run").exists()


# Invalid files


def without(name: str) -> dict[str, Any]:
    return {key: array for key, array in original().items() if key != name}


NAMES = ["transformer.blocks.1.attn.qkv.bias", "lm_head.weight", "transformer.wte.weight", INV_FREQ]
WEIGHT = "transformer.blocks.0.mlp.net.0.weight"
BAD_ARRAYS = [
    *((without(name), f"has no array '{name}'") for name in NAMES),
    ({**original(), "transformer.blocks.2.ln_1.weight": np.ones(16, np.float32)}, "an array 'transformer.blocks.2.ln"),
    ({**original(), WEIGHT: original()[WEIGHT].T.copy()}, r"mlp.net.0.weight' with shape \(16, 32\)"),
    ({**original(), "lm_head.weight": original(1)["lm_head.weight"]}, "'lm_head.weight' that differs from"),
    ({**original(), WEIGHT: np.full((32, 16), np.nan, np.float32)}, "values in .*mlp.net.0.weight"),
    ({**original(), INV_FREQ: np.ones(4, np.float32)}, "inv_freq' of a rotary encoding with another base"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("arrays", "message"), BAD_ARRAYS, ids=range(len(BAD_ARRAYS)))
def test_invalid_array_is_rejected_by_name(tmp_path, kind, arrays, message):
    path = write(tmp_path, arrays, kind)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        convert.import_original(path, tmp_path / "run")
    assert sorted(tmp_path.iterdir()) == before


BAD_CONFIGS = [
    ({"model": ...}, "no model.vocab_size"),
    ({"model.n_layer": ...}, "no model.n_layer"),
    ({"model.n_layer": 3}, "has no array 'transformer.blocks.2"),
    ({"model.n_layer": 10**6}, "too few for 1000000 layers"),
    ({"model.n_layer": 10**12}, "needs at least .* GB of memory"),
    ({"model.n_layer": "2"}, "model.n_layer is '2'"),
    ({"model.n_head": 4}, "qkv.weight' with shape"),
    ({"model.n_embd": -1}, "model.n_embd is -1"),
    ({"model.n_ff": [32] * 1000}, "a list as model.n_ff"),
    ({"tokenizer": ...}, "no tokenizer.vocabulary"),
    ({"tokenizer.vocabulary": ["ab"]}, "must be single characters"),
    ({"tokenizer.vocabulary": [1]}, "must be single characters"),
    ({"tokenizer.vocabulary": [*LETTERS, LETTERS[2]]}, "more than once"),
    ({"tokenizer.vocabulary": [chr(i) for i in range(40, 104)]}, "65 token ids"),
    ({"data": []}, "its section 'data' is not an object"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS, ids=range(len(BAD_CONFIGS)))
def test_invalid_config_is_rejected_by_field(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        convert.import_original(write(tmp_path, original(), "pt", changed(changes)), tmp_path / "run")


def test_config_of_deeply_shared_lists_is_rejected(tmp_path):
    nest: list[Any] = []
    for _ in range(60):  # a pickle can share its parts: these 60 lists would print as 2 ** 60 elements
        nest = [nest, nest]
    for field, value in (("model", {**CONFIG["model"], "n_ff": nest}), ("optimizer", {"betas": (0.9, nest)})):
        with pytest.raises(UserError, match=r"a (list|tuple) as (model.n_ff|optimizer.betas)"):
            from_original({**CONFIG, field: value}, tmp_path)


def test_missing_config_sections_get_defaults(tmp_path):
    config = {"model": CONFIG["model"], "tokenizer": CONFIG["tokenizer"]}
    found, _ = from_original(config, tmp_path)
    assert found.optimizer.learning_rate is None
    assert found.amp.dtype == "auto"


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1, -100])
@pytest.mark.parametrize("kind", KINDS)
def test_truncated_file_is_rejected(tmp_path, kind, cut):
    path = write(tmp_path, original(), kind)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match="cannot be read"):
        convert.import_original(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def entry(begin: Any, end: Any, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "overlap"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, "overlap, leave gaps"),
        ({"a": entry(0, 8)}, "do not end at the end"),
        ({"a": entry(8, 16), "b": entry(16, 24)}, "gaps"),
        ({"a": entry(0, 16)}, "differs from the size"),
        ({"a": entry(0, 16, (2**62, 2**62))}, "differs from the size"),
        ({"a": entry(-16, 0, (4,))}, "invalid shape"),
        ({"a": entry(0, 16, (-4,))}, "invalid shape"),
        ({"a": entry(0, 16, (4.0,))}, "invalid shape"),
        ({"a": entry(0, 16, (True, 4))}, "invalid shape"),
        ({"a": entry(0, 16, (1,) * 9)}, "invalid shape"),
        ({"a": entry(0, 16, (2,), "I64")}, "'a' as 'I64'"),
        ({"a": {"dtype": "F32"}}, "cannot be read"),
        ({"a": 1}, "cannot be read"),
        ([], "not a JSON object"),
        ({"__metadata__": {"x": 1}}, "not strings"),
    ],
)
def test_invalid_safetensors_table_is_rejected(tmp_path, table, message):
    with pytest.raises(UserError, match=message):
        read_safetensors(framed(tmp_path / "x.safetensors", table, b"\0" * 16))


def test_table_longer_than_the_file_is_rejected(tmp_path):
    (tmp_path / "x.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="larger than the file or 4 MiB"):
        read_safetensors(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)
    with pytest.raises(UserError, match="cannot be read"):
        read_safetensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("code", ["F16", "F32", "F64", "BF16"])
def test_safetensors_of_every_dtype_are_read(tmp_path, code):
    values = np.array([[1.5, -2.0, 0.25]])
    raw = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
    blob = (values.astype("<f4").view("<u4") >> 16).astype("<u2") if code == "BF16" else values.astype(raw[code])
    path = framed(tmp_path / "x.safetensors", {"a": entry(0, blob.nbytes, (1, 3), code)}, blob.tobytes())
    found = read_safetensors(path)[0]["a"].read()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, values)


def test_npz_of_any_order_is_read_but_not_objects_or_compressed(tmp_path):
    numbers = np.arange(6.0).reshape(2, 3)
    np.savez(tmp_path / "x.npz", c=numbers, fortran=np.asfortranarray(numbers), big=numbers.astype(">f4"))
    for stored in read_npz(tmp_path / "x.npz").values():
        np.testing.assert_array_equal(stored.read(), numbers)
    for array in (np.array([{}], dtype=object), np.arange(3), np.array(["a"])):
        np.savez(tmp_path / "x.npz", a=array)
        with pytest.raises(UserError, match="'a' as"):
            read_npz(tmp_path / "x.npz")
    np.savez_compressed(tmp_path / "x.npz", a=numbers)
    with pytest.raises(UserError, match="compressed"):
        read_npz(tmp_path / "x.npz")


def test_npz_with_a_shape_larger_than_its_data_is_rejected(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros((1000, 100)))
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        code = archive.read("a.npy").replace(b"(1000, 100)", b"(9999, 999)")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", code)
    with pytest.raises(UserError, match="differs from the size"):
        read_npz(tmp_path / "x.npz")


def test_unsupported_or_missing_files_are_rejected(tmp_path):
    path = write(tmp_path, original(), "npz")
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "nothing.pt")
    with pytest.raises(UserError, match="not a regular file"):
        read(tmp_path)
    with pytest.raises(UserError, match=".pt, .safetensors or .npz file"):
        read(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json cannot be read"):
        read(path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="does not contain its config"):
        read(path)


def test_folder_that_is_not_empty_is_not_changed(tmp_path, imported):
    path = write(tmp_path / "from", original())
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="--workdir is .* already"):
        convert.import_original(path, tmp_path / "used")
    for form in convert.FOLDERS:
        with pytest.raises(UserError, match="--out is .* already"):
            api.export(imported, tmp_path / "used", form)
    with pytest.raises(UserError, match="already"):
        api.export(imported, tmp_path / "used" / "mine.txt")
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    api.export(imported, tmp_path / "link")
    assert (tmp_path / "empty" / "model.safetensors").exists()
    (tmp_path / "broken").symlink_to("nothing")
    with pytest.raises(UserError, match="--out is .* already"):
        api.export(imported, tmp_path / "broken")


@pytest.mark.parametrize("form", convert.FOLDERS)
def test_export_to_the_current_folder_fills_it(tmp_path, imported, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    api.export(imported, ".", form)
    assert {"config.json", "model.safetensors"} <= set(os.listdir("."))


def test_failed_export_leaves_no_folder(tmp_path, imported, monkeypatch):
    monkeypatch.setattr(convert, "write_safetensors", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        api.export(imported, tmp_path / "new" / "out", "original")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="one of original, hf"):
        api.export(imported, tmp_path / "out", "onnx")


def test_export_folder_is_checked_before_the_model_is_loaded(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="which exists already"):
        api.export(tmp_path / "no run", tmp_path / "used")
    with pytest.raises(UserError, match="--out=.* too long"):
        api.export(tmp_path / "no run", tmp_path / ("x" * 300))
    with pytest.raises(UserError, match="--from is .* no such file"):
        api.import_original(tmp_path / "no file.pt", tmp_path / "run")


def test_export_warns_if_the_original_rejects_the_sizes(tmp_path, imported):
    model, said = api.load(imported), []
    model.config.model.block_size = 60
    convert.export("original", model.config, model.tokenizer, model.params, tmp_path / "out", said.append)
    assert "block_size a multiple of 64" in said[0]


def test_commands_import_and_export(tmp_path, capsys):
    path = write(tmp_path, original(), "pt")
    assert main(["chargpt", "--mode=import", f"--from={path}", f"--workdir={tmp_path / 'run'}"]) == 0
    out = ["chargpt", "--mode=export", f"--workdir={tmp_path / 'run'}"]
    assert main([*out, "--format=original", f"--out={tmp_path / 'a'}"]) == 0
    assert main([*out, "--format=hf", f"--out={tmp_path / 'b'}"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / name) for name in ("run", "a", "b")]
    for line in (out, [*out, "--out=x", "--format=onnx"], ["chargpt", "--mode=import", f"--workdir={tmp_path / 'c'}"]):
        assert main(line) == 2
        shown = capsys.readouterr()
        assert shown.err.count("\n") == 1
        assert not shown.out
    assert main(["chargpt", "--mode=import", f"--from={path}", f"--workdir={tmp_path / 'run'}"]) == 2


def test_views_of_one_storage_become_separate_arrays(tmp_path):
    """The embedding table and the head of a state dict are views of one storage."""
    table = original()["transformer.wte.weight"]
    arrays: dict[str, Any] = {**original(), "lm_head.weight": View(table.T.copy(), table.shape, (1, 64))}
    run = convert.import_original(write(tmp_path, arrays, "pt"), tmp_path / "run")
    np.testing.assert_array_equal(api.load(run).params["wte"]["embedding"], table)
