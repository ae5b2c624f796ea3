"""The tensors in a graph that may be weights: where each is stored, what uses it, and its origin in the metadata.

torch's exporter records in the metadata which module a node comes from, and its optimiser records from which values a
folded value was computed. This module knows no checkpoint.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from formats.errors import Quantised
from formats.spec import DType
from surgery.onnx.files.graph_file import External, external, graphs, nbytes

if TYPE_CHECKING:
    import onnx

_SCOPES = "pkg.torch.onnx.name_scopes"
_FOLDED = "pkg.onnxscript.optimizer.folded_from"
_QUANTISED = frozenset(
    {
        "ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul",
        "GatherBlockQuantized", "MatMulBnb4", "MatMulFpQ4", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits",
        "QAttention", "QEmbedLayerNormalization", "QGemm", "QMoE", "QuantizeLinear",
    }
)  # fmt: skip
_ANGLES = (
    ("::RotaryEmbedding", 1),
    ("::RotaryEmbedding", 2),
    ("com.microsoft::RotaryEmbedding", 2),
    ("com.microsoft::RotaryEmbedding", 3),
    ("com.microsoft::GroupQueryAttention", 7),
    ("com.microsoft::GroupQueryAttention", 8),
)  # ops, and the inputs that take cosines and sines of positions
_TABLE = 1024  # bytes; larger 8-bit or 4-bit tensors are quantised weights, not tables of the program


@dataclass(frozen=True)
class Slot:
    """A float tensor of a graph with at least one axis.

    Attributes:
        index: its index in `all_tensors`, because names may repeat in subgraphs.
        name: the value's name.
        dtype: dtype of the elements.
        shape: its shape.
        tensor: the TensorProto, which holds the data if it is inside the graph.
        outside: where the external data is; None if the data is inside the graph.
        uses: how often it is a node's input or the graph's output.
        is_table: whether all uses take cosines or sines of positions, which are never weights.
        modules: dotted path of the module of every node that uses it; empty if the exporter did not record it.
        made_of: names of the values from which the optimiser folded it.
    """

    index: int
    name: str
    dtype: DType
    shape: tuple[int, ...]
    tensor: onnx.TensorProto = field(repr=False)
    outside: External | None
    uses: int
    is_table: bool
    modules: tuple[str, ...]
    made_of: tuple[str, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return nbytes(self.tensor) // self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join(map(str, self.shape))}]"


def find_slots(model: onnx.ModelProto, where: Path) -> tuple[Slot, ...]:
    """Every float tensor with axes, including those in subgraphs and Constant nodes, in the order of the file.

    Raises:
        Quantised: the graph computes with quantised weights.
        UnsafeFile, PathNotFound, CorruptFile: weights are outside the graph's folder, missing, or of another size.
    """
    import onnx

    kinds = {
        onnx.TensorProto.FLOAT: DType.F32,
        onnx.TensorProto.FLOAT16: DType.F16,
        onnx.TensorProto.BFLOAT16: DType.BF16,
        onnx.TensorProto.DOUBLE: DType.F64,
    }
    every = list(graphs(model.graph))
    _refuse_quantised(model, every, where)
    takers, modules, made_of = _noted(every)
    slots = []
    for index, (name, tensor) in enumerate(_tensors(every)):
        outside = external(tensor, where)
        if tensor.dims and tensor.data_type in kinds:
            dtype, shape = kinds[tensor.data_type], tuple(tensor.dims)
            takes = takers.get(name, [])
            is_table = bool(takes) and all(place in _ANGLES for place in takes)
            noted = (tuple(modules.get(name, ())), made_of.get(name, ()))
            slots.append(Slot(index, name, dtype, shape, tensor, outside, len(takes), is_table, *noted))
    return tuple(slots)


def all_tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Every tensor of a model's graphs, of any type, in a fixed order."""
    return [tensor for _, tensor in _tensors(list(graphs(model.graph)))]


def _tensors(every: list[onnx.GraphProto]) -> list[tuple[str, onnx.TensorProto]]:
    found = []
    for graph in every:
        found += [(tensor.name, tensor) for tensor in graph.initializer]
        for node in graph.node:
            if node.op_type == "Constant":
                found += [(node.output[0], a.t) for a in node.attribute if a.name == "value"]
    return found


def _noted(
    every: list[onnx.GraphProto],
) -> tuple[Mapping[str, list[tuple[str, int]]], Mapping[str, list[str]], dict[str, tuple[str, ...]]]:
    """For each value: the ops and inputs that take it, the modules of these ops, and what it was folded from."""
    takers: dict[str, list[tuple[str, int]]] = {}
    modules: dict[str, list[str]] = {}
    made_of: dict[str, tuple[str, ...]] = {}
    for graph in every:
        for node in graph.node:
            scope = _scope(_metadata(node).get(_SCOPES, ""))
            for place, name in enumerate(node.input):
                takers.setdefault(name, []).append((f"{node.domain}::{node.op_type}", place))
                modules.setdefault(name, []).append(scope)
        for value in graph.output:
            takers.setdefault(value.name, []).append(("", 0))
        for each in (*graph.value_info, *graph.initializer):
            names = _names(_metadata(each).get(_FOLDED, ""))
            if names:
                made_of[each.name] = names
    return takers, modules, made_of


def _metadata(proto: onnx.NodeProto | onnx.ValueInfoProto | onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in proto.metadata_props}


def _names(text: str) -> tuple[str, ...]:
    """A list of names in Python's notation; empty if the text is not one."""
    try:
        said = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return ()
    return tuple(map(str, said)) if isinstance(said, (list, tuple, set)) else ()


def _scope(text: str) -> str:
    """The innermost module of a node's scopes; the last of them is the op."""
    names = _names(text)
    return names[-2] if len(names) > 1 else ""


def _refuse_quantised(model: onnx.ModelProto, every: list[onnx.GraphProto], where: Path) -> None:
    import onnx

    small = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    found = [
        f"{node.op_type} ({node.name})"
        for nodes in (*(graph.node for graph in every), *(function.node for function in model.functions))
        for node in nodes
        if node.op_type in _QUANTISED or node.op_type.startswith("QLinear")
    ]
    for name, tensor in _tensors(every):
        label = onnx.TensorProto.DataType.Name(tensor.data_type)
        narrow = tensor.data_type in small or any(part in label for part in ("INT4", "INT2", "FLOAT4", "FLOAT8"))
        if narrow and tensor.dims and nbytes(tensor) > _TABLE:
            found.append(f"{name} {label.lower()}")
    if found:
        raise Quantised(
            "the graph's weights are quantised, so merged values cannot replace them",
            where=where,
            expected="floating-point weights",
            found=", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else ""),
            then="use the graph from before quantisation, and quantise the result again",
        )
