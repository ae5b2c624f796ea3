"""The weights of an ONNX graph, as one safetensors file beside it.

The payload is canonical: its name is fixed, it holds what the graph needs and nothing else, and its header is a
function of names, dtypes and shapes alone. So the offsets that the graph's initialisers carry never depend on the
file the weights came from, and two models of one architecture share one graph byte for byte. Knows nothing of torch
and of what the graph computes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from formats import TensorSpec
from formats.layout import Layout, layout
from formats.staging import disk_errors, write_at
from formats.tensors import Bytes

if TYPE_CHECKING:
    import onnx

PAYLOAD = "model.safetensors"  # its name is part of the graph's bytes, so it never varies
METADATA = {"format": "pt"}
Read = Callable[[str], Bytes]  # a tensor's name → its payload


def payload_layout(weights: Iterable[TensorSpec]) -> Layout:
    """Header and offsets of the canonical payload."""
    return layout(weights, METADATA)


def attach_payload(model: onnx.ModelProto, weights: Iterable[TensorSpec], where: Layout) -> bytes:
    """The graph's bytes, with each weight's initialiser pointing at its place in the payload.

    Args:
        model: a template's model; it is left as it is.
        weights: the template's weights.
        where: their layout.
    """
    import onnx

    pointed = onnx.ModelProto()
    pointed.CopyFrom(model)
    specs = {spec.name: spec for spec in weights}
    for tensor in pointed.graph.initializer:
        if tensor.name in specs:
            del tensor.external_data[:]
            entries = {
                "location": PAYLOAD,
                "offset": where.offsets[tensor.name],
                "length": specs[tensor.name].nbytes,
            }
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=str(value))
    data: bytes = pointed.SerializeToString(deterministic=True)
    return data


def write_payload(descriptor: int, read: Read, weights: Iterable[TensorSpec], where: Layout, target: Path) -> None:
    """Writes the payload into an open file, one tensor in memory at a time. Raises WriteFailed, naming `target`."""
    with disk_errors(target):
        write_at(descriptor, where.header, 0)
        for spec in weights:
            write_at(descriptor, read(spec.name).data, where.offsets[spec.name])


def holds_payload(path: Path, read: Read, weights: Iterable[TensorSpec], where: Layout) -> bool:
    """Whether the file at `path` is this very payload, byte for byte."""
    with path.open("rb") as stream:
        if os.fstat(stream.fileno()).st_size != where.size or stream.read(len(where.header)) != where.header:
            return False
        for spec in weights:
            stream.seek(where.offsets[spec.name])
            if stream.read(spec.nbytes) != read(spec.name).tobytes():
                return False
    return True
