"""Reads the header of a GGUF file (ggml/docs/gguf.md): key-values, then each tensor's name, shape, type and offset.

Every count and size is checked against the file's size before it is used. Lists are skipped: the gguf package's own
reader takes seconds for a model's vocabulary. This module knows one file and no dialect.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from typing import Any

from formats.errors import CorruptFile, NotACheckpoint, UnsupportedDType
from formats.plain_file import Header
from formats.spec import DType, TensorSpec, shape_text

TYPE, ADAPTER = "general.type", "adapter"
TYPES = {0: DType.F32, 1: DType.F16, 28: DType.F64, 30: DType.BF16}  # by GGML's numbers
ALIGNMENT = 32  # bytes, unless a key says otherwise
_ALIGNMENT_KEY = "general.alignment"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_DIMENSIONS = 4  # the most that GGML has


def read_header(descriptor: int, size: int, where: object) -> Header:
    """Reads the header of an adapter.

    The metadata holds the key-values as strings: strings unchanged, scalars as JSON, and only the length of a list.

    Args:
        descriptor, size: the open file and its size in bytes.
        where: the file's path, for errors.

    Raises:
        NotACheckpoint: the file is not GGUF, has another version or byte order, or holds a model.
        CorruptFile: the header and the file contradict each other.
        UnsupportedDType: a tensor has a quantised type.
    """
    if size < 4:
        raise NotACheckpoint(
            "not a GGUF file: too short for a header",
            where=where,
            found=f"{size} bytes",
            then="download or copy the file again",
        )
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as mapped:
        opening = mapped[:4]
        if opening != b"GGUF":
            raise NotACheckpoint("not a GGUF file", where=where, expected="b'GGUF' at its beginning", found=opening)
        cursor = _Cursor(mapped, size, where)
        version = cursor.number("I")
        if version not in _VERSIONS:
            big = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            raise NotACheckpoint(
                "a GGUF file for big-endian machines" if big else "an unsupported version of GGUF",
                where=where,
                expected=f"little-endian, version {' or '.join(map(str, _VERSIONS))}",
                found=version,
            )
        tensors, pairs = cursor.number("Q"), cursor.number("Q")
        metadata = dict(cursor.pair() for _ in range(pairs))
        if len(metadata) != pairs:
            raise CorruptFile("the header has a key twice", where=where, then="download or copy the file again")
        _check_adapter(metadata, where)
        specs, relative = _tensors(cursor, tensors)
        alignment = _alignment(metadata, where)
        start = cursor.position + -cursor.position % alignment
    offsets = {name: start + offset for name, offset in relative.items()}
    for name, spec in specs.items():
        if relative[name] % alignment or offsets[name] + spec.nbytes > size:
            raise CorruptFile(
                "a tensor lies outside the file, or is misaligned",
                where=f"{where}: {name}",
                expected=f"{spec.nbytes} bytes for {spec.dtype} {shape_text(spec.shape)}",
                found=f"a file of {size} bytes, with the tensor at offset {offsets[name]}",
                then="download or copy the file again",
            )
    return Header(specs, metadata, offsets)


def _check_adapter(metadata: Mapping[str, str], where: object) -> None:
    if metadata.get(TYPE) != ADAPTER:
        raise NotACheckpoint(
            "a GGUF file of a model holds weights quantised for llama.cpp",
            where=where,
            expected=f"{TYPE} = {ADAPTER}; for a model a .safetensors or .st file, or a folder with one",
            found=f"{TYPE} = {metadata.get(TYPE, 'missing')}",
            then="use the model that it was converted from, and convert the result again",
        )


def _alignment(metadata: Mapping[str, str], where: object) -> int:
    text = metadata.get(_ALIGNMENT_KEY, str(ALIGNMENT))
    if not text.isdecimal() or int(text).bit_count() != 1:
        raise CorruptFile(f"{_ALIGNMENT_KEY} is not a power of two", where=where, found=text)
    return int(text)


class _Cursor:
    """Steps through a mapped file. Every step raises CorruptFile if it would pass the end of the file."""

    def __init__(self, mapped: mmap.mmap, size: int, where: object) -> None:
        self._mapped, self._size, self.where = mapped, size, where
        self.position = 4

    def step(self, count: int) -> int:
        """Advances by `count` bytes and returns the position before."""
        here = self.position
        if count > self._size - here:
            raise CorruptFile(
                "the header claims more than the file holds",
                where=self.where,
                expected=f"{count} bytes at offset {here}",
                found=f"a file of {self._size} bytes",
                then="download or copy the file again",
            )
        self.position += count
        return here

    def number(self, code: str) -> Any:
        """Reads a little-endian number; `code` is struct's format letter."""
        width = struct.calcsize(f"<{code}")
        return struct.unpack_from(f"<{code}", self._mapped, self.step(width))[0]

    def text(self) -> str:
        """Reads a string, which is preceded by its length."""
        begin = self.step(self.number("Q"))
        try:
            return self._mapped[begin : self.position].decode()
        except UnicodeDecodeError as error:
            raise CorruptFile(
                "a text in the header is not UTF-8", where=self.where, then="download or copy the file again"
            ) from error

    def pair(self) -> tuple[str, str]:
        """Reads a key and its value, both as strings."""
        return self.text(), self._value(self.number("I"))

    def _value(self, kind: int) -> str:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return json.dumps(self.number(_SCALARS[kind]))
        if kind != _ARRAY:
            raise CorruptFile("a key has a value of an unknown type", where=self.where, found=kind)
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            self.step(count * struct.calcsize(f"<{_SCALARS[kind]}"))
        elif kind == _STRING:
            for _ in range(count):
                self.step(self.number("Q"))
        else:
            raise CorruptFile("a list has elements of an unknown type", where=self.where, found=kind)
        return f"a list of {count}"


def _tensors(cursor: _Cursor, count: int) -> tuple[dict[str, TensorSpec], dict[str, int]]:
    """The tensors, and the offset of each in the payload."""
    specs: dict[str, TensorSpec] = {}
    offsets: dict[str, int] = {}
    for _ in range(count):
        name, dimensions = cursor.text(), cursor.number("I")
        if name in specs or not 1 <= dimensions <= _DIMENSIONS:
            raise CorruptFile(
                "a tensor is listed twice, or has too many dimensions",
                where=f"{cursor.where}: {name}",
                expected=f"one entry with 1 to {_DIMENSIONS} dimensions",
                found=f"{dimensions} dimensions",
                then="download or convert the adapter again",
            )
        shape = tuple(reversed([cursor.number("Q") for _ in range(dimensions)]))  # GGML puts the innermost first
        kind = cursor.number("I")
        if kind not in TYPES:
            raise UnsupportedDType(
                "factors in a type that is not a plain float",
                where=f"{cursor.where}: {name}",
                expected=", ".join(f"{dtype} ({number})" for number, dtype in TYPES.items()),
                found=f"GGML's type {kind}",
                then="convert the adapter again with --outtype f16 or f32",
            )
        specs[name] = TensorSpec(name, TYPES[kind], shape)
        offsets[name] = cursor.number("Q")
    return specs, offsets
