"""A torch checkpoint is read exactly; a hostile one is rejected, and none of its code runs."""

import copy
import math
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chargpt_jax.errors import UserError
from chargpt_jax.interop.torch_pickle import read_torch

STORAGES = {"<f4": "FloatStorage", "<f2": "HalfStorage", "<f8": "DoubleStorage", "<u2": "BFloat16Storage"}
ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
NUMBERS = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


class View:
    """A tensor as a checkpoint describes it; by default a valid view of a complete array."""

    def __init__(self, array: np.ndarray, shape: Any = None, strides: Any = None, offset: int = 0, count: Any = None):
        self.array, self.offset = array, offset
        self.shape = array.shape if shape is None else shape
        self.strides = [n // array.itemsize for n in array.strides] if strides is None else strides
        self.count = array.size if count is None else count


class Raw:
    """Instructions that are copied into the program unchanged."""

    def __init__(self, code: bytes):
        self.code = code


def program(value: Any, storages: list[np.ndarray]) -> bytes:
    """Return a value as a pickle like those of torch.save, and append its arrays to `storages`."""
    write = lambda *values: b"".join(program(v, storages) for v in values)  # noqa: E731
    match value:
        case Raw():
            return value.code
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            size = value.bit_length() // 8 + 1
            return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode("utf-8", "surrogatepass"))) + value.encode()
        case dict():
            return b"}(" + write(*(part for item in value.items() for part in item)) + b"u"
        case list():
            return b"](" + write(*value) + b"e"
        case tuple():
            return b"(" + write(*value) + b"t"
        case np.ndarray():
            return write(View(value))
        case View():
            storages.append(value.array)
            name = f"ctorch\n{STORAGES[value.array.dtype.str]}\n".encode()
            storage = b"(" + write("storage", Raw(name), str(len(storages) - 1), "cpu", value.count) + b"tQ"
            shape, strides = tuple(value.shape), tuple(value.strides)
            args = write(Raw(storage), value.offset, shape, strides, False, Raw(ORDERED_DICT))
            return b"ctorch._utils\n_rebuild_tensor_v2\n(" + args + b"tR"
    raise TypeError(type(value))


def save(path: Path, value: Any, how: int = zipfile.ZIP_STORED) -> Path:
    """Write a checkpoint as torch.save does, without torch."""
    storages: list[np.ndarray] = []
    code = b"\x80\x02" + program(value, storages) + b"."
    with zipfile.ZipFile(path, "w", how) as archive:
        archive.writestr(f"{path.stem}/data.pkl", code)
        archive.writestr(f"{path.stem}/byteorder", "little")
        for i, array in enumerate(storages):
            archive.writestr(f"{path.stem}/data/{i}", array.tobytes("A"))
        archive.writestr(f"{path.stem}/version", "3\n")
    return path


def save_model(path: Path, tensor: Any, **how: Any) -> Path:
    return save(path, {"model": {"a": tensor}, "config": {"x": 1}, "metrics": None}, **how)


def one(path: Path) -> np.ndarray:
    """Read the array named a."""
    return read_torch(path)[1]["a"].read()


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<f8"])
def test_every_dtype_is_read_as_float32(tmp_path, dtype):
    array = one(save_model(tmp_path / "x.pt", NUMBERS.astype(dtype)))
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, NUMBERS.astype(dtype).astype(np.float32))


def test_bfloat16_is_the_upper_half_of_float32(tmp_path):
    upper = (NUMBERS.view(np.uint32) >> 16).astype(np.uint16)
    array = one(save_model(tmp_path / "x.pt", upper))
    np.testing.assert_array_equal(array.view(np.uint32), NUMBERS.view(np.uint32) & 0xFFFF0000)


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (View(NUMBERS.T), NUMBERS.T),
        (View(NUMBERS, (4, 3), (1, 4)), NUMBERS.T),
        (View(NUMBERS, (2, 2), (4, 2), 5), NUMBERS[1:, 1::2]),
        (View(NUMBERS, (3,), (0,), 2), np.full(3, NUMBERS[0, 2])),
        (View(NUMBERS, (), (), 11), NUMBERS[2, 3]),
    ],
)
def test_strides_and_offsets_are_used(tmp_path, view, expected):
    np.testing.assert_array_equal(one(save_model(tmp_path / "x.pt", view)), expected)


