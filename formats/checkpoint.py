"""The protocols for reading and writing checkpoints.

This module holds protocols only. Containers implement them; operations and the engine see nothing else.
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
        """A reference from which the checkpoint can be opened again."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor, by name, in the file's order."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """The container's own string-to-string metadata."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the user about the file, such as entries that are not tensors, or a tensor with two names."""

    def tensor(self, name: str) -> TensorRef:
        """A reference to one tensor. Raises UnknownTensor, which lists the nearest names."""

    def read(self, name: str) -> torch.Tensor:
        """Reads the tensor to the CPU in its stored dtype and shape. The caller owns the memory."""

    def read_bytes(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Reads the tensor's payload as stored, as a flat array of bytes."""

    def read_into(self, name: str, begin: int, buffer: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Fills a buffer with the payload from byte `begin` on."""

    def place(self, name: str) -> Place | None:
        """The file and offset of the payload; None where it is not contiguous and is gathered when it is read."""

    def close(self) -> None:
        """Closes the files. Reading afterwards is an error."""

    def __enter__(self) -> Checkpoint: ...

    def __exit__(self, *exc: object) -> None: ...


class TensorWriter(Protocol):
    """Writes named tensors. Call `write` or `omit` once for each name, in any order, from any thread."""

    def write(self, name: str, tensor: torch.Tensor, *, smaller: bool = False) -> None:
        """Writes one tensor, whose dtype and shape must be as declared.

        With `smaller`, the tensor may have fewer bytes than declared; the output is then laid out again.
        """

    def omit(self, name: str) -> None:
        """Leaves out a declared tensor. The output is then laid out without it."""

    def seal(self, metadata: Mapping[str, str]) -> None:
        """Replaces the metadata. This is free if the header keeps its declared length."""


class CheckpointWriter(TensorWriter, Protocol):
    """Writes a whole output: its tensors and the other files of its folder.

    The bytes never depend on the order of calls or on threads. `create_checkpoint` opens a writer: if its context ends
    normally, the output appears whole; if it ends with an exception, nothing is left behind.
    """

    @property
    def shared(self) -> bool:
        """Whether a forked copy of this process may write tensors for this writer."""

    def written(self, name: str) -> None:
        """Records that a forked copy of this process has written this tensor."""

    def write_bytes(self, name: str, payload: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Writes one tensor's payload unchanged."""

    def parts(self, name: str) -> AbstractContextManager[Callable[[int, memoryview], None]]:
        """Writes one tensor's payload in pieces.

        The context returns a function that takes a piece and the offset at which it begins, in bytes. When the context
        ends, every byte must have been written exactly once.
        """

    def attach(self, filename: str, content: bytes) -> None:
        """Adds a small file to the output folder."""

    def beside(self, filename: str, specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> TensorWriter:
        """Adds another safetensors file to the output folder. It is completed together with the output."""

    def settle(self) -> None:
        """Completes the output and syncs it to disk, so that only the final rename is left to do."""
