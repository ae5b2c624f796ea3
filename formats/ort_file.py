"""`.onnx_adapter`, ONNX Runtime's file of an adapter, as a form of plain files.

A FlatBuffer (onnxruntime/lora/adapter_format/adapter_schema.fbs, version 1): a table of versions and a vector of
parameters, each a table of name, dimensions, type and bytes. Everything is found by offsets, so a file is read header
by header without its payload; each offset and size is checked against the file. Written with all tables in front, the
parameters in the order of their names, payloads at multiples of 64 bytes: the bytes are a function of the tensors.
Knows no adapter.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.errors import CorruptFile, FormatError, IncompleteOutput, NotACheckpoint, UnsupportedDType
from formats.layout import Layout
from formats.plain_file import Form, Header
from formats.spec import DType, TensorSpec, shape_text

_IDENTIFIER = b"TORT"
_VERSION = 1
_LARGEST = (1 << 31) - 1  # bytes of a FlatBuffer, whose offsets have 32 bits
_ALIGNMENT = 64  # bytes; the schema asks for 8
_LONGEST_NAME = 1 << 16  # bytes
_DIMS = 64
# Numbers of ONNX's element types.
_TYPES = {
    DType.F32: 1, DType.U8: 2, DType.I8: 3, DType.U16: 4, DType.I16: 5, DType.I32: 6, DType.I64: 7, DType.BOOL: 9,
    DType.F16: 10, DType.F64: 11, DType.U32: 12, DType.U64: 13, DType.BF16: 16, DType.F8_E4M3: 17, DType.F8_E5M2: 19,
}  # fmt: skip
_DTYPES = {number: dtype for dtype, number in _TYPES.items()}
# The fields of the two tables, in the schema's order. Ours both have four of four bytes.
_FORMAT, _ADAPTER, _MODEL, _PARAMETERS = range(4)
_NAME, _SHAPE, _TYPE, _PAYLOAD = range(4)
_VTABLE = struct.pack("<6H", 12, 20, 4, 8, 12, 16)
_TABLE = 20  # bytes


@dataclass(frozen=True)
class _FlatBuffer:
    """An open FlatBuffer, read number by number; whatever points outside of the file is CorruptFile."""

    descriptor: int
    size: int
    path: Path

    def numbers(self, position: int, form: str) -> tuple[Any, ...]:
        """Numbers at a position."""
        nbytes = struct.calcsize(form)
        if not 0 <= position <= self.size - nbytes:
            raise CorruptFile(
                "an offset points outside the file",
                where=self.path,
                expected=f"at most {self.size}",
                found=position,
                then="download or copy the file again",
            )
        data = os.pread(self.descriptor, nbytes, position)
        if len(data) != nbytes:
            raise CorruptFile("the file became shorter while it was read", where=self.path, then="copy it again")
        return struct.unpack(form, data)

    def number(self, position: int, form: str) -> int:
        """One number at a position."""
        return int(self.numbers(position, form)[0])

    def field(self, table: int, index: int) -> int | None:
        """Where a table's field stands; None where it has the default."""
        vtable = table - self.number(table, "<i")
        if 6 + 2 * index > self.number(vtable, "<H"):
            return None
        offset = self.number(vtable + 4 + 2 * index, "<H")
        return table + offset if offset else None

    def integer(self, table: int, index: int) -> int:
        """A field that is a number."""
        place = self.field(table, index)
        return 0 if place is None else self.number(place, "<i")

    def follow(self, position: int) -> int:
        """Where an offset leads."""
        return position + self.number(position, "<I")

    def vector(self, table: int, index: int, itemsize: int) -> tuple[int, int]:
        """A field that is a vector: where its elements begin, and how many there are."""
        place = self.field(table, index)
        if place is None:
            return 0, 0
        start = self.follow(place)
        count = self.number(start, "<I")
        if start + 4 + count * itemsize > self.size:
            raise CorruptFile(
                "a vector is longer than the file",
                where=self.path,
                expected=f"at most {self.size} bytes",
                found=f"{count} elements of {itemsize} bytes",
                then="download or copy the file again",
            )
        return start + 4, count


def _read(descriptor: int, path: Path) -> Header:
    size = os.fstat(descriptor).st_size
    if size <= 8 or os.pread(descriptor, 4, 4) != _IDENTIFIER:
        raise NotACheckpoint(
            "not an adapter of ONNX Runtime's",
            where=path,
            expected=f"{_IDENTIFIER!r} from the fifth byte on",
            found=f"{os.pread(descriptor, 8, 0)!r}",
        )
    flat = _FlatBuffer(descriptor, size, path)
    root = flat.follow(0)
    version = flat.integer(root, _FORMAT)
    if version != _VERSION:
        raise NotACheckpoint(
            "an unknown version of ONNX Runtime's format", where=path, expected=_VERSION, found=version
        )
    start, count = flat.vector(root, _PARAMETERS, 4)
    specs: dict[str, TensorSpec] = {}
    offsets: dict[str, int] = {}
    for place in range(start, start + 4 * count, 4):
        spec, begin = _parameter(flat, flat.follow(place))
        if spec.name in specs:
            raise CorruptFile("two tensors in one file have the same name", where=f"{path}: {spec.name}")
        specs[spec.name], offsets[spec.name] = spec, begin
    versions = {"adapter_version": flat.integer(root, _ADAPTER), "model_version": flat.integer(root, _MODEL)}
    return Header(specs, {key: str(value) for key, value in versions.items()}, offsets)


