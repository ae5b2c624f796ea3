"""Locates the pickle and the bytes of each storage in a torch file.

There are two formats: the zip archive that torch has written since 1.6 (uncompressed members, `NAME/data.pkl` and one
`NAME/data/KEY` per storage), and the older one, five pickles in a row followed by the storages. Sizes and offsets come
from headers and are checked against the file. Nothing is unpacked, so names in an archive cannot reach other files.
This module knows no tensors.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from formats.errors import CorruptFile, NotACheckpoint
from formats.torch_pickle import MAX_PICKLE, StorageEntry, StorageView, read_pickle

_ZIP, _LOCAL_HEADER = b"PK\x03\x04", 30
_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled magic number that begins the older format
_PROTOCOL = 1001
_DAMAGED = (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, EOFError, OverflowError, IndexError)


@dataclass(frozen=True)
class Archive:
    """The content of a torch file.

    Attributes:
        root: the object that the pickle builds.
        storages: offset and number of bytes of each storage, by key.
    """

    root: Any
    storages: Mapping[str, tuple[int, int]]


def read_archive(descriptor: int, path: Path) -> Archive:
    """Reads the pickle of a torch file in either format, and locates its storages.

    Raises:
        NotACheckpoint: the file is in neither format, or holds a TorchScript program.
        CorruptFile: the file is truncated or compressed, or contradicts itself.
        UnsafeFile: see `read_pickle`.
    """
    with open(descriptor, "rb", closefd=False) as stream:
        opening = stream.read(len(_MAGIC))
        stream.seek(0)
        if opening.startswith(_ZIP):
            return _read_zip(stream, path)
        if opening == _MAGIC:
            return _read_legacy(stream, path)
    tar = os.pread(descriptor, 5, 257) == b"ustar"
    raise NotACheckpoint(
        "a tar archive, as written by torch before 0.2: even torch loads those only by running their pickles"
        if tar
        else "not a file that torch.save wrote",
        where=path,
        expected="a zip archive with a data.pkl, or torch's older form",
        found=f"{os.fstat(descriptor).st_size} bytes that start with {opening[:8]!r}",
        then="load it with the program that wrote it, and save the model's state_dict() with torch.save or safetensors",
    )


def _read_zip(stream: BinaryIO, path: Path) -> Archive:
    try:
        with zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
    except _DAMAGED as error:
        raise CorruptFile(
            f"the archive is damaged: {error}", where=path, then="download or copy the file again"
        ) from error
    folder = members[0].filename.partition("/")[0] if members else ""
    own = [member.filename for member in members if member.filename.startswith(f"{folder}/")]
    names = {name.removeprefix(f"{folder}/") for name in own}
    if "data.pkl" not in names:
        raise NotACheckpoint(
            "a zip archive that torch.save did not write",
            where=path,
            expected=f"{folder}/data.pkl",
            found=", ".join(sorted(names)[:4]) or "an empty archive",
            then="unpack it, and give the file inside that holds the weights",
        )
    if "constants.pkl" in names:
        raise NotACheckpoint(
            "a TorchScript program, not a state dict",
            where=path,
            then="save the state_dict() of the module that the program was made from",
        )
    places = _places(stream, members, path)
    inside = {name.removeprefix(f"{folder}/"): places[name] for name in own}
    if "byteorder" in inside and (order := _member(stream, inside["byteorder"], path, 16)) != b"little":
        raise CorruptFile("the weights are not little-endian", where=path, expected="little", found=order)
    root = read_pickle(io.BytesIO(_member(stream, inside["data.pkl"], path, MAX_PICKLE)), path)
    storages = {name.removeprefix("data/"): place for name, place in inside.items() if name.startswith("data/")}
    return Archive(root, storages)


def _places(stream: BinaryIO, members: list[zipfile.ZipInfo], path: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of each member, checked to be inside the file, uncompressed and without overlap."""
    size = os.fstat(stream.fileno()).st_size
    places: dict[str, tuple[int, int]] = {}
    for member in members:
        where = f"{path}: {member.filename}"
        if member.filename in places:
            raise CorruptFile(
                "two members of the archive have the same name", where=where, then="download or copy the file again"
            )
        if (
            member.compress_type != zipfile.ZIP_STORED
            or member.flag_bits & 1
            or member.file_size != member.compress_size
        ):
            raise CorruptFile(
                "a member of the archive is compressed or encrypted",
                where=where,
                expected="uncompressed, as torch.save writes them",
                then="load it and save it again with torch.save",
            )
        header = os.pread(stream.fileno(), _LOCAL_HEADER, member.header_offset) if member.header_offset >= 0 else b""
        if len(header) < _LOCAL_HEADER or not header.startswith(_ZIP):
            raise CorruptFile(
                "the archive's directory points to no member", where=where, then="download or copy the file again"
            )
        begin = member.header_offset + _LOCAL_HEADER + sum(struct.unpack("<HH", header[26:]))
        if begin + member.file_size > size:
            raise CorruptFile(
                "the archive claims more than the file holds",
                where=where,
                expected=f"at least {begin + member.file_size} bytes",
                found=f"{size} bytes",
                then="download or copy the file again",
            )
        places[member.filename] = begin, member.file_size
    end, previous = 0, ""
    for (begin, length), name in sorted((place, name) for name, place in places.items() if place[1]):
        if begin < end:
            raise CorruptFile(
                "members of the archive overlap",
                where=f"{path}: {name}",
                found=previous,
                then="download or copy the file again",
            )
        end, previous = begin + length, name
    return places


def _member(stream: BinaryIO, place: tuple[int, int], path: Path, limit: int) -> bytes:
    begin, size = place
    if size > limit:
        raise CorruptFile(
            "a member of the archive is too large",
            where=path,
            expected=f"at most {limit} bytes",
            found=f"{size} bytes",
            then="save the model's state_dict() alone with torch.save",
        )
    return os.pread(stream.fileno(), size, begin)


def _read_legacy(stream: BinaryIO, path: Path) -> Archive:
    _, protocol, system, root, keys = (read_pickle(stream, path) for _ in range(5))
    if protocol != _PROTOCOL or not (isinstance(system, dict) and system.get("little_endian") is True):
        raise CorruptFile(
            "an unknown variant of torch's older format",
            where=path,
            expected=f"protocol {_PROTOCOL}, little-endian",
            then="load it and save it again with torch.save",
        )
    sizes = _element_sizes(root)
    size, position = os.fstat(stream.fileno()).st_size, stream.tell()
    storages: dict[str, tuple[int, int]] = {}
    for key in keys if isinstance(keys, list) else []:
        count = int.from_bytes(os.pread(stream.fileno(), 8, position), "little")
        nbytes = count * sizes.get(key, 1) if isinstance(key, str) else 0
        if not isinstance(key, str) or key in storages or position + 8 + nbytes > size:
            raise CorruptFile(
                "the file's storages are not where its header says",
                where=f"{path}: storage {str(key)[:40]}",
                expected=f"{nbytes} bytes at offset {position + 8}",
                found=f"a file of {size} bytes",
                then="download or copy the file again",
            )
        storages[key] = position + 8, nbytes
        position += 8 + nbytes
    return Archive(root, storages)


def _element_sizes(root: Any) -> dict[str, int]:
    """Bytes per element of every storage in `root`; the older format gives sizes in elements."""
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if isinstance(value, StorageView):
            value = value.storage
        if isinstance(value, StorageEntry):
            sizes[value.key] = value.itemsize
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
    return sizes
