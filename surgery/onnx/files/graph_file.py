"""A `.onnx` file: its graph, the tensors in it, and where the bytes of each lie.

External data stays where it is until somebody asks for it, and is looked for beside the graph and nowhere else. Knows
nothing of what the graph computes.
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


PRODUCER = "surgery"  # of graphs that export-onnx writes


def load_graph(path: Path, files: OpenFiles | None = None) -> onnx.ModelProto:
    """The graph without its external weights; `files`: where the headers of these are open, or are opened.

    Raises:
        PathNotFound: no such file.
        CorruptFile: no ONNX graph in it, or one of ours whose weights have been written anew since.
    """
    import onnx

    if not path.is_file():
        raise PathNotFound("no such file", where=path)
    try:
        model: onnx.ModelProto = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own kind
        raise CorruptFile("not an ONNX file", where=path, found=error) from error
    if not model.graph.output:
        raise CorruptFile("not an ONNX file, or one whose graph gives nothing", where=path)
    if model.producer_name == PRODUCER:
        _require_places(model, path, files or OpenFiles())
    return model


def _require_places(model: onnx.ModelProto, path: Path, files: OpenFiles) -> None:
    """A graph finds weights by offset, and whatever lies there a runtime takes for them. Of ours the names are known
    too: so where the files tell names, each must be where the graph looks for it."""
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
            checkpoint = files.checkpoint(file)
        except NotACheckpoint:
            continue  # another tool's file under such a name
        for name, offset in offsets.items():
            place = checkpoint.place(name) if name in checkpoint.specs else None
            if place is None or str(place.offset) != offset:
                raise CorruptFile(
                    "the weights have been written anew since the graph was exported, and lie elsewhere",
                    where=path,
                    expected=f"{name} at byte {offset} of {location}",
                    found=f"at byte {place.offset}" if place else "not there",
                    then="export the graph again",
                )


@dataclass(frozen=True)
class External:
    """Where a tensor lies outside its graph: a file beside it, the first byte and their number."""

    location: str
    offset: int
    length: int


def external(tensor: onnx.TensorProto, where: Path) -> External | None:
    """Where a tensor lies outside of the graph at `where`; None if it lies in it.

    Raises:
        UnsafeFile: an absolute location, one with `..`, or a link that leads out of the graph's folder.
        PathNotFound: the file is not there.
        CorruptFile: the file is shorter than it should be, or the length is not the tensor's.
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
            "external data must lie beside its graph, and this location leads elsewhere",
            where=here,
            expected="a file in the graph's folder",
            found=location or "no location",
            then="put graph and data into one folder, as files and not as links",
        )
    if not (folder / path).is_file():
        raise PathNotFound("the graph's weights are not where it says", where=folder / path)
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
    """Bytes of a tensor's payload; elements of four or two bits share them."""
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
    """A tensor's bytes, little-endian, from the graph at `where` or from beside it. Raises as `external`."""
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
            "a tensor's bytes are not as many as its shape says",
            where=f"{where}: {tensor.name}",
            expected=nbytes(tensor),
            found=len(tensor.raw_data),
        )
    return np.frombuffer(tensor.raw_data, np.uint8)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and all that lie in its nodes' attributes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from graphs(inner)


def named_tensors(every: Iterable[onnx.GraphProto]) -> list[tuple[str, onnx.TensorProto]]:
    """Every tensor of these graphs, Constant nodes' included, with the name of its value."""
    found = []
    for graph in every:
        found += [(tensor.name, tensor) for tensor in graph.initializer]
        for node in graph.node:
            if node.op_type == "Constant":
                found += [(node.output[0], a.t) for a in node.attribute if a.name == "value"]
    return found


def all_tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Every tensor of a model's graphs, whatever its type, in one order."""
    return [tensor for _, tensor in named_tensors(graphs(model.graph))]


def files_of(model: onnx.ModelProto, path: Path) -> tuple[TensorRef, ...]:
    """The graph's file and those that its tensors lie in, for a plan: each as so many bytes. Raises as `external`."""
    outside = {found.location for tensor in all_tensors(model) if (found := external(tensor, path)) is not None}
    return tuple(
        TensorRef(CheckpointRef(str(file)), TensorSpec(file.name, DType.U8, (file.stat().st_size,)))
        for file in (path, *(path.parent / location for location in sorted(outside)))
    )


def count_nodes(model: onnx.ModelProto) -> int:
    """Nodes of the main graph; a Constant node is none, but a way to write a value down."""
    return sum(node.op_type != "Constant" for node in model.graph.node)


def constant_of(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """What a Constant node holds, as a tensor; None for other nodes."""
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
}  # Constant's attributes beside `value`, and what each means in numpy
