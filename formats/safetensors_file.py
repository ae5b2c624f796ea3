"""One safetensors file, read and written by offsets.

Reading checks every size in the header against the file before anything is allocated. Writing lays the header out
first and then fills the file from any thread. Knows one file only: no folder, no adapter, no mathematics.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from formats.errors import CorruptFile, IncompleteOutput, NotACheckpoint, PathNotFound
from formats.layout import MAX_HEADER, layout
from formats.names import unknown_tensor
from formats.reading import fill
from formats.spec import CheckpointRef, DType, TensorRef, TensorSpec, shape_text
from formats.staging import Staging, copy_range, disk_errors, send, write_at
from formats.tensors import Bytes, bytes_from_tensor, spec_of, tensor_from_bytes

if TYPE_CHECKING:
    import torch

_DTYPES = {dtype.label: dtype for dtype in DType}


class SafetensorsFile:
    """A readable safetensors file. It says nothing beside its tensors, so `notes` is empty.

    Raises:
        PathNotFound: no such file.
        NotACheckpoint: not a safetensors file.
        CorruptFile: header and payload contradict each other.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise PathNotFound("no such file", where=path) from error
        except IsADirectoryError as error:
            raise NotACheckpoint("a folder where a file was expected", where=path) from error
        try:
            self.specs, self.metadata, self._offsets = _read_header(self._descriptor, path)
        except BaseException:
            self.close()
            raise

    @property
    def ref(self) -> CheckpointRef:
        """What it takes to open it again."""
        return CheckpointRef(str(self.path))

    def tensor(self, name: str) -> TensorRef:
        """A reference to one tensor."""
        return TensorRef(self.ref, self._spec(name))

    def read_bytes(self, name: str) -> Bytes:
        """The tensor's payload as stored."""
        payload = np.empty(self._spec(name).nbytes, dtype=np.uint8)
        self.read_into(name, 0, payload)
        return payload

    def read_into(self, name: str, begin: int, buffer: Bytes) -> None:
        """Fills a buffer with the payload from byte `begin` on."""
        offset = self._offsets[self._spec(name).name] + begin
        fill(self._descriptor, offset, buffer, f"{self.path}: {name}")

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, in its stored dtype and shape."""
        return tensor_from_bytes(self.read_bytes(name), self._spec(name))

    def _spec(self, name: str) -> TensorSpec:
        if name not in self.specs:
            raise unknown_tensor(name, self.specs, self.path)
        return self.specs[name]

    def close(self) -> None:
        """Closes the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _read_header(descriptor: int, path: Path) -> tuple[dict[str, TensorSpec], dict[str, str], dict[str, int]]:
    size = os.fstat(descriptor).st_size
    if size < 8:
        raise NotACheckpoint("not a safetensors file: too short for a header", where=path, found=f"{size} bytes")
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    opening = os.pread(descriptor, 1, 8)
    if opening != b"{" or length > MAX_HEADER:
        raise NotACheckpoint(
            "not a safetensors file",
            where=path,
            expected=f"a JSON header of at most {MAX_HEADER} bytes",
            found=f"a header length of {length} and a first byte {opening!r}",
        )
    if 8 + length > size:
        raise CorruptFile(
            "the header claims more than the file holds",
            where=path,
            expected=f"{8 + length} bytes of header",
            found=f"{size} bytes in all",
            then="download or copy the file again",
        )
    try:
        entries = json.loads(os.pread(descriptor, length, 8), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"the header is no JSON object: {error}", where=path) from error
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptFile("the header's __metadata__ must map strings to strings", where=path)
    specs, offsets = _read_entries(entries, path, start=8 + length, size=size)
    return specs, metadata, offsets


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name stands there twice")
    return entries


def _read_entries(
    entries: dict[str, Any], path: Path, *, start: int, size: int
) -> tuple[dict[str, TensorSpec], dict[str, int]]:
    placed: list[tuple[int, int, TensorSpec]] = []
    for name, entry in entries.items():
        try:
            label, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            sound = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        except (TypeError, KeyError, ValueError):
            sound = False
        if not sound:
            raise CorruptFile("an entry of the header is malformed", where=f"{path}: {name}", found=entry)
        if label not in _DTYPES:
            raise CorruptFile(
                "a dtype we do not know", where=f"{path}: {name}", expected=", ".join(_DTYPES), found=label
            )
        spec = TensorSpec(name, _DTYPES[label], shape)
        if end - begin != spec.nbytes:
            raise CorruptFile(
                "a tensor's extent contradicts its shape",
                where=f"{path}: {name}",
                expected=f"{spec.nbytes} bytes for {label} {shape_text(shape)}",
                found=f"{end - begin} bytes",
            )
        placed.append((begin, end, spec))
    placed.sort(key=lambda item: item[:2])
    position = 0
    for begin, end, spec in placed:
        if begin != position:
            raise CorruptFile(
                "tensors overlap or leave a gap", where=f"{path}: {spec.name}", expected=position, found=begin
            )
        position = end
    if start + position != size:
        raise CorruptFile(
            "the payload is truncated" if size < start + position else "there are bytes after the last tensor",
            where=path,
            expected=f"{start + position} bytes",
            found=f"{size} bytes",
            then="download or copy the file again",
        )
    specs = {spec.name: spec for _, _, spec in placed}
    return specs, {spec.name: start + begin for begin, _, spec in placed}


