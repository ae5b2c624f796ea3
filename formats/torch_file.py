"""Reads one torch file (`.bin`, `.pt`, `.pth`, `.ckpt`): a state dict whose tensors are views of storages.

Nothing in the file is executed, and listing its tensors loads none of them. A tensor's bytes are read straight from its
storage, even if its strides are not contiguous. A training checkpoint is read as the state dict inside it. This module
knows one file and the config.json next to it; no adapter, no mathematics.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from formats.errors import CorruptFile, NotACheckpoint, PathNotFound, UnsupportedDType
from formats.model_config import Read, model_config
from formats.names import unknown_tensor
from formats.reading import fill
from formats.spec import CheckpointRef, Place, TensorRef, TensorSpec, shape_text
from formats.tensors import Bytes, tensor_from_bytes
from formats.tied import kept_once
from formats.torch_archive import read_archive
from formats.torch_pickle import StorageView

if TYPE_CHECKING:
    import torch

# Keys under which training scripts store the state dict, the likeliest first.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
_DEEPEST = 3  # nested wrappers


class TorchFile:
    """A readable torch file.

    Names that are the same view of the same storage are `shared`. Each is listed as a tensor, unless config.json says
    that they are tied: then only the embedding's name is listed (see formats/tied.py).

    Attributes:
        specs: the tensors, in the state dict's order.
        metadata: what a safetensors file of such tensors would say; the container itself has no metadata.
        shared: groups of names that are one tensor in the file, including names that are left out.
        notes: what was unwrapped, what was left behind, what is shared.

    Raises:
        PathNotFound: there is no such file.
        NotACheckpoint: the file is not a torch file, or holds no state dict.
        CorruptFile: the parts of the file contradict each other.
        UnsafeFile: the pickle names something that no state dict contains.
        UnsupportedDType: a tensor is complex, quantised, or of another dtype that safetensors does not have.
    """

    def __init__(self, path: Path, read: Read = Path.read_bytes) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = {"format": "pt"}
        self._mapped: mmap.mmap | None = None
        self._lock = threading.Lock()
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise PathNotFound("no such file", where=path, then="check the path") from error
        try:
            archive = read_archive(self._descriptor, path)
            self._storages = archive.storages
            self._views, notes = _state_dict(archive.root, path)
            size = os.fstat(self._descriptor).st_size
            specs = {name: _checked(name, view, self._storages, size, path) for name, view in self._views.items()}
        except BaseException:
            self.close()
            raise
        self.shared = _shared(self._views)
        once = kept_once(self.shared, model_config(path, read))
        self.specs = {name: spec for name, spec in specs.items() if name not in once}
        notes += [
            f"{left} and {kept} are one tensor in this file, and config.json ties them: kept once, as {kept}"
            for left, kept in once.items()
        ]
        notes += [
            f"{', '.join(group)} are one tensor in this file: each name is treated as a tensor of its own"
            for group in self.shared
            if not any(name in once for name in group)
        ]
        self.notes = tuple(notes)

    @property
    def ref(self) -> CheckpointRef:
        """A reference from which the file can be opened again."""
        return CheckpointRef(str(self.path))

    def tensor(self, name: str) -> TensorRef:
        """A reference to one tensor."""
        return TensorRef(self.ref, self._spec(name))

    def read(self, name: str) -> torch.Tensor:
        """Reads the tensor to the CPU, contiguous, in its stored dtype and shape."""
        return tensor_from_bytes(self.read_bytes(name), self._spec(name))

    def read_bytes(self, name: str) -> Bytes:
        """Reads the tensor's elements in C order."""
        payload = np.empty(self._spec(name).nbytes, dtype=np.uint8)
        self.read_into(name, 0, payload)
        return payload

    def read_into(self, name: str, begin: int, buffer: Bytes) -> None:
        """Fills a buffer with the tensor's bytes in C order, from byte `begin` on."""
        spec, view = self._spec(name), self._views[name]
        if not buffer.nbytes:
            return
        place = self.place(name)
        if place is not None:
            fill(self._descriptor, place.offset + begin, buffer, f"{self.path}: {name}")
            return
        start = self._start(name)
        width = spec.dtype.itemsize
        first, last = begin // width, -(-(begin + buffer.nbytes) // width)
        elements: np.ndarray[Any, Any] = np.ndarray(
            view.shape, f"V{width}", self._map(name), start, tuple(stride * width for stride in view.strides)
        )
        gathered = elements.flat[first:last].view(np.uint8)
        buffer[:] = gathered[begin - first * width :][: buffer.nbytes]
        if last == view.size and self._mapped is not None:
            self._mapped.madvise(mmap.MADV_DONTNEED)  # drop the pages: keep at most one tensor's in memory

    def place(self, name: str) -> Place | None:
        """The file and offset of the payload; None where the tensor is not contiguous."""
        return Place(self.path, self._start(name)) if self._views[name].is_contiguous else None

    def _start(self, name: str) -> int:
        spec, view = self._spec(name), self._views[name]
        return self._storages[view.storage.key][0] + view.offset * spec.dtype.itemsize

    def _map(self, name: str) -> mmap.mmap:
        """Maps the file, for tensors that are not contiguous: one read per element would be far too slow."""
        with self._lock:
            if self._mapped is None:
                self._mapped = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
            if os.fstat(self._descriptor).st_size < len(self._mapped):
                raise CorruptFile(
                    "the file became shorter while it was read", where=f"{self.path}: {name}", then="copy it again"
                )
            return self._mapped

    def _spec(self, name: str) -> TensorSpec:
        if name not in self.specs:
            raise unknown_tensor(name, self.specs, self.path)
        return self.specs[name]

    def close(self) -> None:
        """Closes the file."""
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _state_dict(root: Any, path: Path) -> tuple[dict[str, StorageView], list[str]]:
    """The tensors by name, and notes about what was unwrapped and left behind."""
    notes: list[str] = []
    inside = root
    for _ in range(_DEEPEST):
        if not isinstance(inside, dict) or any(isinstance(value, StorageView) for value in inside.values()):
            break
        wrappers = [key for key in _WRAPPERS if isinstance(inside.get(key), dict)]
        if not wrappers:
            break
        key = wrappers[0]
        others = [str(other) for other in inside if other != key]
        notes.append(f"a training checkpoint: {key} is read" + _left(others))
        inside = inside[key]
    views = (
        {key: value for key, value in inside.items() if isinstance(value, StorageView)}
        if isinstance(inside, dict)
        else {}
    )
    if not views and inside != {}:
        raise NotACheckpoint(
            "no state dict in this file",
            where=path,
            expected=f"a dict of tensors, at the top or under {', '.join(_WRAPPERS[:3])} …",
            found=", ".join(str(key)[:40] for key in list(inside)[:6]) if isinstance(inside, dict) else _kind(inside),
            then="save the model's state_dict() alone",
        )
    others = [str(key) for key in inside if key not in views]
    if others:
        notes.append("not everything in the file is a tensor" + _left(others))
    for name in views:
        _check_name(name, path)
    return views, notes


