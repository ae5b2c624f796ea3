"""Reads a `.onnx` file: its graph, its tensors, and where the bytes of each tensor are.

External data is read only on request, and only from the graph's own folder. This module does not know what the graph
computes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from formats.containers import container_named
from formats.errors import CorruptFile, NotACheckpoint, PathNotFound, UnsafeFile
from formats.open_files import OpenFiles
from formats.reading import fill
from formats.spec import CheckpointRef, DType, TensorRef, TensorSpec
from formats.tensors import Bytes

if TYPE_CHECKING:
    import onnx


PRODUCER = "surgery"  # producer name in graphs that export-onnx writes


def load_graph(path: Path, files: OpenFiles | None = None) -> onnx.ModelProto:
    """The graph without its external weights; `files` keeps the headers of the weight files open.

    Raises:
        PathNotFound: the file does not exist.
        CorruptFile: it holds no ONNX graph, or a graph of ours whose weights have been rewritten since.
    """
    import onnx

    if not path.is_file():
        raise PathNotFound("no such file", where=path, then="check the path of the graph")
    try:
        model: onnx.ModelProto = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own kind
        raise CorruptFile("not an ONNX file", where=path, found=error, then="export or copy the graph again") from error
    if not model.graph.output:
        raise CorruptFile(
            "not an ONNX file, or its graph has no outputs", where=path, then="export or copy the graph again"
        )
    if model.producer_name == PRODUCER:
        _require_places(model, path, files or OpenFiles())
    return model


def _require_places(model: onnx.ModelProto, path: Path, files: OpenFiles) -> None:
    """Checks that each weight is at the offset where the graph expects it. A runtime uses whatever bytes are there; but
    graphs of ours record names, so they can be compared with the names in the weight files."""
    import onnx

    held: dict[str, dict[str, str]] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            said = {entry.key: entry.value for entry in tensor.external_data}
            held.setdefault(said.get("location", ""), {})[tensor.name] = said.get("offset", "0")
    for location, offsets in held.items():
        file = path.parent / location
        if Path(location).name != location or container_named(location) is None or not file.is_file():
            continue  # `external` raises the error for it
        try:
            checkpoint = files.checkpoint(file)
        except NotACheckpoint:
            continue  # a file of another tool with such a name
        for name, offset in offsets.items():
            place = checkpoint.place(name) if name in checkpoint.specs else None
            if place is None or str(place.offset) != offset:
                raise CorruptFile(
                    "the weights have been rewritten since the graph was exported, and are at other offsets",
                    where=path,
                    expected=f"{name} at byte {offset} of {location}",
                    found=f"at byte {place.offset}" if place else "not there",
                    then="export the graph again",
                )


@dataclass(frozen=True)
class External:
    """The place of a tensor outside its graph: a file next to it, the first byte, and the number of bytes."""

    location: str
    offset: int
    length: int


def external(tensor: onnx.TensorProto, where: Path) -> External | None:
    """The place of a tensor outside the graph at `where`; None if the graph holds its bytes.

    Raises:
        UnsafeFile: an absolute location, a location with `..`, or a link that leads out of the graph's folder.
        PathNotFound: the file does not exist.
        CorruptFile: the file is too short, or the length differs from the tensor's.
    """
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    said = {entry.key: entry.value for entry in tensor.external_data}
    location, folder, here = said.get("location", ""), where.parent, f"{where}: {tensor.name}"
    path = Path(location)
    inside = location and not path.is_absolute() and ".." not in path.parts and "\\" not in location
    if not inside or folder.resolve() not in (folder / path).resolve().parents:
        raise UnsafeFile(
            "external data must be in its graph's folder, and this location leads elsewhere",
            where=here,
            expected="a file in the graph's folder",
            found=location or "no location",
            then="put graph and data into one folder, as files and not as links",
        )
    if not (folder / path).is_file():
        raise PathNotFound(
            "the graph's weights are not where it says", where=folder / path, then="copy the weight file there"
        )
    size, wanted = (folder / path).stat().st_size, nbytes(tensor)
    offset, length = said.get("offset", "0"), said.get("length", str(wanted))
    fits = offset.isdigit() and length == str(wanted)
    if not fits or int(offset) + wanted > size:
        raise CorruptFile(
            "a tensor and its external data contradict each other",
            where=here,
            expected=f"{wanted} bytes in a file of {size}",
            found=f"{length} bytes from {offset} on",
            then="export or copy the model again",
        )
    return External(location, int(offset), wanted)


def nbytes(tensor: onnx.TensorProto) -> int:
    """Size of a tensor's payload in bytes; elements of four or two bits share bytes."""
    import onnx

    count = 1
    for size in tensor.dims:
        count *= size
    label = onnx.TensorProto.DataType.Name(tensor.data_type)
    if label.endswith("INT4") or label.startswith("FLOAT4"):
        return (count + 1) // 2
    if label.endswith("INT2"):
        return (count + 3) // 4
    return count * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def payload(tensor: onnx.TensorProto, where: Path) -> Bytes:
    """A tensor's bytes, little-endian, from the graph at `where` or from a file next to it. Raises as `external`."""
    import onnx

    outside = external(tensor, where)
    if outside is not None:
        buffer = np.empty(outside.length, np.uint8)
        descriptor = os.open(where.parent / outside.location, os.O_RDONLY)
        try:
            fill(descriptor, outside.offset, buffer, f"{where}: {tensor.name}")
        finally:
            os.close(descriptor)
        return buffer
    if tensor.data_type == onnx.TensorProto.STRING:
        return np.frombuffer(b"\0".join(tensor.string_data), np.uint8)
    if not tensor.HasField("raw_data"):
        return np.ascontiguousarray(onnx.numpy_helper.to_array(tensor)).reshape(-1).view(np.uint8)
    if len(tensor.raw_data) != nbytes(tensor):
        raise CorruptFile(
            "a tensor's number of bytes does not match its shape",
            where=f"{where}: {tensor.name}",
            expected=nbytes(tensor),
            found=len(tensor.raw_data),
            then="export or copy the graph again",
        )
    return np.frombuffer(tensor.raw_data, np.uint8)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and all graphs in its nodes' attributes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from graphs(inner)