class SafetensorsWriter:
    """Fills one safetensors file of a staged output, from any thread, in any order.

    Positions come from the declared specs and metadata. Where the file is closed with other metadata of another
    length, without some of the tensors or with smaller ones, it is laid out again and the payload copied inside the
    kernel. Space is reserved at once, unless what is declared is an upper bound only.
    """

    def __init__(
        self,
        staging: Staging,
        filename: str,
        specs: Iterable[TensorSpec],
        metadata: Mapping[str, str],
        *,
        reserve: bool = True,
    ) -> None:
        self._staging = staging
        self._filename = filename
        self._metadata = dict(metadata)
        self._specs = {spec.name: spec for spec in specs}
        self._layout = layout(self._specs.values(), metadata)
        self._descriptor = staging.create(filename, self._layout.size if reserve else 0)
        self._pending = set(self._specs)
        self._omitted: set[str] = set()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Payload bytes of what was not omitted."""
        return sum(spec.nbytes for name, spec in self._specs.items() if name not in self._omitted)

    def write(self, name: str, tensor: torch.Tensor, *, smaller: bool = False) -> None:
        """Writes one tensor."""
        declared, found = self._specs.get(name), spec_of(name, tensor)
        if declared is not None and found != declared:
            if not smaller or found.dtype is not declared.dtype or found.nbytes > declared.nbytes:
                raise IncompleteOutput(
                    "a tensor differs from its declaration",
                    where=name,
                    expected=declared,
                    found=found,
                )
            self._specs[name] = found
        self.write_bytes(name, bytes_from_tensor(tensor))

    def write_bytes(self, name: str, payload: Bytes) -> None:
        """Writes one tensor's payload as it is."""
        self._settle(name)
        spec = self._specs[name]
        if payload.nbytes != spec.nbytes:
            raise IncompleteOutput(
                "a payload differs from its declaration",
                where=name,
                expected=spec.nbytes,
                found=payload.nbytes,
            )
        with disk_errors(self._staging.target):
            write_at(self._descriptor, payload.data, self._layout.offsets[name])
        send(self._descriptor, self._layout.offsets[name], payload.nbytes)

    @contextlib.contextmanager
    def parts(self, name: str) -> Iterator[Callable[[int, memoryview], None]]:
        """Writes one tensor's payload piece by piece."""
        self._settle(name)
        nbytes, offset, written = self._specs[name].nbytes, self._layout.offsets[name], 0

        def put(begin: int, piece: memoryview) -> None:
            nonlocal written
            if begin < 0 or begin + piece.nbytes > nbytes:
                raise IncompleteOutput("a piece lies outside of its tensor", where=name, expected=f"{nbytes} bytes")
            with disk_errors(self._staging.target):
                write_at(self._descriptor, piece, offset + begin)
            written += piece.nbytes

        yield put
        send(self._descriptor, offset, written)
        if written != nbytes:
            raise IncompleteOutput("a payload came in part", where=name, expected=nbytes, found=written)

    def omit(self, name: str) -> None:
        """Leaves a declared tensor out."""
        self._settle(name)
        self._omitted.add(name)

    def _settle(self, name: str) -> None:
        with self._lock:
            if name not in self._pending:
                fault = "written twice" if name in self._specs else "never declared"
                raise IncompleteOutput(f"a tensor was {fault}", where=name)
            self._pending.remove(name)

    def seal(self, metadata: Mapping[str, str]) -> None:
        """Replaces the metadata."""
        self._metadata = dict(metadata)

    def finish(self) -> None:
        """Writes the header; afterwards the file is complete. Raises IncompleteOutput if a tensor is missing."""
        if self._pending:
            raise IncompleteOutput("tensors were never written", found=", ".join(sorted(self._pending)[:5]))
        kept = [spec for name, spec in self._specs.items() if name not in self._omitted]
        final = layout(kept, self._metadata)
        with disk_errors(self._staging.target):
            if (final.offsets, final.size) != (self._layout.offsets, self._layout.size):
                old, self._descriptor = self._staging.replace(self._filename, final.size)
                try:
                    for spec in kept:
                        source, target = self._layout.offsets[spec.name], final.offsets[spec.name]
                        copy_range(old, source, self._descriptor, target, spec.nbytes)
                finally:
                    os.close(old)
            write_at(self._descriptor, final.header, 0)
        _check_with_reference(self._descriptor, {spec.name for spec in kept})


def _check_with_reference(descriptor: int, names: set[str]) -> None:
    """Opens what we wrote with the safetensors library itself, header only, before anybody else does."""
    from safetensors import safe_open

    path = f"/proc/self/fd/{descriptor}"
    if os.path.exists(path):
        with safe_open(path, framework="np") as reference:
            if set(reference.keys()) != names:
                raise IncompleteOutput("the reference reader sees other tensors than we wrote", where=path)
