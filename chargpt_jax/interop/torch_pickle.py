"""Read files of `torch.save` without torch, and without running any code that the file names.

Such a file is a zip archive of raw array values and a pickle. A pickle is a program: `pickle.load` calls any function
that it names. Here `pickletools` splits the program into instructions, and a small interpreter executes only those that
build strings, numbers, lists, tuples and dicts. No name is imported, so no function can be called. Two names have a
meaning: an ordered dict, and a tensor that is a view of a storage. All other names and instructions are rejected.
"""

import dataclasses
import math
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from chargpt_jax.errors import UserError
from chargpt_jax.interop.safetensors_file import DTYPES, Stored, as_float32, checked_shape, reading, zipped

ORDERED_DICT = "collections OrderedDict"
REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
STORAGES = {
    "torch FloatStorage": "float32",
    "torch HalfStorage": "float16",
    "torch DoubleStorage": "float64",
    "torch BFloat16Storage": "bfloat16",
}
"""{class of a storage: dtype of its values}."""

MAX_PICKLE = 4 << 20
"""Maximum size of a pickle, bytes: the names, shapes and config of a checkpoint need about ten kilobytes."""

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclasses.dataclass(frozen=True)
class Name:
    """The name of a class or function in a pickle: its module and its name, as text."""

    text: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """A one-dimensional array in the zip archive."""

    key: str
    dtype: str
    count: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch(path: Path) -> tuple[Any, dict[str, Stored]]:
    """Read a checkpoint {'model': state dict, 'config': ..., 'metrics': ...}.

    Returns:
        The config, unchecked (nested dicts, lists, strings and numbers), and the arrays of the state dict by name.

    Raises:
        UserError: if the file is damaged, or contains anything but dicts and tensors.
    """
    with reading(path):
        if not zipfile.is_zipfile(path):
            raise ValueError(
                "it is not a complete zip file; a file of torch before 1.6 must be saved again by a newer version"
            )
        with zipped(path) as (archive, members):
            programs = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(programs) != 1 or members[programs[0]].file_size > MAX_PICKLE:
                raise ValueError(f"it must contain one data.pkl of at most {MAX_PICKLE >> 20} MiB")
            folder = programs[0].removesuffix("data.pkl")
            if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
                raise ValueError("its arrays are big-endian")
            saved = interpret(archive.read(programs[0]), path)
            sizes = {name: member.file_size for name, member in members.items()}
        if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict) or "config" not in saved:
            raise UserError(f"{path} has no 'model' and 'config': give a checkpoint of the original.")
        tensors = saved["model"]
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise UserError(f"{path} has {name[:80]!r} in its model, which is not a tensor: remove it.")
            _check(name, tensor, sizes.get(f"{folder}data/{tensor.storage.key}", -1))
        # The tied embedding is listed twice. More overlaps could expand a small file to a large amount of memory.
        if sum(4 * math.prod(tensor.shape) for tensor in tensors.values()) > 4 * path.stat().st_size:
            raise ValueError("its tensors overlap")
        return saved["config"], {name: _stored(path, folder, tensor) for name, tensor in tensors.items()}


def _check(name: str, tensor: Tensor, size: int) -> None:
    """Reject a tensor that reaches beyond its storage, or has more elements than its storage."""
    storage = tensor.storage
    if storage.count * np.dtype(DTYPES[storage.dtype]).itemsize != size:
        raise ValueError(f"the storage of {name[:80]!r} is missing, or its size differs from the stated one")
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if 0 in tensor.shape or math.prod(tensor.shape) > storage.count or tensor.offset + reach >= storage.count:
        raise ValueError(f"{name[:80]!r} reaches beyond its storage")


def _stored(path: Path, folder: str, tensor: Tensor) -> Stored:
    def read() -> np.ndarray:
        with reading(path), zipped(path) as (archive, _):
            values = as_float32(archive.read(f"{folder}data/{tensor.storage.key}"), tensor.storage.dtype)
        strides = [4 * stride for stride in tensor.strides]
        view = np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.shape, strides, writeable=False)
        return np.ascontiguousarray(view)

    return Stored(tensor.shape, read)


def interpret(program: bytes, path: Path) -> Any:
    """Build the object that a pickle describes, from dicts, lists, tuples, strings, numbers, `Name` and `Tensor`.

    Raises:
        UserError: naming the first unsupported instruction, class or function.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    instructions: Any = pickletools.genops(program)
    for code, arg, _ in instructions:
        match code.name:
            case "PROTO":
                pass
            case "STOP":
                return stack.pop()
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case name if name in LITERALS:
                stack.append(arg)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case name if name in TUPLES:
                stack[-TUPLES[name] :] = [tuple(stack[-TUPLES[name] :])]
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "APPEND":
                _extend(stack[-2], [stack.pop()])
            case "APPENDS":
                items = since_mark()
                _extend(stack[-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _fill(stack[-1], [key, value])
            case "SETITEMS":
                items = since_mark()
                _fill(stack[-1], items)
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL":
                stack.append(_known(arg, path))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                args, function = stack.pop(), stack.pop()
                stack.append(_reduced(function, args))
            case "BUILD":  # a state dict has its modules' versions as an attribute
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise ValueError("it sets attributes of an object that is not a dict")
            case name:
                raise UserError(
                    f"{path} is rejected: its pickle uses {name}, which a checkpoint of the original does not."
                )
    raise EOFError("its pickle is incomplete")


def _known(name: str, path: Path) -> Name:
    if name not in (ORDERED_DICT, REBUILD_TENSOR, *STORAGES):
        shown = name.replace(" ", ".")[:80]
        raise UserError(
            f"{path} is rejected: its pickle names {shown!r}, but a checkpoint needs only dicts and tensors."
        )
    return Name(name)


def _extend(target: Any, items: list[Any]) -> None:
    if not isinstance(target, list):
        raise ValueError("it appends to an object that is not a list")
    target.extend(items)


def _fill(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or not all(isinstance(key, str) for key in items[::2]):
        raise ValueError("it sets items of an object that is not a dict, or with keys that are not strings")
    target.update(zip(items[::2], items[1::2], strict=True))


def _storage(words: Any) -> Storage:
    kind, name, key, _, count = words
    if kind != "storage" or not isinstance(name, Name) or not isinstance(key, str) or type(count) is not int:
        raise ValueError("a storage is invalid")
    return Storage(key, STORAGES[name.text], count)


def _reduced(function: Any, args: Any) -> Any:
    """Return the result that a call would have; no function is called."""
    if function == Name(ORDERED_DICT) and args == ():
        return {}
    if function != Name(REBUILD_TENSOR):
        raise ValueError("it calls an unsupported function")
    storage, offset, shape, strides = args[:4]
    shape, strides = checked_shape(shape, "a tensor"), checked_shape(strides, "a tensor")
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0 or len(shape) != len(strides):
        raise ValueError("a tensor is invalid")
    return Tensor(storage, offset, shape, strides)
