"""Safetensors files: reads and lays out the header, and checks written files with the reference reader.

Every size in a header is checked against the file before anything is allocated.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from formats.errors import CorruptFile, IncompleteOutput, NotACheckpoint
from formats.layout import MAX_HEADER, layout
from formats.plain_file import Form, Header
from formats.spec import DType, TensorSpec, shape_text

_DTYPES = {dtype.label: dtype for dtype in DType}


def _read_header(descriptor: int, path: Path) -> Header:
    size = os.fstat(descriptor).st_size
    if size < 8:
        raise NotACheckpoint(
            "not a safetensors file: too short for a header",
            where=path,
            found=f"{size} bytes",
            then="download or copy the file again",
        )
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    opening = os.pread(descriptor, 1, 8)
    if opening != b"{" or length > MAX_HEADER:
        raise NotACheckpoint(
            "not a safetensors file",
            where=path,
            expected=f"a JSON header of at most {MAX_HEADER} bytes",
            found=f"a header length of {length} and a first byte {opening!r}",
        )
    if 8 + length > size:
        raise CorruptFile(
            "the header claims more than the file holds",
            where=path,
            expected=f"a header of {8 + length} bytes",
            found=f"a file of {size} bytes",
            then="download or copy the file again",
        )
    try:
        entries = json.loads(os.pread(descriptor, length, 8), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(
            f"the header is not a JSON object: {error}", where=path, then="download or copy the file again"
        ) from error
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptFile(
            "the header's __metadata__ must map strings to strings",
            where=path,
            then="write the file again with the safetensors library",
        )
    specs, offsets = _read_entries(entries, path, start=8 + length, size=size)
    return Header(specs, metadata, offsets)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name appears twice")
    return entries


def _read_entries(
    entries: dict[str, Any], path: Path, *, start: int, size: int
) -> tuple[dict[str, TensorSpec], dict[str, int]]:
    placed: list[tuple[int, int, TensorSpec]] = []
    for name, entry in entries.items():
        try:
            label, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            sound = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        except (TypeError, KeyError, ValueError):
            sound = False
        if not sound:
            raise CorruptFile(
                "a header entry is malformed",
                where=f"{path}: {name}",
                found=entry,
                then="download or copy the file again",
            )
        if label not in _DTYPES:
            raise CorruptFile("an unknown dtype", where=f"{path}: {name}", expected=", ".join(_DTYPES), found=label)
        spec = TensorSpec(name, _DTYPES[label], shape)
        if end - begin != spec.nbytes:
            raise CorruptFile(
                "a tensor's data_offsets contradict its shape",
                where=f"{path}: {name}",
                expected=f"{spec.nbytes} bytes for {label} {shape_text(shape)}",
                found=f"{end - begin} bytes",
                then="download or copy the file again",
            )
        placed.append((begin, end, spec))
    placed.sort(key=lambda item: item[:2])
    position = 0
    for begin, end, spec in placed:
        if begin != position:
            raise CorruptFile(
                "tensors overlap or leave a gap",
                where=f"{path}: {spec.name}",
                expected=position,
                found=begin,
                then="download or copy the file again",
            )
        position = end
    if start + position != size:
        raise CorruptFile(
            "the payload is truncated" if size < start + position else "there are bytes after the last tensor",
            where=path,
            expected=f"{start + position} bytes",
            found=f"{size} bytes",
            then="download or copy the file again",
        )
    specs = {spec.name: spec for _, _, spec in placed}
    return specs, {spec.name: start + begin for begin, _, spec in placed}


def _check_with_reference(descriptor: int, names: set[str]) -> None:
    """Opens what we wrote with the safetensors library itself, header only, and compares the names."""
    from safetensors import safe_open

    path = f"/proc/self/fd/{descriptor}"
    if os.path.exists(path):
        with safe_open(path, framework="np") as reference:
            if set(reference.keys()) != names:
                raise IncompleteOutput("the reference reader reads other tensors than we wrote", where=path)


SAFETENSORS = Form(_read_header, layout, _check_with_reference)