def test_config_is_returned_unchanged(tmp_path):
    config = {"n": -3, "big": 2**40, "x": 0.5, "yes": True, "none": None, "list": ["", "é", "😀", "\n"], "pair": (1, 2)}
    assert read_torch(save(tmp_path / "x.pt", {"model": {}, "config": config}))[0] == config


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_file_of_torch_save_is_read(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    from collections import OrderedDict

    whole = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    state = OrderedDict(a=whole, b=whole.T, c=whole[1::2, 1:3])
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    config = {"words": ["", "\n", "é"], "n": 64, "large": 2**33, "rate": 1e-3, "betas": [0.9, 0.95], "dtype": None}
    torch.save({"model": state, "config": config, "metrics": {"loss": [1.5]}}, tmp_path / "x.pt")
    found, arrays = read_torch(tmp_path / "x.pt")
    assert found == config
    assert set(arrays) == set(state)
    for name, stored in arrays.items():
        np.testing.assert_array_equal(stored.read(), state[name].float().numpy())


# Hostile files


class Command:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_runs_a_command_runs_nothing(tmp_path, protocol):
    marker = tmp_path / "marker"
    code = pickle.dumps({"model": {"a": Command(marker)}, "config": {}}, protocol=protocol)
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", code)
    with pytest.raises(UserError, match="is rejected") as caught:
        read_torch(tmp_path / "x.pt")
    assert protocol == 4 or "system" in str(caught.value)
    assert not marker.exists()
    pickle.loads(code)  # control: pickle.loads runs the command
    assert marker.exists()


@pytest.mark.parametrize(
    "name", ["builtins eval", "torch._utils _rebuild_parameter", "collections deque", "torch LongStorage", "os system"]
)
def test_other_classes_are_rejected_by_name(tmp_path, name):
    code = Raw(b"c" + name.replace(" ", "\n").encode() + b"\n)R")
    with pytest.raises(UserError, match=name.replace(" ", ".")):
        read_torch(save_model(tmp_path / "x.pt", code))


@pytest.mark.parametrize(
    ("code", "word"),
    [
        (b"}}b", "BUILD|not a tensor"),
        (b"(idos\nsystem\n", "INST"),
        (b"]2", "DUP"),
        (b"cos\nsystem\n", "os.system"),
        (b"ctorch\nFloatStorage\n)R", "unsupported function"),
        (ORDERED_DICT[:-2] + b"(X\x01\x00\x00\x00atR", "unsupported function"),
        (b"](h\x05e", "cannot be read"),
        (b"K\x01K\x02a", "not a list"),
        (b"}K\x01K\x02s", "not strings"),
        (b"X\xff\xff\xff\x7fabc", "cannot be read"),
        (b"tttt", "cannot be read"),
    ],
)
def test_invalid_instructions_are_rejected(tmp_path, code, word):
    with pytest.raises(UserError, match=word):
        read_torch(save_model(tmp_path / "x.pt", Raw(code)))


@pytest.mark.parametrize(
    "view",
    [
        View(NUMBERS, count=2**40),
        View(NUMBERS, shape=(2**40, 2**40), strides=(0, 0)),
        View(NUMBERS, shape=(4, 4)),
        View(NUMBERS, offset=1),
        View(NUMBERS, strides=(4, 2)),
        View(NUMBERS, strides=(-4, 1), offset=8),
        View(NUMBERS, offset=-1),
        View(NUMBERS, shape=(3, 4, 1)),
        View(NUMBERS, shape=(0, 4)),
        View(NUMBERS, shape=(3.0, 4)),
        View(NUMBERS, shape=("3", 4)),
        View(NUMBERS, shape=(1,) * 70, strides=(1,) * 70),
        View(NUMBERS, count="12"),
    ],
)
def test_a_tensor_that_reaches_past_its_numbers_is_refused(tmp_path, view):
    with pytest.raises(UserError, match="cannot be read"):
        read_torch(save_model(tmp_path / "x.pt", view))


def test_many_tensors_over_one_storage_are_rejected(tmp_path):
    big = np.zeros(10_000, np.float32)
    path = save_model(tmp_path / "x.pt", big)
    with zipfile.ZipFile(path) as archive:
        code = archive.read("x/data.pkl")
    start, end = code.index(b"ctorch._utils"), code.rindex(b"tR") + 2
    copies = b"".join(b"X" + struct.pack("<I", 2) + bytes([98, 98 + i]) + code[start:end] for i in range(20))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", code[:end] + copies + code[end:])
        archive.writestr("x/data/0", big.tobytes())
    with pytest.raises(UserError, match="overlap"):
        read_torch(path)


def test_a_compressed_zip_is_refused_before_it_is_unpacked(tmp_path):
    with pytest.raises(UserError, match="compressed"):
        read_torch(save_model(tmp_path / "x.pt", np.zeros((1000, 1000), np.float32), how=zipfile.ZIP_DEFLATED))


def test_big_endian_arrays_are_rejected(tmp_path):
    path = save_model(tmp_path / "x.pt", NUMBERS)
    path.write_bytes(path.read_bytes().replace(b"byteorder", b"BYTEORDER"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x/byteorder", "big")
    with pytest.raises(UserError, match="big-endian"):
        read_torch(path)


@pytest.mark.parametrize("value", [[], {"model": {}}, {"model": [], "config": {}}, {"model": {"a": 1}, "config": {}}])
def test_pickle_without_a_checkpoint_is_rejected(tmp_path, value):
    with pytest.raises(UserError, match="no 'model' and 'config'|not a tensor"):
        read_torch(save(tmp_path / "x.pt", value))


def test_truncated_file_is_rejected(tmp_path):
    whole = save_model(tmp_path / "x.pt", NUMBERS).read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "x.pt").write_bytes(whole[:length])
        with pytest.raises(UserError, match="cannot be read"):
            read_torch(tmp_path / "x.pt")


def test_mutated_pickle_is_read_or_rejected(tmp_path):
    """The mutations are in the pickle itself, with a correct checksum, so they reach the interpreter."""
    storages: list[np.ndarray] = []
    whole = b"\x80\x02" + program({"model": {"a": NUMBERS}, "config": {"x": [1, "y"]}}, storages) + b"."
    rng, refused = np.random.default_rng(1), 0
    for _ in range(500):
        code = bytearray(whole)
        for index in rng.integers(0, len(code), 2):
            code[index] = rng.integers(256)
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            archive.writestr("x/data.pkl", bytes(code))
            archive.writestr("x/data/0", NUMBERS.tobytes())
        try:
            for stored in read_torch(tmp_path / "x.pt")[1].values():
                assert stored.read().size == math.prod(stored.shape) <= NUMBERS.size
        except UserError:
            refused += 1
    assert refused > 100


def test_zip_that_lists_one_member_many_times_is_rejected(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data/0", bytes(10_000))
        for i in range(1, 9):
            again = copy.copy(archive.filelist[0])
            again.filename = f"x/data/{i}"
            archive.filelist.append(again)
    with pytest.raises(UserError, match="larger than the file"):
        read_torch(tmp_path / "x.pt")
