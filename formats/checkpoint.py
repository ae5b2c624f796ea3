"""The two seams of the package: something that tensors are read from, something they are written to.

Protocols only. Containers implement them; operations and the engine see nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from formats.spec import CheckpointRef, Place, TensorRef, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch


class Checkpoint(Protocol):
    """A readable set of named tensors. Opening reads headers only; reading is thread-safe."""

    @property
    def ref(self) -> CheckpointRef:
        """What it takes to open it again."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor, by name, in the file's order."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """The container's own string-to-string metadata."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of how it was read: what in it is no tensor, or a tensor under two names."""

    def tensor(self, name: str) -> TensorRef:
        """A reference to one tensor. Raises UnknownTensor with the nearest names."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, in its stored dtype and shape; the caller owns the memory."""

    def read_bytes(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The tensor's payload as stored, as a flat array of bytes."""

    def read_into(self, name: str, begin: int, buffer: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Fills a buffer with the payload from byte `begin` on."""

    def place(self, name: str) -> Place | None:
        """Where the payload lies in one piece of a file; None where it is put together when it is read."""

    def close(self) -> None:
        """Releases the files; reading afterwards is an error."""

    def __enter__(self) -> Checkpoint: ...

    def __exit__(self, *exc: object) -> None: ...


class TensorWriter(Protocol):
    """A set of named tensors on its way to disk: `write` or `omit` once a name, in any order, from any thread."""

    def write(self, name: str, tensor: torch.Tensor, *, smaller: bool = False) -> None:
        """Writes one tensor. Its dtype and shape must be those declared; if it may be `smaller`, its bytes at most as
        many: the output is then laid out again."""

    def omit(self, name: str) -> None:
        """Says that a declared tensor will not come after all; the output is laid out without it."""

    def seal(self, metadata: Mapping[str, str]) -> None:
        """Replaces the metadata. Costs nothing where the header's length stays what was declared."""


class CheckpointWriter(TensorWriter, Protocol):
    """A whole output on its way to disk: its tensors, and what lies beside them.

    The bytes never depend on order or threads. `create_checkpoint` opens one: leaving its context normally makes the
    output appear whole; leaving it by an exception leaves nothing.
    """

    @property
    def shared(self) -> bool:
        """Whether a copy of this process, made by fork, can write a tensor in this writer's stead."""

    def written(self, name: str) -> None:
        """Says that such a copy has."""

    def write_bytes(self, name: str, payload: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Writes one tensor's payload as it is."""

    def parts(self, name: str) -> AbstractContextManager[Callable[[int, memoryview], None]]:
        """Writes one tensor's payload piece by piece: the context gives a function that takes the piece's first byte
        and the piece. All bytes must have come, each once, when it is left."""

    def attach(self, filename: str, content: bytes) -> None:
        """Adds a small file beside the weights, where the output is a folder."""

    def beside(self, filename: str, specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> TensorWriter:
        """Adds another safetensors file beside the weights, where the output is a folder; it is complete when the
        output is."""

    def settle(self) -> None:
        """Puts everything on disk once nothing more will come, so that only the name is missing."""
