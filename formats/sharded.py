"""Checkpoints that consist of several safetensors or torch files, listed in an index file.

The index may name files in its own folder only. Other files in the folder are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from formats.containers import Container, container_named
from formats.errors import CorruptFile, PathNotFound
from formats.model_config import Read
from formats.names import unknown_tensor
from formats.plain_file import PlainFile, PlainWriter
from formats.safetensors_file import SAFETENSORS
from formats.spec import CheckpointRef, Place, TensorRef, TensorSpec
from formats.staging import Staging, disk_errors, write_at
from formats.tensors import Bytes
from formats.torch_file import TorchFile
from formats.torch_writer import TorchWriter

if TYPE_CHECKING:
    import torch


class ShardedCheckpoint:
    """A readable set of shards.

    `shards` maps each tensor to its file's name. `metadata` merges the shards' metadata with the strings in the index's
    metadata, which win.

    Raises:
        CorruptFile: the index is malformed, points outside its folder, or contradicts the shards.
        PathNotFound: a shard is missing.
    """

    def __init__(self, index: Path, read: Read = Path.read_bytes) -> None:
        self.path = index
        self.shards, own = _read_index(index)
        self._files: dict[str, PlainFile | TorchFile] = {}
        try:
            for filename in sorted(set(self.shards.values())):
                if not (index.parent / filename).exists():
                    raise PathNotFound(
                        "the index names a shard that does not exist",
                        where=index.parent / filename,
                        then="download the missing shard, or the whole folder again",
                    )
                self._files[filename] = _open_shard(index.parent / filename, read)
            self.specs = self._gather()
        except BaseException:
            self.close()
            raise
        self.metadata: dict[str, str] = {}
        for file in self._files.values():
            self.metadata |= file.metadata
        self.metadata |= own
        self.notes = tuple(dict.fromkeys(note for file in self._files.values() for note in file.notes))

    def _gather(self) -> dict[str, TensorSpec]:
        specs: dict[str, TensorSpec] = {}
        for filename, file in self._files.items():
            for name, spec in file.specs.items():
                if self.shards.get(name) != filename:
                    twice = name in self._files[self.shards[name]].specs if name in self.shards else False
                    raise CorruptFile(
                        "a tensor is in two shards" if twice else "the index and a shard disagree about a tensor",
                        where=f"{file.path}: {name}",
                        expected=self.shards.get(name, "an entry in the index"),
                        found=filename,
                        then="download the shards and their index again",
                    )
                specs[name] = spec
        tied = {name for file in self._files.values() if isinstance(file, TorchFile) for name in chain(*file.shared)}
        absent = sorted(set(self.shards) - set(specs) - tied)
        if absent:
            raise CorruptFile(
                "the index names tensors that its shards do not hold",
                where=self.path,
                found=", ".join(absent[:5]),
                then="download or copy the file again",
            )
        return specs

    @property
    def ref(self) -> CheckpointRef:
        """A reference from which the checkpoint can be opened again."""
        return CheckpointRef(str(self.path))

    def tensor(self, name: str) -> TensorRef:
        """A reference to one tensor."""
        return TensorRef(self.ref, self._file(name).specs[name])

    def read(self, name: str) -> torch.Tensor:
        """Reads the tensor to the CPU in its stored dtype and shape."""
        return self._file(name).read(name)

    def read_bytes(self, name: str) -> Bytes:
        """Reads the tensor's payload as stored."""
        return self._file(name).read_bytes(name)

    def read_into(self, name: str, begin: int, buffer: Bytes) -> None:
        """Fills a buffer with the payload from byte `begin` on."""
        self._file(name).read_into(name, begin, buffer)

    def place(self, name: str) -> Place | None:
        """The file and offset of the payload; None where a torch file stores it non-contiguously."""
        return self._file(name).place(name)

    def _file(self, name: str) -> PlainFile | TorchFile:
        if name not in self.specs:
            raise unknown_tensor(name, self.specs, self.path)
        return self._files[self.shards[name]]

    def close(self) -> None:
        """Closes every shard."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> ShardedCheckpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _open_shard(path: Path, read: Read) -> PlainFile | TorchFile:
    return TorchFile(path, read) if container_named(path) is Container.TORCH else PlainFile(path, SAFETENSORS)


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    try:
        document = json.loads(path.read_bytes(), object_pairs_hook=lambda pairs: _once(pairs, path))
        shards = document["weight_map"]
        own = document.get("metadata") or {}
        sound = all(isinstance(text, str) for pair in shards.items() for text in pair) and isinstance(own, dict)
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise CorruptFile(
            "not an index of shards",
            where=path,
            expected="JSON with a weight_map of names to files",
            then="download or copy the file again",
        )
    for filename in set(shards.values()):
        if Path(filename).name != filename or filename in ("", ".", ".."):
            raise CorruptFile("the index names a file outside its folder", where=path, found=filename)
    return shards, {key: value for key, value in own.items() if isinstance(value, str)}


def _once(pairs: list[tuple[str, object]], path: Path) -> dict[str, object]:
    """A JSON object without duplicate names. Python's json would silently keep the last duplicate."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise CorruptFile(
            "the index names a tensor twice",
            where=path,
            found=", ".join(sorted(name for name in found if names.count(name) > 1)[:5]),
            then="download or copy the file again",
        )
    return found


