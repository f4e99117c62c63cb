"""Tensors of a `pytorch_model*.bin`, located without running its pickle.

The file is a zip archive: `data.pkl`, a pickle whose tensors refer to records of the archive, and the uncompressed
records. Nothing that the pickle names is imported: names stay strings, and all but a few are refused.
"""

from __future__ import annotations

import os
import pickletools
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import open_file, reading
from vlmprune_jax.base.weight_files import FILE_DTYPES, Entry, bytes_in_file, check_no_pointer, check_shape, file_name

_EXPECTED = "expected a plain PyTorch state dict, as torch.save has written it since version 1.6"
_STORAGES = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_MAX_PICKLE_BYTES = 10_000_000  # maximum; a pickle has about 200 bytes per tensor
_LOCAL_HEADER = 30  # bytes of a zip record's own header, before its name and its extra field


class _Name(NamedTuple):
    """Class or function that a PyTorch pickle refers to, or an object that it makes by calling this one."""

    text: str


class _Storage(NamedTuple):
    """Tensor storage described in a PyTorch pickle, typed or untyped."""

    kind: str
    record: str


class _Tensor(NamedTuple):
    """Tensor described in a PyTorch pickle: a view of a storage that starts at element `first`."""

    storage: _Storage
    first: int
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]
    dtype: str


def read_torch(path: Path) -> dict[str, Entry]:
    """Return {key: tensor} of a `pytorch_model*.bin` file without executing its pickle.

    Raises UserError if the file is damaged, or is not a state dict of plain contiguous tensors.
    """
    with open_file(path) as file, reading(path, _EXPECTED):
        check_no_pointer(path, file)
        with zipfile.ZipFile(file) as archive:
            members = {member.filename: member for member in archive.infolist()}
            (listing,) = (name for name in members if name.endswith("data.pkl") and name.count("/") == 1)
            root, place = listing.removesuffix("data.pkl"), _places(file, members)
            begin, end = place(listing, _MAX_PICKLE_BYTES)
            state = _interpret(_bytes(file, begin, end))
            order = f"{root}byteorder"
            if order in members and _bytes(file, *place(order, 16)) != b"little":
                raise ValueError("its numbers are big-endian")
            if not isinstance(state, dict):
                content = f"an object of {state.text}" if isinstance(state, _Name) else "another object"
                raise ValueError(f"it holds {content}, not a state dict")
            return {key: _entry(path, key, value, f"{root}data/", place) for key, value in state.items()}


def _places(file: BinaryIO, members: dict[str, zipfile.ZipInfo]) -> Callable[..., tuple[int, int]]:
    """Return a function that maps a record name in a PyTorch zip archive to its byte range in the file."""
    size, known = os.fstat(file.fileno()).st_size, dict[str, tuple[int, int]]()

    def place(name: str, most: int = 2**63) -> tuple[int, int]:
        if name not in known:
            member = members[name]
            if member.compress_type or member.flag_bits & 1 or member.file_size != member.compress_size:
                raise ValueError(f"record {name} is compressed or encrypted")
            header = _bytes(file, member.header_offset, member.header_offset + _LOCAL_HEADER)
            fields = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            begin = member.header_offset + _LOCAL_HEADER + fields
            known[name] = begin, begin + member.file_size
        begin, end = known[name]
        if end > size or end - begin > most:
            raise ValueError(f"record {name} has an impossible size of {end - begin} bytes")
        return begin, end

    return place


def _bytes(file: BinaryIO, begin: int, end: int) -> bytes:
    file.seek(begin)
    return file.read(end - begin)


