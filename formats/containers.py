"""The containers that tensors are stored in, and how a file's name tells its own. Knows names only."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path


class Container(StrEnum):
    """A form of file that holds tensors."""

    SAFETENSORS = "safetensors"
    TORCH = "torch"  # zip archives of a pickle and storages, and their older form
    GGUF = "gguf"  # of adapters for llama.cpp alone
    ORT = "onnx_adapter"  # of adapters for ONNX Runtime alone

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of its files' names, the usual one first."""
        return _SUFFIXES[self]


_SUFFIXES = {
    Container.SAFETENSORS: (".safetensors", ".st"),
    Container.TORCH: (".bin", ".pt", ".pth", ".ckpt"),
    Container.GGUF: (".gguf",),
    Container.ORT: (".onnx_adapter",),
}


def container_named(path: str | Path) -> Container | None:
    """Which container a file of this name is in; None for any other name, such as a folder's."""
    suffix = Path(path).suffix
    return next((container for container, suffixes in _SUFFIXES.items() if suffix in suffixes), None)
