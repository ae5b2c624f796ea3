"""Computes a safetensors header and offsets from tensor specs. Uses neither files nor torch.

The order is that of the reference writer (widest dtype first, then by name), so the bytes are the same as its bytes.
Unlike the reference writer, we sort the metadata, so that the same input always gives the same file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from formats.errors import CorruptFile
from formats.spec import DType, TensorSpec

MAX_HEADER = 100_000_000  # bytes; the reference reader refuses more
_RANK = {dtype: rank for rank, dtype in enumerate(DType)}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything goes in a file.

    Attributes:
        header: the bytes at the beginning; for safetensors the 8-byte length and the JSON.
        offsets: offset of each tensor from the beginning of the file, in bytes.
        size: size of the file in bytes.
        marks: offsets and bytes of what other containers store between payloads.
    """

    header: bytes
    offsets: Mapping[str, int]
    size: int
    marks: tuple[tuple[int, bytes], ...] = ()


def layout(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> Layout:
    """Lays out a safetensors file.

    Raises:
        CorruptFile: two tensors have one name, or the header exceeds the format's limit of 100 MB.
    """
    ordered = sorted(specs, key=lambda spec: (-_RANK[spec.dtype], spec.name))
    entries: dict[str, object] = {}
    if metadata:
        entries["__metadata__"] = {key: metadata[key] for key in sorted(metadata)}
    begin = 0
    relative: dict[str, int] = {}
    for spec in ordered:
        if spec.name in entries:
            raise CorruptFile("two tensors in one file have the same name", where=spec.name)
        relative[spec.name] = begin
        entries[spec.name] = {
            "dtype": spec.dtype.label,
            "shape": list(spec.shape),
            "data_offsets": [begin, begin + spec.nbytes],
        }
        begin += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise CorruptFile(
            "the header would be larger than the format allows",
            expected=f"at most {MAX_HEADER} bytes",
            found=f"{len(text)} bytes",
            then="split the tensors over several files",
        )
    start = 8 + len(text)
    offsets = {name: start + offset for name, offset in relative.items()}
    return Layout(len(text).to_bytes(8, "little") + text, offsets, start + begin)


def shards_by_size(specs: Iterable[TensorSpec], limit: int, whole: str) -> dict[str, str]:
    """Assigns each tensor to a shard, in the order given.

    No shard holds more than `limit` bytes of payload, unless a single tensor is larger. Shards are named after the file
    `whole` as transformers names them. The result is empty if everything fits into one file.
    """
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if groups[-1] and filled + spec.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    if len(groups) == 1:
        return {}
    stem, _, suffix = whole.rpartition(".")
    return {
        spec.name: f"{stem}-{number:05}-of-{len(groups):05}.{suffix}"
        for number, group in enumerate(groups, 1)
        for spec in group
    }
