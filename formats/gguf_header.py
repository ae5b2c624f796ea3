"""The header of a GGUF file (ggml/docs/gguf.md): key-values, then each tensor's name, shape, type and place.

Every count and size is checked against the file before anything is made of it, and lists are stepped over: the gguf
package's own reader takes seconds for the vocabulary of a model. Knows one file, no dialect.
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
    """Reads the header of an adapter. Metadata: the key-values as texts: strings as they are, numbers as JSON writes
    them, of lists the length.

    Args:
        descriptor, size: of the file.
        where: its path, for errors.

    Raises:
        NotACheckpoint: no GGUF file, one of another version or byte order, or one of a model.
        CorruptFile: header and file contradict each other.
        UnsupportedDType: a tensor in a quantised type.
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
                found=f"{size} bytes in all, the tensor from {offsets[name]} on",
                then="download or copy the file again",
            )
    return Header(specs, metadata, offsets)


def _check_adapter(metadata: Mapping[str, str], where: object) -> None:
    if metadata.get(TYPE) != ADAPTER:
        raise NotACheckpoint(
            "a GGUF file of a model holds weights quantised for llama.cpp",
            where=where,
            expected=f"{TYPE} = {ADAPTER}; for a model a .safetensors or .st file, or a folder with one",
            found=f"{TYPE} = {metadata.get(TYPE, 'not said')}",
            then="use the model that it was converted from, and convert the result again",
        )


def _alignment(metadata: Mapping[str, str], where: object) -> int:
    text = metadata.get(_ALIGNMENT_KEY, str(ALIGNMENT))
    if not text.isdecimal() or int(text).bit_count() != 1:
        raise CorruptFile(f"{_ALIGNMENT_KEY} is not a power of two", where=where, found=text)
    return int(text)


class _Cursor:
    """Steps through a mapped file. Every step raises CorruptFile where the file ends before."""

    def __init__(self, mapped: mmap.mmap, size: int, where: object) -> None:
        self._mapped, self._size, self.where = mapped, size, where
        self.position = 4

    def step(self, count: int) -> int:
        """Goes on by so many bytes; returns where it stood."""
        here = self.position
        if count > self._size - here:
            raise CorruptFile(
                "the header claims more than the file holds",
                where=self.where,
                expected=f"{count} bytes from {here} on",
                found=f"{self._size} bytes in all",
                then="download or copy the file again",
            )
        self.position += count
        return here

    def number(self, code: str) -> Any:
        """A little-endian number, by struct's letter."""
        width = struct.calcsize(f"<{code}")
        return struct.unpack_from(f"<{code}", self._mapped, self.step(width))[0]

    def text(self) -> str:
        """A string and its length before it."""
        begin = self.step(self.number("Q"))
        try:
            return self._mapped[begin : self.position].decode()
        except UnicodeDecodeError as error:
            raise CorruptFile(
                "a text in the header is not UTF-8", where=self.where, then="download or copy the file again"
            ) from error

    def pair(self) -> tuple[str, str]:
        """A key and its value as a text."""
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
    """The tensors, and where each begins in the payload."""
    specs: dict[str, TensorSpec] = {}
    offsets: dict[str, int] = {}
    for _ in range(count):
        name, dimensions = cursor.text(), cursor.number("I")
        if name in specs or not 1 <= dimensions <= _DIMENSIONS:
            raise CorruptFile(
                "a tensor is listed twice, or has too many dimensions",
                where=f"{cursor.where}: {name}",
                expected=f"1 to {_DIMENSIONS} dimensions",
                found=dimensions,
            )
        shape = tuple(reversed([cursor.number("Q") for _ in range(dimensions)]))  # GGML has the innermost first
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
