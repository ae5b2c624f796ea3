"""The containers that tensors are stored in, and the file name suffixes of each. Opens no file."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path


class Container(StrEnum):
    """A file format that holds tensors."""

    SAFETENSORS = "safetensors"
    TORCH = "torch"  # torch.save: a zip archive of a pickle and storages, or the format before torch 1.6
    GGUF = "gguf"  # only for llama.cpp's adapters
    ORT = "onnx_adapter"  # only for ONNX Runtime's adapters

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The suffixes of its files' names, the usual one first."""
        return _SUFFIXES[self]


_SUFFIXES = {
    Container.SAFETENSORS: (".safetensors", ".st"),
    Container.TORCH: (".bin", ".pt", ".pth", ".ckpt"),
    Container.GGUF: (".gguf",),
    Container.ORT: (".onnx_adapter",),
}


def container_named(path: str | Path) -> Container | None:
    """The container that a file name stands for, by its suffix; None for any other name, such as a folder's."""
    suffix = Path(path).suffix
    return next((container for container, suffixes in _SUFFIXES.items() if suffix in suffixes), None)
