"""Writes one GGUF file of a staged output: an adapter for llama.cpp, tensor by tensor.

The gguf package writes the header; all positions follow from it and the specs, so payloads are not held in memory.
Knows no dialect and no mathematics.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from formats.errors import IncompleteOutput
from formats.gguf_file import gguf_package
from formats.gguf_header import ALIGNMENT, TYPES
from formats.spec import TensorSpec
from formats.staging import Staging, disk_errors, send, write_at
from formats.tensors import Bytes, bytes_from_tensor, spec_of

if TYPE_CHECKING:
    import torch

ARCHITECTURE, ALPHA = "general.architecture", "adapter.lora.alpha"
_NUMBERS = {dtype: number for number, dtype in TYPES.items()}


class GgufWriter:
    """Fills one GGUF file of a staged output, from any thread, in any order.

    The metadata are its key-values: all of them strings, but for the alpha, a float32. It must name the architecture.
    """

    def __init__(self, staging: Staging, specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> None:
        self._staging = staging
        self._specs = {spec.name: spec for spec in specs}
        self._header = _header(self._specs.values(), metadata)
        self._offsets: dict[str, int] = {}
        position = _aligned(len(self._header))
        for name, spec in self._specs.items():
            self._offsets[name] = position
            position = _aligned(position + spec.nbytes)
        self._size = position
        self._descriptor = staging.create("", position)
        self._pending = set(self._specs)
        self._lock = threading.Lock()

    def write(self, name: str, tensor: torch.Tensor, *, smaller: bool = False) -> None:
        """Writes one tensor, which must be as declared: nothing here is laid out again."""
        declared, found = self._specs.get(name), spec_of(name, tensor)
        if declared is not None and found != declared:
            raise IncompleteOutput("a tensor differs from its declaration", where=name, expected=declared, found=found)
        self.write_bytes(name, bytes_from_tensor(tensor))

    def write_bytes(self, name: str, payload: Bytes) -> None:
        """Writes one tensor's payload as it is."""
        with self.parts(name) as put:
            put(0, payload.data)

    @contextlib.contextmanager
    def parts(self, name: str) -> Iterator[Callable[[int, memoryview], None]]:
        """Writes one tensor's payload piece by piece."""
        with self._lock:
            if name not in self._pending:
                fault = "written twice" if name in self._specs else "never declared"
                raise IncompleteOutput(f"a tensor was {fault}", where=name)
            self._pending.remove(name)
        offset, nbytes, written = self._offsets[name], self._specs[name].nbytes, 0

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
        """Refuses: the header names every tensor that was declared."""
        raise IncompleteOutput("a tensor of a GGUF file cannot be left out", where=name)

    def seal(self, metadata: Mapping[str, str]) -> None:
        """Refuses: the header stands."""
        raise IncompleteOutput("a GGUF file's key-values cannot be replaced", found=", ".join(metadata))

    def finish(self) -> None:
        """Writes the header. Raises IncompleteOutput if a tensor is missing."""
        if self._pending:
            raise IncompleteOutput("tensors were never written", found=", ".join(sorted(self._pending)[:5]))
        with disk_errors(self._staging.target):
            write_at(self._descriptor, self._header, 0)
            os.ftruncate(self._descriptor, self._size)  # the last tensor is padded too, as the package does it
        _check_with_package(self._descriptor, list(self._specs))


def _header(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Everything before the payload, without the padding: the package writes it to a path, so to a file of its own."""
    gguf = gguf_package()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header"
        writer = gguf.GGUFWriter(path, metadata[ARCHITECTURE])
        for key, text in sorted(metadata.items()):
            if key == ALPHA:
                writer.add_float32(key, float(text))
            elif key != ARCHITECTURE:  # written by the package first of all
                writer.add_string(key, text)
        for spec in specs:
            kind = gguf.GGMLQuantizationType(_NUMBERS[spec.dtype])
            writer.add_tensor_info(spec.name, spec.shape, np.dtype(np.float32), spec.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return path.read_bytes()


def _check_with_package(descriptor: int, names: list[str]) -> None:
    """Opens what we wrote with the gguf package's own reader before anybody else does."""
    path = f"/proc/self/fd/{descriptor}"
    if os.path.exists(path):
        found = [tensor.name for tensor in gguf_package().GGUFReader(path).tensors]
        if found != names:
            raise IncompleteOutput("the gguf package sees other tensors than we wrote", where=path)


def _aligned(position: int) -> int:
    return position + -position % ALIGNMENT
