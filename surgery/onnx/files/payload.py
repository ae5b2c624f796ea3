"""The weights of an ONNX graph: one safetensors file next to it, or the own files of a model in the same folder.

A written payload is canonical: its name is fixed, it holds exactly what the graph needs, and its header is a function
of names, dtypes and shapes alone. So the offsets in the graph's initialisers never depend on the source file, and two
models of one architecture share one graph byte for byte. With the model's own files, only these offsets differ. This
module loads torch only to convert weights to another dtype, and does not know what the graph computes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from formats import DType, Place, TensorSpec
from formats.layout import Layout, layout
from formats.staging import disk_errors, send, write_at
from formats.tensors import Bytes, bytes_from_tensor, tensor_from_bytes
from surgery.errors import NotFinite
from surgery.exact.rounding import round_once
from surgery.hashes import new_hash
from surgery.onnx.files.graph_file import External

if TYPE_CHECKING:
    import onnx

PAYLOAD = "model.safetensors"  # its name is part of the graph's bytes, so it never varies
METADATA = {"format": "pt"}
_PIECE = 8 << 20  # bytes read, hashed and written at a time


class Payloads(Protocol):
    """Named payloads that can be read in pieces. A Checkpoint implements this."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor, by name."""

    def read_into(self, name: str, begin: int, buffer: Bytes) -> None:
        """Fills a buffer with a tensor's payload from byte `begin` on."""

    def place(self, name: str) -> Place | None:
        """The place of a tensor's payload, if a file holds it in one piece; otherwise None."""


class Unusable(Exception):
    """The reason why files cannot be used as a graph's weights."""


class Beside:
    """The payloads of a checkpoint, plus tensors that are made when they are read; only the latest stays in memory."""

    def __init__(self, base: Payloads, made: Mapping[str, TensorSpec], make: Callable[[str], Bytes]) -> None:
        self.specs: Mapping[str, TensorSpec] = {**base.specs, **made}
        self._base, self._made, self._make = base, made, make
        self._latest: tuple[str, Bytes] | None = None

    def read_into(self, name: str, begin: int, buffer: Bytes) -> None:
        """As in Payloads."""
        if name not in self._made:
            self._base.read_into(name, begin, buffer)
            return
        if self._latest is None or self._latest[0] != name:
            self._latest = name, self._make(name)
        buffer[:] = self._latest[1][begin : begin + buffer.nbytes]

    def place(self, name: str) -> Place | None:
        """As in Payloads; None for a tensor that is made."""
        return None if name in self._made else self._base.place(name)


def payload_layout(weights: Iterable[TensorSpec]) -> Layout:
    """The header and offsets of the canonical payload."""
    return layout(weights, METADATA)


def places_in_payload(weights: Iterable[TensorSpec], where: Layout) -> dict[str, External]:
    """The place of each weight in the canonical payload, by name."""
    return {spec.name: External(PAYLOAD, where.offsets[spec.name], spec.nbytes) for spec in weights}


def places_in_files(weights: Iterable[TensorSpec], source: Payloads) -> dict[str, External]:
    """The place of each weight in its source file, by name; the graph goes next to these files.

    Raises Unusable: a weight is not stored as the graph needs it, or its file is a link, which runtimes refuse.
    """
    found = {}
    for spec in weights:
        stored, place = source.specs[spec.name], source.place(spec.name)
        if stored.dtype is not spec.dtype:
            raise Unusable(f"{spec.name} in {stored.dtype}, but the graph needs {spec.dtype}")
        if place is None:
            raise Unusable(f"{spec.name} is not in a file in one piece: it is scattered, or made for the graph")
        if place.path.is_symlink() or place.path.stat().st_nlink > 1:
            raise Unusable(f"{place.path.name}, which is a link")
        found[spec.name] = External(place.path.name, place.offset, spec.nbytes)
    return found


