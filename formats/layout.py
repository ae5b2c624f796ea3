"""From specs to a safetensors header and offsets. Pure: no file, no torch.

The order is the reference writer's (widest dtype first, then by name), so our bytes are its bytes; unlike it, we
write metadata in sorted order, so that the same input always gives the same file.
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
    """Where everything goes: `header` (8-byte length and JSON), absolute `offsets` by name, file `size` in bytes, and
    `marks`, which are what another container has between its payloads, each with its place."""

    header: bytes
    offsets: Mapping[str, int]
    size: int
    marks: tuple[tuple[int, bytes], ...] = ()


def layout(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> Layout:
    """Lays out a safetensors file.

    Raises:
        CorruptFile: two tensors of one name, or a header beyond the format's 100 MB.
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
        raise CorruptFile("the header would be larger than the format allows", expected=MAX_HEADER, found=len(text))
    start = 8 + len(text)
    offsets = {name: start + offset for name, offset in relative.items()}
    return Layout(len(text).to_bytes(8, "little") + text, offsets, start + begin)


def shards_by_size(specs: Iterable[TensorSpec], limit: int, whole: str) -> dict[str, str]:
    """Which shard each tensor goes to: filled in the order given, none beyond `limit` bytes of payload but for a tensor
    that is larger by itself. Named as transformers names those of the file `whole`; none where all fits into that."""
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
