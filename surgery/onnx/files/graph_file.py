"""Reads a `.onnx` file: its graph, its tensors, and where the bytes of each tensor are.

External data is read only on demand, and only from the graph's own folder. This module does not know what the graph
computes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from formats.containers import container_named
from formats.errors import CorruptFile, NotACheckpoint, PathNotFound, UnsafeFile
from formats.paths import open_checkpoint
from formats.reading import fill
from formats.tensors import Bytes

if TYPE_CHECKING:
    import onnx


PRODUCER = "surgery"  # producer_name of graphs that export-onnx writes


def load_graph(path: Path) -> onnx.ModelProto:
    """Loads a graph without its external weights.

    Raises:
        PathNotFound: there is no such file.
        CorruptFile: the file holds no ONNX graph, or a graph of ours whose weights have been rewritten since.
    """
    import onnx

    if not path.is_file():
        raise PathNotFound("no such file", where=path, then="check the path")
    try:
        model: onnx.ModelProto = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own kind
        raise CorruptFile("not an ONNX file", where=path, found=error, then="export or copy the graph again") from error
    if not model.graph.output:
        raise CorruptFile(
            "not an ONNX file, or one whose graph has no outputs", where=path, then="export or copy the graph again"
        )
    if model.producer_name == PRODUCER:
        _require_places(model, path)
    return model


def _require_places(model: onnx.ModelProto, path: Path) -> None:
    """Checks that weights are at the offsets that a graph of ours uses. Runtimes find weights by offset only and would
    read whatever is there. Our graphs also hold names, so if the files give names, they can be compared."""
    import onnx

    held: dict[str, dict[str, str]] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            said = {entry.key: entry.value for entry in tensor.external_data}
            held.setdefault(said.get("location", ""), {})[tensor.name] = said.get("offset", "0")
    for location, offsets in held.items():
        file = path.parent / location
        if Path(location).name != location or container_named(location) is None or not file.is_file():
            continue  # `external` says what is wrong with it
        try:
            checkpoint = open_checkpoint(file)
        except NotACheckpoint:
            continue  # a file of another tool with such a name
        with checkpoint:
            for name, offset in offsets.items():
                place = checkpoint.place(name) if name in checkpoint.specs else None
                if place is None or str(place.offset) != offset:
                    raise CorruptFile(
                        "the weights have been rewritten since the graph was exported, and are at other offsets",
                        where=path,
                        expected=f"{name} at byte {offset} of {location}",
                        found=f"at byte {place.offset}" if place else "no such tensor",
                        then="export the graph again",
                    )


@dataclass(frozen=True)
class External:
    """Where a tensor's external data is: a file in the graph's folder, the offset and the length in bytes."""

    location: str
    offset: int
    length: int


def external(tensor: onnx.TensorProto, where: Path) -> External | None:
    """Where the external data of a tensor is, for the graph at `where`; None if the tensor is inside the graph.

    Raises:
        UnsafeFile: the location is absolute, contains `..`, or is a link that leads out of the graph's folder.
        PathNotFound: the file does not exist.
        CorruptFile: the file is too short, or the length is not the tensor's.
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
            "external data must be in the graph's folder, and this location leads elsewhere",
            where=here,
            expected="a file in the graph's folder",
            found=location or "no location",
            then="put graph and data into one folder, as files and not as links",
        )
    if not (folder / path).is_file():
        raise PathNotFound(
            "the graph's weights are not where it says",
            where=folder / path,
            then="put the file of weights into the graph's folder, or export again",
        )
    size, wanted = (folder / path).stat().st_size, nbytes(tensor)
    offset, length = said.get("offset", "0"), said.get("length", str(wanted))
    fits = offset.isdigit() and length == str(wanted)
    if not fits or int(offset) + wanted > size:
        raise CorruptFile(
            "a tensor and its external data contradict each other",
            where=here,
            expected=f"{wanted} bytes in a file of {size}",
            found=f"{length} bytes at offset {offset}",
            then="export or copy the model again",
        )
    return External(location, int(offset), wanted)


def nbytes(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor's payload. Elements of four or two bits share bytes."""
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
    """A tensor's bytes, little-endian, from the graph at `where` or its external data. Raises as `external`."""
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
            "the number of a tensor's bytes does not fit its shape",
            where=f"{where}: {tensor.name}",
            expected=f"{nbytes(tensor)} bytes",
            found=f"{len(tensor.raw_data)} bytes",
            then="export or copy the graph again",
        )
    return np.frombuffer(tensor.raw_data, np.uint8)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and all subgraphs in its nodes' attributes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from graphs(inner)


def count_nodes(model: onnx.ModelProto) -> int:
    """The number of nodes in the main graph. Constant nodes are not counted: they only store a value."""
    return sum(node.op_type != "Constant" for node in model.graph.node)


def constant_of(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The value of a Constant node as a tensor; None for other nodes."""
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
}  # Constant's attributes other than `value`, and the numpy dtype of each
