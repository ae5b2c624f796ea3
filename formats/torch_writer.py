"""Writes one torch file of a staged output, tensor by tensor: what torch.save makes of a dict of tensors.

A zip archive of stored members, each payload at a multiple of 64 bytes, so that torch can map it: `data.pkl` in
protocol 2, one `data/KEY` a tensor, `byteorder` and `version`, as torch/serialization.py and
caffe2/serialize/inline_container.cc write them. All positions follow from the specs. The container has no room for
metadata.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from formats.errors import IncompleteOutput
from formats.spec import TensorSpec
from formats.staging import Staging, disk_errors, send, write_at
from formats.tensors import Bytes, bytes_from_tensor, spec_of
from formats.torch_pickle import NAMES, STORAGES, UNTYPED

if TYPE_CHECKING:
    import torch

_ALIGNMENT = 64  # bytes, as torch aligns them
_FOLDER = "archive"  # what torch calls it where it writes into no file of a name
_LARGE = 0xFFFFFFFF  # what a field of 32 bits says for: see the extra field
_ZIP64, _PADDING = 0x0001, 0x4246  # ids of extra fields; the second is torch's own, "FB"
_VERSION_NEEDED, _UTF8 = 45, 0x0800
_EPOCH = 0x0021  # 1 January 1980 as MS-DOS has it: no time in the bytes
_CHUNK = 1 << 24


@dataclass
class _Member:
    """One member of the archive: where its header and its bytes go, and their checksum once known."""

    name: bytes
    header: int
    begin: int
    size: int
    crc: int | None = None

    @property
    def end(self) -> int:
        return self.begin + self.size

    @classmethod
    def after(cls, position: int, name: str, size: int) -> _Member:
        """The member that follows at `position`, its bytes aligned by padding in its header."""
        encoded = f"{_FOLDER}/{name}".encode()
        least = position + 30 + len(encoded) + 20 + 4  # the fixed header, the name, the two extra fields' least
        return cls(encoded, position, least + -least % _ALIGNMENT, size)

    def local_header(self) -> bytes:
        """What stands before its bytes. Sizes are always in the 64-bit field."""
        zip64 = struct.pack("<HHQQ", _ZIP64, 16, self.size, self.size)
        room = self.begin - self.header - 30 - len(self.name) - len(zip64) - 4
        extra = zip64 + struct.pack("<HH", _PADDING, room) + b"Z" * room
        fields = (_VERSION_NEEDED, _UTF8, 0, 0, _EPOCH, self.crc, _LARGE, _LARGE, len(self.name), len(extra))
        return struct.pack("<4s5H3I2H", b"PK\x03\x04", *fields) + self.name + extra

    def entry(self) -> bytes:
        """Its entry in the archive's directory."""
        extra = struct.pack("<HHQQQ", _ZIP64, 24, self.size, self.size, self.header)
        fields = (_VERSION_NEEDED, _VERSION_NEEDED, _UTF8, 0, 0, _EPOCH, self.crc, _LARGE, _LARGE, len(self.name))
        return struct.pack("<4s6H3I5H2I", b"PK\x01\x02", *fields, len(extra), 0, 0, 0, 0, _LARGE) + self.name + extra