def attach_payload(model: onnx.ModelProto, places: Mapping[str, External]) -> bytes:
    """The graph's bytes, with the location of each weight in its initialiser.

    Args:
        model: a template's model; it is not modified.
        places: the places of its weights, by name.
    """
    import onnx

    pointed = onnx.ModelProto()
    pointed.CopyFrom(model)
    for tensor in pointed.graph.initializer:
        if tensor.name in places:
            del tensor.external_data[:]
            for key, value in asdict(places[tensor.name]).items():
                tensor.external_data.add(key=key, value=str(value))
    data: bytes = pointed.SerializeToString(deterministic=True)
    return data


def write_payload(descriptor: int, source: Payloads, weights: Iterable[TensorSpec], where: Layout, target: Path) -> str:
    """Writes the payload into an open file, a few pieces of a tensor at a time; returns its BLAKE3, in hexadecimal.

    Raises:
        WriteFailed: the disk is full or cannot be written to; the error names `target`.
        NotFinite: a weight is beyond the range of the dtype in which the graph computes.
    """
    digest = new_hash()
    digest.update(where.header)
    with disk_errors(target), ThreadPoolExecutor(1) as hasher:
        write_at(descriptor, where.header, 0)
        hashed: Future[object] | None = None
        buffers = _buffers()
        for spec in sorted(weights, key=lambda spec: where.offsets[spec.name]):
            offset = where.offsets[spec.name]
            for piece in _pieces(source, spec, buffers):
                if hashed is not None:
                    hashed.result()  # waits for the previous piece, so the next buffer is free
                hashed = hasher.submit(digest.update, piece)
                write_at(descriptor, piece, offset)
                send(descriptor, offset, len(piece))
                offset += len(piece)
    return digest.hexdigest()


def has_layout(path: Path, where: Layout) -> bool:
    """Whether the file at `path` is a payload with this layout, whatever its weights."""
    with path.open("rb") as stream:
        return os.fstat(stream.fileno()).st_size == where.size and stream.read(len(where.header)) == where.header


def holds_payload(path: Path, source: Payloads, weights: Iterable[TensorSpec], where: Layout) -> bool:
    """Whether the file at `path` is exactly this payload, byte for byte."""
    if not has_layout(path, where):
        return False
    with path.open("rb") as stream:
        buffers = _buffers()
        for spec in weights:
            stream.seek(where.offsets[spec.name])
            if any(stream.read(len(piece)) != piece for piece in _pieces(source, spec, buffers)):
                return False
    return True


def _buffers() -> Iterator[Bytes]:
    """Two alternating buffers: one piece is hashed and written while the next is read."""
    return itertools.cycle([np.empty(_PIECE, np.uint8), np.empty(_PIECE, np.uint8)])


def _pieces(source: Payloads, spec: TensorSpec, buffers: Iterator[Bytes]) -> Iterator[memoryview]:
    """The tensor's bytes in the dtype of `spec`; every second piece reuses the same memory."""
    stored = source.specs[spec.name]
    for begin in range(0, stored.nbytes, _PIECE):
        buffer = next(buffers)[: stored.nbytes - begin]
        source.read_into(spec.name, begin, buffer)
        yield buffer.data if stored.dtype is spec.dtype else _converted(buffer, stored, spec.dtype)


def _converted(piece: Bytes, stored: TensorSpec, dtype: DType) -> memoryview:
    """Values in another floating-point dtype, each rounded once."""
    flat = TensorSpec(stored.name, stored.dtype, (piece.nbytes // stored.dtype.itemsize,))
    values = tensor_from_bytes(piece, flat).double()
    made = round_once(values, dtype)
    if bool((made.isinf() & values.isfinite()).any()):
        raise NotFinite(
            f"a weight is beyond the range of {dtype}",
            where=stored.name,
            found=f"a magnitude of {float(values[values.isfinite()].abs().max()):.3g}",
            then="pass --dtype float32 or --dtype bfloat16, which can hold it",
        )
    return bytes_from_tensor(made).data
