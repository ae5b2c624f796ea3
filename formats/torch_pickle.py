"""Reads the pickle in a torch file without running it.

A pickle is a program: run by Python's own `pickle`, it may call anything. Here `pickletools` reads its opcodes, and a
small interpreter follows them that knows plain containers, numbers, strings, and the few names that a state dict
contains. These names become descriptions; no function is ever called by name, and any other name is refused. The layout
follows torch/serialization.py and torch/_utils.py (torch 2.9). This module opens no file.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from formats.errors import CorruptFile, UnsafeFile
from formats.spec import DType

MAX_PICKLE = 32_000_000  # bytes; enough for more than 100,000 tensors
MAX_STEPS = 8_000_000  # opcodes; a tensor takes 32, and the smallest opcode makes an object of 64 bytes
_MAX_SIDE = 1 << 63
_MAX_DIMENSIONS = 64
# The storage classes that torch writes by name. All other dtypes use an UntypedStorage, whose size is in bytes.
STORAGES = {
    DType.F64: "DoubleStorage",
    DType.F32: "FloatStorage",
    DType.F16: "HalfStorage",
    DType.BF16: "BFloat16Storage",
    DType.I64: "LongStorage",
    DType.I32: "IntStorage",
    DType.I16: "ShortStorage",
    DType.I8: "CharStorage",
    DType.U8: "ByteStorage",
    DType.BOOL: "BoolStorage",
}
_UNHELD_STORAGES = {  # bytes per element
    "ComplexDoubleStorage": 16,
    "ComplexFloatStorage": 8,
    "QInt8Storage": 1,
    "QInt32Storage": 4,
    "QUInt8Storage": 1,
    "QUInt4x2Storage": 1,
    "QUInt2x4Storage": 1,
}
UNTYPED = "UntypedStorage"
# torch's names of our dtypes, and of the dtypes that we do not support.
NAMES = {
    DType.BOOL: "bool",
    DType.U8: "uint8",
    DType.I8: "int8",
    DType.F8_E5M2: "float8_e5m2",
    DType.F8_E4M3: "float8_e4m3fn",
    DType.I16: "int16",
    DType.U16: "uint16",
    DType.F16: "float16",
    DType.BF16: "bfloat16",
    DType.I32: "int32",
    DType.U32: "uint32",
    DType.F32: "float32",
    DType.F64: "float64",
    DType.I64: "int64",
    DType.U64: "uint64",
}
_UNHELD_NAMES = (
    "float8_e5m2fnuz", "float8_e4m3fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2", "bits8", "bits16", "bits1x8", "bits2x4",
    "bits4x2", "complex32", "complex64", "complex128",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kind:
    """A dtype as torch names it, directly or by a storage class.

    Attributes:
        name: torch's name.
        dtype: our dtype; None if we do not support it.
        itemsize: bytes per element.
    """

    name: str
    dtype: DType | None
    itemsize: int = 1


@dataclass(frozen=True, slots=True)
class StorageEntry:
    """A storage in the file: its key, its kind (None for plain bytes), and its number of elements."""

    key: str
    kind: Kind | None
    count: int

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.kind.itemsize if self.kind is not None else 1


@dataclass(frozen=True, slots=True)
class StorageView:
    """A tensor as the pickle describes it: `offset` and `strides` count elements of `kind`."""

    storage: StorageEntry
    kind: Kind
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def extent(self) -> int:
        """Number of elements from the start of the storage to the view's last one; 0 for an empty view."""
        if not self.size:
            return 0
        return self.offset + 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements are stored in C order, without gaps."""
        expected = 1
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1 and stride != expected:
                return not self.size
            expected *= n
        return True


@dataclass(frozen=True, slots=True)
class _Call:
    """One of the functions that a state dict's pickle may name."""

    name: str


