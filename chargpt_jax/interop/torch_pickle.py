"""What `torch.save` wrote, read without torch and without running anything that the file asks for.

Such a file is a zip of raw numbers beside a pickle, and a pickle is a program: loaded the usual way it may call any
function it names. Here nothing is loaded. `pickletools` splits the program into instructions, a small interpreter
obeys those that build texts, numbers, lists, tuples and dicts, and a name stays a name: two are understood (an ordered
dict, a tensor over a storage), no name is looked up, so there is nothing to call. All else is refused.
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
"""What a storage's class says of its numbers."""

MOST_PICKLE = 4 << 20
"""The longest program, bytes: names, shapes and the config of a checkpoint take some ten kilobytes."""

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclasses.dataclass(frozen=True)
class Name:
    """A class or function that a pickle names: its module and its name, and no more than that."""

    text: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """A row of numbers in the zip."""

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
        The config as it stands there (nested dicts, lists, texts and numbers), and the state dict's arrays by name.

    Raises:
        UserError: where the file is damaged, or asks for anything but dicts and tensors.
    """
    with reading(path):
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no whole zip file; files of torch before 1.6 must be saved again by a newer one")
        with zipped(path) as (archive, members):
            programs = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(programs) != 1 or members[programs[0]].file_size > MOST_PICKLE:
                raise ValueError("it holds no data.pkl of reasonable size")
            folder = programs[0].removesuffix("data.pkl")
            if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
                raise ValueError("its numbers are big-endian")
            saved = interpret(archive.read(programs[0]), path)
            sizes = {name: member.file_size for name, member in members.items()}
        if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict) or "config" not in saved:
            raise UserError(f"{path} holds no 'model' and 'config': give a checkpoint of the original.")
        tensors = saved["model"]
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise UserError(f"{path} holds {name[:80]!r} in its model, but that is no tensor: leave it out.")
            _check(name, tensor, sizes.get(f"{folder}data/{tensor.storage.key}", -1))
        # The tied table is there twice; more of that kind would make a small file large in memory.
        if sum(4 * math.prod(tensor.shape) for tensor in tensors.values()) > 4 * path.stat().st_size:
            raise ValueError("its tensors overlap")
        return saved["config"], {name: _stored(path, folder, tensor) for name, tensor in tensors.items()}


def _check(name: str, tensor: Tensor, size: int) -> None:
    """Refuse a tensor that reaches past its storage, or has more numbers than that."""
    storage = tensor.storage
    if storage.count * np.dtype(DTYPES[storage.dtype]).itemsize != size:
        raise ValueError(f"the storage of {name[:80]!r} is missing, or of another size than it says")
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if 0 in tensor.shape or math.prod(tensor.shape) > storage.count or tensor.offset + reach >= storage.count:
        raise ValueError(f"{name[:80]!r} reaches past its storage")


def _stored(path: Path, folder: str, tensor: Tensor) -> Stored:
    def read() -> np.ndarray:
        with reading(path), zipped(path) as (archive, _):
            numbers = as_float32(archive.read(f"{folder}data/{tensor.storage.key}"), tensor.storage.dtype)
        strides = [4 * stride for stride in tensor.strides]
        view = np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides, writeable=False)
        return np.ascontiguousarray(view)

    return Stored(tensor.shape, read)


def interpret(program: bytes, path: Path) -> Any:
    """Build what a pickle describes, of dicts, lists, tuples, texts, numbers, `Name` and `Tensor`.

    Raises:
        UserError: naming the instruction, class or function that is not among those.
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
            case "BUILD":  # a state dict carries its modules' versions as an attribute
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise ValueError("it gives attributes to what has none")
            case name:
                raise UserError(f"{path} is refused: its pickle uses {name}, which torch.save never does here.")
    raise EOFError("its pickle has no end")


def _known(name: str, path: Path) -> Name:
    if name not in (ORDERED_DICT, REBUILD_TENSOR, *STORAGES):
        shown = name.replace(" ", ".")[:80]
        raise UserError(f"{path} is refused: it asks for {shown!r}, but a checkpoint needs dicts and tensors only.")
    return Name(name)


def _extend(target: Any, items: list[Any]) -> None:
    if not isinstance(target, list):
        raise ValueError("it appends to what is no list")
    target.extend(items)


def _fill(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or not all(isinstance(key, str) for key in items[::2]):
        raise ValueError("it fills what is no dict, or with keys that are no texts")
    target.update(zip(items[::2], items[1::2], strict=True))


def _storage(words: Any) -> Storage:
    kind, name, key, _, count = words
    if kind != "storage" or not isinstance(name, Name) or not isinstance(key, str) or type(count) is not int:
        raise ValueError("it refers to what is no storage")
    return Storage(key, STORAGES[name.text], count)


def _reduced(function: Any, args: Any) -> Any:
    """Say what a call would have given; nothing is called."""
    if function == Name(ORDERED_DICT) and args == ():
        return {}
    if function != Name(REBUILD_TENSOR):
        raise ValueError("it calls what is no function")
    storage, offset, shape, strides = args[:4]
    shape, strides = checked_shape(shape, "a tensor"), checked_shape(strides, "a tensor")
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0 or len(shape) != len(strides):
        raise ValueError("a tensor is described wrongly")
    return Tensor(storage, offset, shape, strides)