def _parameter(flat: _FlatBuffer, table: int) -> tuple[TensorSpec, int]:
    """A parameter's spec, and where its payload begins."""
    name = _name(flat, *flat.vector(table, _NAME, 1))
    where = f"{flat.path}: {name}"
    start, dims = flat.vector(table, _SHAPE, 8)
    shape = flat.numbers(start, f"<{dims}q") if dims <= _DIMS else (-1,)
    if any(n < 0 for n in shape):
        raise CorruptFile(
            "a tensor has invalid dimensions",
            where=where,
            found=f"{dims} dimensions, {shape}",
            then="download or copy the file again",
        )
    number = flat.integer(table, _TYPE)
    if number not in _DTYPES:
        raise UnsupportedDType("safetensors cannot hold this dtype", where=where, found=f"ONNX's type {number}")
    spec = TensorSpec(name, _DTYPES[number], shape)
    begin, nbytes = flat.vector(table, _PAYLOAD, 1)
    if nbytes != spec.nbytes:
        raise CorruptFile(
            "a tensor's extent contradicts its shape",
            where=where,
            expected=f"{spec.nbytes} bytes for {spec.dtype} {shape_text(shape)}",
            found=f"{nbytes} bytes",
            then="download or copy the file again",
        )
    return spec, begin


def _name(flat: _FlatBuffer, start: int, length: int) -> str:
    if not 0 < length <= _LONGEST_NAME:
        raise CorruptFile("a tensor's name is empty or too long", where=flat.path, found=f"{length} bytes")
    try:
        return bytes(flat.numbers(start, f"<{length}s")[0]).decode()
    except UnicodeDecodeError as error:
        raise CorruptFile("a tensor's name is not text", where=flat.path, found=error) from error


def _lay_out(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> Layout:
    """Tables, names and dimensions in front, then each payload behind its length. The form holds no metadata."""
    ordered = sorted(specs, key=lambda spec: spec.name)
    vtable, root, vector = 8, 20, 40
    header = bytearray(struct.pack("<I4s12s", root, _IDENTIFIER, _VTABLE))
    header += struct.pack("<4iI", root - vtable, _VERSION, 1, 1, vector - root - 16)
    places = [vector + 4 + 4 * len(ordered)]  # of each parameter's table
    parts = []
    for spec in ordered:
        parts.append(_Parts.after(places[-1], spec))
        places.append(parts[-1].end)
    header += struct.pack("<I", len(ordered))
    header += b"".join(struct.pack("<I", place - vector - 4 - 4 * i) for i, place in enumerate(places[:-1]))
    offsets: dict[str, int] = {}
    marks = []
    position = places[-1]
    for spec in ordered:
        if spec.name in offsets:
            raise CorruptFile("two tensors in one file have the same name", where=spec.name)
        offsets[spec.name] = _aligned(position + 4, _ALIGNMENT)
        marks.append((offsets[spec.name] - 4, struct.pack("<I", spec.nbytes)))
        position = offsets[spec.name] + spec.nbytes
        if position > _LARGEST:
            raise FormatError(
                "ONNX Runtime's adapters cannot be larger than 2 GiB",
                where=spec.name,
                expected=f"at most {_LARGEST} bytes",
                found=f"{sum(each.nbytes for each in ordered)} bytes of tensors",
                then="resize the adapter to a smaller rank, or merge it",
            )
    for part in parts:
        header += part.encoded(vtable, offsets[part.spec.name] - 4)
    return Layout(bytes(header), offsets, position, tuple(marks))


@dataclass(frozen=True)
class _Parts:
    """Where one parameter's table, name and dimensions go."""

    spec: TensorSpec
    table: int
    name: int
    dims: int
    end: int

    @classmethod
    def after(cls, position: int, spec: TensorSpec) -> _Parts:
        """The parts of the parameter whose table stands at `position`."""
        name = position + _TABLE
        dims = _aligned(name + 4 + len(spec.name.encode()) + 1 + 4, 8) - 4  # its elements at a multiple of eight
        return cls(spec, position, name, dims, dims + 4 + 8 * len(spec.shape))

    def encoded(self, vtable: int, payload: int) -> bytes:
        """The bytes from the table's place to the end; `payload` is the place of its length."""
        table, shape, name = self.table, self.spec.shape, self.spec.name.encode()
        to_name, to_dims, to_payload = self.name - table - 4, self.dims - table - 8, payload - table - 16
        fields = struct.pack("<i2IiI", table - vtable, to_name, to_dims, _TYPES[self.spec.dtype], to_payload)
        text = struct.pack("<I", len(name)) + name
        return fields + text.ljust(self.dims - self.name, b"\0") + struct.pack(f"<I{len(shape)}q", len(shape), *shape)


def _aligned(position: int, to: int) -> int:
    return position + -position % to


def _check_with_onnxruntime(descriptor: int, names: set[str]) -> None:
    """Opens what we wrote with ONNX Runtime itself before anybody else does."""
    from onnxruntime import AdapterFormat

    path = f"/proc/self/fd/{descriptor}"
    if os.path.exists(path) and AdapterFormat.read_adapter(path).get_parameters().keys() != names:
        raise IncompleteOutput("ONNX Runtime reads other tensors than we wrote", where=path)


ORT = Form(_read, _lay_out, _check_with_onnxruntime)