class ShardedWriter:
    """Fills the shards of one staged folder and writes their index.

    Our metadata goes into the index only, because the index is written last.
    """

    def __init__(
        self,
        staging: Staging,
        index: str,
        shards: Mapping[str, str],
        specs: Iterable[TensorSpec],
        metadata: Mapping[str, str],
        *,
        reserve: bool = True,
    ) -> None:
        self._staging = staging
        self._index = index
        self._shards = dict(shards)
        self._metadata = dict(metadata)
        self._omitted: set[str] = set()
        grouped: dict[str, list[TensorSpec]] = {}
        for spec in specs:
            grouped.setdefault(self._shards[spec.name], []).append(spec)
        self._writers: dict[str, PlainWriter | TorchWriter] = {
            filename: TorchWriter(staging, filename, group)
            if container_named(filename) is Container.TORCH
            else PlainWriter(staging, filename, group, {"format": "pt"}, SAFETENSORS, reserve=reserve)
            for filename, group in sorted(grouped.items())
        }

    def write(self, name: str, tensor: torch.Tensor, *, smaller: bool = False) -> None:
        """Writes one tensor."""
        self._writers[self._shards[name]].write(name, tensor, smaller=smaller)

    def write_bytes(self, name: str, payload: Bytes) -> None:
        """Writes one tensor's payload unchanged."""
        self._writers[self._shards[name]].write_bytes(name, payload)

    def parts(self, name: str) -> AbstractContextManager[Callable[[int, memoryview], None]]:
        """Writes one tensor's payload in pieces."""
        return self._writers[self._shards[name]].parts(name)

    @property
    def shared(self) -> bool:
        """Whether a forked copy of this process may write tensors for this writer."""
        return all(writer.shared for writer in self._writers.values())

    def written(self, name: str) -> None:
        """Records that a forked copy of this process has written this tensor."""
        self._writers[self._shards[name]].written(name)

    def omit(self, name: str) -> None:
        """Leaves a declared tensor out."""
        self._writers[self._shards[name]].omit(name)
        self._omitted.add(name)

    def seal(self, metadata: Mapping[str, str]) -> None:
        """Replaces the index's metadata."""
        self._metadata = dict(metadata)

    def finish(self) -> None:
        """Completes every shard and writes the index, whose `total_size` is the payload in bytes."""
        for writer in self._writers.values():
            writer.finish()
        metadata: dict[str, object] = {"total_size": sum(writer.nbytes for writer in self._writers.values())}
        metadata |= {key: value for key, value in sorted(self._metadata.items()) if key != "format"}
        weight_map = {name: self._shards[name] for name in sorted(set(self._shards) - self._omitted)}
        text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2).encode() + b"\n"
        with disk_errors(self._staging.target):
            write_at(self._staging.create(self._index, len(text)), text, 0)
