"""Turns a bfloat16 graph into one that computes in float32 with the same weights, which ONNX Runtime's CPU can run.

Every weight gets a Cast after it; constants, types of values and casts to bfloat16 become float32. So the graph is
compared node for node, with rounded weights but without rounding between nodes. This module knows neither the model nor
the payload.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.onnx.files.graph_file import graphs

if TYPE_CHECKING:
    import onnx

_NARROW, _WIDE, _EXTERNAL = 16, 1, 1  # TensorProto's BFLOAT16 and FLOAT, and the data_location EXTERNAL
_TYPES = ("to", "dtype")  # attributes that name a type


def widened(graph: bytes) -> bytes:
    """The graph with all bfloat16, except the weights, changed to float32."""
    import onnx

    model = onnx.load_model_from_string(graph)
    for each in graphs(model.graph):
        _widen(each)
    data: bytes = model.SerializeToString()
    return data


def _widen(graph: onnx.GraphProto) -> None:
    import onnx

    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == _NARROW:
            value.type.tensor_type.elem_type = _WIDE
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in _TYPES and attribute.i == _NARROW:
                attribute.i = _WIDE
            if attribute.HasField("t"):
                _widen_constant(attribute.t)
    casts = []
    for tensor in graph.initializer:
        if tensor.data_location != _EXTERNAL:
            _widen_constant(tensor)
        elif tensor.data_type == _NARROW:
            name, tensor.name = tensor.name, f"{tensor.name}/stored"
            casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], f"{name}/Cast", to=_WIDE))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _widen_constant(tensor: onnx.TensorProto) -> None:
    import onnx

    if tensor.data_type == _NARROW:
        values = onnx.numpy_helper.to_array(tensor).astype("float32")
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
