"""The tensors in a graph that may be weights: where each is stored, which nodes use it, and what metadata says of it.

torch's exporter notes in the metadata which module a node comes from, and its optimiser notes which values were folded
into one. This module knows no checkpoint.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from formats.errors import Quantised
from formats.spec import DType
from surgery.onnx.files.graph_file import External, external, graphs, named_tensors, nbytes

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
)  # ops, and which of their inputs are cosines and sines of positions
_TABLE = 1024  # elements; more in bytes or half bytes are quantised weights, not a table of the program


@dataclass(frozen=True)
class Slot:
    """A float tensor of a graph, with at least one axis.

    Attributes:
        index: its index in `all_tensors`; names may repeat in subgraphs.
        name: name of the value.
        dtype: dtype of the elements.
        shape: its shape.
        tensor: the TensorProto, to be filled if the bytes are inside the graph.
        outside: the place of the bytes if they are outside the graph.
        uses: how often it is an input of a node or an output of the graph.
        is_table: whether all uses are cosines or sines of positions, which are never weights.
        modules: dotted path of the module of every node that uses it; empty if the exporter did not note it.
        made_of: names of the values that the optimiser folded it from.
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
    """Every float tensor with axes, subgraphs' and Constant nodes' included, in the order of the file.

    Raises:
        Quantised: a graph that computes with quantised weights.
        UnsafeFile, PathNotFound, CorruptFile: weights outside the graph's folder, missing, or of the wrong size.
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
    for index, (name, tensor) in enumerate(named_tensors(every)):
        outside = external(tensor, where)
        if tensor.dims and tensor.data_type in kinds:
            dtype, shape = kinds[tensor.data_type], tuple(tensor.dims)
            takes = takers.get(name, [])
            is_table = bool(takes) and all(place in _ANGLES for place in takes)
            noted = (tuple(modules.get(name, ())), made_of.get(name, ()))
            slots.append(Slot(index, name, dtype, shape, tensor, outside, len(takes), is_table, *noted))
    return tuple(slots)


def _noted(
    every: list[onnx.GraphProto],
) -> tuple[Mapping[str, list[tuple[str, int]]], Mapping[str, list[str]], dict[str, tuple[str, ...]]]:
    """For each value: the ops that use it and at which input, their modules, and the names it was folded from."""
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
    """The names in a list as Python prints it; empty if it is not such a list."""
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
    for name, tensor in named_tensors(every):
        label = onnx.TensorProto.DataType.Name(tensor.data_type)
        narrow = tensor.data_type in small or any(part in label for part in ("INT4", "INT2", "FLOAT4", "FLOAT8"))
        if narrow and tensor.dims and nbytes(tensor) > _TABLE:
            found.append(f"{name} {label.lower()}")
    if found:
        raise Quantised(
            "the graph's weights are quantised, and merged values cannot replace them",
            where=where,
            expected="weights in floating point",
            found=", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else ""),
            then="use the graph from before quantisation, and quantise the result again",
        )
