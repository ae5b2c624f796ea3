"""What a graph costs at one shape of its inputs: floating-point operations, and bytes read and written, node by node.

Counted from shapes, which ONNX's own inference follows through the graph; no payload is read and nothing runs. A
product counts two operations for each multiplication. Every other op that computes counts one for each element of its
largest operand, a convention: what it really takes depends on the kernel. Ops that only move or rename elements count
none. Bytes are those of a node's inputs and outputs, as if no cache held any of them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from surgery.onnx.graph_file import constant_of

if TYPE_CHECKING:
    import onnx

Shape = tuple[int, ...]

_VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size"})
_MOVES = frozenset(
    {
        "Cast", "Compress", "Concat", "ConstantOfShape", "DepthToSpace", "Expand", "EyeLike", "Gather",
        "GatherElements", "GatherND", "OneHot", "Pad", "Range", "Resize", "ScatterElements", "ScatterND", "Slice",
        "SpaceToDepth", "Split", "Tile", "Transpose", "Trilu",
    }
)  # fmt: skip
# Ops whose cost their operands' shapes do not tell, or not by these rules.
_OPAQUE = frozenset(
    {
        "ConvInteger", "DeformConv", "Det", "DFT", "Einsum", "GRU", "If", "Loop", "LSTM", "MatMulInteger",
        "QLinearConv", "QLinearMatMul", "RNN", "Scan", "SequenceMap", "STFT",
    }
)  # fmt: skip
# Of com.microsoft's ops those that the rule for everything else fits.
_SIMPLE = frozenset(
    {
        "BiasGelu", "FastGelu", "Gelu", "QuickGelu", "RotaryEmbedding", "SimplifiedLayerNormalization",
        "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Tally:
    """Of all nodes of one op: how many, their floating-point operations, and the bytes they move."""

    nodes: int
    flops: int
    nbytes: int


@dataclass(frozen=True)
class Cost:
    """Of a graph: in all, by op, and the nodes that could not be counted."""

    flops: int
    nbytes: int
    by_op: Mapping[str, Tally]
    uncounted: tuple[str, ...]


def cost(model: onnx.ModelProto, shape: tuple[int, int]) -> Cost:
    """Counts a graph.

    Args:
        model: as `load_graph` gives it.
        shape: batch, the first axis of every input that is free there; and sequence, every other free axis.
    """
    import onnx

    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    sizes = _shapes(model, shape)
    by_op: dict[str, Tally] = {}
    uncounted = []
    for node in model.graph.node:
        if constant_of(node) is not None:
            continue
        op = node.op_type
        inputs = [sizes.get(name) for name in node.input if name]
        outputs = [sizes.get(name) for name in node.output if name]
        known = [each for each in (*inputs, *outputs) if each is not None]
        count = _rule(node)
        if count is None or len(known) < len(inputs) + len(outputs):
            uncounted.append(f"{op} ({node.name})" if node.name else op)
            continue
        flops = count(node, [s.shape for s in known[: len(inputs)]], [s.shape for s in known[len(inputs) :]])
        moved = _moved(op, known[: len(inputs)], known[len(inputs) :])
        past = by_op.get(op, Tally(0, 0, 0))
        by_op[op] = Tally(past.nodes + 1, past.flops + flops, past.nbytes + moved)
    flops, nbytes = (sum(getattr(each, name) for each in by_op.values()) for name in ("flops", "nbytes"))
    return Cost(flops, nbytes, dict(sorted(by_op.items())), tuple(sorted(uncounted)))


@dataclass(frozen=True)
class _Sized:
    shape: Shape
    itemsize: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


def _shapes(model: onnx.ModelProto, shape: tuple[int, int]) -> dict[str, _Sized]:
    """Every value whose shape is known once the inputs' are."""
    bare = _without_payload(model)
    named: dict[str, int] = {}
    for value in bare.graph.input:
        for place, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value"):
                size = shape[min(place, 1)]
                if dim.dim_param:
                    size = named.setdefault(dim.dim_param, size)
                dim.dim_value = size
    for value in (*bare.graph.value_info, *bare.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in named:
                dim.dim_value = named[dim.dim_param]
            elif dim.dim_param:
                dim.Clear()
    full = _inferred(bare).graph
    sizes = {}
    for value in (*full.input, *full.value_info, *full.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            sizes[value.name] = _Sized(tuple(dim.dim_value for dim in tensor.shape.dim), _itemsize(tensor.elem_type))
    held = [(tensor.name, tensor) for tensor in bare.graph.initializer]
    held += [(node.output[0], tensor) for node in bare.graph.node if (tensor := constant_of(node)) is not None]
    for name, tensor in held:
        sizes[name] = _Sized(tuple(tensor.dims), _itemsize(tensor.data_type))
    return sizes


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with all shapes that can be told. What exporters declare may contradict what follows from the ops:
    then it is believed only of ops whose inference ONNX does not know, or not at all."""
    import onnx

    foreign = {name for node in model.graph.node if node.domain not in ("", "ai.onnx") for name in node.output}
    for believed in (None, foreign, set[str]()):
        declared = [value for value in model.graph.value_info if believed is None or value.name in believed]
        del model.graph.value_info[:]
        model.graph.value_info.extend(declared)
        with contextlib.suppress(onnx.shape_inference.InferenceError):
            return onnx.shape_inference.infer_shapes(model, data_prop=True)
    return model


def _without_payload(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with shapes and constants but without large tensors, which inference does not look at."""
    import onnx

    bare = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    bare.graph.name = model.graph.name
    for field in ("node", "input", "output", "value_info"):
        getattr(bare.graph, field).extend(getattr(model.graph, field))
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) < 1024 and tensor.data_location != onnx.TensorProto.EXTERNAL:
            bare.graph.initializer.append(tensor)
        else:
            bare.graph.initializer.add(
                name=tensor.name,
                dims=tensor.dims,
                data_type=tensor.data_type,
                data_location=onnx.TensorProto.EXTERNAL,
            )
    return bare


def _itemsize(kind: int) -> int:
    import onnx

    return 1 if kind in (0, onnx.TensorProto.STRING) else int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)


