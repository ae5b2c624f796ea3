"""Writes one torch file of a staged output by torch.save, in memory that does not grow with the file.

torch.save wants all tensors at once, so it runs twice. First over tensors without content, which shows where each
payload will lie; these then come in any order and from any thread. At the end it runs over the file itself, mapped,
and writes all that belongs around the payloads. The container has no room for metadata.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Mapping
from typing import IO, TYPE_CHECKING, cast

import numpy as np

from formats.errors import IncompleteOutput
from formats.layout import Layout
from formats.plain_file import PlainWriter
from formats.spec import TensorSpec
from formats.staging import Staging, disk_errors, write_at
from formats.tensors import tensor_from_bytes, torch_dtype

if TYPE_CHECKING:
    import torch


def lay_out(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> Layout:
    """Where torch.save puts each payload."""
    import torch

    declared, sink = tuple(specs), _Sink()
    empty = {spec.name: torch.empty(spec.shape, dtype=torch_dtype(spec.dtype)) for spec in declared}
    with torch.serialization.skip_data():
        torch.save(empty, cast("IO[bytes]", sink))
    places = iter(sink.skipped)
    offsets = {spec.name: next(places)[0] if spec.nbytes else 0 for spec in declared}
    return Layout(b"", offsets, sink.end)


class TorchWriter:
    """Fills one torch file of a staged output, from any thread, in any order. Metadata is not kept."""

    def __init__(self, staging: Staging, filename: str, specs: Iterable[TensorSpec]) -> None:
        self._target, self._specs = staging.target, tuple(specs)
        self._file = PlainWriter(staging, filename, self._specs, {}, self)
        self.nbytes, self.shared = self._file.nbytes, self._file.shared
        self.write_bytes, self.parts, self.written = self._file.write_bytes, self._file.parts, self._file.written
        self.finish = self._file.finish

    def write(self, name: str, tensor: torch.Tensor, *, smaller: bool = False) -> None:
        """Writes one tensor, which must be as declared: nothing here is laid out again."""
        self._file.write(name, tensor)

    def omit(self, name: str) -> None:
        """Refuses: the pickle names every tensor that was declared."""
        raise IncompleteOutput("a tensor of a torch file cannot be omitted", where=name)

    def seal(self, metadata: Mapping[str, str]) -> None:
        """Does nothing: there is no room for metadata."""

    lay_out = staticmethod(lay_out)

    def check(self, descriptor: int, names: set[str]) -> None:
        """Puts everything else around the payloads. Raises IncompleteOutput if torch wants them elsewhere."""
        import torch

        layout = lay_out(self._specs, {})
        with disk_errors(self._target):
            os.ftruncate(descriptor, layout.size)  # where no space was reserved
        mapped = mmap.mmap(descriptor, layout.size)
        payload = np.frombuffer(mapped, np.uint8)
        begins = [(spec, layout.offsets[spec.name]) for spec in self._specs]
        tensors = {spec.name: tensor_from_bytes(payload[at : at + spec.nbytes], spec) for spec, at in begins}
        sink = _Sink(descriptor, mapped, {(at, spec.nbytes) for spec, at in begins if spec.nbytes})
        torch.save(tensors, cast("IO[bytes]", sink))
        with disk_errors(self._target):
            sink.raise_error()
        if (set(sink.skipped), sink.end) != (sink.there, layout.size):
            raise IncompleteOutput(
                "torch.save expects the tensors at other offsets than it declared", where=self._target
            )


class _Sink:
    """What torch.save writes to: nothing, or a file in which the payloads are there already.

    An error is kept until the end: torch's writer, which calls this, would put one of its own in its place.
    """

    def __init__(
        self, descriptor: int = -1, mapped: mmap.mmap | None = None, there: Iterable[tuple[int, int]] = ()
    ) -> None:
        self.there, self.end = set(there), 0
        self.skipped: list[tuple[int, int]] = []  # where what was not written begins, and its bytes
        self._descriptor, self._mapped = descriptor, mapped
        self._error: BaseException | None = None

    def write(self, data: memoryview) -> int:
        """Appends what is not there already; pages that have been read are let go of."""
        place = (self.end, data.nbytes)
        if place in self.there:
            self.skipped.append(place)
            if self._mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                self._mapped.madvise(mmap.MADV_DONTNEED)
        elif self._mapped is not None and self._error is None:
            try:
                write_at(self._descriptor, data, self.end)
            except BaseException as error:  # Ctrl-C too
                self._error = error
        self.end += data.nbytes
        return data.nbytes

    def tell(self) -> int:
        """How much has been appended."""
        return self.end

    def seek(self, offset: int, whence: int = 0) -> int:
        """Leaves room for a payload that torch.save skips."""
        end = offset + (self.end if whence else 0)
        self.skipped.append((self.end, end - self.end))
        self.end = end
        return end

    def flush(self) -> None:
        """Does nothing: every write is the system's at once."""

    def raise_error(self) -> None:
        """Raises what went wrong."""
        if self._error is not None:
            raise self._error