_ORDERED_DICT = _Call("collections.OrderedDict")
_TENSOR = _Call("torch._utils._rebuild_tensor_v2")
_TENSOR_OF_DTYPE = _Call("torch._utils._rebuild_tensor_v3")
_PARAMETER = _Call("torch._utils._rebuild_parameter")
_UNTYPED = Kind(UNTYPED, None)
_BY_CLASS = {name: Kind(name, dtype, dtype.itemsize) for dtype, name in STORAGES.items()}
_BY_CLASS |= {name: Kind(name, None, size) for name, size in _UNHELD_STORAGES.items()}
_GLOBALS: dict[str, _Call | Kind] = {
    **{call.name: call for call in (_ORDERED_DICT, _TENSOR, _TENSOR_OF_DTYPE, _PARAMETER)},
    **{f"{module}.{name}": kind for module in ("torch", "torch.cuda") for name, kind in _BY_CLASS.items()},
    **{f"torch.{name}": Kind(f"torch.{name}", dtype, dtype.itemsize) for dtype, name in NAMES.items()},
    **{f"torch.{name}": Kind(f"torch.{name}", None) for name in _UNHELD_NAMES},
    f"torch.{UNTYPED}": _UNTYPED,
    f"torch.storage.{UNTYPED}": _UNTYPED,
}
_PLAIN = frozenset(
    ("BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT",
     "BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
)  # fmt: skip
_IGNORED = frozenset(("PROTO", "FRAME"))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Limited:
    """A stream that yields at most MAX_PICKLE bytes, whatever lengths the pickle claims."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._end = stream.tell() + MAX_PICKLE

    def read(self, size: int) -> bytes:
        if size > self._end - self._stream.tell():
            raise ValueError(f"it is longer than {MAX_PICKLE} bytes")
        return self._stream.read(size)

    def readline(self) -> bytes:
        return self._stream.readline(self._end - self._stream.tell())

    def tell(self) -> int:
        return self._stream.tell()


def read_pickle(stream: BinaryIO, where: object) -> Any:
    """Reads one pickle from the stream and returns the object that it builds.

    The object consists of dicts (also for ordered ones), lists, tuples, numbers, strings, bytes, None, and one
    StorageView per tensor. Afterwards the stream is just past the pickle.

    Raises:
        UnsafeFile: the pickle names something that no state dict contains.
        CorruptFile: it is not a pickle, ends early, or contradicts itself.
    """
    machine = _Machine(where)
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(cast(BinaryIO, _Limited(stream)))):
            if step == MAX_STEPS:
                raise ValueError(f"it has more than {MAX_STEPS} opcodes")
            machine.step(opcode.name, argument)
        (result,) = machine.stack
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CorruptFile(
            f"the file's pickle is malformed: {error}", where=where, then="download or copy the file again"
        ) from error
    return result


class _Machine:
    """Interprets a pickle's opcodes: builds plain containers and descriptions, and calls nothing the pickle names."""

    def __init__(self, where: object) -> None:
        self.stack: list[Any] = []
        self._where = where
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _PLAIN:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            self._marks.append(len(stack) - _TUPLES[name])
            stack.append(tuple(self._marked()))
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(self._marked()))
        elif name in ("SETITEM", "SETITEMS"):
            if name == "SETITEM":
                self._marks.append(len(stack) - 2)
            items = self._marked()
            _set_items(stack[-1], zip(items[::2], items[1::2], strict=True))
        elif name in ("APPEND", "APPENDS"):
            if name == "APPEND":
                self._marks.append(len(stack) - 1)
            items = self._marked()
            _expect(stack[-1], list).extend(items)
        elif name == "GLOBAL":
            stack.append(self._named(str(argument).replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(self._named(f"{module}.{attribute}"))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            arguments, call = stack.pop(), stack.pop()
            stack.append(_called(call, arguments))
        elif name == "BUILD":  # the attributes of an ordered dict, such as _metadata
            stack.pop()
            _expect(stack[-1], dict)
        elif name not in _IGNORED and name != "STOP":
            raise UnsafeFile(
                "the file's pickle uses an opcode that no state dict needs",
                where=self._where,
                expected="plain containers of tensors, numbers and strings",
                found=f"the opcode {name}",
                then="load it with the program that wrote it, and save the model's state_dict() alone",
            )

    def _marked(self) -> list[Any]:
        begin = self._marks.pop()
        if begin < 0 or begin > len(self.stack):
            raise ValueError("its stack is empty")
        items = self.stack[begin:]
        del self.stack[begin:]
        return items

    def _named(self, name: str) -> _Call | Kind:
        if name not in _GLOBALS:
            raise UnsafeFile(
                "the file's pickle names something that is not part of a state dict; nothing of it was run",
                where=self._where,
                expected="tensors, numbers and strings in plain containers",
                found=name[:200],
                then="if you trust the file, load it with torch, and save the model's state_dict() alone",
            )
        return _GLOBALS[name]


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {kind.__name__} was expected, not a {type(value).__name__}")
    return value


def _set_items(target: Any, items: Iterable[tuple[Any, Any]]) -> None:
    _expect(target, dict)
    for key, value in items:
        parts = key if type(key) is tuple else (key,)
        if not all(part is None or type(part) in (str, int, float, bool, bytes) for part in parts):
            raise ValueError("a dict's key is neither text nor a number")
        target[key] = value


def _storage(identity: Any) -> StorageEntry:
    tag, kind, key, _, count, *view = _expect(identity, tuple)
    if tag != "storage" or any(part is not None for part in view):
        raise ValueError(f"a storage of an unknown form: {str(tag)[:40]}")
    if type(kind) is not Kind or (kind is not _UNTYPED and kind.name not in _BY_CLASS):
        raise ValueError("a storage without a class")
    return StorageEntry(_expect(key, str), None if kind is _UNTYPED else kind, _natural(count))


def _called(call: Any, arguments: Any) -> Any:
    arguments = _expect(arguments, tuple)
    if call is _ORDERED_DICT:
        made: dict[Any, Any] = {}
        pairs = _expect(arguments[0], list) if arguments else []
        _set_items(made, ((key, value) for key, value in pairs))
        return made
    if call is _PARAMETER:
        return _expect(arguments[0], StorageView)
    if call is _TENSOR:
        storage, offset, shape, strides, _, _, *bits = arguments
        kind = _expect(storage, StorageEntry).kind or Kind("torch.uint8", DType.U8)
    elif call is _TENSOR_OF_DTYPE:
        storage, offset, shape, strides, _, _, kind, *bits = arguments
        _expect(storage, StorageEntry)
        _expect(kind, Kind)
    else:
        raise ValueError("it calls something that is not a function")
    if any(bits):
        raise ValueError("a tensor is stored conjugated or negated, which only torch can undo")
    shape, strides = tuple(map(_natural, shape)), tuple(map(_natural, strides))
    if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {len(shape)} dimensions and {len(strides)} strides")
    return StorageView(storage, kind, _natural(offset), shape, strides)


def _natural(value: Any) -> int:
    if not 0 <= _expect(value, int) < _MAX_SIDE:
        raise ValueError("a size, stride or offset out of range")
    return int(value)