class TorchWriter:
    """Fills one torch file of a staged output, from any thread, in any order. Metadata is not kept."""

    def __init__(self, staging: Staging, filename: str, specs: Iterable[TensorSpec]) -> None:
        self._staging = staging
        self._specs = {spec.name: spec for spec in specs}
        self._small = {"data.pkl": state_dict_pickle(self._specs.values()), "byteorder": b"little", "version": b"3\n"}
        self._members: dict[str, _Member] = {}
        sizes = {"data.pkl": len(self._small["data.pkl"]), "byteorder": 6}
        sizes |= {f"data/{key}": spec.nbytes for key, spec in enumerate(self._specs.values())}
        position = 0
        for name, size in {**sizes, "version": 2}.items():
            self._members[name] = _Member.after(position, name, size)
            position = self._members[name].end
        self._payloads = {name: self._members[f"data/{key}"] for key, name in enumerate(self._specs)}
        self._directory = position
        self._descriptor = staging.create(filename, position)
        self._pending = set(self._specs)
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of payload."""
        return sum(spec.nbytes for spec in self._specs.values())

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
        """Writes one tensor's payload piece by piece; pieces in order are summed on the way, others read again."""
        with self._lock:
            if name not in self._pending:
                fault = "written twice" if name in self._specs else "never declared"
                raise IncompleteOutput(f"a tensor was {fault}", where=name)
            self._pending.remove(name)
        member, written, crc, in_order = self._payloads[name], 0, 0, True

        def put(begin: int, piece: memoryview) -> None:
            nonlocal written, crc, in_order
            if begin < 0 or begin + piece.nbytes > member.size:
                raise IncompleteOutput(
                    "a piece lies outside of its tensor", where=name, expected=f"{member.size} bytes"
                )
            with disk_errors(self._staging.target):
                write_at(self._descriptor, piece, member.begin + begin)
            in_order &= begin == written
            crc = zlib.crc32(piece, crc)
            written += piece.nbytes

        yield put
        send(self._descriptor, member.begin, written)
        if written != member.size:
            raise IncompleteOutput("a payload came in part", where=name, expected=member.size, found=written)
        member.crc = crc if in_order else None

    shared = False  # each member's checksum is ours alone

    def written(self, name: str) -> None:
        """Refuses: nobody else knows the checksum."""
        raise IncompleteOutput("a tensor that another process wrote has no checksum", where=name)

    def omit(self, name: str) -> None:
        """Refuses: the pickle names every tensor that was declared."""
        raise IncompleteOutput("a tensor of a torch file cannot be left out", where=name)

    def seal(self, metadata: Mapping[str, str]) -> None:
        """Does nothing: there is no room for metadata."""

    def finish(self) -> None:
        """Writes headers and directory. Raises IncompleteOutput if a tensor is missing."""
        if self._pending:
            raise IncompleteOutput("tensors were never written", found=", ".join(sorted(self._pending)[:5]))
        with disk_errors(self._staging.target):
            for name, content in self._small.items():
                write_at(self._descriptor, content, self._members[name].begin)
            for member in self._members.values():
                if member.crc is None:
                    member.crc = self._checksum(member)
                write_at(self._descriptor, member.local_header(), member.header)
            write_at(self._descriptor, self._ending(), self._directory)
        _check_with_torch(self._descriptor, list(self._specs))

    def _checksum(self, member: _Member) -> int:
        crc = 0
        for position in range(member.begin, member.end, _CHUNK):
            crc = zlib.crc32(os.pread(self._descriptor, min(_CHUNK, member.end - position), position), crc)
        return crc

    def _ending(self) -> bytes:
        """The directory, and what says where it is, in 64 bits and in 32."""
        entries, count = b"".join(member.entry() for member in self._members.values()), len(self._members)
        where = self._directory + len(entries)
        versions = (_VERSION_NEEDED, _VERSION_NEEDED, 0, 0)
        large = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, *versions, count, count, len(entries), self._directory)
        locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, where, 1)
        return (
            entries
            + large
            + locator
            + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, _LARGE & 0xFFFF, _LARGE & 0xFFFF, _LARGE, _LARGE, 0)
        )


def state_dict_pickle(specs: Iterable[TensorSpec]) -> bytes:
    """The pickle, in protocol 2, of a dict of contiguous tensors, each alone in the storage of its number."""
    ordered = b"ccollections\nOrderedDict\n)R"  # the hooks that no tensor has
    entries = [
        b"".join(
            (
                _text(spec.name),
                _rebuilder(spec),
                b"((",
                _text("storage"),
                _storage_class(spec),
                _text(str(key)),
                _text("cpu"),
                _number(spec.size if spec.dtype in STORAGES else spec.nbytes),
                b"tQ",
                _number(0),
                _numbers(spec.shape),
                _numbers(_strides(spec.shape)),
                b"\x89",  # requires no gradient
                ordered,
                b"" if spec.dtype in STORAGES else f"ctorch\n{NAMES[spec.dtype]}\n".encode(),
                b"tR",
            )
        )
        for key, spec in enumerate(specs)
    ]
    return b"\x80\x02}(" + b"".join(entries) + b"u."


def _rebuilder(spec: TensorSpec) -> bytes:
    return f"ctorch._utils\n_rebuild_tensor_v{2 if spec.dtype in STORAGES else 3}\n".encode()


def _storage_class(spec: TensorSpec) -> bytes:
    known = STORAGES.get(spec.dtype)
    return f"ctorch\n{known}\n".encode() if known else f"ctorch.storage\n{UNTYPED}\n".encode()


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * max(n, 1))
    return tuple(reversed(strides)) if shape else ()


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _number(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x09" + value.to_bytes(9, "little")


def _numbers(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"


def _check_with_torch(descriptor: int, names: list[str]) -> None:
    """Opens what we wrote with torch itself, mapped and not loaded, before anybody else does."""
    import torch

    path = f"/proc/self/fd/{descriptor}"
    if os.path.exists(path):
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if list(found) != names:
            raise IncompleteOutput("torch sees other tensors than we wrote", where=path)