def _entry(path: Path, key: str, value: Any, root: str, place: Callable[..., tuple[int, int]]) -> Entry:
    if not isinstance(value, _Tensor):
        kind = f"an object of {value.text}" if isinstance(value, _Name) else f"a {type(value).__name__}"
        raise UserError(
            f"{path}: {key} is {kind} (a sparse, quantised or empty tensor, or no tensor): save a state dict that "
            "contains only plain tensors"
        )
    check_shape(value.shape)
    if value.dtype not in FILE_DTYPES:
        raise ValueError(f"{key} has dtype {value.dtype}")
    if type(value.first) is not int or value.first < 0 or not _in_one_piece(value):
        raise UserError(f"{path}: {key} is not contiguous: save the state dict again with each tensor's .contiguous()")
    first, last = place(root + value.storage.record)
    begin = first + value.first * FILE_DTYPES[value.dtype].itemsize
    end = begin + bytes_in_file(value.dtype, value.shape)
    if end > last:
        raise ValueError(f"{key} (shape {list(value.shape)}, {value.dtype}) needs more bytes than the file stores")
    return Entry(key, path, value.dtype, value.shape, begin, end)


def _in_one_piece(tensor: _Tensor) -> bool:
    """Return True if a tensor is contiguous in row-major order."""
    step = 1
    for size, stride in reversed(list(zip(tensor.shape, tensor.strides, strict=True))):
        if size > 1 and stride != step:
            return 0 in tensor.shape
        step *= size
    return True


def _interpret(pickle: bytes) -> Any:
    """Interpret a pickle without executing it; only strings, numbers, containers and the classes above are built.

    Raises Exception of various types if the pickle is damaged or has other content.
    """
    below: list[list[Any]] = []  # saved stacks, one for each open MARK opcode
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(pickle):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                below.append(stack)
                stack = []
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                stack.append(_CONSTANTS[opcode.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "EMPTY_LIST" | "EMPTY_DICT":
                stack.append([] if opcode.name == "EMPTY_LIST" else {})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                items, stack = stack, below.pop()
                stack.append(tuple(items))
            case "APPEND" | "APPENDS":
                items, stack = ([stack.pop()], stack) if opcode.name == "APPEND" else (stack, below.pop())
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                pair = opcode.name == "SETITEM"
                items, stack = ([stack.pop(-2), stack.pop()], stack) if pair else (stack, below.pop())
                stack[-1].update(_pairs(items[::2], items[1::2]))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if argument is None else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_Name(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                stack[-2:] = [_Name(".".join(stack[-2:]))]
            case "BINPERSID":
                stack[-1] = _storage(*stack[-1])
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack[-1] = _construct(stack[-1].text, arguments)
            case "BUILD":
                stack.pop()  # drops the object's attributes, such as `_metadata` of a state dict
            case "STOP":
                return stack.pop()
            case _:
                raise ValueError(f"its pickle has {opcode.name}")
    raise ValueError("its pickle has no end")


def _storage(kind: str, storage_type: _Name, record: str, *_: Any) -> _Storage:
    if kind != "storage":
        raise ValueError("it names objects other than storages")
    return _Storage(storage_type.text.rpartition(".")[2], f"{record:s}")


def _pairs(keys: Sequence[Any], values: Sequence[Any]) -> dict[str, Any]:
    for key in keys:
        if not isinstance(key, str):
            raise ValueError(f"key {key} is not a string" if isinstance(key, int) else "a key is not a string")
    return dict(zip(keys, values, strict=True))


def _construct(function: str, arguments: tuple[Any, ...]) -> Any:
    match function:
        case "collections.OrderedDict":
            pairs = arguments[0] if arguments else []
            return _pairs([key for key, _ in pairs], [value for _, value in pairs])
        case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state":
            return arguments[0]
        case "torch._utils._rebuild_tensor_v2" if len(arguments) < 7 or not arguments[6]:
            storage, first, shape, strides = arguments[:4]
            return _Tensor(storage, first, shape, strides, _STORAGES.get(storage.kind, storage.kind))
        case "torch._utils._rebuild_tensor_v3" if len(arguments) < 8 or not arguments[7]:
            storage, first, shape, strides = arguments[:4]
            return _Tensor(storage, first, shape, strides, file_name(arguments[6].text.removeprefix("torch.")))
    return _Name(function)