def _kind(value: Any) -> str:
    return "a tensor without a name" if isinstance(value, StorageView) else f"a {type(value).__name__}"


def _left(keys: list[str]) -> str:
    return f", left behind: {', '.join(key[:60] for key in keys[:6])}{' …' if len(keys) > 6 else ''}" if keys else ""


def _check_name(name: Any, path: Path) -> None:
    try:
        name.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise CorruptFile(
            "a tensor's name is not text",
            where=path,
            expected="a string that UTF-8 can encode",
            found=ascii(name)[:80],
            then="rename the tensor, and save the state dict again",
        ) from error


def _checked(
    name: str, view: StorageView, storages: Mapping[str, tuple[int, int]], size: int, path: Path
) -> TensorSpec:
    """The tensor's spec, after checking that we support its dtype and that its elements lie inside its storage."""
    where = f"{path}: {name}"
    dtype, entry = view.kind.dtype, view.storage
    if dtype is None:
        raise UnsupportedDType(
            "safetensors cannot hold this dtype",
            where=where,
            found=view.kind.name,
            then="save the state dict again without this tensor, or in another dtype",
        )
    nbytes = storages.get(entry.key, (0, 0))[1]
    if (entry.key not in storages and entry.count) or nbytes != entry.count * entry.itemsize:
        raise CorruptFile(
            "a tensor's storage is not in the file as the pickle says",
            where=where,
            expected=f"{entry.count * entry.itemsize} bytes under the key {entry.key[:40]!r}",
            found=f"{nbytes} bytes" if entry.key in storages else "no such storage",
            then="download or copy the file again",
        )
    spec = TensorSpec(name, dtype, view.shape)
    if view.extent * dtype.itemsize > nbytes:
        raise CorruptFile(
            "a tensor extends beyond its storage",
            where=where,
            expected=f"at most {nbytes} bytes",
            found=f"{dtype} {shape_text(view.shape)} that ends at {view.extent * dtype.itemsize}",
            then="download or copy the file again",
        )
    if spec.nbytes > max(nbytes, size):  # only by repeating elements
        raise CorruptFile(
            "a tensor with repeated elements is larger than the file",
            where=where,
            expected=f"at most {size} bytes",
            found=f"{dtype} {shape_text(view.shape)} from {nbytes} bytes",
            then="save it as tensor.contiguous()",
        )
    return spec


def _shared(views: Mapping[str, StorageView]) -> tuple[tuple[str, ...], ...]:
    """Groups of names that are the same view of the same storage."""
    groups: dict[StorageView, list[str]] = {}
    for name, view in views.items():
        if view.size:
            groups.setdefault(view, []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)
