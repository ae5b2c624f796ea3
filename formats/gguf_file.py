"""One GGUF file that holds an adapter for llama.cpp, read by offsets; and the gguf package, where it is needed.

Its key-values are the metadata, as texts. A file of a model is none of ours: llama.cpp's weights are quantised, and in
orders of its own. Knows one file, no dialect, no mathematics.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from formats.errors import FormatError, PathNotFound
from formats.gguf_header import read_header
from formats.names import unknown_tensor
from formats.reading import fill
from formats.spec import CheckpointRef, TensorRef, TensorSpec
from formats.tensors import Bytes, tensor_from_bytes

if TYPE_CHECKING:
    import torch


class GgufFile:
    """A readable GGUF file. It says nothing beside its tensors and key-values, so `notes` is empty.

    Raises:
        PathNotFound: no such file.
        NotACheckpoint: no GGUF file, or one that holds a model.
        CorruptFile: header and payload contradict each other.
        UnsupportedDType: factors in a quantised type.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise PathNotFound("no such file", where=path) from error
        try:
            header = read_header(self._descriptor, os.fstat(self._descriptor).st_size, path)
        except BaseException:
            self.close()
            raise
        self.specs, self.metadata, self._offsets = header.specs, header.metadata, header.offsets

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
        fill(self._descriptor, self._offsets[self._spec(name).name] + begin, buffer, f"{self.path}: {name}")

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

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def gguf_package() -> Any:
    """The gguf package. Raises FormatError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise FormatError(
            f"GGUF needs the gguf package: {error}", expected="gguf", then="pip install 'model-surgery[gguf]'"
        ) from error
    return gguf
