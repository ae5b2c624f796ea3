"""Reads and writes one file that stores each tensor contiguously, at an offset that its header gives.

The header depends on the container: a `Form` reads it and lays it out. Reading goes straight to a tensor's offset.
Writing lays out the header first and then fills the file from any thread. This module knows one file only: no folder,
no adapter, no mathematics.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from formats.errors import IncompleteOutput, NotACheckpoint, PathNotFound
from formats.layout import Layout
from formats.names import unknown_tensor
from formats.reading import fill
from formats.spec import CheckpointRef, Place, TensorRef, TensorSpec
from formats.staging import Staging, copy_range, disk_errors, send, write_at
from formats.tensors import Bytes, bytes_from_tensor, spec_of, tensor_from_bytes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Header:
    """The content of a file's header: its tensors in order, its metadata, and the offset of each payload in bytes."""

    specs: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]
    offsets: Mapping[str, int]


@dataclass(frozen=True)
class Form:
    """How to read and write one container.

    Attributes:
        read: reads the header of an open file, and checks every size in it against the file.
        lay_out: computes the layout of a file from specs and metadata.
        check: opens a written file with the container's own library, header only, and compares the names.
    """

    read: Callable[[int, Path], Header]
    lay_out: Callable[[Iterable[TensorSpec], Mapping[str, str]], Layout]
    check: Callable[[int, set[str]], None]


class WrittenForm(Protocol):
    """What writing needs to know of a container: a `Form` knows it."""

    @property
    def lay_out(self) -> Callable[[Iterable[TensorSpec], Mapping[str, str]], Layout]:
        """From specs and metadata to where everything goes."""

    @property
    def check(self) -> Callable[[int, set[str]], None]:
        """Has the container's own library look at the file, or complete it, when all tensors are in it."""


class PlainFile:
    """A readable file in the container that `form` describes. Such files hold only tensors, so `notes` is empty.

    Raises:
        PathNotFound: there is no such file.
        NotACheckpoint: the file is not in this container.
        CorruptFile: the header and the payload contradict each other.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, path: Path, form: Form) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise PathNotFound("no such file", where=path, then="check the path") from error
        except IsADirectoryError as error:
            raise NotACheckpoint("a folder where a file was expected", where=path, then="name a file") from error
        try:
            header = form.read(self._descriptor, path)
            self.specs, self.metadata, self._offsets = header.specs, header.metadata, header.offsets
        except BaseException:
            self.close()
            raise

    @property
    def ref(self) -> CheckpointRef:
        """A reference from which the file can be opened again."""
        return CheckpointRef(str(self.path))

    def tensor(self, name: str) -> TensorRef:
        """A reference to one tensor."""
        return TensorRef(self.ref, self._spec(name))

    def read_bytes(self, name: str) -> Bytes:
        """Reads the tensor's payload as stored."""
        payload = np.empty(self._spec(name).nbytes, dtype=np.uint8)
        self.read_into(name, 0, payload)
        return payload

    def read_into(self, name: str, begin: int, buffer: Bytes) -> None:
        """Fills a buffer with the payload from byte `begin` on."""
        fill(self._descriptor, self.place(name).offset + begin, buffer, f"{self.path}: {name}")

    def place(self, name: str) -> Place:
        """The file and offset of the payload."""
        return Place(self.path, self._offsets[self._spec(name).name])

    def read(self, name: str) -> torch.Tensor:
        """Reads the tensor to the CPU in its stored dtype and shape."""
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

    def __enter__(self) -> PlainFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class PlainWriter:
    """Fills one file of a staged output, from any thread, in any order.

    Offsets follow from the declared specs and metadata. If in the end the metadata has another length, or tensors were
    omitted or are smaller than declared, the file is laid out again and the payload is copied inside the kernel. With
    `reserve`, the disk space is allocated at once; without it, the declared sizes are upper bounds.
    """

    def __init__(
        self,
        staging: Staging,
        filename: str,
        specs: Iterable[TensorSpec],
        metadata: Mapping[str, str],
        form: WrittenForm,
        *,
        reserve: bool = True,
    ) -> None:
        self._staging = staging
        self._filename = filename
        self._form = form
        self._metadata = dict(metadata)
        self._specs = {spec.name: spec for spec in specs}
        self._layout = form.lay_out(self._specs.values(), metadata)
        self._descriptor = staging.create(filename, self._layout.size if reserve else 0)
        self._pending = set(self._specs)
        self._omitted: set[str] = set()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Payload bytes of the tensors that were not omitted."""
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
        """Writes one tensor's payload unchanged."""
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
        """Writes one tensor's payload in pieces."""
        self._settle(name)
        nbytes, offset, written = self._specs[name].nbytes, self._layout.offsets[name], 0

        def put(begin: int, piece: memoryview) -> None:
            nonlocal written
            if begin < 0 or begin + piece.nbytes > nbytes:
                raise IncompleteOutput("a piece lies outside its tensor", where=name, expected=f"{nbytes} bytes")
            with disk_errors(self._staging.target):
                write_at(self._descriptor, piece, offset + begin)
            written += piece.nbytes

        yield put
        send(self._descriptor, offset, written)
        if written != nbytes:
            raise IncompleteOutput("a payload was written only in part", where=name, expected=nbytes, found=written)

    shared = True  # a forked copy of the process writes to the same file and nowhere else

    def written(self, name: str) -> None:
        """Records that a forked copy of this process has written this tensor, whole and as declared."""
        self._settle(name)

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
        """Writes the header, which completes the file. Raises IncompleteOutput if a tensor is missing."""
        if self._pending:
            raise IncompleteOutput("tensors were never written", found=", ".join(sorted(self._pending)[:5]))
        kept = [spec for name, spec in self._specs.items() if name not in self._omitted]
        final = self._form.lay_out(kept, self._metadata)
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
            for position, mark in final.marks:
                write_at(self._descriptor, mark, position)
        self._form.check(self._descriptor, {spec.name for spec in kept})