def _moved(op: str, inputs: Sequence[_Sized], outputs: Sequence[_Sized]) -> int:
    if op in _VIEWS:
        return 0
    written = sum(each.nbytes for each in outputs)
    if op in ("Gather", "GatherElements", "GatherND", "Slice"):  # of the first input, only what is taken
        return 2 * written + sum(each.nbytes for each in inputs[1:])
    return written + sum(each.nbytes for each in inputs)


_Rule = Callable[["onnx.NodeProto", Sequence[Shape], Sequence[Shape]], int]


def _rule(node: onnx.NodeProto) -> _Rule | None:
    """What counts a node's operations; None where nothing here does."""
    if node.op_type in _PRODUCTS:
        return _PRODUCTS[node.op_type]
    if node.op_type in _VIEWS or node.op_type in _MOVES:
        return _nothing
    if node.domain in ("", "ai.onnx"):
        return None if node.op_type in _OPAQUE else _elementwise
    return _elementwise if node.op_type in _SIMPLE else None


def _nothing(node: onnx.NodeProto, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    return 0


def _elementwise(node: onnx.NodeProto, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    return max(map(math.prod, (*inputs, *outputs)), default=0)


def _matmul(node: onnx.NodeProto, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    inner = inputs[0][-2] if _flag(node, "transA") and len(inputs[0]) > 1 else inputs[0][-1]
    return 2 * math.prod(outputs[0]) * inner


def _gemm(node: onnx.NodeProto, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    bias = math.prod(outputs[0]) if len(inputs) > 2 else 0
    return _matmul(node, inputs, outputs) + bias


def _conv(node: onnx.NodeProto, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    weight = inputs[1]  # (out, in / groups, *kernel)
    bias = math.prod(outputs[0]) if len(inputs) > 2 else 0
    return 2 * math.prod(outputs[0]) * math.prod(weight[1:]) + bias


def _conv_transpose(node: onnx.NodeProto, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    weight = inputs[1]  # (in, out / groups, *kernel)
    bias = math.prod(outputs[0]) if len(inputs) > 2 else 0
    return 2 * math.prod(inputs[0]) * math.prod(weight[1:]) + bias


def _attention(node: onnx.NodeProto, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    """Scores and their product with the values, of (batch, …, length, width) queries, keys and values."""
    query, key, value = inputs[:3]
    scores = math.prod(query) * key[-2]
    return 2 * scores + 2 * scores // query[-1] * value[-1]


def _flag(node: onnx.NodeProto, name: str) -> bool:
    return any(attribute.name == name and attribute.i for attribute in node.attribute)


_PRODUCTS: Mapping[str, _Rule] = MappingProxyType(
    {
        "MatMul": _matmul,
        "FusedMatMul": _matmul,
        "Gemm": _gemm,
        "Conv": _conv,
        "FusedConv": _conv,
        "ConvTranspose": _conv_transpose,
        "Attention": _attention,
        "MultiHeadAttention": _attention,
    }
)