def named_tensors(every: Iterable[onnx.GraphProto]) -> list[tuple[str, onnx.TensorProto]]:
    """Every tensor of these graphs, including Constant nodes, with the name of its value."""
    found = []
    for graph in every:
        found += [(tensor.name, tensor) for tensor in graph.initializer]
        for node in graph.node:
            if node.op_type == "Constant":
                found += [(node.output[0], a.t) for a in node.attribute if a.name == "value"]
    return found


def all_tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Every tensor of a model's graphs, whatever its type, in a fixed order."""
    return [tensor for _, tensor in named_tensors(graphs(model.graph))]


def files_of(model: onnx.ModelProto, path: Path) -> tuple[TensorRef, ...]:
    """The graph's file and the files of its tensors, each as one byte tensor for a plan. Raises as `external`."""
    outside = {found.location for tensor in all_tensors(model) if (found := external(tensor, path)) is not None}
    return tuple(
        TensorRef(CheckpointRef(str(file)), TensorSpec(file.name, DType.U8, (file.stat().st_size,)))
        for file in (path, *(path.parent / location for location in sorted(outside)))
    )


def count_nodes(model: onnx.ModelProto) -> int:
    """Number of nodes in the main graph, without Constant nodes, which only store values."""
    return sum(node.op_type != "Constant" for node in model.graph.node)


def constant_of(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The value of a Constant node, as a tensor; None for other nodes."""
    import onnx

    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx") or len(node.attribute) != 1:
        return None
    (attribute,) = node.attribute
    if attribute.name == "value":
        return attribute.t
    if attribute.name not in _PLAIN:
        return None
    value = onnx.helper.get_attribute_value(attribute)
    return onnx.numpy_helper.from_array(np.array(value, _PLAIN[attribute.name]))


_PLAIN: dict[str, Any] = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
    "value_string": object,
    "value_strings": object,
}  # Constant's attributes other than `value`, and the numpy form of each
